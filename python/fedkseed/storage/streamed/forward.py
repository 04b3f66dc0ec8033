"""The forward pass of a model with perturbed weights, unit by unit, beside the stored ones."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedkseed.model.packed import packed_bytes
from fedkseed.model.placement import by_device
from fedkseed.storage.streamed.buffers import WidenedBuffers
from fedkseed.storage.streamed.copies import Copies, Perturbation, Scratch, Weight
from fedkseed.storage.streamed.guard import ReadGuard, StandIns
from fedkseed.storage.streamed.halves import Halves
from fedkseed.storage.streamed.pairing import Pairing, map_tensors
from fedkseed.storage.streamed.refusals import NotStreamableForwardError, NotStreamableWeightError
from fedkseed.storage.streamed.units import Unit, partition
from fedkseed.storage.updates import interrupts_held

#: What torch and its modules say where tensors of fp32 and of 16 bits meet: they name both dtypes.
_MIXED_DTYPES = re.compile(
    r"(?=.*\b(?:bfloat16|half|float16)\b)(?=.*\b(?:float|float32)\b)", re.IGNORECASE | re.DOTALL
)


class PerturbedModel:
    """Runs a model's forward pass with each unit's parameters at w +- eps z while the unit runs.

    In `swapped` every parameter holds a stand-in of NaN, and each unit's forward is wrapped: it puts
    perturbed values into scratch, lets the parameters point there, runs, and points them back. Stored
    weights are read, never written.

    Args:
        model: not wrapped by anything that keeps weights of its own.
        weights: its parameters, those that are perturbed and those that are only converted.
        is_paired: whether evaluations are of both sides at once, by `evaluate_both`.

    Raises:
        NotStreamableWeightError: a parameter of ``weights`` belongs to no unit, an embedding renormalises its
            weight, or a unit has parameters on several devices.
    """

    def __init__(self, model: nn.Module, weights: Sequence[Weight], is_paired: bool = False) -> None:
        self._model = model
        self._weights = list(weights)
        self._of_parameter = {id(weight.parameter): weight for weight in weights}
        self.units = partition(model, [weight.parameter for weight in weights])
        self._check_units()
        self._devices = {unit: self._device_of(unit) for unit in self.units}
        self._is_paired = is_paired
        #: On each device one for each side, for the units there.
        self._scratches = {
            device: [Scratch(num_bytes, device) for _ in range(1 + is_paired)]
            for device, num_bytes in largest_needs(self._devices, self._of_parameter).items()
        }
        #: Those in scratch, which are the same each time that the same units run.
        self._copies: dict[tuple[Any, ...], Copies] = {}
        self._stand_ins = StandIns(self._weights)
        self._running: list[Unit] = []
        #: By id the parameters that are perturbed now; others hold their stand-in.
        self._loaded: set[int] = set()
        self._perturbation = Perturbation(0, 0.0, "gaussian")
        #: 1 or -1: the side that is evaluated; 0: both, each unit splits its batch.
        self._sign = 1
        self._is_checked = False
        self._is_widened = any(weight.is_widened for weight in self._weights)
        self._halves = Halves(model, self.units if is_paired else ())
        self._pairing = Pairing(model, self._scratches, self._halves.outside)
        self._widened = WidenedBuffers(model, next((w.dtype for w in weights if w.is_widened), None))

    def evaluate(self, closure: Callable[[], float], perturbation: Perturbation, sign: int) -> float:
        """The closure at w + sign eps z, within `swapped`.

        The first evaluation, and the one after a loss that was not a number, look at every operator.

        Raises:
            NotStreamableForwardError: a parameter is read while none of its units runs, or meets tensors of
                16 bits in fp32.
        """
        self._perturbation, self._sign = perturbation, sign
        with self._looked_at():
            loss = closure()
        self._is_checked = not math.isnan(loss)
        return loss

    def evaluate_both(
        self, closure: Callable[[], tuple[float, float]], perturbation: Perturbation
    ) -> tuple[float, float]:
        """The closure's losses of the halves of a doubled batch, at w + eps z and at w - eps z.

        Raises:
            NotStreamableForwardError: as `evaluate`.
            RuntimeError: random numbers are drawn; as `Halves.outside`.
            TypeError, ValueError: a batch that cannot be split, or a unit's results that cannot be joined.
        """
        self._perturbation, self._sign = perturbation, 0
        self._halves.begin()
        with self._looked_at():
            losses = closure()
        self._is_checked = not any(math.isnan(loss) for loss in losses)
        if not self._is_checked:
            self._pairing.forget()
        return losses

    @contextmanager
    def _looked_at(self) -> Iterator[None]:
        if self._is_checked:
            yield
            return
        with self._guard():
            try:
                yield
            except (RuntimeError, TypeError, ValueError) as error:
                if self._is_widened and _MIXED_DTYPES.match(str(error)):
                    raise NotStreamableForwardError(
                        "expected a forward pass in torch.float32, as compute_dtype says, got one that mixes "
                        "dtypes, for what the model is given, or a buffer, has 16 bits: give it inputs in "
                        f"fp32, or use compute_dtype=None or storage=Inplace(); {error}"
                    ) from error
                raise

    def _guard(self) -> ReadGuard:
        return ReadGuard(self._stand_ins, self._refusal)

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
                if self._is_paired:
                    forwards.append((self._model, vars(self._model).get("forward")))
                    vars(self._model)["forward"] = self._pairing.around_model(
                        self._model.forward, self._guard
                    )
                for weight in self._weights:
                    weight.parameter.data = self._stand_ins[weight]
                self._widened.widen()
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
                for scratches in self._scratches.values():
                    for scratch in scratches:
                        scratch.level = 0
                self._widened.put_back()

    def _wrapper(self, unit: Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def perturbed(*args: Any, **kwargs: Any) -> Any:
            return self._run(unit, forward, args, kwargs)

        return perturbed

    def _run(
        self, unit: Unit, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._sign:
            with self._entered(unit) as ((_, load),):
                load()
                return self._result(unit, forward, args, kwargs)
        calls = self._pairing.split(unit, args, kwargs)
        results: list[Any] = []
        with self._entered(unit) as sides:
            for (sign, load), (half_args, half_kwargs) in zip(sides, calls, strict=True):
                self._sign = sign
                load()
                with self._halves.half(unit, sign):
                    results.append(self._result(unit, forward, half_args, half_kwargs))
            return self._pairing.merge(unit, calls, *results)

    def _result(
        self, unit: Unit, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self._lookup(unit):
            return map_tensors(forward(*args, **kwargs), self._copied_out)

    @contextmanager
    def _entered(self, unit: Unit) -> Iterator[list[tuple[int, Callable[[], None]]]]:
        """Perturbed values in scratch; yields for each side its sign and what points the parameters there."""
        # What a unit around this one has perturbed already stays as it is.
        weights = [self._of_parameter[id(p)] for p in unit.parameters if id(p) not in self._loaded]
        signs = [self._sign] if self._sign else [1, -1]
        scratches = self._scratches[self._devices[unit]][: len(signs)]
        outer_sign, levels = self._sign, [scratch.level for scratch in scratches]
        self._running.append(unit)
        try:
            copies = self._in_scratch(weights, scratches)
            copies.write(self._perturbation, signs[0])
            yield [
                (sign, functools.partial(self._load, weights, side))
                for sign, side in zip(signs, copies.sides, strict=True)
            ]
        finally:
            self._sign = outer_sign
            for weight in weights:
                self._loaded.discard(id(weight.parameter))
                weight.parameter.data = self._stand_ins[weight]
            for scratch, level in zip(scratches, levels, strict=True):
                scratch.level = level
            self._running.pop()

    def _in_scratch(self, weights: Sequence[Weight], scratches: Sequence[Scratch]) -> Copies:
        """Copies of the unit's weights that the units around it have not perturbed, for each side."""
        shapes, dtypes = [w.stored.shape for w in weights], [w.dtype for w in weights]
        key = (self._perturbation.family, len(scratches), *self._running)
        copies = self._copies.get(key)
        if copies is not None:
            for scratch in scratches:
                scratch.level += packed_bytes(shapes, dtypes)
            return copies
        sides = [scratch.take(shapes, dtypes) for scratch in scratches]
        copies = Copies(weights, sides, self._perturbation.family)
        if all(scratch.level <= scratch.num_bytes for scratch in scratches):
            self._copies[key] = copies
        return copies

    def _load(self, weights: Sequence[Weight], values: Sequence[Tensor]) -> None:
        for weight, tensor in zip(weights, values, strict=True):
            weight.parameter.data = tensor
            self._loaded.add(id(weight.parameter))

    def _copied_out(self, tensor: Tensor) -> Tensor:
        """A copy of a result that would change when the unit is left."""
        is_scratch = any(s.holds(tensor) for scratches in self._scratches.values() for s in scratches)
        return tensor.clone() if is_scratch or id(tensor) in self._loaded else tensor

    def _lookup(self, unit: Unit) -> AbstractContextManager[Any]:
        if unit.gathered is None or id(unit.gathered) in self._loaded:
            return nullcontext()
        return _Lookup(unit.gathered, self._rows)

    def _rows(self, parameter: nn.Parameter, ids: Tensor) -> Tensor:
        weight = self._of_parameter[id(parameter)]
        if ids.numel() < weight.stored.shape[0]:
            return self._perturbation.rows(weight, ids, self._sign)
        # Every row is drawn once, in the scratch that the unit which reads the weight leaves free.
        scratch = self._scratches[weight.stored.device][0]
        level = scratch.level
        (values,) = scratch.take([weight.stored.shape], [weight.dtype])
        try:
            Copies([weight], [[values]], self._perturbation.family).write(self._perturbation, self._sign)
            return functional.embedding(ids, values)
        finally:
            scratch.level = level

    def _refusal(self, weight: Weight, operator: str) -> Exception:
        owners = [str(unit) for unit in self.units if self._reads(unit, weight)]
        where = f"while {self._running[-1]} runs" if self._running else "while no unit runs"
        return NotStreamableForwardError(
            f"expected {weight.name} to be read by the forward of {' or '.join(owners)} alone, got "
            f"{operator} that reads it outside of its unit, {where}; use storage=Inplace() for this model"
        )

    @staticmethod
    def _reads(unit: Unit, weight: Weight) -> bool:
        return weight.parameter is unit.gathered or any(weight.parameter is p for p in unit.parameters)

    def _device_of(self, unit: Unit) -> torch.device:
        """Where a unit's parameters are.

        Raises:
            NotStreamableWeightError: on several devices.
        """
        parameters = unit.parameters or (unit.gathered,)
        devices = list(by_device(self._of_parameter[id(parameter)].stored for parameter in parameters))
        if len(devices) > 1:
            raise NotStreamableWeightError(
                f"expected all tuned parameters of a unit on one device, got those of {unit} on "
                f"{', '.join(map(str, devices))}; place such modules as a whole, or use storage=Inplace()"
            )
        return devices[0]

    def _check_units(self) -> None:
        for weight in self._weights:
            if not any(self._reads(unit, weight) for unit in self.units):
                raise NotStreamableWeightError(
                    f"expected every tuned tensor in the forward of a module, got {weight.name} in none; "
                    "use storage=Inplace()"
                )
        for unit in self.units:
            if unit.gathered is not None and getattr(unit.module, "max_norm", None) is not None:
                raise NotStreamableWeightError(
                    f"expected embeddings without max_norm, got {unit}: its forward pass writes its weight; "
                    "use storage=Inplace()"
                )


def largest_needs(
    devices: Mapping[Unit, torch.device], weights: Mapping[int, Weight]
) -> dict[torch.device, int]:
    """Bytes of scratch on each device, for the largest unit there and the containers around it."""
    needs = {}
    for unit in devices:
        entered = [weights[id(parameter)] for parameter in unit.parameters]
        needs[unit] = packed_bytes([w.stored.shape for w in entered], [w.dtype for w in entered])
    largest = dict.fromkeys(devices.values(), 0)
    for unit, device in devices.items():
        around = sum(
            needs[outer]
            for outer in devices
            if outer.is_container
            and outer is not unit
            and devices[outer] == device
            and (outer.name == "" or unit.name.startswith(outer.name + "."))
        )
        largest[device] = max(largest[device], needs[unit] + around)
    return largest


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
