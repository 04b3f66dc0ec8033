"""What a tuned parameter holds while it is not perturbed, and who notices that it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedkseed.storage.streamed.copies import Weight

# Operators that take a tensor for its shape, dtype and device alone.
_METADATA_PREFIXES, _METADATA_SUFFIXES = ("new_",), ("_like",)


class StandIns:
    """A tensor of NaN for each weight, of its shape, dtype and device, all elements in one place of memory.

    ``stand_ins[weight]`` is the tensor.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._owners: dict[int, Weight] = {}
        self._tensors: dict[Weight, Tensor] = {}
        for position, weight in enumerate(weights):
            dtype, device = kind = weight.dtype, weight.stored.device
            buffer = self._buffers.get(kind)
            if buffer is None:
                buffer = torch.full((len(weights),), float("nan"), dtype=dtype, device=device)
                self._buffers[kind] = buffer
            self._tensors[weight] = buffer[position].expand(weight.stored.shape)
            self._owners[buffer[position].data_ptr()] = weight

    def __getitem__(self, weight: Weight) -> Tensor:
        return self._tensors[weight]

    def owner(self, tensor: Tensor) -> Weight | None:
        """The weight that this tensor, or a view of it, stands for."""
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return None
        if tensor.layout is not torch.strided:
            return None
        return self._owners.get(tensor.data_ptr()) if tensor.numel() else None


class ReadGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises what ``refuse`` makes of the weight whose stand-in an operator reads; views do not read.

    It also follows marked tensors: what is computed of them is marked.
    """

    supports_higher_order_operators = True

    def __init__(self, stand_ins: StandIns, refuse: Callable[[Weight, str], Exception]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stand_ins = stand_ins
        self._refuse = refuse
        self._mark = object()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _reads_no_values(func):
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor) and (weight := self._stand_ins.owner(value)) is not None:
                    raise self._refuse(weight, str(func))
        result = func(*args, **kwargs)
        if any(isinstance(value, Tensor) and self.is_marked(value) for value in tree_iter((args, kwargs))):
            results = tree_iter((result, _written(func, args, kwargs)))
            self.mark(value for value in results if isinstance(value, Tensor))
        return result

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Marks tensors, for as long as they live."""
        for tensor in tensors:
            tensor._fedkseed_mark = self._mark  # type: ignore[attr-defined]

    def is_marked(self, tensor: Tensor) -> bool:
        """Whether the tensor was marked, or computed of one that was, within this guard."""
        return getattr(tensor, "_fedkseed_mark", None) is self._mark


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operator writes."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    values = [*args, *[None] * (len(schema.arguments) - len(args))]
    return [
        kwargs.get(argument.name, value)
        for argument, value in zip(schema.arguments, values, strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _reads_no_values(func: Any) -> bool:
    name = func.__name__.partition(".")[0]
    return (
        getattr(func, "is_view", False)
        or name.startswith(_METADATA_PREFIXES)
        or name.endswith(_METADATA_SUFFIXES)
    )
