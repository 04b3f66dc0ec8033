"""Models whose quantised layers stay as they are, because nothing of them can be tuned."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: Where torch keeps its own.
_TORCH_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
#: bitsandbytes' layers, by the names of their types.
_TYPES = frozenset({"Linear8bitLt", "Linear4bit"})
#: What other libraries call the packed weight of a layer (GPTQ, AWQ, EETQ; HQQ; compressed-tensors).
_PACKED = frozenset({"qweight", "W_q", "weight_packed"})


def warn_if_quantised(model: nn.Module, tuned: Collection[torch.Tensor]) -> None:
    """Warns of a model with quantised layers of which all is tuned that can be: there are no adapters.

    Whoever has frozen a floating-point parameter outside of these layers (as for adapters), or has left one
    out, has chosen what to tune and is not warned; nor is who tunes matrices within the layers.
    """
    layers = list(_quantised_layers(model))
    if not layers:
        return
    wanted = {id(tensor) for tensor in tuned}
    inside = {id(parameter): parameter for _, layer in layers for parameter in layer.parameters()}
    has_adapters = any(id(parameter) in wanted and parameter.dim() > 1 for parameter in inside.values())
    others = [p for p in model.parameters() if p.is_floating_point() and id(p) not in inside]
    if has_adapters or any(id(parameter) not in wanted for parameter in others):
        return
    name, layer = layers[0]
    warnings.warn(
        f"the weights of {len(layers)} quantised layers cannot be tuned, the first {name} "
        f"({type(layer).__name__}): only {len(tuned)} parameters with {sum(t.numel() for t in tuned)} "
        "elements are; to tune such a model add adapters (LoRA) and freeze the rest",
        stacklevel=5,  # the caller of the optimizer's constructor, through those of its base class
    )


def _quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of each; what it is made of is not told apart."""
    within: str | None = None
    for name, module in model.named_modules():
        if within is not None and f"{name}.".startswith(within):
            continue
        kind = type(module)
        own = dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
        weight = own.get("weight")
        if (
            kind.__module__.startswith(_TORCH_MODULES)
            or kind.__name__ in _TYPES
            or not _PACKED.isdisjoint(own)
            or (weight is not None and _is_packed(weight))
        ):
            within = f"{name}." if name else ""
            yield name or "the model itself", module


def _is_packed(weight: torch.Tensor) -> bool:
    """Whether a layer's weight is kept in 8 bits or fewer, openly or within a tensor that wraps others."""
    kind = type(weight.data)
    is_wrapped = is_traceable_wrapper_subclass(weight) and not kind.__module__.startswith("torch.distributed")
    return is_wrapped or weight.dtype.itemsize == 1
