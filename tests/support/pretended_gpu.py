"""Support for tests of models on a GPU where there is none: the processor's memory, taken for cuda:0.

A tensor is on the GPU if it was made with that device, moved there, or computed of such tensors. Everything
that asks in Python is told so. As on a GPU, an operator refuses tensors of both, numbers (no dimensions) and
the indices of an index apart, and numpy() refuses; the kernels are the processor's, behind their dispatch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import native_cpu, reference

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

#: Operators that take tensors of several devices: copies, and indices in the processor's memory.
_TAKE_BOTH = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::set_")


class PretendedGpu:
    """Which memory is the GPU's, and what happened there.

    Attributes:
        copies: bytes of each tensor that came from the processor's memory.
        seeds: those that the GPU's generator was given.
        calls: operands of the kernels' calls there.
    """

    def __init__(self) -> None:
        self.copies: list[int] = []
        self.seeds: list[int] = []
        self.calls: list[Any] = []
        self.state = torch.arange(16, dtype=torch.uint8)
        self.is_moving = False
        self._memory: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used again

    def place(self, results: Any) -> Any:
        """Tensors within are on the GPU from now on."""
        for tensor in tree_iter(results):
            if isinstance(tensor, Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                self._memory[storage.data_ptr()] = storage
        return results

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return tensor.untyped_storage().data_ptr() in self._memory

    def device_of(self, tensor: Tensor) -> torch.device:
        """What ``tensor.device`` answers."""
        if tensor.is_meta:
            return torch.device("meta")
        return GPU if self.has(tensor) else CPU

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Meanwhile operators decide nothing about places."""
        before, self.is_moving = self.is_moving, True
        try:
            yield
        finally:
            self.is_moving = before

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy on a device; the tensor itself if it is there."""
        if self.device_of(tensor) == device:
            return tensor
        with self.moving():
            found = tensor.clone()
        if device == GPU:
            self.copies.append(found.nbytes)
            self.place(found)
        return found


def _is_device(value: Any) -> bool:
    return isinstance(value, (torch.device, str))


def _device(value: Any) -> torch.device:
    named = torch.device(value)
    return GPU if named.type == "cuda" else named


class _Moves(TorchFunctionMode):
    """Takes what names a device: moves, and whatever makes tensors."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, dict(kwargs or {})
        if func is torch.Tensor.cpu:
            return gpu.moved(args[0], CPU)
        if func is torch.Tensor.numpy and gpu.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        if _is_device(kwargs.get("device")):
            device = _device(kwargs["device"])
            if device == GPU:
                with gpu.moving():
                    made = func(*args, **{**kwargs, "device": CPU})
                return gpu.place(made)
        return func(*args, **kwargs)

    def _to(self, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        wanted = [value for value in (*rest, kwargs.pop("device", None)) if _is_device(value)]
        if rest and isinstance(rest[0], Tensor):
            wanted, rest = [self._gpu.device_of(rest[0])], [rest[0].dtype]
        dtypes = [value for value in (*rest, kwargs.get("dtype")) if isinstance(value, torch.dtype)]
        found = self._gpu.moved(tensor, _device(wanted[0])) if wanted else tensor
        return found.to(dtypes[0]) if dtypes else found


class _Operators(TorchDispatchMode):
    """Refuses operators on tensors of both places; results are where the inputs are."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, kwargs or {}
        given = [v for v in tree_iter((args, kwargs)) if isinstance(v, Tensor) and v.numel()]
        places = {gpu.has(tensor) for tensor in given if tensor.dim()}
        name = func._schema.name
        if len(places) > 1 and not gpu.is_moving and not name.startswith((*_TAKE_BOTH, "fedkseed")):
            shapes = [(tuple(tensor.shape), str(gpu.device_of(tensor))) for tensor in given]
            raise RuntimeError(f"expected all tensors of {name} on one device, got {shapes}")
        on_gpu = gpu.has(given[0]) if name.startswith("aten::copy_") else any(map(gpu.has, given))
        results = func(*args, **kwargs)
        if on_gpu and not gpu.is_moving and not name.startswith(("aten::copy_", "fedkseed")):
            gpu.place(results)
        return results


class _Kernels:
    """The processor's kernels, as a backend of the GPU."""

    WRITES_FP32 = True
    SELF_TEST = None

    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu = gpu

    def unavailable(self, device: torch.device | None = None) -> str | None:
        return None

    def seed_axpy(self, operands: Any, terms: Any) -> None:
        self._gpu.calls.append(operands)
        assert operands.device == GPU
        if native_cpu.unavailable() is None:
            native_cpu.seed_axpy(operands, terms)
        else:
            reference.seed_axpy(operands, terms)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """A GPU within a block."""
    gpu = PretendedGpu()
    kernels: Any = _Kernels(gpu)
    manual_seed = torch.manual_seed

    def seed(value: int) -> Any:
        gpu.seeds.append(value)
        gpu.state = torch.full((16,), value % 251, dtype=torch.uint8)
        return manual_seed(value)

    with pytest.MonkeyPatch.context() as patch, _Moves(gpu), _Operators(gpu):
        patch.setattr(torch.Tensor, "device", property(gpu.device_of), raising=False)
        patch.setattr(torch.Tensor, "is_cpu", property(lambda t: not gpu.has(t)), raising=False)
        patch.setattr(torch.Tensor, "is_cuda", property(gpu.has), raising=False)
        patch.setitem(dispatch.TABLE, "cuda", {"native": kernels})
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_rng_state", lambda device: gpu.state)
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: setattr(gpu, "state", state))
        patch.setattr(torch, "manual_seed", seed)
        yield gpu
