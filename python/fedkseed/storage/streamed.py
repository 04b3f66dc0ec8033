"""The storage mode that perturbs copies of the weights, unit by unit, and never the stored ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedkseed.storage.interface import Direction, Evaluation, GroupUpdate, TunedWeights
from fedkseed.storage.perturbation import Perturbation, Weight
from fedkseed.storage.perturbed_model import PerturbedModel
from fedkseed.storage.reads import flush_waiting
from fedkseed.storage.rounding import RoundingSeeds, check_rounding
from fedkseed.storage.unsupported import check_servable
from fedkseed.storage.updates import GroupedWeights, interrupts_held


@dataclass(frozen=True)
class Streamed:
    """Leaves the stored weights as they are but for the update (`StreamedStorage`).

    Just before a unit of the model runs (a block of layers, an embedding, the head: `units.partition`), its
    weights w + eps z, or w - eps z, are written to scratch, and the unit runs on these. Embeddings get only
    the rows looked up. No restoring pass, no drift: the stored weights round once a step, at the update.

    Costs: two generations of the noise for the evaluations of a direction and one for the update; memory of
    the largest unit.

    Args:
        compute_dtype: torch.float32 runs the forward pass of 16-bit weights in fp32, on w +- eps z that is
            not rounded to 16 bits. The scratch is twice as large; processors without arithmetic of 16 bits
            are several times faster so, GPUs slower. None: the dtype of the stored weights.
        rounding: "stochastic" rounds 16-bit weights up or down at random, with the right mean: in scratch
            (alike on both sides) and at the update. No cost in memory. "nearest" does not.
    """

    compute_dtype: torch.dtype | None = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        check_rounding(self.rounding)
        if self.compute_dtype not in (None, torch.float32):
            raise ValueError(
                f"expected compute_dtype None or torch.float32, got {self.compute_dtype}; "
                "only 16-bit weights are converted, to fp32"
            )

    def open(self, weights: TunedWeights) -> StreamedStorage:
        """See `StorageOptions.open`."""
        return StreamedStorage(weights, self)


class StreamedStorage:
    """Evaluates on copies; one pass in place for the update, w <- alpha w - sum_i (lr g_i) / n z_i.

    Raises:
        TypeError: no model, or one that cannot be served (`unsupported`).
        ValueError: a tensor that no unit of the model reads, an embedding with max_norm.
    """

    def __init__(self, weights: TunedWeights, options: Streamed) -> None:
        if weights.model is None:
            raise TypeError(
                "expected the model whose forward pass is perturbed, got tensors alone; give the model, or "
                "model= beside them, or use storage=Inplace()"
            )
        check_servable(weights.model)
        self._weights = GroupedWeights(weights)
        self._tensors = [tensor for group in weights.groups for tensor in group]
        self._eps = weights.eps
        self._family = weights.family
        self._rounding = RoundingSeeds(weights.seed, options.rounding)
        self._model = PerturbedModel(weights.model, _seen_weights(weights, options.compute_dtype))

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
        """Nothing waits: the stored weights are never perturbed."""

    def state(self) -> dict[str, Any]:
        """The number of passes rounded, if that is stochastic."""
        return self._rounding.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Storage.load_state`."""
        self._rounding.load_state(state)

    def _direction(
        self,
        perturbation: Perturbation,
        evaluation: Evaluation,
        project: Callable[[float, float], float | None],
    ) -> Direction:
        plus = self._model.evaluate(evaluation.side, perturbation, 1)
        minus = self._model.evaluate(evaluation.side, perturbation, -1)
        return Direction(plus, minus, project(plus, minus))


def _seen_weights(weights: TunedWeights, compute_dtype: torch.dtype | None) -> list[Weight]:
    """The parameters that a perturbed forward pass must see otherwise than they are stored."""
    assert weights.model is not None
    streams = {
        id(tensor): stream
        for group, streams in zip(weights.groups, weights.streams, strict=True)
        for tensor, stream in zip(group, streams, strict=True)
    }
    seen = []
    for name, parameter in weights.model.named_parameters():
        widens = compute_dtype is not None and parameter.dtype in (torch.bfloat16, torch.float16)
        dtype = compute_dtype if compute_dtype is not None and widens else parameter.dtype
        if id(parameter) in streams or widens:
            seen.append(Weight(name, parameter, parameter.data, streams.pop(id(parameter), None), dtype))
    if streams:
        raise ValueError(
            f"expected tensors that are parameters of the model, got {len(streams)} that are not; "
            "leave them out"
        )
    return seen
