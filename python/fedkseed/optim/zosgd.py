"""Zeroth-order SGD with a new seed each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkseed._checks import check_count, check_learning_rate, check_real, check_seed, check_weight_decay
from fedkseed.optim.base import ZerothOrderOptimizer
from fedkseed.optim.evaluation import Losses
from fedkseed.optim.gradient import ProjectedGradient
from fedkseed.optim.measurement import Plan, Reduce
from fedkseed.optim.parameters import Params
from fedkseed.seeds import derived_seed
from fedkseed.storage import DEFAULT_STORAGE, GroupUpdate, StorageChoice
from fedkseed_kernels import derived

#: Above what rounding alpha leaves: half a step of fp32 below 1, which is 2^-25.
_LARGEST_CARRIED = 2.0**-24


class ZOSGD(ZerothOrderOptimizer):
    """Zeroth-order SGD with a new seed each time, decoupled weight decay and several directions a step.

        w <- (1 - lr weight_decay) w - lr / n sum_i g_i z(s_i)

    Each g_i is measured around the same w. A step makes 2 n evaluations, and in place 2 n + 1 passes over
    the weights, decay and update within the last one (`InplaceStorage`; chained, 2 n passes).
    alpha = 1 - lr weight_decay is an fp32 number, whose steps are 6e-8: what its rounding leaves out is
    carried to the next step, in fp64 for each group, so that the decay asked for arrives over time.

    Seed number i is the candidate seed of index i (contract, section 9, purpose 0) of ``seed``; step t takes
    the numbers n t to n t + n - 1. So the seeds of a run are those of SeedPool(seed, n steps).

    Args:
        params: a model (a parameter's stream is then its index in the manifest), or ``named_parameters()``, a
            list of tensors, or a list of groups, dicts with "params" and, if wanted, "lr" and "weight_decay"
            (the stream is then the position among all given, unless ``model`` is). Parameters with
            ``requires_grad=False`` are frozen: left alone, but counted; plain tensors are always tuned.
        lr: learning rate, finite, at least 0.
        eps: scale of the perturbation, above 0.
        seed: any integer, taken mod 2^64.
        weight_decay: at least 0, and lr weight_decay at most 1.
        num_directions: n, the seeds of a step.
        max_abs_g: bound to which g is clipped, rounded down to fp32.
        max_loss_gap: a direction with |L+ - L-| above it is skipped. The mean stays one over n. If all
            directions of a step are skipped, the step changes nothing: no weight decay either.
        model: beside a list or groups: the model whose manifest gives the streams, so that grouping and
            leaving out parameters does not change what noise they get.
        storage: how both sides of the weights are visited (`fedkseed.storage`): a mode, or "auto" for the one
            that suits, which is said (logger "fedkseed") and kept in the attribute ``storage``. That is
            `Inplace()` for weights of 32 bits and more and for models that cannot be streamed, else
            ``Streamed(compensated=True)``, on a processor with ``compute_dtype=torch.float32``.
        family: of the noise, "gaussian" or "rademacher".
        reduce: makes the losses of several ranks one: called once a step with an fp64 tensor [n, 2] on the
            CPU, which it changes in place, or returns another for. False: the closure returns the losses of
            all ranks already. None: there is one rank; with more the first measurement refuses.

    Attributes:
        seed: in [0, 2^64).
        num_directions: as given.
        projected_grads: g of each direction of the last step, as used; empty before the first.
        eps, family, last, manifest, num_skipped, storage: see `ZerothOrderOptimizer`.

    Raises:
        TypeError: a tensor that is not floating point or is sharded; a number of another type.
        ValueError: a number out of range, nothing to tune, a tensor twice, an unknown option of a group.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        eps: float = 1e-3,
        *,
        seed: int = 0,
        weight_decay: float = 0.0,
        num_directions: int = 1,
        max_abs_g: float | None = None,
        max_loss_gap: float | None = None,
        model: nn.Module | None = None,
        storage: StorageChoice = DEFAULT_STORAGE,
        family: str = "gaussian",
        reduce: Reduce | None = None,
    ) -> None:
        self.seed = check_seed(seed)
        self.num_directions = check_count("num_directions", num_directions, 1, 2**16)
        self.projected_grads: tuple[float, ...] = ()
        defaults = {"lr": check_learning_rate(lr), "weight_decay": check_weight_decay(weight_decay)}
        gradient = ProjectedGradient(eps, max_abs_g, max_loss_gap)
        super().__init__(params, defaults, gradient, model, _check_group, storage, family, self.seed, reduce)
        self._carried_decay = [0.0] * len(self.param_groups)
        self._updates()

    @torch.no_grad()
    def step(self, closure: Callable[[], Losses] | None = None) -> float:  # type: ignore[override]
        """One step along the noise of the next ``num_directions`` seeds.

        Without a closure it is made of what `measure` measured since the last step. The closure is called
        twice for each seed, without gradients. It must take the same batch every time and leave the weights
        alone.

        Args:
            closure: evaluates the loss.

        Returns:
            The mean loss of the evaluations in fp64: NaN or infinite if a loss was.

        Raises:
            RuntimeError: neither a closure nor a measurement; weights were written since they were measured.
            ValueError: lr or weight_decay of a group out of range, a loss of more than one element, an update
                that is not finite in fp32.
            TypeError: a loss that is neither a tensor nor a number.
        """
        return self._step(closure)

    def _plan(self, seed_index: int | None) -> Plan:
        if seed_index is not None:
            raise TypeError("expected no seed_index: the seeds of ZOSGD are new ones; FedKSeedSGD has a pool")
        first = self._num_drawn
        seeds = [_seed(self.seed, first + number) for number in range(self.num_directions)]
        return Plan(seeds, None, True, _seed(self.seed, first + self.num_directions))

    def _updates(self) -> list[GroupUpdate]:
        return [
            _decaying_update(group["lr"], group["weight_decay"], carried)
            for group, carried in zip(self.param_groups, self._carried_decay, strict=True)
        ]

    def _note(self, plan: Plan, projected_grads: list[float], updates: list[GroupUpdate] | None) -> None:
        self._num_drawn += len(plan.seeds)
        self.projected_grads = tuple(projected_grads)
        if updates is not None:
            self._carried_decay = [
                carried + (update.lr * group["weight_decay"] - (1.0 - update.alpha))
                for group, update, carried in zip(
                    self.param_groups, updates, self._carried_decay, strict=True
                )
            ]

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "seed": self.seed, "num_directions": self.num_directions}

    def _progress(self) -> dict[str, Any]:
        return {
            **super()._progress(),
            "projected_grads": list(self.projected_grads),
            "carried_decay": list(self._carried_decay),
        }

    def _parsed(self, own: dict[str, Any]) -> dict[str, Any]:
        nothing = [0.0] * len(self.param_groups)  # states of 0.2 and before carried nothing
        carried = [check_real("carried_decay", value) for value in own.get("carried_decay", nothing)]
        if len(carried) != len(nothing) or not all(abs(value) < _LARGEST_CARRIED for value in carried):
            raise ValueError(f"expected a carried decay for each of {len(nothing)} groups, got {carried}")
        return {
            **super()._parsed(own),
            "projected_grads": tuple(float(g) for g in own["projected_grads"]),
            "_carried_decay": carried,
        }


def _seed(base_seed: int, number: int) -> int:
    return derived_seed(base_seed, derived.PURPOSE_CANDIDATE_SEEDS, number)


def _check_group(options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - {"lr", "weight_decay"})
    if unknown:
        raise ValueError(f"expected groups with params, lr and weight_decay alone, got {', '.join(unknown)}")


def _decaying_update(lr: Any, weight_decay: Any, carried: float) -> GroupUpdate:
    """Args: carried: decay that the steps before owe to what was asked for, or were ahead of it by."""
    lr, weight_decay = check_learning_rate(lr), check_weight_decay(weight_decay)
    decay = lr * weight_decay
    if decay > 1:
        raise ValueError(
            f"expected lr weight_decay of at most 1, got {lr} times {weight_decay}: "
            "the weights would change their sign"
        )
    return GroupUpdate(lr, float(np.float32(1.0 - (decay + carried))) if decay else 1.0)
