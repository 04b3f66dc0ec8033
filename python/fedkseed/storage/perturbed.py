"""Weights that are perturbed where they are stored, and the passes that move them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import fedkseed_kernels
from fedkseed.seeds import derived_seed
from fedkseed.storage.interface import GroupUpdate, TunedWeights
from fedkseed.storage.interrupts import interrupts_held
from fedkseed_kernels import derived


class PerturbedWeights:
    """Stored weights that stand at w + offset z(seed); every method is one pass over them, or none.

    Args:
        weights: w as they stand now.
        rounding: of every pass, "nearest" or "stochastic": then pass n has the rounding seed
            derived.seeds(weights.seed, 3, n).
        residuals: for each tensor of each group None or its residual (contract, section 6.5).

    Attributes:
        tensors: the weights.
        seed, offset: where they stand; at offset 0 that is w, whatever the seed.
        num_passes: made so far.
        is_waiting: whether they stand there for a step to come.

    Raises:
        TypeError, ValueError: what the kernels refuse: a dtype, tensors that overlap, devices that are mixed.
    """

    def __init__(
        self,
        weights: TunedWeights,
        rounding: str,
        residuals: Sequence[Sequence[torch.Tensor | None]] | None = None,
    ) -> None:
        self.tensors = [tensor for group in weights.groups for tensor in group]
        self._streams = [stream for group in weights.streams for stream in group]
        self._family = weights.family
        if residuals is None:
            residuals = [[None] * len(group) for group in weights.groups]
        self._whole = fedkseed_kernels.prepare(
            self.tensors,
            streams=self._streams,
            family=weights.family,
            residuals=[residual for group in residuals for residual in group],
        )
        self._groups = (
            [self._whole]
            if len(weights.groups) == 1
            else [
                fedkseed_kernels.prepare(
                    list(group), streams=list(streams), family=weights.family, residuals=list(left)
                )
                for group, streams, left in zip(weights.groups, weights.streams, residuals, strict=True)
            ]
        )
        self._rounding = rounding
        self._base_seed = weights.seed
        self._lock = threading.Lock()
        self.seed = 0
        self.offset = 0.0
        self.num_passes = 0
        self.is_waiting = False

    def move(self, seed: int, offset: float) -> None:
        """To w + offset z(seed); no pass if they stand there."""
        if (seed, offset) == (self.seed, self.offset):
            return
        if seed == self.seed or not self.offset:
            seeds, coeffs = [seed], [offset - self.offset]
        else:
            seeds, coeffs = [self.seed, seed], [-self.offset, offset]
        with self._pass() as rounding:
            self._whole.seed_axpy_(seeds, coeffs, **rounding)
            self.seed, self.offset = seed, offset

    def update(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        gradients: Sequence[float],
        following: tuple[int, float] | None = None,
        num_passes_before: int = 0,
    ) -> None:
        """w <- alpha w - lr / n sum_i g_i z(seeds_i) for each group, from where the weights stand.

        Args:
            seeds: n of them, the last one that of the perturbation.
            updates: one for each group of tensors.
            gradients: g of each seed.
            following: the seed and the offset at which the weights wait afterwards; at w itself if None.
            num_passes_before: passes of this step that were made elsewhere and count among the others.

        Raises:
            ValueError: a coefficient is not finite in fp32; nothing has moved.
        """
        all_coeffs = [self._coefficients(update, gradients) for update in updates]
        seed, offset = (seeds[-1], 0.0) if following is None else following
        if following is not None:
            seeds = [*seeds, seed]
            all_coeffs = [[*coeffs, offset] for coeffs in all_coeffs]
        with self._pass(num_passes_before) as rounding:
            if len(set(updates)) == 1:
                self._whole.seed_axpy_(seeds, all_coeffs[0], alpha=updates[0].alpha, **rounding)
            else:
                self.check_in_place()  # before the first is updated
                for group, update, coeffs in zip(self._groups, updates, all_coeffs, strict=True):
                    group.seed_axpy_(seeds, coeffs, alpha=update.alpha, **rounding)
            self.seed, self.offset = seed, offset
            self.is_waiting = following is not None

    def check_in_place(self) -> None:
        """Moves nothing.

        Raises:
            RuntimeError: a tensor is not where, or what, it was at construction.
        """
        self._whole.seed_axpy_([], [])

    def restore(self) -> None:
        """Back to w, wherever the tensors are now, for they may be what was changed."""
        if self.offset:
            with torch.no_grad(), self._pass() as rounding:
                fedkseed_kernels.perturb_(
                    self.tensors,
                    self.seed,
                    -self.offset,
                    streams=self._streams,
                    family=self._family,
                    **rounding,
                )
                self.offset = 0.0
                self.is_waiting = False

    def flush(self) -> None:
        """Back to w if they wait for a step; threads that read them may all call this."""
        with self._lock:
            if self.is_waiting:
                self.restore()

    @contextmanager
    def _pass(self, num_before: int = 0) -> Iterator[dict[str, Any]]:
        """A pass behind ``num_before`` others, and the note of all, without Ctrl-C between them.

        Yields how the kernels shall round.
        """
        with interrupts_held():
            if self._rounding == "nearest":
                yield {}
            else:
                number = self.num_passes + num_before
                seed = derived_seed(self._base_seed, derived.PURPOSE_ROUNDING_SEEDS, number)
                yield {"rounding": self._rounding, "rounding_seed": seed}
            self.num_passes += num_before + 1

    def _coefficients(self, update: GroupUpdate, gradients: Sequence[float]) -> list[float]:
        coeffs = [-(update.lr * g) / len(gradients) for g in gradients]
        coeffs[-1] += update.alpha * -self.offset
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.array(coeffs).astype(np.float32))
        if not finite.all():
            raise ValueError(
                f"expected an update that is finite in fp32, got lr {update.lr} times g {list(gradients)}; "
                "lower lr or set max_abs_g"
            )
        return coeffs
