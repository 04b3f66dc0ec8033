"""FedKSeed-Pro: probabilities and schedules beside a plain float64 implementation of them."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import pytest
from scipy import stats
from support.messages import make_reply, make_server

from fedkseed import Reply, SeedPool, SeedSignificance, Server
from fedkseed_kernels.contract import derived


def probabilities_of(history: list[list[float]], clip: float = 1000.0, start: float = 0.0) -> list[float]:
    """The authors' rule, from whole histories, each after the start: magnitudes clipped and averaged."""
    means = [sum(min(abs(g), clip) for g in [start, *seen]) / (1 + len(seen)) for seen in history]
    spread = max(means) - min(means) + 1e-10
    exponentials = [math.exp((mean - min(means)) / spread) for mean in means]
    return [value / math.fsum(exponentials) for value in exponentials]


def schedule_of(probabilities: list[float], base_seed: int, round: int, client: int, steps: int) -> list[int]:
    """Inverse transform, one step after the other, from raw words."""
    first = round * 2**40 + client * 2**16
    words = derived.words(base_seed, 1, np.arange(steps, dtype=np.uint64) + np.uint64(first)).tolist()
    drawn = []
    for high, low, _, _ in words:
        uniform = ((high >> 5) * 2**26 + (low >> 6)) / 2**53
        running = accumulate(probabilities)
        drawn.append(next(index for index, total in enumerate(running) if total > uniform))
    return drawn


def filled(
    seed: int, num_seeds: int, num_seen: int, **settings: float
) -> tuple[SeedSignificance, list[list[float]]]:
    generator = np.random.default_rng(seed)
    indices = generator.integers(0, num_seeds, num_seen)
    scalars = (generator.normal(size=num_seen) * 10.0 ** generator.uniform(-3, 4, num_seen)).astype(
        np.float32
    )
    scalars[::17] = 0
    significance = SeedSignificance.empty(num_seeds, **settings)
    history: list[list[float]] = [[] for _ in range(num_seeds)]
    for part in np.array_split(np.arange(num_seen), 3):
        significance.record_(indices[part], scalars[part].astype(np.float64))
    for index, g in zip(indices.tolist(), scalars.tolist(), strict=True):
        if g != 0:
            history[index].append(g)
    return significance, history


@pytest.mark.parametrize(("num_seeds", "num_seen"), [(1, 5), (2, 0), (64, 40), (64, 3000), (4096, 8000)])
def test_probabilities_equal_the_plain_rule(num_seeds: int, num_seen: int) -> None:
    significance, history = filled(num_seeds + num_seen, num_seeds, num_seen)
    found = significance.probabilities()
    assert found.dtype == np.float64
    assert significance.counts.tolist() == [len(seen) for seen in history]
    np.testing.assert_allclose(found, probabilities_of(history), rtol=2e-14, atol=0)
    assert abs(math.fsum(found) - 1) < 1e-15 * num_seeds
    assert found.max() / found.min() <= math.e * (1 + 1e-15)


@pytest.mark.parametrize("seed", range(40))
def test_any_clip_and_start_follow_the_plain_rule(seed: int) -> None:
    """Over clips and starts of all sizes, a start above the clip among them, which the clip bounds."""
    generator = np.random.default_rng([15, seed])
    clip = float(10.0 ** generator.uniform(-4, 5))
    start = float(clip * 10.0 ** generator.uniform(-2, 2)) if seed % 4 else 0.0
    num_seeds, num_seen = int(generator.integers(1, 60)), int(generator.integers(0, 400))
    significance, history = filled(seed, num_seeds, num_seen, clip=clip, start=start)
    assert significance.copy().start == start
    found = significance.copy().probabilities()
    np.testing.assert_allclose(found, probabilities_of(history, clip, start), rtol=2e-12, atol=0)
    assert found.max() / found.min() <= math.e * (1 + 1e-15)


@pytest.mark.parametrize(("clip", "start"), [(1000.0, 0.0), (0.5, 0.0), (2.0, 0.25), (0.5, 3.0)])
def test_a_server_with_another_clip_and_start_draws_by_the_plain_rule(clip: float, start: float) -> None:
    server = make_server(pool=SeedPool(77, 16), sampling="pro", max_abs_g=1e5, pro_clip=clip, pro_start=start)
    history = play(server, 3)
    expected = probabilities_of(history, clip, start)
    np.testing.assert_allclose(server.probabilities(), expected, rtol=2e-14, atol=0)
    for client in server.clients:
        assert server.schedule(client).tolist() == schedule_of(expected, 77, 3, client, 20)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pro_clip": 0.0}, ValueError, r"expected pro_clip in \[1.18e-38, 3.4e\+38\], got 0.0"),
        ({"pro_clip": math.inf}, ValueError, "pro_clip"),
        ({"pro_clip": math.nan}, ValueError, "pro_clip"),
        ({"pro_clip": "1"}, TypeError, "pro_clip"),
        ({"pro_start": -0.5}, ValueError, r"expected pro_start in \[0, 3.4e\+38\], got -0.5"),
        ({"pro_start": 1e39}, ValueError, "pro_start"),
        ({"pro_start": None}, TypeError, "pro_start"),
    ],
)
def test_a_clip_or_start_out_of_range_is_named(
    change: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_server(sampling="pro", **change)


def test_without_observations_pro_is_uniform_bit_for_bit() -> None:
    uniform, pro = make_server(), make_server(sampling="pro")
    assert np.array_equal(pro.probabilities(), uniform.probabilities())
    assert np.array_equal(pro.schedule(pro.clients[0]), uniform.schedule(uniform.clients[0]))
    assert SeedSignificance.empty(3).probabilities().tolist() == [1 / 3] * 3


def test_the_largest_and_the_smallest_mean_are_a_factor_of_e_apart() -> None:
    significance = SeedSignificance.empty(3)
    significance.record_(np.array([0, 1, 1, 2]), np.array([-5.0, 1e9, 2.0, 0.0]))
    assert significance.sums.tolist() == [5.0, 1002.0, 0.0]
    assert significance.counts.tolist() == [1, 2, 0]
    p = significance.probabilities()
    assert p[1] / p[2] == pytest.approx(math.e, rel=1e-12)
    assert p[0] / p[2] == pytest.approx(math.exp(2.5 / 334), rel=1e-12)


def play(server: Server, num_rounds: int) -> list[list[float]]:
    """Merges rounds of random replies; the histories that an observer of the messages writes down."""
    history: list[list[float]] = [[] for _ in range(server.pool.num_seeds)]
    for _ in range(num_rounds):
        generator = np.random.default_rng([9, server.round])
        replies = []
        for client in server.clients:
            scale = 1.0 + server.schedule(client).astype(np.float64)
            scalars = (generator.normal(size=len(scale)) * scale).astype(np.float32)
            scalars[3] = 0
            replies.append((client, make_reply(server, client, scalars=scalars)))
        for client, message in replies:
            scalars = Reply.from_bytes(message).scalars
            for index, g in zip(server.schedule(client).tolist(), scalars.tolist(), strict=True):
                if g != 0:
                    history[index].append(g)
        server.merge(replies)
    return history


def test_schedules_of_a_running_server_equal_the_plain_rule() -> None:
    server, observed = (make_server(pool=SeedPool(77, 64), sampling="pro", max_abs_g=1e5) for _ in range(2))
    history: list[list[float]] = [[] for _ in range(64)]
    for _ in range(4):
        expected = probabilities_of(history)
        np.testing.assert_allclose(server.probabilities(), expected, rtol=2e-14, atol=0)
        for client in server.clients:
            assert server.schedule(client).tolist() == schedule_of(expected, 77, server.round, client, 20)
        play(server, 1)
        for seen, new in zip(history, play(observed, 1), strict=True):
            seen += new
    uniform = SeedPool(77, 64).schedule(server.round, server.clients[0], 20)
    assert not np.array_equal(server.schedule(server.clients[0]), uniform)


def test_frequencies_of_drawn_seeds_follow_the_probabilities() -> None:
    sizes = {"num_clients": 5, "clients_per_round": 5, "num_local_steps": 20_000, "max_abs_g": 1e5}
    server = make_server(pool=SeedPool(5, 64), sampling="pro", **sizes)
    play(server, 1)
    p = server.probabilities()
    assert p.max() / p.min() > 2
    drawn = np.concatenate([server.schedule(client) for client in server.clients])
    assert len(drawn) == 100_000
    counts = np.bincount(drawn, minlength=64)
    assert stats.chisquare(counts, p * len(drawn)).pvalue > 1e-3
    # The test can tell: equal probabilities are out of the question.
    assert stats.chisquare(counts).pvalue < 1e-100


def test_schedules_of_many_clients_are_those_of_each() -> None:
    pool = SeedPool(3, 32)
    p = filled(1, 32, 200)[0].probabilities()
    clients = [5, 0, 2**24 - 1, 9, *range(100, 400)]
    # 301 steps: more draws than are made in one pass.
    whole = pool.schedules(6, clients, 301, p)
    assert whole.dtype == np.uint16
    for row in (0, 2, 250):
        assert whole[row].tolist() == schedule_of(p.tolist(), 3, 6, clients[row], 301)
    equal = pool.schedules(6, clients, 301)
    assert all(np.array_equal(equal[row], pool.schedule(6, clients[row], 301)) for row in (0, 2, 250))
    with pytest.raises(ValueError, match=r"expected 32 probabilities, got shape \(31,\)"):
        pool.schedules(6, clients, 301, p[:31])
    with pytest.raises(ValueError, match="client"):
        pool.schedules(6, [0, 2**24], 3)
