"""A model's shapes without its weights: what memory and rows are planned by before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedkseed._extras import require_extra
from fedkseed.data.architectures import ModelError, choose_class
from fedkseed.data.models import (
    CLASSIFIERS,
    LANGUAGE_MODELS,
    find_model,
    is_local,
    loading,
    revision_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_shapes(
    path_or_id: str | Path,
    dtype: torch.dtype,
    *,
    is_classifier: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model on the meta device, by its config.json alone; see `fedkseed.data.models.load_causal_lm`.

    Raises:
        ModelError, MissingExtraError: as `load_causal_lm`.
    """
    source, local = find_model(path_or_id)
    families = CLASSIFIERS if is_classifier else LANGUAGE_MODELS
    with loading(path_or_id, local, families):
        model_class, config = choose_class(
            source, local, families, trust_remote_code, revision_of(path_or_id)
        )
        with torch.device("meta"):
            model: PreTrainedModel = model_class.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    evaluated: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
    return evaluated


def shapes_of_config(architecture: str, config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A model on the meta device, of a class of transformers and what its config is made of.

    Raises:
        ModelError: transformers has no such model, or it does not take the config.
        MissingExtraError: a package of the extra `hf` is not installed.
    """
    require_extra("hf", "transformers")
    import transformers

    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ModelError(f"expected a model class of transformers, got {architecture[:80]!r}")
    try:
        with torch.device("meta"):
            model: Any = found(found.config_class(**config))  # type: ignore[misc]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"expected a config that {architecture} takes, got: {error}") from error
    evaluated: PreTrainedModel = model.to(dtype).eval()
    return evaluated


def weight_file_bytes(path_or_id: str | Path) -> int:
    """Bytes of the weights' files in a folder; 0 of a hub id."""
    if not is_local(path_or_id):
        return 0
    folder = Path(path_or_id).expanduser()
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files)


def num_positions(model: PreTrainedModel) -> int | None:
    """How many tokens of a row the model has positions for; None if it does not say."""
    config: Any = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(found, int) or found < 1:
        return None
    for table in model.modules():
        # RoBERTa and its kin count positions from behind that of padding.
        if (
            isinstance(table, torch.nn.Embedding)
            and table is not model.get_input_embeddings()
            and table.num_embeddings == found
            and table.padding_idx is not None
        ):
            return found - table.padding_idx - 1
    return found
