"""How much memory is free: on a GPU as torch reports, else as Linux and its control groups do."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")

#: For each version of control groups: where their memory is kept, the limit, the use, and in the statistics
#: the field of files' pages that would be given back.
_VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still take on a device; None if the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    found = [size for size in (_available(), *_left_in_groups()) if size is not None]
    return min(found, default=None)


def _available() -> int | None:
    """MemAvailable of the whole machine."""
    for line in _lines(_MEMINFO):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _left_in_groups() -> list[int]:
    """What is left of the limits of this process's control groups, outer ones included."""
    left = []
    for line in _lines(_OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, limit, use, given_back = _VERSIONS[bool(controllers)]
        group = _GROUPS / root / path.strip("/")
        for folder in (group, *group.parents):
            bounds = [_number(folder / name) for name in (limit, use)]
            if None not in bounds:
                highest, used = bounds
                left.append(max(0, int(highest or 0) - int(used or 0) + _statistic(folder, given_back)))
            if folder == _GROUPS / root:
                break
    return left


def _statistic(folder: Path, name: str) -> int:
    fields = dict(line.split() for line in _lines(folder / "memory.stat") if len(line.split()) == 2)
    return int(fields.get(name, 0))


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file, or no limit ("max")."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
