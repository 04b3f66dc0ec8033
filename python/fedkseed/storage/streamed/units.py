"""The units of a model: modules whose parameters are perturbed together, just before the module runs;
and which models cannot be split so."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedkseed.model.manifest import types_if_imported
from fedkseed.storage.streamed.refusals import NotStreamableModelError

#: What models keep their repeated layers in.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

#: (module of the type, type, why), see `types_if_imported`.
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
    (
        "torch.jit",
        "ScriptModule",
        "TorchScript keeps its weights from being exchanged; give the model that was scripted or traced, or "
        "use storage=Inplace()",
    ),
)


@dataclass(frozen=True, eq=False)
class Unit:
    """A module, and what is perturbed while its forward pass runs.

    Attributes:
        name: of the module in the model; empty for the model itself.
        module: whose forward reads the parameters.
        parameters: perturbed as a whole when the forward begins.
        gathered: the weight of an embedding, of which only the rows looked up are perturbed; or None.
        is_container: other units run within its forward.
    """

    name: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    gathered: nn.Parameter | None = None
    is_container: bool = False

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({type(self.module).__name__})"


def partition(model: nn.Module, parameters: Collection[nn.Parameter]) -> list[Unit]:
    """Splits a model so that each of the parameters belongs to a unit.

    A unit is

    * a block: an entry of an outermost nn.ModuleList, nn.ModuleDict or nn.Sequential;
    * outside of blocks, a largest module that contains no block;
    * a module that contains blocks, with the parameters that it owns directly;
    * an nn.Embedding outside of blocks (or that is a block), whose weight is gathered.

    Parameters of a module without a forward of its own (nn.ParameterList) belong to the module around it. A
    parameter that is tied between units belongs to each of them; a module that stands at several places is
    one unit, under its first name. Units without any of the parameters are left out.
    """
    splitter = _Splitter({id(parameter) for parameter in parameters})
    splitter.split(model, "", is_block=False)
    return splitter.units


class _Splitter:
    def __init__(self, wanted: set[int]) -> None:
        self._wanted = wanted
        self._visited: set[int] = set()
        self.units: list[Unit] = []

    def split(self, module: nn.Module, name: str, is_block: bool) -> list[nn.Parameter]:
        """Makes the units of a module; returns the parameters that its parent's forward must read."""
        if id(module) in self._visited:
            return []
        self._visited.add(id(module))
        has_forward = type(module).forward is not nn.Module.forward or "forward" in vars(module)
        descends = not (is_block and has_forward) and self._contains_list(module)
        if not descends:
            if not has_forward:
                return self._unique(module.parameters())
            self._add_leaf(module, name, is_block)
            return []
        left = self._unique(module.parameters(recurse=False))
        is_list = isinstance(module, _LISTS)
        for child_name, child in module.named_children():
            left += self.split(child, f"{name}.{child_name}" if name else child_name, is_list)
        if not has_forward:
            return left
        if left:
            self.units.append(Unit(name, module, tuple(self._unique(left)), is_container=True))
        return []

    def _add_leaf(self, module: nn.Module, name: str, is_block: bool) -> None:
        gathered = {}
        if not is_block or isinstance(module, nn.Embedding):
            for inner_name, inner in module.named_modules(prefix=name):
                if isinstance(inner, nn.Embedding) and id(inner.weight) in self._wanted:
                    gathered[id(inner)] = (inner_name, inner)
        dense = self._unique(
            parameter
            for inner in module.modules()
            for key, parameter in inner.named_parameters(recurse=False, remove_duplicate=False)
            if not (id(inner) in gathered and key == "weight")
        )
        own = gathered.pop(id(module), None)
        if own is not None:
            self.units.append(Unit(name, module, tuple(dense), gathered=module.weight))  # type: ignore[arg-type]
        elif dense:
            self.units.append(Unit(name, module, tuple(dense)))
        for inner_name, inner in gathered.values():
            if id(inner) not in self._visited:
                self._visited.add(id(inner))
                self.units.append(Unit(inner_name, inner, (), gathered=inner.weight))  # type: ignore[arg-type]

    def _contains_list(self, module: nn.Module) -> bool:
        return any(
            isinstance(inner, _LISTS) and any(id(p) in self._wanted for p in inner.parameters())
            for inner in module.modules()
        )

    def _unique(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return list({id(p): p for p in parameters if id(p) in self._wanted}.values())


def check_servable(model: nn.Module) -> None:
    """Refuses modules that would not see the perturbed weights, and parameters that cannot be guarded.

    Raises:
        NotStreamableModelError: names the module or parameter and what to do instead.
    """
    refused = types_if_imported(_REFUSED)
    for name, module in model.named_modules():
        place = f"{name or 'the model itself'} ({type(module).__name__})"
        for kind, reason in refused:
            if isinstance(module, kind):
                raise NotStreamableModelError(
                    f"expected modules that can be run unit by unit, got {place}: {reason}"
                )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise NotStreamableModelError(
                f"expected modules that can be run unit by unit, got {place} compiled in place: compiled "
                "code may keep the addresses of weights; make the optimizer of a model without .compile()"
            )
        if _is_compiled(module.forward):
            raise NotStreamableModelError(
                f"expected modules that can be run unit by unit, got {place} with a compiled forward: "
                "compiled code may keep the addresses of weights; make the optimizer of a model without it"
            )
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise NotStreamableModelError(
                f"expected parameters that have a shape, got {place} with uninitialized ones; "
                "run one forward pass first"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise NotStreamableModelError(
                f"expected parameters that count what is written to them, got {name} made within "
                "torch.inference_mode(); make the model outside of it, or use storage=Inplace()"
            )


def _is_compiled(forward: Any) -> bool:
    """Whether it comes out of torch.compile; torch.compiler.disable leaves the same mark and one more."""
    compiled = getattr(forward, "_torchdynamo_orig_callable", None) is not None
    return compiled and not getattr(forward, "_torchdynamo_disable", False)
