"""Tensors that no step can perturb or put back, refused in the words of those who own the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fedkseed.model.manifest import types_if_imported

_FREEZE = "freeze it (requires_grad_(False))"
#: (module of the type, type, what to do), see `types_if_imported`.
_WRAPPERS = (
    (
        "torch._subclasses.fake_tensor",
        "FakeTensor",
        "make the model outside of FakeTensorMode",
    ),
    (
        "torch.distributed.tensor",
        "DTensor",
        "sharded tensors are not supported here, load the model whole",
    ),
)


def check_tunable(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """Refuses what is no ordinary floating-point tensor with an address in memory.

    Dtypes, strides and what else the kernels ask for are theirs to check (`PreparedTensors`).

    Raises:
        TypeError: not floating point, not strided, or of a type that wraps other tensors.
        ValueError: without a shape or without memory yet.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if is_lazy(tensor):
            raise ValueError(
                f"expected parameters that have a shape, got {name} uninitialized; run one forward pass first"
            )
        kind = type(tensor.data)
        if kind is not torch.Tensor:
            advice = next(
                (text for wrapper, text in types_if_imported(_WRAPPERS) if issubclass(kind, wrapper)),
                f"wrapped tensors are not supported here, {_FREEZE} and tune adapters if it is quantised",
            )
            raise TypeError(f"expected ordinary tensors, got {name} of type {kind.__name__}; {advice}")
        if tensor.is_meta:
            raise ValueError(
                f"expected weights in memory, got {name} on the meta device; if accelerate has offloaded it "
                "(device_map), load the model whole, else give it values first (to_empty, load_state_dict)"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"expected strided tensors, got {name} of layout {tensor.layout}; make it dense "
                f"(.to_dense()), or {_FREEZE}"
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"expected floating-point tensors, got {name} of {tensor.dtype}; leave it out, or {_FREEZE}"
            )
        if not (tensor.is_leaf or tensor.retains_grad):
            raise ValueError(
                f"expected parameters, got {name}, which autograd has computed from others; give those, or a "
                "copy (.detach().clone()) that the loss reads"
            )


def check_buffers(model: nn.Module) -> None:
    """Refuses buffers without a shape yet: what the first forward pass makes of them cannot be put back.

    Raises:
        ValueError: names the first.
    """
    for name, buffer in model.named_buffers():
        if is_lazy(buffer):
            raise ValueError(
                f"expected buffers that have a shape, got {name} uninitialized; run one forward pass first"
            )
