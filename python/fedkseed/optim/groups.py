"""Parameter groups that keep weight decay off biases and norms."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fedkseed._checks import check_weight_decay
from fedkseed.model.manifest import manifest_parameters

#: Parts of a lower-cased parameter name that keep decay off, as transformers' Trainer has them.
_EXEMPT_NAMES = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)")
#: What the lower-cased name of a norm's class has in it; a NormedEmbedding is an embedding.
_NORM_CLASSES = re.compile(r"norm(?!ed|al(?!ization))")


def decay_groups(model: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """The model's parameters in at most two groups: those that decay, and biases and norms, which do not.

    They are for an optimizer that is given the model as well: each parameter then keeps the noise of its
    place in the manifest, however parameters are grouped or frozen.

        optimizer = ZOSGD(decay_groups(model, 0.01), lr, model=model)

    Exempt from decay are

    * the parameters that a norm holds itself: a module whose class, or a base of it, has "norm" in its name,
      be it torch's (LayerNorm, RMSNorm, GroupNorm, BatchNorm2d) or of another library (LlamaRMSNorm);
    * parameters by name: with "bias", "layernorm" or "rmsnorm" in it, or "norm" or "..._norm" as one of its
      parts. These are the rules of transformers' Trainer, which knows all norms but LayerNorm by such names
      alone, and so decays a batch norm or Mamba's RMSNorm called ``norm_f``.

    Frozen parameters (``requires_grad=False``) are left out, so is a group without a parameter. A tied
    parameter stands once, under its first name. Wrappers are taken off as by `Manifest`.

    Args:
        weight_decay: of the first group, at least 0; if None, what the optimizer is given holds there.

    Returns:
        The groups, with (name, parameter) as "params".

    Raises:
        TypeError: not a module, or a weight decay that is not a number.
        ValueError: no parameter, all of them frozen, or weight_decay out of range.
    """
    options = {} if weight_decay is None else {"weight_decay": check_weight_decay(weight_decay)}
    parameters = manifest_parameters(model)
    in_norms = {
        id(parameter)
        for module in model.modules()
        if _is_norm(module)
        for parameter in module.parameters(recurse=False)
    }
    decaying: list[tuple[str, nn.Parameter]] = []
    exempt: list[tuple[str, nn.Parameter]] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            is_exempt = id(parameter) in in_norms or _EXEMPT_NAMES.search(name.lower())
            (exempt if is_exempt else decaying).append((name, parameter))
    if not decaying and not exempt:
        raise ValueError("expected at least one parameter to tune, got all frozen (requires_grad=False)")
    groups = [{"params": decaying, **options}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_norm(module: nn.Module) -> bool:
    return any(_NORM_CLASSES.search(kind.__name__.lower()) for kind in type(module).__mro__)
