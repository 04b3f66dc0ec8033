"""The seed pool, schedules and client samples: pure functions of the base seed, at the documented indices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedkseed import SeedPool
from fedkseed_kernels.contract import derived


def test_seeds_are_the_contract_s_and_read_only() -> None:
    pool = SeedPool(7, 5)
    assert pool.seeds.dtype == np.uint64
    assert np.array_equal(pool.seeds, derived.seeds(7, 0, np.arange(5, dtype=np.uint64)))
    with pytest.raises(ValueError, match="read-only"):
        pool.seeds[0] = 1
    assert len(SeedPool(7).seeds) == 4096
    assert np.array_equal(SeedPool(7).seeds[:5], pool.seeds)


def test_base_seed_is_taken_modulo_two_to_the_64() -> None:
    assert SeedPool(-1, 3).base_seed == 2**64 - 1
    assert SeedPool(-1, 3) == SeedPool(2**64 - 1, 3)
    assert SeedPool(0, 3) != SeedPool(1, 3)
    assert SeedPool(0, 3) != SeedPool(0, 4)


def test_a_schedule_draws_at_the_documented_index() -> None:
    pool = SeedPool(99, 4096)
    round, client, step = 3, 11, 5
    index = round * 2**40 + client * 2**16 + step
    (uniform,) = derived.uniforms(99, 1, np.array([index], dtype=np.uint64))
    schedule = pool.schedule(round, client, 200)
    assert schedule.dtype == np.uint16
    # 1/4096 adds up exactly, so the first running sum above u is at floor(4096 u).
    assert schedule[step] == int(uniform * 4096)


def test_the_last_corner_of_the_index_layout() -> None:
    pool = SeedPool(99, 4096)
    (uniform,) = derived.uniforms(99, 1, np.array([2**64 - 1], dtype=np.uint64))
    assert pool.schedule(2**24 - 1, 2**24 - 1, 1, first_step=2**16 - 1)[0] == int(uniform * 4096)


def test_schedules_differ_by_round_client_and_base_seed_and_continue() -> None:
    pool = SeedPool(1, 4096)
    schedules = [pool.schedule(0, 0, 64), pool.schedule(1, 0, 64), pool.schedule(0, 1, 64)]
    schedules.append(SeedPool(2, 4096).schedule(0, 0, 64))
    assert len({schedule.tobytes() for schedule in schedules}) == 4
    assert np.array_equal(pool.schedule(0, 0, 14, first_step=50), schedules[0][50:])
    assert len(pool.schedule(0, 0, 0)) == 0


def test_draws_are_uniform_over_the_pool() -> None:
    # Chi-square of 63 degrees of freedom: 120.6 is exceeded with probability 1.7e-5.
    counts = np.bincount(SeedPool(5, 64).schedule(0, 0, 2**16 - 1), minlength=64)
    expected = (2**16 - 1) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120.6


@pytest.mark.parametrize("num_seeds", [1, 3, 65536])
def test_every_index_is_inside_a_pool_of_any_size(num_seeds: int) -> None:
    schedule = SeedPool(5, num_seeds).schedule(0, 0, 500)
    assert int(schedule.max()) < num_seeds
    assert len(set(schedule.tolist())) > (0 if num_seeds == 1 else 2)


def test_a_sample_is_the_documented_shuffle() -> None:
    order = list(range(20))
    uniforms = derived.uniforms(8, 2, np.uint64(6 << 40) + np.arange(5, dtype=np.uint64))
    for position, uniform in enumerate(uniforms):
        other = position + int(uniform * (20 - position))
        order[position], order[other] = order[other], order[position]
    assert SeedPool(8, 2).sample_clients(6, 20, 5) == tuple(sorted(order[:5]))


def test_samples_are_without_replacement_and_even() -> None:
    pool = SeedPool(3, 2)
    counts = np.zeros(10)
    for round in range(1000):
        sample = pool.sample_clients(round, 10, 4)
        assert len(set(sample)) == 4
        assert list(sample) == sorted(sample)
        counts[list(sample)] += 1
    # Each client 400 times on average, standard deviation 15.5: five of them.
    assert np.abs(counts - 400).max() < 78
    assert pool.sample_clients(0, 10, 10) == tuple(range(10))
    assert len(set(pool.sample_clients(0, 2**24, 3))) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0), ValueError, r"num_seeds in \[1, 65536\], got 0"),
        ((0, 65537), ValueError, r"num_seeds in \[1, 65536\], got 65537"),
        ((0.5, 4), TypeError, "integer base_seed, got 0.5"),
        ((True, 4), TypeError, "integer base_seed, got True"),
        ((0, "4"), TypeError, "integer num_seeds"),
    ],
)
def test_bad_pools(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SeedPool(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 1), "round"),
        ((2**24, 0, 1), "round"),
        ((0, 2**24, 1), "client"),
        ((0, 0, 2**16 + 1), "steps"),
        ((0, 0, -1), "steps"),
        ((0, 0, 2, 2**16 - 1), "steps"),
    ],
)
def test_bad_schedules(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeedPool(0, 4).schedule(*arguments)


@pytest.mark.parametrize("arguments", [(0, 4, 0), (0, 4, 5), (0, 2**24 + 1, 1), (2**24, 4, 1)])
def test_bad_samples(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SeedPool(0, 4).sample_clients(*arguments)
