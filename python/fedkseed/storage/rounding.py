"""Rounding seeds of the passes over the weights, in the order in which they are made."""

from __future__ import annotations

from typing import Any

from fedkseed._checks import check_count
from fedkseed.seeds import derived_seed
from fedkseed_kernels.contract import derived


def check_rounding(rounding: str) -> None:
    """Refuses what is not the name of a rounding mode.

    Raises:
        ValueError: neither "nearest" nor "stochastic".
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"expected rounding 'nearest' or 'stochastic', got {rounding!r}")


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
