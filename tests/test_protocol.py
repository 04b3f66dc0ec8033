"""The two messages: every byte where docs/protocol.md says, and nothing else taken for a message."""

from __future__ import annotations

import dataclasses
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from support.messages import (
    BROADCAST_HEADER,
    IDENTITY,
    REPLY_HEADER,
    make_broadcast,
    make_reply,
    make_server,
    patched,
    sealed,
)
from support.protocol_page import read_by_the_page

from fedkseed import Broadcast, MessageError, ModelIdentity, Reply, SeedPool
from fedkseed.federation.messages import MAX_BROADCAST_BYTES, MAX_REPLY_BYTES, broadcast_digest
from fedkseed_kernels import CONTRACT_VERSION

Read = Callable[[Any], Any]
REPLY = Reply(258, 3, 77, bytes(range(100, 132)), np.array([0.25, -3.0], dtype=np.float32))
MESSAGES: dict[str, tuple[bytes, Read]] = {
    "broadcast": (make_broadcast().to_bytes(), Broadcast.from_bytes),
    "reply": (REPLY.to_bytes(), Reply.from_bytes),
}
BOTH = pytest.mark.parametrize("kind", list(MESSAGES))


def test_the_page_shows_every_byte_of_a_broadcast() -> None:
    message, _ = MESSAGES["broadcast"]
    assert read_by_the_page("Broadcast", message, {"K": 2, "tau": 3}) == {
        "magic": b"FKSB",
        "format version": 2,
        "contract version": CONTRACT_VERSION,
        "noise family": 0,
        "dtype of w0": 2,
        "tau": 3,
        "K": 2,
        "round": 258,
        "eps": 0.5,
        "lr": 0.1,
        "base seed": 2**63 + 1,
        "run id": b"sixteen bytes id",
        "structure hash": IDENTITY.structure,
        "content hash": IDENTITY.content,
        "bound of g": 8.0,
        "coefficients": (1.5, -2.0),
        "client": 3,
        "schedule": (1, 0, 1),
        "checksum": zlib.crc32(message[:-4]),
    }


def test_the_page_shows_every_byte_of_a_reply() -> None:
    message, _ = MESSAGES["reply"]
    assert read_by_the_page("Reply", message, {"tau": 2}) == {
        "magic": b"FKSR",
        "format version": 2,
        "contract version": CONTRACT_VERSION,
        "tau": 2,
        "round": 258,
        "client": 3,
        "data size": 77,
        "digest": bytes(range(100, 132)),
        "scalars": (0.25, -3.0),
        "checksum": zlib.crc32(message[:-4]),
    }


def test_what_is_read_is_what_was_written() -> None:
    down, up = make_broadcast(), Reply.from_bytes(REPLY.to_bytes())
    read = Broadcast.from_bytes(down.to_bytes())
    for field in dataclasses.fields(Broadcast):
        assert np.array_equal(getattr(read, field.name), getattr(down, field.name)), field.name
    assert (read.coefficients.dtype, read.schedule.dtype) == (np.float32, np.uint16)
    assert (up.round, up.client, up.data_size, up.digest) == (258, 3, 77, REPLY.digest)
    assert up.scalars.tolist() == [0.25, -3.0]
    assert broadcast_digest(down.to_bytes()) == sha256(down.to_bytes()).digest()
    with pytest.raises(dataclasses.FrozenInstanceError):
        up.round = 3  # type: ignore[misc]


@pytest.mark.parametrize("sampling", ["uniform", "pro"])
def test_bytes_at_the_paper_s_size(sampling: str) -> None:
    server = make_server(pool=SeedPool(0, 4096), num_local_steps=200, sampling=sampling)
    down = server.broadcast(server.clients[0])
    up = make_reply(server, server.clients[0])
    assert len(down) <= 16_950
    assert len(up) <= 950
    assert (len(down), len(up)) == (16_916, 860)


@BOTH
def test_every_flipped_bit_and_every_truncation_is_noticed(kind: str) -> None:
    message, read = MESSAGES[kind]
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
        ("broadcast", 4, struct.pack("<H", 1), "format version 2, got 1; both sides need the same release"),
        ("broadcast", 6, struct.pack("<H", 9), "contract version 1, got 9; both sides need the same release"),
        ("broadcast", 8, b"\2", "noise family below 2, got 2"),
        ("broadcast", 9, b"\5", "dtype code"),
        ("broadcast", 16, struct.pack("<I", 2**24), "round below"),
        ("broadcast", 20, struct.pack("<f", 0.0), "normal fp32 as eps, got 0"),
        ("broadcast", 20, struct.pack("<f", np.nan), "normal fp32 as eps, got nan"),
        ("broadcast", 24, struct.pack("<d", -1.0), "lr of at least 0, got -1"),
        ("broadcast", 24, struct.pack("<d", np.nan), "lr of at least 0, got nan"),
        ("broadcast", 24, struct.pack("<d", np.inf), "lr of at least 0, got inf"),
        ("broadcast", 120, struct.pack("<f", np.inf), r"as bound of \|g\|, got inf"),
        ("broadcast", 120, struct.pack("<f", -1.0), r"as bound of \|g\|, got -1"),
        ("broadcast", 24, struct.pack("<d", 1e38), "whose steps lie within fp32"),
        ("broadcast", 20, struct.pack("<f", 2e38), "whose steps lie within fp32"),
        ("broadcast", BROADCAST_HEADER + 4, struct.pack("<f", np.inf), "finite coefficients"),
        ("broadcast", BROADCAST_HEADER + 8, struct.pack("<I", 2**24), "client below"),
        ("broadcast", BROADCAST_HEADER + 16, struct.pack("<H", 2), "indices below 2, got 2"),
        ("reply", 4, struct.pack("<H", 3), "format version 2, got 3"),
        ("reply", 6, struct.pack("<H", 0), "contract version 1, got 0"),
        ("reply", 12, struct.pack("<I", 2**32 - 1), "round below"),
        ("reply", 16, struct.pack("<I", 2**24), "client below"),
        ("reply", 20, struct.pack("<I", 0), "a data size of at least 1"),
        ("reply", REPLY_HEADER, struct.pack("<f", np.nan), "finite scalars"),
        ("reply", REPLY_HEADER + 4, struct.pack("<f", -np.inf), "finite scalars"),
    ],
)
def test_a_field_out_of_range_under_a_right_checksum(
    kind: str, position: int, field: bytes, message: str
) -> None:
    whole, read = MESSAGES[kind]
    with pytest.raises(MessageError, match=message):
        read(patched(whole, position, field))


def test_no_message_is_made_of_fields_out_of_range() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"round": -1}, "round"),
        ({"client": 2**24}, "client"),
        ({"run_id": b""}, "run id of 16 bytes, got 0"),
        ({"base_seed": -1}, "base seed"),
        ({"identity": ModelIdentity(b"", bytes(32), "float32")}, "hashes"),
        ({"identity": ModelIdentity(bytes(32), bytes(32), "int8")}, "dtype out of"),
        ({"coefficients": np.zeros(0, np.float32)}, r"number of seeds in \[1, 65536\], got 0"),
        ({"schedule": np.zeros(2**16, np.uint16)}, "fewer than 65536 local steps"),
        ({"family": "cauchy"}, "noise family"),
    ]
    for changes, message in cases:
        with pytest.raises(MessageError, match=message):
            make_broadcast(**changes).to_bytes()
    for changes, message in [
        ({"data_size": 2**32}, "data size"),
        ({"digest": b"short"}, "digest of 32 bytes, got 5"),
        ({"scalars": np.array([np.nan], np.float32)}, "finite scalars"),
        ({"scalars": np.zeros(0, np.float32)}, "at least one local step"),
    ]:
        with pytest.raises(MessageError, match=message):
            dataclasses.replace(REPLY, **changes).to_bytes()


def test_other_types_and_other_kinds() -> None:
    with pytest.raises(MessageError, match="as bytes, bytearray or memoryview, got str"):
        Reply.from_bytes("FKSR")  # type: ignore[arg-type]
    for kind, (message, reader) in zip(("broadcast", "reply"), MESSAGES.values(), strict=True):
        for given in (bytearray(message), memoryview(message), memoryview(bytearray(message))):
            assert reader(given).to_bytes() == message, kind
    with pytest.raises(MessageError, match="begins with b'FKSR', got b'FKSB'"):
        Reply.from_bytes(MESSAGES["broadcast"][0])


@BOTH
def test_the_largest_message_is_read_and_a_larger_one_refused(kind: str) -> None:
    steps = 2**16 - 1
    if kind == "broadcast":
        arrays = {
            "coefficients": np.ones(2**16, np.float32),
            "schedule": np.full(steps, 2**16 - 1, np.uint16),
        }
        largest, limit = make_broadcast(**arrays).to_bytes(), MAX_BROADCAST_BYTES
    else:
        largest = dataclasses.replace(REPLY, scalars=np.ones(steps, np.float32)).to_bytes()
        limit = MAX_REPLY_BYTES
    assert len(largest) == limit
    MESSAGES[kind][1](largest)
    with pytest.raises(MessageError, match=f"to {limit} bytes, got {limit + 1}"):
        MESSAGES[kind][1](largest + b"\0")


@BOTH
def test_a_gigabyte_is_refused_by_its_length_in_constant_memory(kind: str) -> None:
    # Zero pages that nobody touches take no memory; reading or copying them would.
    message = bytes(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="got 1073741824"):
            MESSAGES[kind][1](message)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


@BOTH
def test_lengths_that_the_header_claims_allocate_nothing(kind: str) -> None:
    message, read = MESSAGES[kind]
    claim = patched(message, 12 if kind == "broadcast" else 8, struct.pack("<I", 2**32 - 1))
    tracemalloc.start()
    try:
        with pytest.raises(MessageError):
            read(claim)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def rejected(read: Read, messages: list[bytes]) -> int:
    count = 0
    for message in messages:
        try:
            read(message)
        except MessageError:
            count += 1
    return count


@pytest.mark.slow
def test_a_million_random_messages_are_refused() -> None:
    generator = np.random.default_rng(3)
    starts = [message[: 4 * part] for message, _ in MESSAGES.values() for part in (0, 1, 2)]
    for _, read in MESSAGES.values():
        for start in starts:
            noise = generator.bytes(2 << 20)
            cuts = generator.integers(0, len(noise) - 300, 80_000).tolist()
            sizes = generator.integers(0, 300, 80_000).tolist()
            messages = [start + noise[cut : cut + size] for cut, size in zip(cuts, sizes, strict=True)]
            assert rejected(read, messages) == len(messages)
    # And messages of the right length with some bytes changed: the checksum's work.
    for whole, read in MESSAGES.values():
        changed = []
        for position, old, new in zip(
            generator.integers(0, len(whole), 20_000).tolist(),
            generator.integers(1, 256, 20_000).tolist(),
            generator.integers(0, len(whole) - 4, 20_000).tolist(),
            strict=True,
        ):
            message = bytearray(whole)
            message[position] ^= old
            message[new : new + 4] = message[new : new + 4][::-1]
            if bytes(message) != whole:
                changed.append(bytes(message))
        assert rejected(read, changed) == len(changed)


@BOTH
def test_random_fields_under_a_right_checksum_are_in_range_or_refused(kind: str) -> None:
    """Structured fuzz: magic and versions stay, all else is random; what is read must be valid again."""
    whole, read = MESSAGES[kind]
    generator = np.random.default_rng(4)
    num_read = 0
    for _ in range(10_000):
        message = bytearray(whole)
        for _ in range(generator.integers(1, 4)):
            start = int(generator.integers(8, len(whole) - 4))
            size = int(generator.integers(1, 5))
            message[start : start + size] = generator.bytes(len(message[start : start + size]))
        try:
            found = read(sealed(bytes(message)))
        except MessageError:
            continue
        num_read += 1
        # Valid again, and the very bytes: no two messages mean the same.
        assert found.to_bytes() == sealed(bytes(message))
    assert 100 < num_read < 9_900
