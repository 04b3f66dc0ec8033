"""The storage mode that perturbs copies of the weights, unit by unit, and never the stored ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedkseed.model.waiting import flush_waiting
from fedkseed.storage.interface import Direction, Evaluation, GroupUpdate, TunedWeights
from fedkseed.storage.streamed.copies import Perturbation, Weight
from fedkseed.storage.streamed.forward import PerturbedModel
from fedkseed.storage.streamed.units import check_servable
from fedkseed.storage.updates import GroupedWeights, RoundingSeeds, check_rounding, interrupts_held

_SHORT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Streamed:
    """Leaves the stored weights as they are but for the update (`StreamedStorage`).

    Just before a unit of the model runs (a block of layers, an embedding, the head: `units.partition`), its
    weights w + eps z, or w - eps z, are written to scratch, and the unit runs on these. Embeddings get only
    the rows looked up. No restoring pass, no drift: the stored weights round once a step, at the update.

    Costs: two generations of the noise for the evaluations of a direction and one for the update; memory of
    the largest unit. Of an embedding with no more rows than ids are looked up, all rows are written: within
    that memory where they fit, else in memory of their own, no more than the lookup's result takes.

    Args:
        paired: one call of the closure for both sides: it runs a batch doubled along dimension 0 and returns
            two losses, of the first half and of the second (`fedkseed.optim.paired`). Each unit runs on the
            first half with w + eps z, then on the second with w - eps z. One generation of the noise instead
            of two for the evaluations; memory of twice the largest unit, and of the doubled batch. The model
            has to keep the batch in dimension 0, and to draw no random numbers.
        compensated: keeps what rounding the update to 16 bits would lose, in 2 bytes a parameter more
            (contract, section 6.5). The perturbed forward passes read it too; other reads of the weights see
            them rounded. fp32 and fp64 weights have no such thing. Whoever writes to the weights between
            steps makes a new optimizer. Not together with stochastic rounding.
        compute_dtype: torch.float32 runs the forward pass of 16-bit weights in fp32, on w +- eps z that is
            not rounded to 16 bits. The scratch is twice as large; processors without arithmetic of 16 bits
            are several times faster so, GPUs slower. None: the dtype of the stored weights.
        rounding: "stochastic" rounds 16-bit weights up or down at random, with the right mean: in scratch
            (alike on both sides) and at the update. No cost in memory. "nearest" does not.
    """

    paired: bool = False
    compensated: bool = False
    compute_dtype: torch.dtype | None = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        for name in ("paired", "compensated"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"expected {name} as True or False, got {getattr(self, name)!r}")
        check_rounding(self.rounding)
        if self.compute_dtype not in (None, torch.float32):
            raise ValueError(
                f"expected compute_dtype None or torch.float32, got {self.compute_dtype}; "
                "only 16-bit weights are converted, to fp32"
            )

        if self.compensated and self.rounding == "stochastic":
            raise ValueError(
                "expected compensated=True or rounding='stochastic', got both; compensated updates lose "
                "nothing that could be left to chance"
            )

    def open(self, weights: TunedWeights) -> StreamedStorage:
        """See `StorageOptions.open`."""
        return StreamedStorage(weights, self)


class StreamedStorage:
    """Evaluates on copies; one pass in place for the update, w <- alpha w - sum_i (lr g_i) / n z_i.

    Raises:
        TypeError: no model, or one that cannot be served (`units.check_servable`).
        ValueError: a tensor that no unit of the model reads, an embedding with max_norm, a unit on several
            devices.
    """

    def __init__(self, weights: TunedWeights, options: Streamed) -> None:
        if weights.model is None:
            raise TypeError(
                "expected the model whose forward pass is perturbed, got tensors alone; give the model, or "
                "model= beside them, or use storage=Inplace()"
            )
        check_servable(weights.model)
        self._options = options
        self._eps = weights.eps
        self._family = weights.family
        self._residuals = [
            [_residual(tensor) if options.compensated else None for tensor in group]
            for group in weights.groups
        ]
        self._weights = GroupedWeights(weights, self._residuals)
        self._tensors = [tensor for group in weights.groups for tensor in group]
        self._rounding = RoundingSeeds(weights.seed, options.rounding)
        seen = _seen_weights(weights, options.compute_dtype, self._residuals)
        self._model = PerturbedModel(weights.model, seen, options.paired)

    def walk(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        evaluation: Evaluation,
        project: Callable[[float, float], float | None],
        record: Callable[[list[Direction]], None],
        next_seed: int | None = None,
    ) -> list[Direction]:
        """See `Storage.walk`."""
        flush_waiting(self._tensors)  # another optimizer's; its hooks would meet the stand-ins
        self._weights.check_in_place()
        rounding_seeds = self._rounding.next(len(seeds) + 1)
        with self._model.swapped():
            directions = [
                self._direction(Perturbation(seed, self._eps, self._family, rounding), evaluation, project)
                for seed, rounding in zip(seeds, rounding_seeds, strict=False)
            ]
        with interrupts_held():
            self._weights.update(seeds, updates, directions, rounding_seed=rounding_seeds[-1])
            self._rounding.advance(len(seeds) + 1)
            record(directions)
        return directions

    def flush(self) -> None:
        """Does nothing: the stored weights are never perturbed."""

    def state(self) -> dict[str, Any]:
        """Copies of the residuals, if compensated; the number of passes made, if rounding seeds count it."""
        state = self._rounding.state()
        if self._options.compensated:
            state["residuals"] = [residual.clone() for residual in self._existing_residuals()]
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Storage.load_state`."""
        if not self._options.compensated:
            self._rounding.load_state(state)
            return
        own, loaded = self._existing_residuals(), state.get("residuals")
        if set(state) != {"residuals"} or not isinstance(loaded, list):
            raise ValueError(f"expected a storage state of residuals, a list, got {sorted(state)}")
        shapes = [(residual.dtype, residual.shape) for residual in own]
        got = [(r.dtype, r.shape) if isinstance(r, torch.Tensor) else type(r) for r in loaded]
        if shapes != got:
            raise ValueError(f"expected residuals of {shapes}, got {got}; take the state of this model")
        for mine, theirs in zip(own, loaded, strict=True):
            mine.copy_(theirs)

    def _existing_residuals(self) -> list[torch.Tensor]:
        return [residual for group in self._residuals for residual in group if residual is not None]

    def _direction(
        self,
        perturbation: Perturbation,
        evaluation: Evaluation,
        project: Callable[[float, float], float | None],
    ) -> Direction:
        if self._options.paired:
            plus, minus = self._model.evaluate_both(evaluation.both, perturbation)
        else:
            plus = self._model.evaluate(evaluation.side, perturbation, 1)
            minus = self._model.evaluate(evaluation.side, perturbation, -1)
        return Direction(plus, minus, project(plus, minus))


def _residual(tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.dtype not in _SHORT:
        return None
    strides = tensor.stride()
    return torch.empty_strided(tensor.shape, strides, dtype=torch.int16, device=tensor.device).zero_()


def _seen_weights(
    weights: TunedWeights,
    compute_dtype: torch.dtype | None,
    residuals: Sequence[Sequence[torch.Tensor | None]],
) -> list[Weight]:
    """The parameters that a perturbed forward pass must see otherwise than they are stored."""
    assert weights.model is not None
    tuned = {
        id(tensor): (stream, residual)
        for columns in zip(weights.groups, weights.streams, residuals, strict=True)
        for tensor, stream, residual in zip(*columns, strict=True)
    }
    seen = []
    for name, parameter in weights.model.named_parameters():
        widens = compute_dtype is not None and parameter.dtype in _SHORT
        dtype = compute_dtype if compute_dtype is not None and widens else parameter.dtype
        if id(parameter) in tuned or widens:
            stream, residual = tuned.pop(id(parameter), (None, None))
            seen.append(Weight(name, parameter, parameter.data, stream, dtype, residual))
    if tuned:
        raise ValueError(
            f"expected tensors that are parameters of the model, got {len(tuned)} that are not; "
            "leave them out"
        )
    return seen
