"""Memory that a tuned weight shares with another tensor of the model: what moves the one moves the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import fedkseed_kernels
from fedkseed.model.manifest import ModelParameters
from fedkseed.model.named_errors import TIE
from fedkseed.model.placement import by_device

#: A tensor, and what errors call it.
_Named = tuple[str, torch.Tensor]


def check_overlaps(
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    model: nn.Module | None,
    known: ModelParameters | None = None,
) -> None:
    """Refuses tuned weights that share memory with each other, or with anything else that the model holds.

    A frozen parameter would move along, seen by no ledger, in one storage mode and not in another. Modules
    that share one Parameter object share one weight: that is fine.

    Exact for strided views, as far as the kernels' own check of their arguments is. Looked at are parameters
    and buffers, and the tensors within those that wrap others; not what has no memory at an address (sparse,
    meta and fake tensors), nor tensors that are plain attributes of modules.

    Args:
        names: of the tensors.
        tensors: the tuned weights.
        model: None if there are only the tensors.
        known: the model's parameters, of a caller who has them.

    Raises:
        ValueError: names both.
    """
    tuned = {id(tensor) for tensor in tensors}
    others: list[_Named] = []
    if model is not None:
        held = ModelParameters.of(model) if known is None else known
        others = [(f"{name} (not tuned)", parameter) for name, parameter in held.named]
        others += [(f"{name} (a buffer)", buffer) for name, buffer in model.named_buffers()]
    refuse_overlap(
        list(zip(names, tensors, strict=True)),
        [(name, tensor) for name, tensor in others if id(tensor) not in tuned],
        TIE,
    )


def refuse_overlap(changed: Sequence[_Named], others: Sequence[_Named], advice: str) -> None:
    """Refuses tensors that share memory, if one of the two at least is among the changed ones.

    Raises:
        ValueError: names both, and the advice.
    """
    pieces = [list(_in_memory(changed)), list(_in_memory(others))]
    places = [by_device(tensor for _, tensor in some) for some in pieces]
    for device, positions in places[0].items():
        first = [pieces[0][position] for position in positions]
        second = [pieces[1][position] for position in places[1].get(device, [])]
        found = fedkseed_kernels.find_overlap(
            [tensor for _, tensor in first], [tensor for _, tensor in second]
        )
        if found is not None:
            names = [name for name, _ in (*first, *second)]
            verb = (
                "share memory" if found.is_certain else "have strides too irregular to rule out shared memory"
            )
            raise ValueError(
                f"expected weights with memory of their own, but {names[found.first]} and "
                f"{names[found.second]} {verb}; {advice}"
            )


def _in_memory(named: Sequence[_Named]) -> Iterator[_Named]:
    """The tensors that have an address, those that others wrap in their place."""
    for name, tensor in named:
        if is_lazy(tensor):
            continue
        if is_traceable_wrapper_subclass(tensor):
            inner = [getattr(tensor, attribute) for attribute in tensor.__tensor_flatten__()[0]]
            yield from _in_memory([(name, piece) for piece in inner if isinstance(piece, torch.Tensor)])
            continue
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # sparse and fake tensors have no storage
            continue
        if address:
            yield name, tensor
