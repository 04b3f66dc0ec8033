"""The most memory that a run had in use at any moment."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
#: Sets the kernel's peak of resident memory to what is resident now.
_RESET_PEAK = "5"


def reset_peaks(device: torch.device) -> None:
    """Lets both counters begin anew, as far as the system lets a process do so.

    What an earlier run of this process has freed goes back to the system first: the allocator keeps it, up to
    gigabytes, and it would count as this run's.

    Args:
        device: of the run.
    """
    with contextlib.suppress(OSError, AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, int | None]:
    """Bytes at most since `reset_peaks`, of this process alone: no workers.

    "process" is resident memory, None where the system does not count it; "device" is what torch had
    allocated on a GPU, None without one.
    """
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"process": _resident_peak(), "device": on_device}


def _resident_peak() -> int | None:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
