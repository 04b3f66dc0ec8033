"""Models whose weights cannot be put aside for a forward pass, told by name before the first step."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

#: (module of the type, type, why). A type whose module was never imported has no instance.
_REFUSED = (
    (
        "torch._dynamo.eval_frame",
        "OptimizedModule",
        "compiled code may keep the addresses of weights; give the model that torch.compile was given",
    ),
    (
        "torch.nn.parallel.data_parallel",
        "DataParallel",
        "it copies the model to each device; give its .module, or use storage=Inplace()",
    ),
    (
        "torch.nn.parallel.distributed",
        "DistributedDataParallel",
        "it averages gradients, and there are none; give its .module",
    ),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "it gathers weights on its own; use storage=Inplace() on a model that is not sharded",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fully_shard",
        "FSDPModule",
        "it gathers weights on its own; use storage=Inplace() on a model that is not sharded",
    ),
)


def check_servable(model: nn.Module) -> None:
    """Refuses modules that would not see the perturbed weights.

    Raises:
        TypeError: names the module and what to do instead.
    """
    refused = [
        (getattr(sys.modules[module], name), reason)
        for module, name, reason in _REFUSED
        if module in sys.modules
    ]
    for name, module in model.named_modules():
        place = f"{name or 'the model itself'} ({type(module).__name__})"
        for kind, reason in refused:
            if isinstance(module, kind):
                raise TypeError(f"expected modules that can be run unit by unit, got {place}: {reason}")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"expected modules that can be run unit by unit, got {place} compiled in place: compiled "
                "code may keep the addresses of weights; make the optimizer of a model without .compile()"
            )
        if _is_compiled(module.forward):
            raise TypeError(
                f"expected modules that can be run unit by unit, got {place} with a compiled forward: "
                "compiled code may keep the addresses of weights; make the optimizer of a model without it"
            )
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise TypeError(
                f"expected parameters that have a shape, got {place} with uninitialized ones; "
                "run one forward pass first"
            )


def _is_compiled(forward: Any) -> bool:
    """Whether it comes out of torch.compile; torch.compiler.disable leaves the same mark and one more."""
    compiled = getattr(forward, "_torchdynamo_orig_callable", None) is not None
    return compiled and not getattr(forward, "_torchdynamo_disable", False)
