"""Models that a name stands for, made of pinned archives of the package index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedkseed.data.minilm import minilm_folder
from fedkseed.data.models import smollm2_folder

SMOLLM2, MINILM = "smollm2", "minilm"
_FOLDERS: Mapping[str, Callable[[], Path]] = {SMOLLM2: smollm2_folder, MINILM: minilm_folder}
_TITLES: Mapping[str, str] = {SMOLLM2: "SmolLM2-135M-Instruct", MINILM: "all-MiniLM-L6-v2"}
#: Where their makers publish them, and under which licence: what is converted here are other files.
_PUBLISHED: Mapping[str, tuple[str, str]] = {
    SMOLLM2: ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    MINILM: ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
}
#: What --model takes beside folders and hub ids.
BUILT_IN_MODELS = tuple(_FOLDERS)
#: The model of a run that names none.
DEFAULT_MODEL = SMOLLM2


def model_title(named: str) -> str:
    """What a model is called in texts and results: of a built-in one, or of "", its makers' name.

    Args:
        named: as `model_source` takes it.
    """
    return _TITLES.get(named or DEFAULT_MODEL, named)


def published_as(name: str) -> tuple[str, str]:
    """Hub id and licence under which a built-in model's makers publish it."""
    return _PUBLISHED[name]


def model_source(named: str | Path) -> str | Path:
    """Folder or hub id of a model: of a built-in one the folder in the cache, else what was named.

    A folder that is called as a built-in model is named by its path: ./minilm, say.

    Args:
        named: built-in name, folder or hub id; "" for `DEFAULT_MODEL`.

    Raises:
        FetchError, ModelError, MissingExtraError: a built-in model cannot be had.
    """
    folder = _FOLDERS.get(named or DEFAULT_MODEL) if isinstance(named, str) else None
    return named if folder is None else folder()
