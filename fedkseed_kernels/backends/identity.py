"""What tells machine code and a GPU from any other: a self-test that passed is remembered by it.

The build id of a library, the linker's digest of what it linked, is read where the library is mapped: by now
the file at its path may be another one.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Any

import torch

_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
# Bytes at the start of a library that hold its table of segments: linkers put it behind the header.
_HEAD = 1024
# Of an entry of that table: kind, address, size in memory, alignment.
_ENTRY = struct.Struct("<I12xQ16xQQ")
_NOTE = struct.Struct("<3I")  # sizes of name and description, kind
_PT_NOTE, _NT_GNU_BUILD_ID = 4, 3


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
    """The build id of the library that a function belongs to, in hexadecimal; None if it has none."""
    # Python's own handle finds the names of all that the process was linked with, libc's among them.
    dladdr = getattr(ctypes.pythonapi, "dladdr", None)
    info = _DlInfo()
    if dladdr is None or not dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info)):
        return None
    base: int = info.base
    head = ctypes.string_at(base, _HEAD)
    table, num_entries = int.from_bytes(head[32:40], "little"), int.from_bytes(head[56:58], "little")
    end = table + num_entries * _ENTRY.size
    if not head.startswith(_ELF64_LITTLE_ENDIAN) or end > _HEAD:
        return None
    for kind, address, size, alignment in _ENTRY.iter_unpack(head[table:end]):
        if kind == _PT_NOTE:
            notes = ctypes.string_at(base + address, size)
            if (found := _in_notes(notes, 8 if alignment == 8 else 4)) is not None:
                return found
    return None


def _in_notes(notes: bytes, alignment: int) -> str | None:
    """The build id in a segment of notes: each has a name and a description, padded to the alignment."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = _NOTE.unpack_from(notes, at)
        start = at + -(-(12 + name_size) // alignment) * alignment
        if kind == _NT_GNU_BUILD_ID and notes[at + 12 : at + 16] == b"GNU\0":
            return notes[start : start + size].hex()
        at = start + -(-size // alignment) * alignment
    return None
