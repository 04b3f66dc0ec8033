"""What every storage mode does alike: rounding seeds, the update of the groups, what was written, Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
from torch import Tensor

from fedkseed._checks import check_count
from fedkseed.model.overlaps import check_overlaps
from fedkseed.model.placement import PreparedTensors
from fedkseed.seeds import derived_seed
from fedkseed.storage.interface import GroupUpdate, TunedWeights
from fedkseed_kernels import derived


def check_rounding(rounding: str) -> None:
    """Refuses what is not the name of a rounding mode.

    Raises:
        ValueError: neither "nearest" nor "stochastic".
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"expected rounding 'nearest' or 'stochastic', got {rounding!r}")


def rounding_options(rounding_seed: int | None) -> dict[str, Any]:
    """Keyword arguments of the kernels' functions: stochastic rounding with this seed, to nearest if None."""
    rounding = "nearest" if rounding_seed is None else "stochastic"
    return {"rounding": rounding, "rounding_seed": rounding_seed}


class RoundingSeeds:
    """Pass n rounds with seed n of the optimizer's seed and purpose 3 (contract, section 9).

    Args:
        seed: of the optimizer.
        rounding: "nearest" or "stochastic"; for the former there are no seeds.
    """

    def __init__(self, seed: int, rounding: str) -> None:
        self._seed = seed
        self._is_stochastic = rounding == "stochastic"
        self._num_passes = 0

    def next(self, num_passes: int) -> list[int | None]:
        """The seeds of the passes to come; None where rounding is to nearest."""
        if not self._is_stochastic:
            return [None] * num_passes
        numbers = range(self._num_passes, self._num_passes + num_passes)
        return [derived_seed(self._seed, derived.PURPOSE_ROUNDING_SEEDS, number) for number in numbers]

    def advance(self, num_passes: int) -> None:
        """Counts passes as made."""
        if self._is_stochastic:
            self._num_passes += num_passes

    def state(self) -> dict[str, Any]:
        """How many passes were made; empty if rounding is to nearest."""
        return {"num_passes": self._num_passes} if self._is_stochastic else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ValueError: not a state of this rounding; nothing changes.
        """
        expected = set(self.state())
        if set(state) != expected:
            raise ValueError(f"expected a storage state of {sorted(expected)}, got {sorted(state)}")
        if self._is_stochastic:
            try:
                self._num_passes = check_count("num_passes", state["num_passes"], 0, 2**63)
            except TypeError as error:
                raise ValueError(f"expected a whole storage state, got a damaged one: {error}") from error


class GroupedWeights:
    """The tuned weights, checked once for the passes in place: all of them, and group by group.

    Args:
        weights: as they stand now.
        residuals: for each tensor of each group None or its residual (contract, section 6.5).

    Attributes:
        whole: all tensors; one pass, of one call for each device.

    Raises:
        TypeError, ValueError: what the kernels refuse (a dtype, an expanded tensor), and memory shared with
            another tensor of the model (`check_overlaps`).
        RuntimeError: a device without a backend.
    """

    def __init__(
        self, weights: TunedWeights, residuals: Sequence[Sequence[Tensor | None]] | None = None
    ) -> None:
        if residuals is None:
            residuals = [[None] * len(group) for group in weights.groups]
        tensors = [tensor for group in weights.groups for tensor in group]
        names = [name for group in weights.names for name in group]
        check_overlaps(names, tensors, weights.model)
        self.whole = PreparedTensors(
            tensors,
            [stream for group in weights.streams for stream in group],
            weights.family,
            [residual for group in residuals for residual in group],
            names,
        )
        self._groups = (
            [self.whole]
            if len(weights.groups) == 1
            else [
                PreparedTensors(group, streams, weights.family, of_group, its_names)
                for group, streams, of_group, its_names in zip(
                    weights.groups, weights.streams, residuals, weights.names, strict=True
                )
            ]
        )

    def update(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        gs: Sequence[float | None],
        offset: float = 0.0,
        rounding_seed: int | None = None,
        following: tuple[int, float] | None = None,
    ) -> None:
        """One step of all groups, from weights that stand at w + offset z(seeds[-1]), in one pass each.

            w <- alpha w + sum_i c_i z_i,  c_i = -(lr g_i) / n, and c_n = -alpha offset - (lr g_n) / n

        A skipped direction (g None) counts as 0; if all are skipped, nothing but the offset is taken back.

        Args:
            rounding_seed: of stochastic rounding; None rounds to nearest.
            following: (seed, offset): one term more, which moves on to w + offset z(seed).

        Raises:
            ValueError: a coefficient is not finite in fp32; no tensor has changed.
        """
        if all(g is None for g in gs):
            updates = [GroupUpdate(lr=0.0)] * len(updates)
        gradients = [0.0 if g is None else g for g in gs]
        all_coeffs = [_coefficients(update, gradients, offset) for update in updates]
        if following is not None:
            seeds = [*seeds, following[0]]
            all_coeffs = [[*coeffs, following[1]] for coeffs in all_coeffs]
        if len(set(updates)) == 1:
            handles = [self.whole]
        else:
            handles = self._groups
            self.whole.check()  # before the first group is updated
        for handle, update, coeffs in zip(handles, updates, all_coeffs, strict=False):
            handle.seed_axpy_(seeds, coeffs, alpha=update.alpha, **rounding_options(rounding_seed))


def _coefficients(update: GroupUpdate, gradients: Sequence[float], offset: float) -> list[float]:
    coeffs = [-(update.lr * g) / len(gradients) for g in gradients]
    coeffs[-1] += update.alpha * -offset
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.array(coeffs).astype(np.float32))
    if not finite.all():
        raise ValueError(
            f"expected an update that is finite in fp32, got lr {update.lr} times g {gradients}; "
            "lower lr or set max_abs_g"
        )
    return coeffs


class Written:
    """Whether tensors were written by others, by their version counters.

    A write through ``.data`` moves no counter and goes unseen, as in torch.

    Args:
        names, tensors: of the tuned weights.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._names = names
        self._tensors = tensors
        self._versions = self._current()

    def note(self) -> None:
        """They are as they should be."""
        self._versions = self._current()

    def is_seen(self) -> bool:
        """Whether one was written since."""
        return self._versions != self._current()

    def check(self) -> None:
        """Raises where one was written since.

        Raises:
            RuntimeError: names the first.
        """
        for name, before, now in zip(self._names, self._versions, self._current(), strict=True):
            if before != now:
                raise RuntimeError(
                    f"expected the weights to stay as they are between measure and step, got {name} written: "
                    "what was measured belongs to other weights; call optimizer.discard() before you write "
                    "to them, and measure again"
                )

    def _current(self) -> list[int]:
        # Tensors of inference mode have no counter.
        return [0 if tensor.is_inference() else tensor._version for tensor in self._tensors]


#: Whether the main thread is within `interrupts_held`.
_is_held = False


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delays Ctrl-C until a pass over the weights and the note of what it did are done; may be nested."""
    global _is_held
    if _is_held or threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets a KeyboardInterrupt
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    _is_held = True
    try:
        yield
    finally:
        _is_held = False
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[-1])
