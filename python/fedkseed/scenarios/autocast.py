"""Forward passes in bfloat16 where the processor multiplies matrices of it: AMX."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import torch

Autocast = Literal["auto", "off", "bfloat16"]

_CPU_FLAGS = Path("/proc/cpuinfo")


def has_amx() -> bool:
    """Whether this machine's processor has AMX for bfloat16."""
    try:
        return "amx_bf16" in _CPU_FLAGS.read_text("utf-8", errors="replace").split()
    except OSError:
        return False


def resolved_autocast(choice: Autocast, device: str) -> Autocast:
    """What "auto" means on this machine, for a run on the device that this text names: never "auto".

    A GPU computes as the weights are.
    """
    if choice != "auto":
        return choice
    is_on_processor = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return "bfloat16" if is_on_processor and has_amx() else "off"


def forward_passes(autocast: Autocast, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context for forward passes: under autocast to bfloat16, or as the weights are."""
    if autocast == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
