"""One forward pass for both sides: a doubled batch, split in halves for each unit and put together again.

Shapes: R rows of the doubled batch, B = R / 2 of a half; the plus half comes first.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from fedkseed.model.randomness import Generators, OwnGenerators, active_dropout
from fedkseed.storage.streamed.guard import ReadGuard
from fedkseed.storage.streamed.units import Unit

_Call = tuple[tuple[Any, ...], dict[str, Any]]


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with ``function`` applied to every tensor within: the same object if none has changed.

    Anything but tensors, tuples, lists, dicts and dataclasses is left as it is.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = {key: map_tensors(item, function) for key, item in value.items()}
        if all(changed[key] is value[key] for key in changed):
            return value
        rebuilt = copy.copy(value)
        for key, item in changed.items():
            rebuilt[key] = item
        return rebuilt
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = {name: map_tensors(item, function) for name, item in fields.items()}
        if all(changed[name] is fields[name] for name in fields):
            return value
        twin = copy.copy(value)
        for name, item in changed.items():
            object.__setattr__(twin, name, item)
        return twin
    return value


class Pairing:
    """What rows the batch has, and which tensors have them.

    A tensor is taken to have the rows of the batch if it is an argument of two or more dimensions with R
    rows, or a result with B rows. That is checked the first time that a number of rows is seen: such a tensor
    must derive from the model's inputs, or have equal rows.

    Args:
        model: whose call says what the rows are.
        devices: where its units run.
        around: what its forward runs in besides.
    """

    def __init__(
        self,
        model: nn.Module,
        devices: Collection[torch.device],
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model = model
        self._devices = frozenset(devices)
        self._own_generators = OwnGenerators(model)
        self._around = around
        self._num_rows: int | None = None
        self._checked: set[int] = set()
        self._guard: ReadGuard | None = None

    def forget(self) -> None:
        """Checks again what was checked."""
        self._checked.clear()

    def around_model(
        self, forward: Callable[..., Any], make_guard: Callable[[], ReadGuard]
    ) -> Callable[..., Any]:
        """The model's own forward with its batch noted for the units within.

        Args:
            make_guard: to run the model in, the first time that a number of rows is seen.

        It raises ValueError: the batch is not doubled, or has as many rows as another dimension.
        RuntimeError: random numbers were drawn; what ``around`` raises.
        """

        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
            with self._noting(inputs, make_guard):
                return forward(*args, **kwargs)

        return noted

    def split(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Call]:
        """What the unit is called with for either half.

        Raises:
            RuntimeError: the model itself was not called.
            TypeError: a cache of keys and values.
            ValueError: a tensor that has R rows by accident, for all one can tell.
        """
        if self._num_rows is None:
            raise RuntimeError(
                f"expected the model itself to be called in a paired step, got a call of {unit} alone; the "
                "rows of the batch are known from the model's arguments"
            )
        _refuse_caches(unit, (args, kwargs))
        half = self._num_rows // 2

        def take(tensor: Tensor, start: int) -> Tensor:
            if tensor.dim() < 2 or len(tensor) != self._num_rows:
                return tensor
            if self._guard is not None and not self._guard.is_marked(tensor):
                self._check_rows(unit, tensor, "is given")
            return tensor[start : start + half]

        return [
            tuple(map_tensors(part, functools.partial(take, start=start)) for part in (args, kwargs))
            for start in (0, half)
        ]

    def merge(self, unit: Unit, calls: Sequence[_Call], plus: Any, minus: Any) -> Any:
        """The result for the doubled batch.

        Args:
            calls: what `split` gave.
            plus, minus: the results of the two calls, which may be taken apart.

        Raises:
            ValueError: results that do not fit together, or that differ between the halves without having
                rows of the batch.
        """
        if type(plus) is not type(minus):
            raise self._misfit(unit, f"{type(plus).__name__} and {type(minus).__name__}")
        if isinstance(plus, Tensor):
            return self._merge_tensors(unit, calls, plus, minus)
        if isinstance(plus, (tuple, list)) and len(plus) == len(minus):
            items = [self.merge(unit, calls, a, b) for a, b in zip(plus, minus, strict=True)]
            return type(plus)(*items) if hasattr(plus, "_fields") else type(plus)(items)
        if isinstance(plus, dict) and plus.keys() == minus.keys():
            for key in plus:
                plus[key] = self.merge(unit, calls, plus[key], minus[key])
            return plus
        if dataclasses.is_dataclass(plus):
            for field in dataclasses.fields(plus):
                merged = self.merge(unit, calls, getattr(plus, field.name), getattr(minus, field.name))
                object.__setattr__(plus, field.name, merged)
            return plus
        if plus is minus or (isinstance(plus, (bool, int, float, str)) and plus == minus):
            return plus
        raise self._misfit(unit, f"different values of {type(plus).__name__}")

    def _merge_tensors(self, unit: Unit, calls: Sequence[_Call], plus: Tensor, minus: Tensor) -> Tensor:
        assert self._num_rows is not None
        half = self._num_rows // 2
        if plus is minus:
            if plus.dim() and len(plus) == half and not any(plus is value for value in tree_iter(calls)):
                raise self._misfit(unit, f"one tensor of shape {tuple(plus.shape)} for both, written twice")
            return plus
        if plus.shape == minus.shape and plus.dim() and len(plus) == half:
            if self._guard is not None and not self._guard.is_marked(plus):
                self._check_rows(unit, plus, "returns")
            return self._joined(plus, minus)
        if plus.shape == minus.shape and torch.equal(plus, minus):
            return plus
        if plus.shape == minus.shape and plus.dim() > 2 and len(plus) == 1:
            # One row for the whole batch, made of perturbed weights (a position bias): one for each half.
            return self._joined(*[side.expand(half, *side.shape[1:]) for side in (plus, minus)])
        raise self._misfit(unit, f"tensors of shape {tuple(plus.shape)} that differ, without {half} rows")

    def _joined(self, plus: Tensor, minus: Tensor) -> Tensor:
        joined = torch.cat([plus, minus])
        if self._guard is not None:
            self._guard.mark([joined])
        return joined

    def _misfit(self, unit: Unit, got: str) -> ValueError:
        return ValueError(
            f"expected results of {unit} with the rows of the batch in dimension 0, or equal for both "
            f"halves, got {got}; use Streamed(paired=False) for this model"
        )

    def _check_rows(self, unit: Unit, tensor: Tensor, verb: str) -> None:
        if not torch.equal(tensor, tensor[:1].expand_as(tensor)):
            raise ValueError(
                f"expected a batch whose number of rows no other dimension has, got {self._num_rows} doubled "
                f"rows, and {unit} {verb} a tensor of shape {tuple(tensor.shape)} that does not derive from "
                "the batch; use another batch size or Streamed(paired=False)"
            )

    @contextmanager
    def _noting(self, inputs: Sequence[Tensor], make_guard: Callable[[], ReadGuard]) -> Iterator[None]:
        outer = self._num_rows, self._guard
        num_rows = _doubled_rows(inputs)
        checks = num_rows not in self._checked
        self._num_rows = num_rows
        self._guard = make_guard() if checks else None
        guard: AbstractContextManager[Any] = self._guard if self._guard is not None else nullcontext()
        if self._guard is not None:
            self._guard.mark(inputs)
        devices = self._devices.union(tensor.device for tensor in inputs)
        generators = Generators(devices, self._own_generators.now())
        states = generators.states()
        try:
            with guard, self._around():
                yield
        finally:
            self._num_rows, self._guard = outer
        if generators.have_changed(states):
            raise RuntimeError(
                "expected a forward pass without random numbers in a paired step, for both halves would draw "
                f"different ones{_named_dropout(self._model)}; call model.eval(), or use "
                "Streamed(paired=False)"
            )
        self._checked.add(num_rows)


def _doubled_rows(inputs: Sequence[Tensor]) -> int:
    """R, from the first tensor of two or more dimensions."""
    batches = [tensor for tensor in inputs if tensor.dim() > 1]
    if not batches or len(batches[0]) % 2 or not len(batches[0]):
        got = f"shape {tuple(batches[0].shape)}" if batches else "no tensor of two dimensions or more"
        raise ValueError(
            "expected a batch doubled along dimension 0 in a paired step, as the first tensor that the model "
            f"is called with, got {got}; see fedkseed.optim.paired"
        )
    num_rows = len(batches[0])
    for tensor in batches:
        if num_rows in tensor.shape[1:] or num_rows // 2 in tensor.shape[1:]:
            raise ValueError(
                f"expected a batch whose number of rows no other dimension has, got {num_rows} doubled rows "
                f"and a tensor of shape {tuple(tensor.shape)}, which does not tell rows from the rest; use "
                "another batch size or Streamed(paired=False)"
            )
    return num_rows


def _named_dropout(model: nn.Module) -> str:
    found = active_dropout(model)
    return f" (dropout in train mode: {found[0][0]}, {len(found)} in all)" if found else ""


def _refuse_caches(unit: Unit, arguments: Any) -> None:
    for value in tree_iter(arguments):
        if any(kind.__name__.endswith("Cache") for kind in type(value).__mro__):
            raise TypeError(
                f"expected no cache of keys and values in a paired step, got {type(value).__name__} for "
                f"{unit}; call the model with use_cache=False"
            )
