"""The server: merging in fp64, who may reply with what, and that a bad reply changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from support.messages import CONFIG, IDENTITY, POOL, make_replies, make_reply, make_server, patched

from fedkseed import (
    Broadcast,
    MessageError,
    ModelIdentity,
    ProtocolError,
    Reply,
    SeedPool,
    Server,
    ServerConfig,
)
from fedkseed.federation.messages import RUN_ID_BYTES
from fedkseed.seeds import MAX_ROUNDS


def state_of(server: Server) -> tuple[Any, ...]:
    significance = server.significance
    tracked = () if significance is None else (significance.sums.tobytes(), significance.counts.tobytes())
    return (server.round, server.clients, server.coefficients.tobytes(), *tracked)


def test_a_broadcast_says_what_the_round_is() -> None:
    server = make_server()
    client = server.clients[1]
    message = Broadcast.from_bytes(server.broadcast(client))
    assert (message.round, message.client, message.base_seed) == (0, client, 5)
    assert (message.lr, message.eps, message.max_abs_g) == (0.3, float(np.float32(1e-3)), 100.0)
    assert (message.identity, message.family) == (IDENTITY, "gaussian")
    assert message.run_id == server.config.run_id
    assert not message.coefficients.any()
    assert np.array_equal(message.schedule, POOL.schedule(0, client, 20))
    assert server.broadcast(client) == server.broadcast(client)
    server.merge(make_replies(server))
    message = Broadcast.from_bytes(server.broadcast(server.clients[0]))
    assert message.round == 1
    assert np.array_equal(message.coefficients, server.coefficients.astype(np.float32))
    assert server.wire_coefficients.dtype == np.float32
    assert np.array_equal(server.wire_coefficients, message.coefficients)


def test_every_new_server_has_a_run_id_of_its_own_unless_one_is_given() -> None:
    config = ServerConfig(**CONFIG)
    drawn = [Server(IDENTITY, POOL, config).config.run_id for _ in range(3)]
    assert len({*drawn}) == 3
    assert all(run_id is not None and len(run_id) == RUN_ID_BYTES for run_id in drawn)
    given = make_server(run_id=b"another run here")
    assert Broadcast.from_bytes(given.broadcast(given.clients[0])).run_id == b"another run here"


def test_replies_recorded_in_an_earlier_run_of_equal_configuration_are_refused() -> None:
    config = ServerConfig(**CONFIG)
    earlier, later = Server(IDENTITY, POOL, config), Server(IDENTITY, POOL, config)
    assert earlier.clients == later.clients
    for client, reply in make_replies(earlier):
        with pytest.raises(ProtocolError, match="answer to another: of another run"):
            later.open().add(client, reply)
    assert later.open().replied == ()


def test_a_derived_run_id_tells_configurations_apart() -> None:
    ids = [
        make_server().config.run_id,
        make_server(lr=0.2).config.run_id,
        make_server(median_clip=5.0).config.run_id,
        make_server(pool=SeedPool(6, 16)).config.run_id,
        make_server(ModelIdentity(bytes(32), bytes(32), "bfloat16")).config.run_id,
    ]
    assert len(set(ids)) == 5
    assert make_server().config.run_id == ids[0]


@pytest.mark.parametrize("weighting", ["data_size", "equal"])
def test_merge_adds_what_the_formula_says(weighting: str) -> None:
    server = make_server(weighting=weighting)
    exact = [Fraction(0)] * 16
    for _ in range(3):
        members, replies = server.clients, make_replies(server)
        sizes = {client: 10 + client if weighting == "data_size" else 1 for client in members}
        for client, message in replies:
            scalars = Reply.from_bytes(message).scalars
            weight = Fraction(sizes[client], sum(sizes.values()))
            for index, g in zip(server.schedule(client).tolist(), scalars.tolist(), strict=True):
                exact[index] -= Fraction(0.3) * weight * Fraction(g)
        server.merge(replies)
    assert server.round == 3
    assert server.coefficients.dtype == np.float64
    expected = np.array([float(value) for value in exact])
    assert np.abs(server.coefficients - expected).max() < 1e-15 * np.abs(expected).max() * 8


def test_merge_has_the_bits_of_the_formula_one_addition_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedkseed.federation.messages._SCALARS_AT_ONCE", 100)  # many passes
    server = make_server(num_clients=90, clients_per_round=90, num_local_steps=3)
    sizes = [10 + client for client in server.clients]
    sums = [0.0] * 16
    replies = make_replies(server)
    for client, message in replies:
        weight = (10 + client) / float(sum(sizes))
        for index, g in zip(server.schedule(client), Reply.from_bytes(message).scalars, strict=True):
            sums[index] += weight * float(g)
    server.merge(reversed(replies))
    assert server.coefficients.tolist() == [0.0 - 0.3 * value for value in sums]


@pytest.mark.parametrize("sampling", ["uniform", "pro"])
def test_order_of_arrival_does_not_matter(sampling: str) -> None:
    results = set()
    for order in permutations(range(3)):
        server = make_server(sampling=sampling)
        for _ in range(2):
            replies = make_replies(server)
            server.merge(iter([replies[i] for i in order]))
        results.add(state_of(server))
    assert len(results) == 1


def test_missing_replies_leave_the_weights_to_the_others() -> None:
    server, alone = make_server(), make_server()
    reply = make_replies(server)[1]
    server.merge([reply])
    g = np.zeros(16)
    np.add.at(g, alone.schedule(reply[0]), Reply.from_bytes(reply[1]).scalars.astype(np.float64))
    assert np.array_equal(server.coefficients, -0.3 * g)
    assert server.round == 1


def test_a_round_without_replies_is_skipped_and_the_model_stays() -> None:
    server = make_server()
    server.merge(make_replies(server))
    before = server.coefficients.copy()
    with pytest.raises(ProtocolError, match=r"reply of round 1, got none; skip_round\(\) goes on without"):
        server.merge([])
    late = make_replies(server)
    server.skip_round()
    assert server.round == 2
    assert np.array_equal(server.coefficients, before)
    with pytest.raises(ProtocolError):
        server.merge(late)
    server.merge(make_replies(server))
    assert server.round == 3


def test_rounds_differ_in_clients_and_schedules_and_repeat_by_seed() -> None:
    server, again = make_server(), make_server()
    history = []
    for _ in range(6):
        history.append((server.clients, [server.schedule(client).tobytes() for client in server.clients]))
        assert again.clients == server.clients
        server.merge(make_replies(server))
        again.merge(make_replies(again))
    assert len({clients for clients, _ in history}) > 1
    assert len({schedule for _, schedules in history for schedule in schedules}) == 18
    assert np.array_equal(server.coefficients, again.coefficients)


def g_of(value: float) -> np.ndarray[Any, Any]:
    scalars = np.zeros(20, dtype=np.float32)
    scalars[7] = value
    return scalars


BAD: dict[str, tuple[Callable[[Server, int], bytes], type[Exception], str]] = {
    "an older round": (lambda s, c: make_reply(s, c, round=0), ProtocolError, r"\(1, .*got one of \(0, "),
    "a coming round": (lambda s, c: make_reply(s, c, round=2), ProtocolError, r"\(1, .*got one of \(2, "),
    "another client": (
        lambda s, c: make_reply(s, s.clients[0] if c != s.clients[0] else s.clients[1]),
        ProtocolError,
        r"of \(round, client, number of steps\)",
    ),
    "fewer steps": (lambda s, c: make_reply(s, c, scalars=g_of(0)[:19]), ProtocolError, "19\\)"),
    "more steps": (
        lambda s, c: make_reply(s, c, scalars=np.zeros(21, np.float32)),
        ProtocolError,
        "21\\)",
    ),
    "another broadcast": (
        lambda s, c: make_reply(s, c, digest=bytes(32)),
        ProtocolError,
        "answer to another: of another run, model or configuration",
    ),
    "another run": (
        lambda s, c: make_reply(make_server(run_id=b"another run here"), c, round=1),
        ProtocolError,
        "answer to another",
    ),
    "g too large": (
        lambda s, c: make_reply(s, c, scalars=g_of(-100.1)),
        ProtocolError,
        r"\|g\| of at most 100.0 from client \d, got -100.0\d* at step 7",
    ),
    "huge g": (lambda s, c: make_reply(s, c, scalars=g_of(3e38)), ProtocolError, "at step 7"),
    "NaN": (
        lambda s, c: patched(make_reply(s, c), 60, np.float32(np.nan).tobytes()),
        ProtocolError,
        "got nan at step 1",
    ),
    "infinity": (
        lambda s, c: patched(make_reply(s, c), 60, np.float32(-np.inf).tobytes()),
        ProtocolError,
        "got -inf at step 1",
    ),
    "truncated": (
        lambda s, c: make_reply(s, c)[:-1],
        MessageError,
        "client .: expected a reply of 140 bytes",
    ),
    "damaged": (lambda s, c: make_reply(s, c)[:-1] + b"x", MessageError, "client .: .* it was damaged"),
    "a broadcast": (lambda s, c: s.broadcast(c), MessageError, "begins with b'FKSR'"),
    "no bytes": (lambda s, c: None, MessageError, "as bytes, bytearray or memoryview, got NoneType"),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize("sampling", ["uniform", "pro"])
@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_reply_changes_nothing(what: str, sampling: str) -> None:
    make, error, message = BAD[what]
    server = make_server(sampling=sampling, clients_per_round=7)
    server.merge(make_replies(server))
    before = state_of(server)
    good = make_replies(server)
    bad = (good[1][0], make(server, good[1][0]))
    for replies in ([good[0], bad, *good[2:]], [bad]):
        with pytest.raises(error, match=message):
            server.merge(replies)
        assert state_of(server) == before
    with pytest.raises(error, match=message):
        server.check(*bad)
    # What is checked one by one can be merged.
    kept = []
    for client, reply in [good[0], bad, *good[2:]]:
        try:
            server.check(client, reply)
        except (MessageError, ProtocolError):
            continue
        kept.append((client, reply))
    assert len(kept) == 6
    assert state_of(server) == before
    server.merge(kept)
    assert server.round == 2


def test_repeated_and_uninvited_replies_are_refused() -> None:
    server = make_server()
    server.merge(make_replies(server))
    before, good = state_of(server), make_replies(server)
    outsider = next(client for client in range(7) if client not in server.clients)
    message = make_reply(server, outsider, digest=bytes(32))
    other = (good[0][0], make_reply(server, good[0][0], data_size=99))
    with pytest.raises(ProtocolError, match=f"one reply of client {good[0][0]}, got two that differ"):
        server.merge([*good, good[0], other])
    for call in (
        lambda: server.merge([*good, (outsider, message)]),
        lambda: server.check(outsider, message),
        lambda: server.broadcast(outsider),
        lambda: server.schedule(outsider),
        lambda: server.check(-1, message),
        lambda: server.check(2**70, message),
    ):
        with pytest.raises(ProtocolError, match="one of the 3 clients of round 1, got"):
            call()
    assert state_of(server) == before
    server.merge(good)
    with pytest.raises(ProtocolError):
        server.merge(good)
    assert server.round == 2


def test_check_returns_the_reply() -> None:
    server = make_server()
    client = server.clients[2]
    reply = server.check(client, make_reply(server, client, scalars=g_of(-100.0)))
    assert (reply.client, reply.data_size, reply.scalars[7]) == (client, 10 + client, -100.0)


def test_sums_beyond_fp32_change_nothing() -> None:
    server = make_server(lr=1.0, max_abs_g=3e38)
    client = server.clients[0]
    before = state_of(server)
    with pytest.raises(ProtocolError, match="got some beyond it; lr or max_abs_g is too large"):
        server.merge([(client, make_reply(server, client, scalars=np.full(20, 3e38, np.float32)))])
    assert state_of(server) == before


def test_rounds_end_where_their_numbers_end() -> None:
    server = make_server()
    server._open_round(MAX_ROUNDS - 1)
    for call in (server.skip_round, lambda: server.merge(make_replies(server))):
        with pytest.raises(ProtocolError, match="at most 16777215 rounds"):
            call()
    assert server.round == MAX_ROUNDS - 1


def test_one_client_moves_the_model_no_further_than_said() -> None:
    server = make_server(num_local_steps=50)
    replies = make_replies(server)
    worst = np.full(50, 100.0, dtype=np.float32)
    client = server.clients[1]
    replies[1] = (client, make_reply(server, client, scalars=worst, data_size=2**32 - 1))
    server.merge(replies)
    assert np.abs(server.coefficients).sum() <= 0.3 * 50 * 100.0 * (1 + 1e-12)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_clients": 0}, ValueError, "num_clients"),
        ({"num_clients": 2**24 + 1}, ValueError, "num_clients"),
        ({"clients_per_round": 8}, ValueError, r"clients_per_round in \[1, 7\], got 8"),
        ({"clients_per_round": 0}, ValueError, "clients_per_round"),
        ({"num_local_steps": 0}, ValueError, "num_local_steps"),
        ({"num_local_steps": 2**16}, ValueError, "num_local_steps"),
        ({"num_local_steps": 2.0}, TypeError, "integer num_local_steps"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"max_abs_g": 0.0}, ValueError, "max_abs_g in"),
        ({"max_abs_g": np.inf}, ValueError, "max_abs_g in"),
        ({"max_abs_g": np.nan}, ValueError, "max_abs_g in"),
        ({"max_abs_g": 3e38, "lr": 2.0}, ValueError, "whose steps lie within fp32"),
        ({"max_abs_g": None}, TypeError, "real number for max_abs_g"),
        ({"weighting": "size"}, ValueError, r"weighting out of \['data_size', 'equal'\], got 'size'"),
        ({"sampling": "best"}, ValueError, r"sampling out of \['uniform', 'pro'\], got 'best'"),
        ({"run_id": b"short"}, ValueError, "run_id of 16 bytes or None"),
        ({"run_id": "sixteen letters."}, ValueError, "run_id of 16 bytes or None"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ServerConfig(**{**CONFIG, **changes})


def test_a_model_of_a_dtype_without_a_code_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype out of .*, got int8"):
        make_server(ModelIdentity(bytes(32), bytes(32), "int8"))


def test_random_changes_of_replies_are_refused_or_within_the_bounds() -> None:
    """Structured fuzz under a right checksum: what passes differs in data size or scalars alone."""
    server = make_server(sampling="pro")
    generator = np.random.default_rng(6)
    replies = make_replies(server)
    before, num_passed = state_of(server), 0
    for _ in range(5_000):
        client, whole = replies[int(generator.integers(3))]
        start = int(generator.integers(0, len(whole) - 4))
        changed = patched(whole, start, generator.bytes(int(generator.integers(1, 5))))[: len(whole)]
        message = patched(changed, 0, b"")
        try:
            reply = server.check(client, message)
        except (MessageError, ProtocolError):
            with pytest.raises((MessageError, ProtocolError)):
                server.merge([(client, message)])
            assert state_of(server) == before
            continue
        num_passed += 1
        assert message[:20] + message[24:56] == whole[:20] + whole[24:56]
        assert (np.abs(reply.scalars) <= 100).all()
        assert reply.data_size >= 1
    assert 100 < num_passed < 4_900


def test_memory_follows_the_invited_not_the_registered() -> None:
    server = make_server(num_clients=2**24, clients_per_round=3)
    server.merge(make_replies(server))
    held = sum(value.nbytes for value in vars(server).values() if isinstance(value, np.ndarray))
    assert held <= 16 * 8 + 3 * 20 * 2
