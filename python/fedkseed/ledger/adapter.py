"""The adapter of a LoRA ledger as files: how the matrices lie in the model, and where they began.

`CONFIG` holds those of peft's settings that say what the model computes; `START`, only where no seed makes
the start (`fedkseed.ledger.adapter_start`), the numbers that the matrices began with: random ones, none of
the tuning and none of the base.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedkseed._extras import require_extra
from fedkseed.documents import DocumentError, parse_json, shown
from fedkseed.files import FileTooLargeError, read_bounded
from fedkseed.ledger.adapter_start import MARK, start_adapter
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.origin import AdapterStart, OriginError
from fedkseed.model.identity import IdentityError, structure_hash
from fedkseed.model.manifest import ModelParameters

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, START = "adapter/adapter_config.json", "adapter/adapter_start.safetensors"
MAX_CONFIG_BYTES = 1 << 18
#: Name of a ledger's note that holds `config_digest`: so a signature is of the settings, too.
NOTE = "adapter"
_NAME = "default"
_LORA = "LORA"
#: Of names of modules: peft takes them for patterns, and a hostile pattern takes for ever.
_MODULE = re.compile(r"[\w.-]{1,300}", re.ASCII)
_ALL_LINEAR = "all-linear"
_TASK = re.compile(r"[A-Z_]{1,40}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_module(value: object) -> bool:
    return isinstance(value, str) and _MODULE.fullmatch(value) is not None


def _is_list(value: object, check: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_pattern(value: object) -> bool:
    return isinstance(value, dict) and all(
        _is_module(name) and _is_number(entry) for name, entry in value.items()
    )


#: Settings of peft that a published adapter may have, and what they may be; None is left out.
_SETTINGS: Mapping[str, Callable[[object], bool]] = {
    "r": lambda value: _is_count(value) and value != 0,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,  # type: ignore[operator]
    "use_rslora": lambda value: isinstance(value, bool),
    "fan_in_fan_out": lambda value: isinstance(value, bool),
    "target_modules": lambda value: value == _ALL_LINEAR or _is_list(value, _is_module),
    "exclude_modules": lambda value: _is_list(value, _is_module),
    "layers_to_transform": lambda value: _is_count(value) or _is_list(value, _is_count),
    "layers_pattern": lambda value: _is_module(value) or _is_list(value, _is_module),
    "rank_pattern": _is_pattern,
    "alpha_pattern": _is_pattern,
    "task_type": lambda value: isinstance(value, str) and _TASK.fullmatch(value) is not None,
}
#: Settings that do not say what the model computes once its matrices are known, or name where it came from.
_LEFT_OUT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
}


def write_adapter(model: nn.Module, start: AdapterStart, folder: Path) -> None:
    """Writes `CONFIG`, and `START` where no seed makes it, into a folder.

    Args:
        model: a PeftModel with one LoRA adapter, named default. Where the start is stored it holds w0.
        start: of it.

    Raises:
        OriginError: another model, or settings that a published adapter may not have; names one.
        MissingExtraError: peft or safetensors is not installed.
        OSError: the folder cannot be written.
    """
    settings = _settings_of(model)
    text = json.dumps({"peft_type": _LORA, **settings}, indent=2) + "\n"
    (folder / CONFIG).parent.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(text, "utf-8")
    read_config(folder)  # what cannot be read again is not written
    if start.seed is None:
        require_extra("hf", "safetensors")
        from safetensors.torch import save_file

        save_file({name: weight.detach().cpu() for name, weight in _matrices(model)}, folder / START)


def config_digest(folder: Path) -> str:
    """32 hex digits of the SHA-256 of `CONFIG`, short enough for a ledger's note.

    Raises:
        OriginError: the file cannot be read.
    """
    return hashlib.sha256(_config_bytes(folder / CONFIG)).hexdigest()[:32]


def read_config(folder: Path) -> LoraConfig:
    """The settings in `CONFIG`, for peft.

    Raises:
        OriginError: the file is not there, damaged, or has other settings than a published adapter may have.
        MissingExtraError: peft is not installed.
    """
    require_extra("scenarios", "peft")
    from peft import LoraConfig

    path = folder / CONFIG
    try:
        found = parse_json(_config_bytes(path), str(path), max_bytes=MAX_CONFIG_BYTES)
    except DocumentError as error:
        raise OriginError(f"expected the settings of an adapter in {path}, got: {error}") from error
    if not isinstance(found, dict) or found.pop("peft_type", None) != _LORA:
        raise OriginError(f"expected the settings of a LoRA adapter in {path}, got others")
    for name, value in found.items():
        if name not in _SETTINGS or not _SETTINGS[name](value):
            raise OriginError(
                f"expected settings that a published adapter may have in {path}, got {shown(name)} = "
                f"{shown(value)}"
            )
    try:
        return LoraConfig(**found)
    except (TypeError, ValueError) as error:
        raise OriginError(f"expected settings that peft takes in {path}, got: {shown(error)}") from error


def add_adapter(base: nn.Module, folder: Path, start: AdapterStart, ledger: Ledger) -> nn.Module:
    """The base with the adapter of a published folder, at its start: a PeftModel.

    The matrices are made when names and shapes are known to be those of the ledger, so that no settings can
    ask for more memory than the ledger's model has.

    Args:
        base: gets adapters, in place.
        folder: of `CONFIG` and `START`.
        start: of the matrices.
        ledger: that is to be applied.

    Raises:
        OriginError: files that are none of an adapter.
        IdentityError: settings that give other parameters than the ledger's.
        MissingExtraError: peft or safetensors is not installed.
    """
    config = read_config(folder)
    require_extra("scenarios", "peft")
    from peft import get_peft_model

    wanted = ledger.identity
    # Matrices in fp32 beside weights of 16 bits are peft's default, and make the ledger's weights "mixed".
    dtype = torch.float32 if wanted.dtype == "mixed" else getattr(torch, wanted.dtype)
    try:
        # low_cpu_mem_usage keeps peft from copying the matrices to the base's device.
        with torch.device("meta"):
            model: nn.Module = get_peft_model(
                base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OriginError(f"expected an adapter that fits the base, got: {shown(first)}") from error
    known = ModelParameters.of(model)
    frozen = frozenset(ledger.frozen)
    tuned = [index not in frozen for index in range(len(known.parameters))]
    if structure_hash(known.manifest, tuned) != wanted.structure:
        raise IdentityError(
            f"expected a model of structure {wanted.structure.hex()[:16]}, got another from the base with "
            f"the adapter of {folder / CONFIG}; use the base that the card names"
        )
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(weight.is_meta for weight in own):
            module.to(dtype).to_empty(device=torch.device("cpu"), recurse=False)
    if start.seed is not None:
        start_adapter(model, start.seed)
    else:
        _read_start(model, folder / START)
    return model.eval()


def has_adapter(model: nn.Module) -> bool:
    """Whether LoRA's matrices are in the model already."""
    return any(MARK in name for name, _ in model.named_parameters())


def _config_bytes(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_CONFIG_BYTES)
    except (OSError, FileTooLargeError) as error:
        raise OriginError(f"expected the settings of an adapter in {path}, got: {error}") from error


def _settings_of(model: nn.Module) -> dict[str, Any]:
    """The settings of a PeftModel's adapter that go into `CONFIG`."""
    require_extra("scenarios", "peft")
    from peft import LoraConfig, PeftModel

    configs = model.peft_config if isinstance(model, PeftModel) else {}
    config = configs.get(_NAME)
    if len(configs) != 1 or not isinstance(config, LoraConfig):
        raise OriginError(
            f"expected a PeftModel with one LoRA adapter named {_NAME}, got {type(model).__name__} with "
            f"{', '.join(configs) or 'none'}"
        )
    plain = LoraConfig()
    settings: dict[str, Any] = {}
    for entry in fields(LoraConfig):
        value = getattr(config, entry.name)
        if entry.name in _LEFT_OUT:
            continue
        if entry.name not in _SETTINGS:
            if value != getattr(plain, entry.name):
                raise OriginError(
                    f"expected an adapter of LoRA's usual settings, got {entry.name} = {shown(value)}, which "
                    "cannot be published"
                )
        elif value is not None:
            settings[entry.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
    if settings.get("task_type") is not None:
        settings["task_type"] = str(getattr(settings["task_type"], "value", settings["task_type"]))
    settings["target_modules"] = _targets(model)
    return settings


def _targets(model: Any) -> list[str]:
    """The modules with matrices: by the last parts of their names if these name no others, else in full."""
    targeted = set(model.base_model.targeted_module_names)
    lasts = {name.rpartition(".")[2] for name in targeted}
    named = {name for name, _ in model.base_model.model.named_modules() if name.rpartition(".")[2] in lasts}
    return sorted(lasts if named == targeted else targeted)


def _matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in ModelParameters.of(model).named if MARK in name]


@torch.no_grad()
def _read_start(model: nn.Module, path: Path) -> None:
    """Fills the matrices from `START`, whose names, shapes and dtypes have to be theirs."""
    require_extra("hf", "safetensors")
    from safetensors import SafetensorError, safe_open

    matrices = dict(_matrices(model))
    try:
        with safe_open(path, framework="pt") as stored:
            if set(stored.keys()) != set(matrices):
                raise OriginError(f"expected the adapter's matrices in {path}, got others")
            for name, weight in matrices.items():
                value = stored.get_tensor(name)
                if value.shape != weight.shape or value.dtype != weight.dtype:
                    raise OriginError(
                        f"expected {weight.dtype} of shape {tuple(weight.shape)} for {name} in {path}, got "
                        f"{value.dtype} of {tuple(value.shape)}"
                    )
                weight.copy_(value)
    except (OSError, SafetensorError) as error:
        raise OriginError(f"expected the adapter's start in {path}, got: {shown(error)}") from error
