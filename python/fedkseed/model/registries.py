"""What modules hold by name, asked alike whatever the module: parameters, buffers, modules."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any


class _Scripted(MutableMapping[str, Any]):
    """What a TorchScript module holds, through a wrapper that lacks half of what a dict has."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._held[name] = value

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held.keys())

    def __len__(self) -> int:
        return len(self._held)


def registry_of(held: Any) -> MutableMapping[str, Any]:
    """A module's ``_parameters``, ``_buffers`` or ``_modules`` as a dict, or like one."""
    return held if isinstance(held, dict) else _Scripted(held)
