"""What tells machine code and a GPU from any other: a self-test that passed is remembered by it.

The build id of a library, the linker's digest of what it linked, is read where the library is mapped: by now
the file at its path may be another one.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

# Linkers put the notes of a library into its first page. A note has the sizes of its name and description,
# its kind, here NT_GNU_BUILD_ID, and then both.
_PAGE, _NOTE = 4096, b"\x03\0\0\0GNU\0"


class _DlInfo(ctypes.Structure):
    """Dl_info, which dladdr fills."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    )


def library_identity(function: Any, path: Path) -> str | None:
    """Build id, size and time of the library to which a function belongs; None if it has no build id."""
    found = build_id(function)
    try:
        file = os.stat(path)
    except OSError:
        return None
    return found and f"{path.name} {found} {file.st_size} {file.st_mtime_ns}"


def gpu_identity(device: torch.device) -> str:
    """Name and driver of a GPU."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as file:
            driver = file.readline().strip()
    except OSError:
        driver = "driver unknown"
    return f"{torch.cuda.get_device_name(device)}; {driver}; {torch.version.cuda or torch.version.hip}"


def build_id(function: Any) -> str | None:
    """The build id of the library that a function belongs to, in hexadecimal; None if none is found."""
    # Python's own handle finds the names of all that the process was linked with, libc's among them.
    dladdr = getattr(ctypes.pythonapi, "dladdr", None)
    info = _DlInfo()
    if dladdr is None or not dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info)):
        return None
    head = ctypes.string_at(info.base, _PAGE)
    at = head.find(_NOTE)
    if not head.startswith(b"\x7fELF") or at < 0:
        return None
    size = int.from_bytes(head[at - 4 : at], "little")
    return head[at + len(_NOTE) : at + len(_NOTE) + size].hex() or None
