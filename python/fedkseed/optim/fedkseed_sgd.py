"""Zeroth-order SGD over a pool of candidate seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedkseed._checks import check_count, check_learning_rate
from fedkseed.ledger import Ledger
from fedkseed.optim.base import ZerothOrderOptimizer
from fedkseed.optim.evaluation import Losses
from fedkseed.optim.gradient import ProjectedGradient
from fedkseed.optim.ledgers import ledger_of
from fedkseed.optim.measurement import Plan, Reduce
from fedkseed.optim.parameters import Params
from fedkseed.seeds import SeedPool
from fedkseed.storage import DEFAULT_STORAGE, GroupUpdate, StorageChoice

_REBUILD = (
    "a model tuned by FedKSeed is w0 plus one coefficient a seed for all of its parameters, and could not be "
    "rebuilt from seeds and scalars otherwise"
)


class FedKSeedSGD(ZerothOrderOptimizer):
    """Zeroth-order SGD over a pool of candidate seeds: what it did is one coefficient a seed.

    In place a step makes three passes over the weights: +eps z; -2 eps z; restore and update in one,
    (eps - lr g) z. With storage Inplace(chained=True) it makes two where its seed was known before: drawn,
    not passed as seed_index.

    Args:
        params: a model (a parameter's stream is then its index in the manifest), or ``named_parameters()``, a
            list of tensors, or a list of groups (the stream is then the position among all given, unless
            ``model`` is). Parameters with ``requires_grad=False`` are frozen: left alone, but counted; plain
            tensors are always tuned.
        lr: learning rate, finite, at least 0.
        eps: scale of the perturbation, above 0.
        seed_pool: the candidate seeds.
        schedule: indices into the pool for the steps to come; if None, they are drawn from the pool,
            uniformly.
        weight_decay: must be 0.
        max_abs_g: bound to which g is clipped, rounded down to fp32.
        max_loss_gap: a step with |L+ - L-| above it is skipped.
        model: beside a list or groups: the model whose manifest gives the streams, without which no ledger
            can be made.
        storage: as in `ZOSGD`; "auto" is not compensated here, for the ledger has every update: `Streamed()`
            for weights of 16 bits, on a processor with ``compute_dtype=torch.float32``.
        family: of the noise, "gaussian" or "rademacher".
        reduce: makes the losses of several ranks one, as in `ZOSGD`.

    Attributes:
        history: one (index into the pool, g) for each step since construction; g = 0 if it was skipped.
        coefficients: fp64 [K], the sum of -lr g over the steps that drew each seed.
        eps, family, last, manifest, num_skipped, storage: see `ZerothOrderOptimizer`.

    Raises:
        TypeError: a tensor that is not floating point or is sharded; a number or the pool of another type.
        ValueError: a number or the schedule out of range, nothing to tune, a tensor twice, weight decay, a
            group with options of its own.
    """

    _LEDGER_COUNTS = True

    def __init__(
        self,
        params: Params,
        lr: float,
        eps: float,
        seed_pool: SeedPool,
        *,
        schedule: Sequence[int] | NDArray[np.uint16] | None = None,
        weight_decay: float = 0.0,
        max_abs_g: float | None = None,
        max_loss_gap: float | None = None,
        model: nn.Module | None = None,
        storage: StorageChoice = DEFAULT_STORAGE,
        family: str = "gaussian",
        reduce: Reduce | None = None,
    ) -> None:
        if not isinstance(seed_pool, SeedPool):
            raise TypeError(f"expected a SeedPool, got {type(seed_pool).__name__}")
        if weight_decay != 0:
            raise ValueError(f"expected weight_decay 0, got {weight_decay}: {_REBUILD}")
        lr = check_learning_rate(lr)
        self.seed_pool = seed_pool
        self.history: list[tuple[int, float]] = []
        self.coefficients: NDArray[np.float64] = np.zeros(seed_pool.num_seeds)
        self._schedule = None if schedule is None else [self._check_index(index) for index in schedule]

        def check_group(options: dict[str, Any]) -> None:
            same = {"lr": lr, "weight_decay": 0}
            for key, value in options.items():
                if not (key in same and value == same[key]):
                    raise ValueError(
                        f"expected groups without options of their own, got {key}={value!r}: {_REBUILD}"
                    )

        gradient = ProjectedGradient(eps, max_abs_g, max_loss_gap)
        super().__init__(
            params, {"lr": lr}, gradient, model, check_group, storage, family, seed_pool.base_seed, reduce
        )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Losses] | None = None, seed_index: int | None = None
    ) -> float:
        """One step along the noise of one candidate seed.

        Without a closure it is made of what `measure` measured since the last step. The closure is called
        twice, without gradients. It must take the same batch both times and leave the weights alone.

        Args:
            closure: evaluates the loss.
            seed_index: index into the pool; the schedule's next entry if None. Without a closure `measure`
                has taken it.

        Returns:
            (L+ + L-) / 2 in fp64: NaN or infinite if a loss was.

        Raises:
            RuntimeError: neither a closure nor a measurement; weights were written since they were measured.
            ValueError: an index out of range, an exhausted schedule, learning rates that differ between
                groups, weight decay, a loss of more than one element, an update that is not finite in fp32.
            TypeError: a loss that is neither a tensor nor a number; an index without a closure.
        """
        if closure is None and seed_index is not None:
            raise TypeError("expected seed_index beside a closure, got it alone; give it to measure")
        return self._step(closure, seed_index)

    def ledger(self, w0: nn.Module, notes: Mapping[str, str] | None = None) -> Ledger:
        """What was done to w0 since, as a file of a few kilobytes: the coefficients and what they belong to.

        Args:
            w0: a model that holds the weights of the start, made as the tuned one was; not the tuned one.
            notes: free texts, see `Ledger`.

        Raises:
            LedgerError: the optimizer was made of a list without ``model``; a coefficient that is not finite
                in fp32; notes that no ledger may have.
            IdentityError: w0 is the tuned model, or has other parameters, another frozen set or dtype; the
                first parameter that differs is named.
        """
        streams = itertools.chain.from_iterable(self._streams)
        weights = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        tuned = zip(streams, weights, strict=True)
        return ledger_of(self.manifest, tuned, self.seed_pool, self.coefficients, self.family, w0, notes)

    def _plan(self, seed_index: int | None) -> Plan:
        if seed_index is None:
            index, following = self._scheduled_index(self._num_drawn), self._following_index()
        else:
            index, following = self._check_index(seed_index), None
        next_seed = None if following is None else int(self.seed_pool.seeds[following])
        return Plan([int(self.seed_pool.seeds[index])], index, seed_index is None, next_seed)

    def _updates(self) -> list[GroupUpdate]:
        return [GroupUpdate(self._learning_rate())] * len(self.param_groups)

    def _note(self, plan: Plan, projected_grads: list[float], updates: list[GroupUpdate] | None) -> None:
        (g,) = projected_grads
        assert plan.index is not None
        self._num_drawn += plan.is_drawn
        self.coefficients[plan.index] -= self._learning_rate() * g
        self.history.append((plan.index, g))

    def _identity(self) -> dict[str, Any]:
        pool = {"base_seed": self.seed_pool.base_seed, "num_seeds": self.seed_pool.num_seeds}
        return {**pool, **super()._identity()}

    def _progress(self) -> dict[str, Any]:
        return {
            **super()._progress(),
            "schedule": self._schedule,
            "history": list(self.history),
            "coefficients": torch.from_numpy(self.coefficients.copy()),
        }

    def _parsed(self, own: dict[str, Any]) -> dict[str, Any]:
        schedule, coefficients = own["schedule"], own["coefficients"].cpu().double().numpy().copy()
        if coefficients.shape != self.coefficients.shape or not np.isfinite(coefficients).all():
            raise ValueError(
                f"expected {self.seed_pool.num_seeds} finite coefficients, got shape {coefficients.shape}"
            )
        return {
            **super()._parsed(own),
            "_schedule": None if schedule is None else [self._check_index(index) for index in schedule],
            "history": [(self._check_index(index), float(g)) for index, g in own["history"]],
            "coefficients": coefficients,
        }

    def _learning_rate(self) -> float:
        rates = [check_learning_rate(group["lr"]) for group in self.param_groups]
        if len(set(rates)) != 1:
            raise ValueError(f"expected one lr for all groups, got {rates}: {_REBUILD}")
        for group in self.param_groups:
            if group.get("weight_decay", 0) != 0:
                raise ValueError(f"expected weight_decay 0, got {group['weight_decay']}: {_REBUILD}")
        return rates[0]

    def _check_index(self, index: Any) -> int:
        return check_count("seed index", index, 0, self.seed_pool.num_seeds - 1)

    def _following_index(self) -> int | None:
        """Index of the step after this one; None if the schedule ends with this one."""
        step = self._num_drawn + 1
        is_last = self._schedule is not None and step >= len(self._schedule)
        return None if is_last else self._scheduled_index(step)

    def _scheduled_index(self, step: int) -> int:
        if self._schedule is None:
            return self.seed_pool.drawn(step)
        if step >= len(self._schedule):
            raise ValueError(
                f"expected at most {len(self._schedule)} steps, the length of the schedule, got one more; "
                "pass seed_index, or a longer schedule at construction"
            )
        return self._schedule[step]
