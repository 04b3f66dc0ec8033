"""The forward pass of a model with perturbed weights, unit by unit, beside the stored ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedkseed.storage.perturbation import Perturbation, Weight
from fedkseed.storage.scratch import Scratch, bytes_needed
from fedkseed.storage.stand_ins import ReadGuard, StandIns
from fedkseed.storage.structures import map_tensors
from fedkseed.storage.units import Unit, partition
from fedkseed.storage.updates import interrupts_held


class PerturbedModel:
    """Runs a model's forward pass with each unit's parameters at w +- eps z while the unit runs.

    In `swapped` every parameter holds a stand-in of NaN, and each unit's forward is wrapped: it puts
    perturbed values into scratch, lets the parameters point there, runs, and points them back. Stored
    weights are read, never written.

    Args:
        model: not wrapped by anything that keeps weights of its own.
        weights: its parameters, those that are perturbed and those that are only converted.

    Raises:
        ValueError: a parameter of ``weights`` belongs to no unit, or an embedding renormalises its weight.
    """

    def __init__(self, model: nn.Module, weights: Sequence[Weight]) -> None:
        self._model = model
        self._weights = list(weights)
        self._of_parameter = {id(weight.parameter): weight for weight in weights}
        self.units = partition(model, [weight.parameter for weight in weights])
        self._check_units()
        device = weights[0].stored.device
        self._scratch = Scratch(_largest_need(self.units, self._of_parameter), device)
        self._stand_ins = StandIns(self._weights)
        self._running: list[Unit] = []
        #: By id the parameters that are perturbed now; others hold their stand-in.
        self._loaded: set[int] = set()
        self._perturbation = Perturbation(0, 0.0, "gaussian")
        self._sign = 1
        self._is_checked = False

    def evaluate(self, closure: Callable[[], float], perturbation: Perturbation, sign: int) -> float:
        """The closure at w + sign eps z, within `swapped`.

        The first evaluation, and the one after a loss that was not a number, look at every operator.

        Raises:
            RuntimeError: a parameter is read while none of its units runs.
        """
        self._perturbation, self._sign = perturbation, sign
        guard = nullcontext() if self._is_checked else ReadGuard(self._stand_ins, self._refusal)
        with guard:
            loss = closure()
        self._is_checked = loss == loss
        return loss

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Stand-ins for parameters and wrappers for forwards; everything is put back, whatever happens."""
        forwards: list[tuple[nn.Module, Any]] = []
        try:
            with interrupts_held():
                for unit in self.units:
                    module = unit.module
                    forwards.append((module, vars(module).get("forward")))
                    vars(module)["forward"] = self._wrapper(unit, module.forward)
                for weight in self._weights:
                    weight.parameter.data = self._stand_ins[weight]
            yield
        finally:
            with interrupts_held():
                for weight in self._weights:
                    weight.parameter.data = weight.stored
                for module, forward in reversed(forwards):
                    if forward is None:
                        vars(module).pop("forward", None)
                    else:
                        vars(module)["forward"] = forward
                self._loaded.clear()
                self._running.clear()
                self._scratch.level = 0

    def _wrapper(self, unit: Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def perturbed(*args: Any, **kwargs: Any) -> Any:
            return self._run(unit, forward, args, kwargs)

        return perturbed

    def _run(
        self, unit: Unit, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        level = self._scratch.level
        # What a unit around this one has perturbed already stays as it is.
        entered = [self._of_parameter[id(p)] for p in unit.parameters if id(p) not in self._loaded]
        self._running.append(unit)
        try:
            if entered:
                self._enter(entered)
            with self._lookup(unit):
                result = forward(*args, **kwargs)
            return map_tensors(result, self._copied_out)
        finally:
            for weight in entered:
                self._loaded.discard(id(weight.parameter))
                weight.parameter.data = self._stand_ins[weight]
            self._scratch.level = level
            self._running.pop()

    def _enter(self, weights: Sequence[Weight]) -> None:
        views = self._scratch.take([w.stored.shape for w in weights], [w.dtype for w in weights])
        self._perturbation.write(weights, views, self._sign)
        for weight, view in zip(weights, views, strict=True):
            weight.parameter.data = view
            self._loaded.add(id(weight.parameter))

    def _copied_out(self, tensor: Tensor) -> Tensor:
        """A copy of a result that would change when the unit is left."""
        return tensor.clone() if id(tensor) in self._loaded or self._scratch.holds(tensor) else tensor

    def _lookup(self, unit: Unit) -> AbstractContextManager[Any]:
        if unit.gathered is None or id(unit.gathered) in self._loaded:
            return nullcontext()
        return _Lookup(unit.gathered, self._rows)

    def _rows(self, parameter: nn.Parameter, ids: Tensor) -> Tensor:
        weight = self._of_parameter[id(parameter)]
        if ids.numel() < weight.stored.shape[0]:
            return self._perturbation.rows(weight, ids, self._sign)
        return functional.embedding(ids, self._perturbation.whole(weight, self._sign))

    def _refusal(self, weight: Weight, operator: str) -> Exception:
        owners = [str(unit) for unit in self.units if self._reads(unit, weight)]
        where = f"while {self._running[-1]} runs" if self._running else "while no unit runs"
        return RuntimeError(
            f"expected {weight.name} to be read by the forward of {' or '.join(owners)} alone, got "
            f"{operator} that reads it outside of its unit, {where}; use storage=Inplace() for this model"
        )

    @staticmethod
    def _reads(unit: Unit, weight: Weight) -> bool:
        return weight.parameter is unit.gathered or any(weight.parameter is p for p in unit.parameters)

    def _check_units(self) -> None:
        for weight in self._weights:
            if not any(self._reads(unit, weight) for unit in self.units):
                raise ValueError(
                    f"expected every tuned tensor in the forward of a module, got {weight.name} in none; "
                    "use storage=Inplace()"
                )
        for unit in self.units:
            if unit.gathered is not None and getattr(unit.module, "max_norm", None) is not None:
                raise ValueError(
                    f"expected embeddings without max_norm, got {unit}: its forward pass writes its weight; "
                    "use storage=Inplace()"
                )


def _largest_need(units: Sequence[Unit], weights: Mapping[int, Weight]) -> int:
    """Bytes of scratch for the largest unit and the containers around it."""
    needs = {}
    for unit in units:
        entered = [weights[id(parameter)] for parameter in unit.parameters]
        needs[unit] = bytes_needed([w.stored.shape for w in entered], [w.dtype for w in entered])
    around = {
        unit: sum(
            needs[outer]
            for outer in units
            if outer.is_container
            and outer is not unit
            and (outer.name == "" or unit.name.startswith(outer.name + "."))
        )
        for unit in units
    }
    return max(needs[unit] + around[unit] for unit in units)


class _Lookup(TorchFunctionMode):
    """Answers torch's embedding functions on one weight by gathering rows of it."""

    def __init__(self, weight: nn.Parameter, rows: Callable[[nn.Parameter, Tensor], Tensor]) -> None:
        super().__init__()
        self._weight = weight
        self._rows = rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            ids, weight = _pick(args, kwargs, ("input", "weight"))
        elif func is torch.embedding:
            weight, ids = _pick(args, kwargs, ("weight", "indices"))
        else:
            return func(*args, **kwargs)
        return self._rows(weight, ids) if weight is self._weight else func(*args, **kwargs)


def _pick(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
