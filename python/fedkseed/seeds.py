"""The pool of candidate seeds, and every random choice a server makes: schedules and client samples.

All of it is a function of one base seed (contract, section 9), so any machine can draw it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedkseed_kernels import derived

#: An index into the words of a base seed has 64 bits, and this is their layout:
#:   schedule draws   (purpose 1): round in the top 24 bits, client in the next 24, step in the low 16
#:   client sampling  (purpose 2): round in the top 24 bits, number of the draw in the low 40
ROUND_BITS, CLIENT_BITS, STEP_BITS = 24, 24, 16
MAX_ROUNDS, MAX_CLIENTS, MAX_STEPS = 1 << ROUND_BITS, 1 << CLIENT_BITS, 1 << STEP_BITS

#: A schedule travels as 16-bit indices.
MAX_SEEDS = 1 << 16

#: Draws made in one vectorised pass: bounds the memory of drawing many schedules.
_DRAWS_AT_ONCE = 1 << 16

#: Single seeds and indices are made this many at a time and kept: one by itself costs as much as a pass over
#: a small model.
_BLOCK = 256


def derived_seed(base_seed: int, purpose: int, index: int) -> int:
    """Seed number ``index``, in [0, 2^64), of a base seed and a purpose (contract, section 9)."""
    return _derived_block(base_seed, purpose, index // _BLOCK)[index % _BLOCK]


@lru_cache(maxsize=16)
def _derived_block(base_seed: int, purpose: int, block: int) -> list[int]:
    indices = np.uint64(block * _BLOCK) + np.arange(_BLOCK, dtype=np.uint64)
    seeds: list[int] = derived.seeds(base_seed, purpose, indices).tolist()
    return seeds


@dataclass(frozen=True)
class SeedPool:
    """K candidate seeds derived from a base seed (any integer, taken mod 2^64).

    Attributes:
        base_seed: in [0, 2^64) after construction.
        num_seeds: K, in [1, 65536].
        seeds: the candidate seeds, uint64 [K], read-only.
    """

    base_seed: int
    num_seeds: int = 4096
    seeds: NDArray[np.uint64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("base_seed", self.base_seed), ("num_seeds", self.num_seeds)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"expected an integer {name}, got {value!r}")
        if not 1 <= self.num_seeds <= MAX_SEEDS:
            raise ValueError(f"expected num_seeds in [1, {MAX_SEEDS}], got {self.num_seeds}")
        object.__setattr__(self, "base_seed", self.base_seed % 2**64)
        seeds = derived.candidate_seeds(self.base_seed, self.num_seeds)
        seeds.flags.writeable = False
        object.__setattr__(self, "seeds", seeds)

    def schedule(self, round: int, client: int, num_steps: int, first_step: int = 0) -> NDArray[np.uint16]:
        """Uniform draws from the pool for the steps of one client in one round: indices, uint16 [num_steps].

        A schedule that starts at ``first_step`` is the tail of the one that starts at 0.

        Raises:
            ValueError: round, client or a step outside the index layout.
        """
        schedule: NDArray[np.uint16] = self._draw(round, np.array([client]), num_steps, first_step, None)[0]
        return schedule

    def drawn(self, step: int) -> int:
        """Index that a run without a server draws for step number ``step``, as client 0 of `schedule`.

        Every MAX_STEPS steps begin another round of the index layout.
        """
        return _drawn_block(self, step // _BLOCK)[step % _BLOCK]

    def schedules(
        self,
        round: int,
        clients: Sequence[int],
        num_steps: int,
        probabilities: NDArray[np.float64] | None = None,
    ) -> NDArray[np.uint16]:
        """The schedules of several clients in one round, uint16 [len(clients), num_steps].

        Args:
            probabilities: of the K seeds, fp64 [K]; equal if None, and then each row is `schedule`'s.

        Raises:
            ValueError: round, a client or a step outside the index layout, or not K probabilities.
        """
        if probabilities is not None and probabilities.shape != (self.num_seeds,):
            raise ValueError(f"expected {self.num_seeds} probabilities, got shape {probabilities.shape}")
        result = np.empty((len(clients), num_steps), dtype=np.uint16)
        at_once = max(1, _DRAWS_AT_ONCE // max(1, num_steps))
        for start in range(0, len(clients), at_once):
            part = np.array(clients[start : start + at_once])
            result[start : start + at_once] = self._draw(round, part, num_steps, 0, probabilities)
        return result

    def _draw(
        self,
        round: int,
        clients: NDArray[np.int64],
        num_steps: int,
        first_step: int,
        probabilities: NDArray[np.float64] | None,
    ) -> NDArray[np.uint16]:
        _check_range("round", round, MAX_ROUNDS)
        for client in (int(clients.min()), int(clients.max())):
            _check_range("client", client, MAX_CLIENTS)
        if first_step < 0 or num_steps < 0 or first_step + num_steps > MAX_STEPS:
            raise ValueError(
                f"expected steps in [0, {MAX_STEPS}), got {num_steps} of them from {first_step} on"
            )
        first = np.uint64((round << (CLIENT_BITS + STEP_BITS)) | first_step)
        of_client = first + (clients.astype(np.uint64) << np.uint64(STEP_BITS))
        indices = of_client[:, None] + np.arange(num_steps, dtype=np.uint64)
        uniforms = derived.uniforms(self.base_seed, derived.PURPOSE_SCHEDULE, indices.reshape(-1))
        if probabilities is None:
            probabilities = np.full(self.num_seeds, 1.0 / self.num_seeds)
        drawn: NDArray[np.int64] = derived.draw(probabilities, uniforms)
        return drawn.reshape(len(clients), num_steps).astype(np.uint16)

    def sample_clients(self, round: int, num_clients: int, num_sampled: int) -> tuple[int, ...]:
        """``num_sampled`` of the clients 0 .. num_clients - 1, without replacement, ascending.

        Every subset is equally likely. The first draws of a Fisher-Yates shuffle; memory is O(num_sampled).

        Raises:
            ValueError: a count or the round out of range.
        """
        _check_range("round", round, MAX_ROUNDS)
        if not 1 <= num_sampled <= num_clients <= MAX_CLIENTS:
            raise ValueError(
                f"expected 1 <= num_sampled <= num_clients <= {MAX_CLIENTS}, "
                f"got {num_sampled} of {num_clients}"
            )
        first = np.uint64(round << (CLIENT_BITS + STEP_BITS))
        indices = first + np.arange(num_sampled, dtype=np.uint64)
        uniforms = derived.uniforms(self.base_seed, derived.PURPOSE_CLIENT_SAMPLING, indices)
        moved: dict[int, int] = {}  # position -> the client that a swap has put there
        sampled = []
        for position, uniform in enumerate(uniforms.tolist()):
            # The largest uniform, 1 - 2^-53, times a count below 2^53 rounds to less than the count.
            other = position + int(uniform * (num_clients - position))
            sampled.append(moved.get(other, other))
            moved[other] = moved.get(position, position)
        return tuple(sorted(sampled))


@lru_cache(maxsize=16)
def _drawn_block(pool: SeedPool, block: int) -> list[int]:
    round, step = divmod(block * _BLOCK, MAX_STEPS)
    indices: list[int] = pool.schedule(round, 0, _BLOCK, first_step=step).tolist()
    return indices


def _check_range(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise ValueError(f"expected a {name} in [0, {limit}), got {value}")
