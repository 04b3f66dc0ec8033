"""Support for tests of models that are spread over devices: a second one, which is the processor's memory.

Tensors there answer `device` with SECOND; so do views and copies of them, and what a factory is told to make
there. Everything that asks in Python takes it for another device: the kernels refuse lists on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)
_ON_THE_PROCESSOR = (torch.Tensor.cpu, torch.Tensor.numpy)
_COPIES = (torch.clone, torch.Tensor.clone, torch.empty_like, torch.zeros_like)


class _Factories(TorchFunctionMode):
    """Has what is made with device=SECOND, or moved to it, there; only cpu() brings it to NumPy."""

    def __init__(self, devices: TwoDevices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and SECOND in (*args[1:], kwargs.get("device")):
            result = args[0].clone()
            self._devices.place(result)
            return result
        if func in _ON_THE_PROCESSOR and args[0].device == SECOND:
            if func is torch.Tensor.numpy:
                raise TypeError("a tensor of another device has no numpy(); copy it by cpu() first")
            return args[0].clone()
        result = func(*args, **kwargs)
        if kwargs.get("device") == SECOND or (func in _COPIES and args[0].device == SECOND):
            self._devices.place(result)
        return result


class TwoDevices:
    """Which memory is the second device's."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used again

    def place(self, *tensors: Tensor) -> None:
        """Have tensors on the second device, where they are."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._memory[storage.data_ptr()] = storage

    def place_module(self, module: nn.Module) -> None:
        """Have a module's parameters on the second device, in memory of their own."""
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
            self.place(parameter.data)

    def device_of(self, tensor: Tensor) -> torch.device:
        """SECOND or FIRST."""
        return SECOND if tensor.untyped_storage().data_ptr() in self._memory else FIRST


@contextmanager
def two_devices() -> Iterator[TwoDevices]:
    """A second device within a block."""
    devices = TwoDevices()
    with pytest.MonkeyPatch.context() as patch, _Factories(devices):
        patch.setattr(torch.Tensor, "device", property(devices.device_of), raising=False)
        yield devices
