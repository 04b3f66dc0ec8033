"""The bounds of a round: the clip at the median |g|, and the cap of the weights."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.messages import make_replies, make_reply, make_server

from benchmarks.liars import __main__ as liars
from benchmarks.liars.tables import tables
from fedkseed import RECOMMENDED_BOUNDS, Bounds, Broadcast, ServerConfig
from fedkseed.federation.bounds import capped_weights, clipped, median_magnitude

STEPS = 20


def scalars(seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=STEPS)).astype(np.float32)


def test_the_median_is_that_of_the_replies_medians() -> None:
    given = [[5, -1, 2, 900], [-3, 4, 4, 5], [8, 9, -7, 6]]  # medians 3.5, 4, 7.5
    assert median_magnitude([np.array(given, np.float32)]) == 4.0
    assert median_magnitude([np.array(given[:2], np.float32)]) == 3.75
    assert median_magnitude([np.array(given[1:2], np.float32)]) == 4.0


def test_the_median_leaves_out_skipped_steps() -> None:
    given = np.array([[0, -3, 1], [0, 0, 8], [0, 0, 0], [7, 2, -2]], np.float32)  # medians 2, 8, none, 2
    assert median_magnitude([given]) == 2.0
    assert median_magnitude([np.zeros((3, 4), np.float32)]) is None


@pytest.mark.parametrize(("num_clients", "num_steps"), [(1, 1), (2, 3), (7, 20), (16, 21)])
def test_the_median_is_numpys_whatever_the_order(num_clients: int, num_steps: int) -> None:
    generator = np.random.default_rng([num_clients, num_steps])
    given = generator.normal(size=(num_clients, num_steps)).astype(np.float32)
    given[generator.random(given.shape) < 0.2] = 0
    given[0, 0] = 1.5
    medians = [np.median(np.abs(row[row != 0]).astype(np.float64)) for row in given if row.any()]
    assert median_magnitude([given]) == np.median(medians)
    shuffled = generator.permuted(generator.permutation(given), axis=1)
    assert median_magnitude([shuffled]) == median_magnitude([given])
    assert median_magnitude(np.array_split(given, 3)) == median_magnitude([given])


def test_the_largest_finite_g_have_a_finite_median() -> None:
    largest = float(np.finfo(np.float32).max)
    assert median_magnitude([np.full((2, 2), -largest, np.float32)]) == largest


def test_four_liars_of_sixteen_leave_a_median_of_honest_replies() -> None:
    honest = np.stack([scalars(client) for client in range(12)])
    highest = max(float(np.median(np.abs(row))) for row in honest)
    for lie in (100.0, 1e-6):
        everyone = np.concatenate((honest, np.full((4, STEPS), lie, np.float32)))
        found = median_magnitude([everyone])
        assert found is not None
        assert 0.4 < found < highest < 1.2


def test_a_clip_keeps_signs_and_what_is_within() -> None:
    given = np.array([-7.0, -2.0, 0.0, 2.0, 7.0])
    assert clipped(given, 2.5).tolist() == [-2.5, -2.0, 0.0, 2.0, 2.5]
    assert given[0] == -7.0


@pytest.mark.parametrize(
    ("shares", "multiple", "expected", "cut"),
    [
        ([1, 1, 1, 1], 1, [0.25] * 4, []),
        ([58, 17, 15, 10], 2.4, [0.58, 0.17, 0.15, 0.10], []),
        ([58, 17, 15, 10], 0, [0.58, 0.17, 0.15, 0.10], []),
        ([58, 17, 15, 10], 2, [0.5, 17 / 84, 15 / 84, 10 / 84], [0]),
        # The second is above the cap only once the first one is cut.
        ([80, 12, 4, 4], 1.6, [0.4, 0.36, 0.12, 0.12], [0]),
        ([80, 16, 2, 2], 1.6, [0.4, 0.4, 0.1, 0.1], [0, 1]),
        ([2**32 - 1, 1000, 1000, 1000], 1, [0.25] * 4, [0, 1, 2, 3]),
        ([5], 1, [1.0], []),
    ],
)
def test_weights_are_cut_in_turn_and_the_others_share_the_rest(
    shares: list[int], multiple: float, expected: list[float], cut: list[int]
) -> None:
    weights, is_cut = capped_weights(np.array(shares, float), multiple)
    assert weights == pytest.approx(expected, rel=1e-12)
    assert weights.sum() == pytest.approx(1.0, rel=1e-12)
    if shares != [2**32 - 1, 1000, 1000, 1000]:  # there rounding decides who is called cut
        assert np.flatnonzero(is_cut).tolist() == cut


def test_weights_below_the_cap_have_the_bits_of_no_cap() -> None:
    shares = np.array([58.0, 17.0, 15.0, 10.0])
    assert capped_weights(shares, 2.4)[0].tobytes() == (shares / shares.sum()).tobytes()


def test_caps_hold_for_many_shares() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        shares = np.ceil(generator.lognormal(sigma=3, size=generator.integers(1, 40)))
        multiple = float(generator.uniform(1, 4))
        weights, _ = capped_weights(shares, multiple)
        assert weights.max() <= multiple / len(shares) * (1 + 1e-12)
        assert weights.sum() == pytest.approx(1.0, rel=1e-9)
        assert (np.diff(weights[np.argsort(shares, kind="stable")]) >= -1e-15).all()


def round_of(changes: dict[str, Any], liars: int = 0, sizes: tuple[int, ...] = ()) -> Any:
    """A server after one round of seven clients, of whom the first ones lie, and the round's summary."""
    server = make_server(clients_per_round=7, **changes)
    opened = server.open()
    for place, client in enumerate(opened.clients):
        lies = place < liars
        values = np.full(STEPS, 100.0, np.float32) if lies else scalars(client)
        size = 2**32 - 1 if lies else sizes[place] if sizes else 1000
        opened.add(client, make_reply(server, client, scalars=values, data_size=size))
    return server, opened.close()


def test_a_liar_is_clipped_and_capped() -> None:
    _, free = round_of({}, liars=1)
    assert free.weights[0] > 0.99
    assert (dict(free.clipped), free.capped, free.median_abs_g) == ({}, (), None)
    server, held = round_of({"median_clip": 5.0, "share_cap": 2.4}, liars=1)
    assert held.weights[0] == pytest.approx(2.4 / 7)
    assert held.capped == (0,)
    assert held.clipped[0] == STEPS
    everyone = np.stack([np.full(STEPS, 100.0, np.float32), *(scalars(c) for c in range(1, 7))])
    assert held.median_abs_g == median_magnitude([everyone])
    limit = 5.0 * held.median_abs_g
    expected = np.zeros(16)
    for client in range(7):
        g = np.full(STEPS, 100.0) if not client else scalars(client).astype(float)
        schedule = make_server(clients_per_round=7, median_clip=5.0, share_cap=2.4).schedule(client)
        np.add.at(expected, schedule.astype(int), held.weights[client] * np.clip(g, -limit, limit))
    assert server.coefficients == pytest.approx(-0.3 * expected, rel=1e-12)


def test_what_is_clipped_counts_as_clipped_for_the_significance_of_seeds() -> None:
    server, summary = round_of({"median_clip": 5.0, "sampling": "pro"}, liars=1)
    assert server.significance is not None
    assert summary.median_abs_g is not None
    limit = 5.0 * summary.median_abs_g
    expected = np.zeros(16)
    fresh = make_server(clients_per_round=7, median_clip=5.0, sampling="pro")
    for client in range(7):
        g = np.full(STEPS, 100.0) if not client else scalars(client).astype(float)
        np.add.at(expected, fresh.schedule(client).astype(int), np.minimum(np.abs(g), limit))
    assert server.significance.sums == pytest.approx(expected, rel=1e-12)


def test_bounds_that_cut_nothing_leave_the_bits_of_none() -> None:
    sizes = (58, 17, 15, 10, 20, 20, 20)
    free, _ = round_of({}, sizes=sizes)
    held, summary = round_of({"median_clip": 50.0, "share_cap": 3.0}, sizes=sizes)
    assert held.coefficients.tobytes() == free.coefficients.tobytes()
    assert (dict(summary.clipped), summary.capped) == ({}, ())


def test_bounds_do_not_depend_on_the_order_of_arrival() -> None:
    found = set()
    for order in permutations(range(3)):
        server = make_server(median_clip=1.5, share_cap=1.2, sampling="pro")
        replies = make_replies(server)
        for place in order:
            server.open().add(*replies[place])
        summary = server.open().close()
        assert server.significance is not None
        found.add((server.coefficients.tobytes(), server.significance.sums.tobytes(), repr(summary)))
    assert len(found) == 1


def test_a_message_does_not_tell_the_bounds() -> None:
    held, free = make_server(median_clip=5.0, share_cap=2.4), make_server()
    client = held.clients[0]
    told = Broadcast.from_bytes(held.broadcast(client))
    assert told.max_abs_g == Broadcast.from_bytes(free.broadcast(client)).max_abs_g
    assert len(held.broadcast(client)) == len(free.broadcast(client))


def test_what_is_cut_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    round_of({"median_clip": 6.0, "share_cap": 2.4}, liars=1)
    assert "round 0: clipped 20 g of clients 0 to 6 times the median |g| of " in caplog.text
    assert "round 0: cut the weights of clients 0 to 2.4 / 7" in caplog.text
    caplog.clear()
    round_of({}, liars=1)
    assert "client 0 weighs 1.000 (by its data size), more than the 6 others together" in caplog.text
    caplog.clear()
    round_of({})
    assert caplog.text == ""


def test_recommended_bounds_are_put_where_none_are() -> None:
    config = ServerConfig(4, clients_per_round=2, num_local_steps=1, lr=0.1, eps=1e-3)
    assert (config.median_clip, config.share_cap) == (0.0, 0.0)
    held = config.with_bounds(RECOMMENDED_BOUNDS)
    assert Bounds(held.median_clip, held.share_cap) == RECOMMENDED_BOUNDS
    own = ServerConfig(4, clients_per_round=2, num_local_steps=1, lr=0.1, eps=1e-3, share_cap=1.5)
    assert own.with_bounds(RECOMMENDED_BOUNDS).share_cap == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share_cap": 0.5}, r"share_cap of 0 \(off\) or in \[1, 3.4e\+38\], got 0.5"),
        ({"share_cap": -1.0}, "share_cap of 0"),
        ({"median_clip": -1.0}, "median_clip of 0"),
        ({"median_clip": float("nan")}, "median_clip of 0"),
        ({"median_clip": float("inf")}, "median_clip of 0"),
    ],
)
def test_bounds_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_server(**changes)


PAGE = Path(__file__).parent.parent / "docs" / "protocol.md"


def test_the_page_shows_the_tables_of_the_committed_figures() -> None:
    page = PAGE.read_text()
    for table in tables(json.loads(liars.RESULT.read_bytes())).split("\n\n"):
        assert table in page


def test_the_committed_figures_hold_what_the_recommended_bounds_promise() -> None:
    document = json.loads(liars.RESULT.read_bytes())
    recommended = RECOMMENDED_BOUNDS._asdict()
    times = {
        (row["weighting"], row["num_liars"], row["median_clip"], row["share_cap"]): row["times_honest"]
        for row in document["attacks"]
    }
    for weighting in ("data_size", "equal"):
        for num_liars, most in ((1, 3.0), (4, 6.0)):
            assert times[weighting, num_liars, *recommended.values()] <= most
    assert times["data_size", 1, 0.0, 0.0] > 200
    (chosen,) = (row for row in document["window"] if recommended.items() <= row.items())
    assert chosen["mean_change"] < 0.01
    assert max(chosen["p95_times_honest_1"] / 3, chosen["p95_times_honest_4"] / 6) < 1
    others = [row for row in document["window"] if row is not chosen]
    assert any(row["times_honest_4"] > 6 for row in others)  # the window has two sides
    assert any(row["mean_change"] > 0.01 for row in others)


def test_the_command_measures_and_its_tables_have_every_row() -> None:
    document = liars.measure(num_weights=256, num_attacks=1, num_honest=2)
    lines = tables(document).splitlines()
    num_rows = sum(len(rows) for rows in document.values())
    assert len(lines) == num_rows - 2 + 3 * 2 + 2  # two rows are of nobody lying; heads and what separates
    assert {row["num_clients"] for row in document["honest"]} == {4, 16}
