"""The units of a model: modules whose parameters are perturbed together, just before the module runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

#: What models keep their repeated layers in.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


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
