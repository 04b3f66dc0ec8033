"""Buffers of 16 bits, widened while a forward pass runs with widened weights."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor, nn

from fedkseed.storage.interface import SIXTEEN_BIT

_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)


class WidenedBuffers:
    """Running statistics, tables and constants of a model, in the dtype to which its weights are widened.

    Layers refuse to mix them: batch norm takes statistics of its weight's dtype alone. The buffers stay the
    tensors that they are, and get other memory for a time. A module that holds weights of 8 bits or packed
    ones, a quantised layer, is left alone: its kernels read scales in the dtype in which they are stored.

    Args:
        model: whose modules' buffers they are.
        dtype: of the widened weights; None if none is, and there is nothing to do.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._owners = [] if dtype is None else [module for module in model.modules() if _is_plain(module)]
        self._stored: list[tuple[Tensor, Tensor]] = []
        #: Where they are, and the dtype in which they are stored.
        self._places: list[tuple[MutableMapping[str, Tensor | None], str, Tensor, torch.dtype]] = []

    def widen(self) -> None:
        """Gives the buffers of 16 bits widened values."""
        if self._dtype is None:
            return
        for owner in self._owners:
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.dtype in SIXTEEN_BIT:
                    self._places.append((owner._buffers, name, buffer, buffer.dtype))
        for _, _, buffer, _ in self._places:
            if buffer.dtype in SIXTEEN_BIT:  # one that two modules share is wide the second time
                self._stored.append((buffer, buffer.data))
                buffer.data = buffer.data.to(self._dtype)

    def put_back(self) -> None:
        """Gives them their memory back, with the values that they hold by now, rounded to nearest.

        What a module holds in place of one of them by now is rounded likewise.
        """
        while self._places:
            registry, name, buffer, dtype = self._places.pop()
            now = registry.get(name)
            if now is not None and now is not buffer and now.dtype == self._dtype:
                registry[name] = now.to(dtype)
        while self._stored:
            buffer, stored = self._stored.pop()
            wide, buffer.data = buffer.data, stored
            if not torch.equal(wide, stored.to(wide.dtype)):
                stored.copy_(wide)


def _is_plain(module: nn.Module) -> bool:
    tensors: Sequence[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(module._buffers) and not any(_is_packed(tensor) for tensor in tensors)


def _is_packed(tensor: Tensor) -> bool:
    return tensor.dtype in _PACKED or (tensor.is_floating_point() and tensor.itemsize == 1)
