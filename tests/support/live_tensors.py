"""Support for tests of memory: how many bytes tensors that an operator returned take at once, at most."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """Counts the memory of tensors made within the block, views once.

    Attributes:
        peak: bytes that stood at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._holders: Counter[int] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {id(value) for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)}
        before = {
            value.untyped_storage().data_ptr()
            for value in tree_iter((args, kwargs))
            if isinstance(value, torch.Tensor)
        }
        for value in tree_iter(results):
            if isinstance(value, torch.Tensor) and id(value) not in given:
                self._note(value, before)
        self.peak = max(self.peak, self._now)
        return results

    def _note(self, tensor: torch.Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not self._holders[address]:
            if address in before:
                return  # a view of what was there before the block
            self._now += size
        self._holders[address] += 1
        weakref.finalize(tensor, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self._now -= size
