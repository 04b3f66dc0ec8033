"""The storage mode that perturbs copies of the weights, unit by unit, and never the stored ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedkseed.model.placement import Places
from fedkseed.model.waiting import flush_waiting
from fedkseed.storage.interface import SIXTEEN_BIT, Evaluation, GroupUpdate, TunedWeights
from fedkseed.storage.streamed.copies import Perturbation, Weight
from fedkseed.storage.streamed.forward import PerturbedModel
from fedkseed.storage.streamed.refusals import NotStreamableModelError, NotStreamableWeightError
from fedkseed.storage.streamed.units import check_servable
from fedkseed.storage.updates import GroupedWeights, RoundingSeeds, Written, check_rounding


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
        NotStreamableModelError (a TypeError): no model, or one that cannot be served
            (`units.check_servable`).
        NotStreamableWeightError (a ValueError): a tensor that no unit of the model reads, an embedding with
            max_norm, a unit on several devices.
    """

    def __init__(self, weights: TunedWeights, options: Streamed) -> None:
        if weights.model is None:
            raise NotStreamableModelError(
                "expected the model whose forward pass is perturbed, got tensors alone; give the model, or "
                "model= beside them, or use storage=Inplace()"
            )
        check_servable(weights.model)
        self._tuned = weights
        self._options = options
        self._tensors = [tensor for group in weights.groups for tensor in group]
        self._written = Written([name for names in weights.names for name in names], self._tensors)
        self._rounding = RoundingSeeds(weights.seed, options.rounding)
        self._residuals: list[list[torch.Tensor | None]] = [
            [_residual(tensor) if options.compensated else None for tensor in group]
            for group in weights.groups
        ]
        self._prepare()

    def _prepare(self) -> None:
        """Checks the weights as they are now, and what of the model has to see them perturbed."""
        weights = self._tuned
        assert weights.model is not None
        self._weights = GroupedWeights(weights, self._residuals)
        seen = _seen_weights(weights, self._options.compute_dtype, self._residuals)
        self._model = PerturbedModel(weights.model, seen, self._options.paired)
        self._dtypes = {
            name: tensor.dtype
            for names, group in zip(weights.names, weights.groups, strict=True)
            for name, tensor in zip(names, group, strict=True)
        }
        names = [*itertools.chain(*weights.names), *(weight.name for weight in seen)]
        self._places = Places([*self._tensors, *(weight.parameter for weight in seen)], names)

    def prepare(self) -> bool:
        """See `Storage.prepare`; residuals move along."""
        have_moved = self._places.have_changed()
        if have_moved:
            if self._options.compensated:
                self._move_residuals()
            self._prepare()
        else:
            self._weights.whole.check()  # shapes and strides: the forward pass would undo what changed them
        return have_moved

    def _move_residuals(self) -> None:
        """Lays residuals out as their weights are now.

        Raises:
            RuntimeError: a weight of 16 bits has another dtype; names the first.
        """
        moved = []
        for names, group, residuals in zip(
            self._tuned.names, self._tuned.groups, self._residuals, strict=True
        ):
            for name, tensor, residual in zip(names, group, residuals, strict=True):
                dtype = self._dtypes[name]
                if residual is not None and tensor.dtype != dtype:
                    raise RuntimeError(
                        f"expected {name} in {dtype} as when the optimizer was made, got {tensor.dtype}: "
                        "what compensated=True keeps beside a weight of 16 bits belongs to its dtype; "
                        "convert the model first, then make the optimizer"
                    )
            moved.append([_residual(tensor) for tensor in group])
        for new, old in zip(itertools.chain(*moved), itertools.chain(*self._residuals), strict=True):
            if new is not None and old is not None:
                new.copy_(old)
        self._residuals = moved

    def measure(
        self, seeds: Sequence[int], evaluation: Evaluation, is_apart: bool
    ) -> list[tuple[float, float]]:
        """See `Storage.measure`; the stored weights are w all the while."""
        flush_waiting(self._tensors)  # another optimizer's; its hooks would meet the stand-ins
        rounding_seeds = self._rounding.next(len(seeds))
        with self._model.swapped():
            losses = [
                self._losses(Perturbation(seed, self._tuned.eps, self._tuned.family, rounding), evaluation)
                for seed, rounding in zip(seeds, rounding_seeds, strict=True)
            ]
        if is_apart:
            self._written.note()
        return losses

    def update(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        gs: Sequence[float | None],
        next_seed: int | None = None,
    ) -> None:
        """See `Storage.update`."""
        num_passes = len(seeds) + 1
        self._weights.update(seeds, updates, gs, rounding_seed=self._rounding.next(num_passes)[-1])
        self._rounding.advance(num_passes)

    def check_unwritten(self) -> None:
        """See `Storage.check_unwritten`."""
        self._written.check()

    def restore(self) -> None:
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

    def _losses(self, perturbation: Perturbation, evaluation: Evaluation) -> tuple[float, float]:
        if self._options.paired:
            return self._model.evaluate_both(evaluation.both, perturbation)
        plus = self._model.evaluate(evaluation.side, perturbation, 1)
        return plus, self._model.evaluate(evaluation.side, perturbation, -1)


def _residual(tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.dtype not in SIXTEEN_BIT:
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
        widens = compute_dtype is not None and parameter.dtype in SIXTEEN_BIT
        dtype = compute_dtype if compute_dtype is not None and widens else parameter.dtype
        if id(parameter) in tuned or widens:
            stream, residual = tuned.pop(id(parameter), (None, None))
            seen.append(Weight(name, parameter, parameter.data, stream, dtype, residual))
    if tuned:
        raise NotStreamableWeightError(
            f"expected tensors that are parameters of the model, got {len(tuned)} that are not; "
            "leave them out"
        )
    return seen
