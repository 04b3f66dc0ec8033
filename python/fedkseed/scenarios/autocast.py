"""Forward passes in bfloat16 where the processor multiplies matrices of it: AMX."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import torch

_CPU_FLAGS = Path("/proc/cpuinfo")


def has_amx() -> bool:
    """Whether this machine's processor has AMX for bfloat16."""
    try:
        return "amx_bf16" in _CPU_FLAGS.read_text("utf-8", errors="replace").split()
    except OSError:
        return False


def resolved_autocast(choice: Literal["auto", "off", "bfloat16"]) -> Literal["off", "bfloat16"]:
    """What "auto" means on this machine."""
    if choice == "auto":
        return "bfloat16" if has_amx() else "off"
    return choice


def forward_passes(autocast: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context for forward passes: under autocast to bfloat16, or as the weights are."""
    if autocast == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
