"""Messages and the server: bytes both ways, merging in fp64, and that a bad message changes nothing."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from fedkseed import Broadcast, Manifest, MessageError, ProtocolError, Reply, SeedPool, Server

MANIFEST = Manifest(("weight",), ((3, 2),))


def make_server(**changes: Any) -> Server:
    arguments: dict[str, Any] = {
        "num_clients": 7,
        "clients_per_round": 3,
        "num_local_steps": 20,
        "lr": 0.3,
        "eps": 1e-3,
    }
    return Server(MANIFEST, SeedPool(5, 16), **{**arguments, **changes})


def make_reply(server: Server, client: int, **changes: Any) -> bytes:
    generator = np.random.default_rng([server.round, client])
    scalars = generator.normal(size=server.num_local_steps).astype(np.float32)
    fields = {"round": server.round, "client": client, "data_size": 10 + client, "scalars": scalars}
    return Reply(**{**fields, **changes}).to_bytes()


def make_replies(server: Server) -> list[tuple[int, bytes]]:
    return [(client, make_reply(server, client)) for client in server.clients]


def resealed(message: bytes, position: int, field: bytes, header_size: int) -> bytes:
    """The message with one field replaced and its checksum made right again."""
    changed = message[:position] + field + message[position + len(field) :]
    start, body = changed[: header_size - 4], changed[header_size:]
    return start + struct.pack("<I", zlib.crc32(start + body)) + body


def test_a_broadcast_says_what_the_round_is() -> None:
    server = make_server()
    client = server.clients[1]
    message = Broadcast.from_bytes(server.broadcast(client))
    assert (message.round, message.client, message.base_seed) == (0, client, 5)
    assert (message.lr, message.eps) == (0.3, float(np.float32(1e-3)))
    assert message.coefficients.dtype == np.float32
    assert not message.coefficients.any()
    assert np.array_equal(message.schedule, SeedPool(5, 16).schedule(0, client, 20))
    assert server.broadcast(client) == server.broadcast(client)


def test_bytes_at_the_paper_s_size() -> None:
    server = Server(
        MANIFEST, SeedPool(0, 4096), num_clients=1, clients_per_round=1, num_local_steps=200, lr=0.1, eps=1e-3
    )
    assert len(server.broadcast(0)) == 44 + 4 * 4096 + 2 * 200
    assert len(make_reply(server, 0)) == 24 + 4 * 200


def test_the_layout_of_both_messages() -> None:
    coefficients = np.array([1.5, -2.0], dtype=np.float32)
    schedule = np.array([1, 0, 1], dtype=np.uint16)
    down = Broadcast(258, 3, 2**63 + 1, 0.1, 0.5, coefficients, schedule).to_bytes()
    start = b"FKSB" + bytes([1, 0, 3, 0, 2, 1, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 128])
    start += struct.pack("<d", 0.1) + struct.pack("<f", 0.5)
    body = struct.pack("<2f", 1.5, -2.0) + bytes([1, 0, 0, 0, 1, 0])
    assert down == start + struct.pack("<I", zlib.crc32(start + body)) + body
    up = Reply(258, 3, 77, np.array([0.25], dtype=np.float32)).to_bytes()
    start = b"FKSR" + bytes([1, 0, 1, 0, 2, 1, 0, 0, 3, 0, 0, 0, 77, 0, 0, 0])
    assert up == start + struct.pack("<I", zlib.crc32(start + struct.pack("<f", 0.25))) + struct.pack(
        "<f", 0.25
    )
    for message in (Broadcast.from_bytes(down), Reply.from_bytes(up)):
        assert message.to_bytes() in (down, up)


@pytest.mark.parametrize("kind", ["broadcast", "reply"])
def test_every_flipped_bit_and_every_truncation_is_noticed(kind: str) -> None:
    server = make_server(num_local_steps=2)
    client = server.clients[0]
    message = server.broadcast(client) if kind == "broadcast" else make_reply(server, client)
    read: Any = Broadcast.from_bytes if kind == "broadcast" else Reply.from_bytes
    read(message)
    for position in range(len(message)):
        for bit in range(8):
            changed = bytearray(message)
            changed[position] ^= 1 << bit
            with pytest.raises(MessageError):
                read(bytes(changed))
    for length in range(len(message)):
        with pytest.raises(MessageError):
            read(message[:length])
    with pytest.raises(MessageError, match="bytes, got"):
        read(message + b"\0")


@pytest.mark.parametrize(
    ("kind", "position", "field", "message"),
    [
        ("broadcast", 4, struct.pack("<H", 2), "format version 1, got 2"),
        ("broadcast", 8, struct.pack("<I", 2**24), "round below"),
        ("broadcast", 12, struct.pack("<I", 2**24), "client below"),
        ("broadcast", 28, struct.pack("<d", -1.0), "lr of at least 0, got -1"),
        ("broadcast", 28, struct.pack("<d", np.nan), "lr of at least 0, got nan"),
        ("broadcast", 36, struct.pack("<f", 0.0), "eps above 0"),
        ("broadcast", 44, struct.pack("<f", np.inf), "finite coefficients"),
        ("broadcast", 44 + 4 * 16, struct.pack("<H", 16), "indices below 16, got 16"),
        ("reply", 4, struct.pack("<H", 0), "format version 1, got 0"),
        ("reply", 8, struct.pack("<I", 2**32 - 1), "round below"),
        ("reply", 12, struct.pack("<I", 2**24), "client below"),
        ("reply", 16, struct.pack("<I", 0), "a data size of at least 1"),
        ("reply", 24, struct.pack("<f", np.nan), "finite scalars"),
        ("reply", 24, struct.pack("<f", -np.inf), "finite scalars"),
    ],
)
def test_a_field_out_of_range_under_a_right_checksum(
    kind: str, position: int, field: bytes, message: str
) -> None:
    server = make_server()
    client = server.clients[0]
    whole = server.broadcast(client) if kind == "broadcast" else make_reply(server, client)
    read: Any = Broadcast.from_bytes if kind == "broadcast" else Reply.from_bytes
    with pytest.raises(MessageError, match=message):
        read(resealed(whole, position, field, 44 if kind == "broadcast" else 24))


def test_empty_messages_and_other_types() -> None:
    empty = np.zeros(0)
    with pytest.raises(MessageError, match="at least one local step"):
        Broadcast.from_bytes(Broadcast(0, 0, 0, 0.1, 0.1, np.zeros(2, "f4"), empty.astype("u2")).to_bytes())
    with pytest.raises(MessageError, match="number of seeds"):
        Broadcast.from_bytes(Broadcast(0, 0, 0, 0.1, 0.1, empty.astype("f4"), np.zeros(2, "u2")).to_bytes())
    with pytest.raises(MessageError, match="at least one scalar"):
        Reply.from_bytes(Reply(0, 0, 1, empty.astype("f4")).to_bytes())
    with pytest.raises(MessageError, match="as bytes, got str"):
        Reply.from_bytes("FKSR")  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="begins with b'FKSR', got b'FKSB'"):
        Reply.from_bytes(make_server().broadcast(make_server().clients[0]))


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
    assert server.wire_coefficients.dtype == np.float32
    assert np.array_equal(server.wire_coefficients, server.coefficients.astype(np.float32))


def test_order_of_arrival_does_not_matter() -> None:
    results = set()
    for order in permutations(range(3)):
        server = make_server()
        for _ in range(2):
            replies = make_replies(server)
            server.merge(iter([replies[i] for i in order]))
        results.add((server.coefficients.tobytes(), server.clients))
    assert len(results) == 1


def test_missing_replies_leave_the_weights_to_the_others() -> None:
    server, alone = make_server(), make_server()
    reply = make_replies(server)[1]
    server.merge([reply])
    first = server.coefficients.copy()
    g = np.zeros(16)
    np.add.at(g, alone.schedule(reply[0]), Reply.from_bytes(reply[1]).scalars.astype(np.float64))
    assert np.array_equal(first, -0.3 * g)


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


def test_a_bad_reply_changes_nothing() -> None:
    server = make_server()
    server.merge(make_replies(server))
    before = (server.round, server.clients, server.coefficients.tobytes())
    good = make_replies(server)
    first, second = good[0][0], good[1][0]
    outsider = next(client for client in range(7) if client not in server.clients)
    steps = np.zeros(19, dtype=np.float32)
    cases: list[tuple[list[tuple[int, bytes]], type[Exception], str]] = [
        ([], ProtocolError, "at least one reply of round 1, got none"),
        ([*good, good[0]], ProtocolError, f"one reply of client {first}, got two"),
        ([*good, (outsider, make_reply(server, outsider))], ProtocolError, f"of round 1, got {outsider}"),
        ([good[0], (second, good[0][1])], ProtocolError, "of \\(round, client, number of steps\\)"),
        ([good[0], (second, make_reply(server, second, round=0))], ProtocolError, "got one of \\(0, "),
        ([good[0], (second, make_reply(server, second, scalars=steps))], ProtocolError, "19\\)"),
        ([good[0], (second, good[1][1][:-1])], MessageError, "reply of 104 bytes, got 103"),
    ]
    for replies, error, message in cases:
        with pytest.raises(error, match=message):
            server.merge(replies)
        assert (server.round, server.clients, server.coefficients.tobytes()) == before
    with pytest.raises(ProtocolError, match=f"got {outsider}"):
        server.broadcast(outsider)
    server.merge(good)
    assert server.round == 2


def test_sums_beyond_fp32_change_nothing() -> None:
    server = make_server(lr=1e3)
    client = server.clients[0]
    huge = np.full(20, 1e38, dtype=np.float32)
    with pytest.raises(ProtocolError, match="got some beyond it; the learning rate is too large"):
        server.merge([(client, make_reply(server, client, scalars=huge))])
    assert server.round == 0
    assert not server.coefficients.any()


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
        ({"weighting": "size"}, ValueError, r"out of \['data_size', 'equal'\], got 'size'"),
    ],
)
def test_bad_servers(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_server(**changes)


def test_messages_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Reply(0, 0, 1, np.zeros(1, np.float32)).round = 3  # type: ignore[misc]
