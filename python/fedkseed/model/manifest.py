"""The manifest of a model: the list of all its parameters, which says what noise each of them gets.

Noise is a function of (seed, stream, element), and a parameter's stream is its index here (contract, section
1). So the manifest must come out the same however the model is wrapped, frozen, grouped, sharded or compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: The closed list of wrappers that are taken off: (module of the type, type, attribute with the wrapped
#: model). FSDP v2 (`fully_shard`) needs no entry: it changes the model in place, and its parameters tell
#: their full shape.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
        "_checkpoint_wrapped_module",
    ),
)


@dataclass(frozen=True)
class Manifest:
    """Names and full shapes of all parameters of a model; the stream of a parameter is its index.

    A tied parameter stands once, under its first name. The order is that of ``named_parameters`` of the model
    without its wrappers (torch.compile, DistributedDataParallel, FSDP, activation checkpointing, at any
    depth), and the names are those of that model. Whether a parameter is frozen does not matter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Manifest:
        """The manifest of a model.

        Raises:
            TypeError: not a module.
            ValueError: a model without parameters, or one of which a parameter's full shape cannot be told
                (named).
        """
        return ModelParameters.of(model).manifest

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(
                f"expected one shape for each name, got {len(self.names)} names and {len(self.shapes)} shapes"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError("expected every name once in a manifest, got a name twice")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def numel(self) -> int:
        """Number of elements of all parameters together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def stream(self, name: str) -> int:
        """The stream of the parameter called ``name``.

        Raises:
            ValueError: the manifest has no such name.
        """
        if name not in self.names:
            raise ValueError(
                f"expected the name of one of {len(self)} parameters ({', '.join(self.names[:3])}, ...), "
                f"got {name!r}; a tied parameter has its first name"
            )
        return self.names.index(name)


@dataclass(frozen=True, eq=False)
class ModelParameters:
    """The parameters of a model as one traversal of its modules finds them.

    Attributes:
        manifest: of the model.
        parameters: in manifest order: the one at position i has stream i.
    """

    manifest: Manifest
    parameters: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, model: nn.Module) -> ModelParameters:
        """What the model holds now.

        Raises:
            TypeError, ValueError: as `Manifest.of`.
        """
        names, parameters, shapes = zip(*_Traversal(model).entries, strict=True)
        return cls(Manifest(names, shapes), parameters)

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of each."""
        return list(zip(self.manifest.names, self.parameters, strict=True))

    @property
    def frozen(self) -> tuple[int, ...]:
        """Manifest indices of those with ``requires_grad=False`` now, ascending."""
        return tuple(index for index, parameter in enumerate(self.parameters) if not parameter.requires_grad)


def manifest_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of every parameter in manifest order: the entry at position i has stream i.

    Raises:
        TypeError, ValueError: as `Manifest.of`.
    """
    return ModelParameters.of(model).named


def types_if_imported(table: Iterable[tuple[str, str, str]]) -> list[tuple[type, str]]:
    """(type, text) of each (module of the type, type, text) whose module has been imported.

    The others have no instance, and importing torch._dynamo to look for one takes a second.
    """
    return [
        (getattr(sys.modules[module], name), text) for module, name, text in table if module in sys.modules
    ]


class _Traversal:
    """The order of named_parameters: depth first, own parameters before the children's, each module once."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        self._wrappers = types_if_imported(_WRAPPERS)
        self._visited: set[int] = set()
        self._full_shapes: dict[int, tuple[int, ...]] = {}
        self.entries: list[tuple[str, nn.Parameter, tuple[int, ...]]] = []
        self._visit(model, "")
        if not self.entries:
            raise ValueError(f"expected a model with parameters, got {type(model).__name__} without any")

    def _visit(self, module: nn.Module, prefix: str) -> None:
        module = self._unwrap(module)
        if id(module) in self._visited:
            return
        self._visited.add(id(module))
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in self._visited:
                self._visited.add(id(parameter))
                self.entries.append((prefix + name, parameter, self._full_shape(prefix + name, parameter)))
        for name, child in module.named_children():
            self._visit(child, f"{prefix}{name}.")

    def _unwrap(self, module: nn.Module) -> nn.Module:
        for wrapper, attribute in self._wrappers:
            if isinstance(module, wrapper):
                handle: Any = getattr(module, "_handle", None)
                if handle is not None:
                    self._note_fsdp_shapes(handle.flat_param)
                return self._unwrap(getattr(module, attribute))
        return module

    def _note_fsdp_shapes(self, flat: Any) -> None:
        """FSDP v1 replaces a sharded parameter's content by a flat piece of it and keeps the shape aside."""
        if flat._params is None:
            raise ValueError(
                f"expected FSDP with use_orig_params=True, got one with {', '.join(flat._fqns[:3])}, ... in "
                "one flat parameter; wrap with use_orig_params=True or use fully_shard"
            )
        for parameter, shape in zip(flat._params, flat._shapes, strict=True):
            self._full_shapes[id(parameter)] = tuple(shape)

    def _full_shape(self, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"expected parameters that have a shape, got {name} uninitialized; run one forward pass first"
            )
        return self._full_shapes.get(id(parameter), tuple(parameter.shape))
