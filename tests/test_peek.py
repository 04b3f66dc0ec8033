"""Who a message is for, told without reading it; and messages in every kind of buffer."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.messages import make_broadcast, patched
from support.small_client import make_broadcast as make_small_broadcast
from support.small_client import make_client, make_model

from fedkseed import Broadcast, MessageError, WorkingCopy
from fedkseed.federation.messages import MAX_BROADCAST_BYTES

NO_STEPS = np.zeros(0, np.uint16)
BUFFERS: list[Callable[[bytes], Any]] = [
    bytes,
    bytearray,
    memoryview,
    lambda message: memoryview(bytearray(message)),
    lambda message: memoryview(b"".join(bytes([byte, 0]) for byte in message))[::2],
    lambda message: memoryview(message).cast("B", (1, len(message))),
]


@pytest.mark.parametrize("make", BUFFERS)
def test_the_header_says_kind_round_client_steps_seeds_and_run(make: Callable[[bytes], Any]) -> None:
    for schedule, kind in ((np.array([1, 0, 1], np.uint16), "train"), (NO_STEPS, "evaluate")):
        found = Broadcast.peek(make(make_broadcast(schedule=schedule).to_bytes()))
        assert found == (kind, 258, 3, len(schedule), 2, b"sixteen bytes id")


@pytest.mark.parametrize("make", BUFFERS)
def test_a_client_answers_a_message_in_any_buffer_with_the_same_bytes(make: Callable[[bytes], Any]) -> None:
    client = make_client(WorkingCopy(make_model()), evaluate=lambda model, round: {"round": round})
    for message in (make_small_broadcast(), make_small_broadcast(schedule=NO_STEPS)):
        reply = client.handle(message)
        assert type(reply) is bytes
        assert client.handle(make(message)) == reply
        client.load(make(message))


def test_a_buffer_that_is_written_meanwhile_changes_nothing() -> None:
    """A transport may use its buffer for the next message while the client still computes."""
    expected = make_client(WorkingCopy(make_model())).step(make_small_broadcast())
    buffer = bytearray(make_small_broadcast())
    client = make_client(
        WorkingCopy(make_model()), on_step=lambda: buffer.__setitem__(slice(None), bytes(len(buffer)))
    )
    assert client.handle(buffer) == expected
    assert not any(buffer)


def test_coefficients_and_checksum_are_not_looked_at() -> None:
    message = bytearray(make_broadcast().to_bytes())
    whole = Broadcast.peek(message)
    message[124:132] = b"\xff" * 8
    assert Broadcast.peek(message) == whole
    with pytest.raises(MessageError):
        Broadcast.from_bytes(message)


def test_a_peek_at_the_largest_message_takes_no_memory() -> None:
    schedule = np.zeros(2**16 - 1, np.uint16)
    message = make_broadcast(coefficients=np.ones(2**16, np.float32), schedule=schedule).to_bytes()
    assert len(message) == MAX_BROADCAST_BYTES
    tracemalloc.start()
    try:
        assert Broadcast.peek(message)[3:5] == (2**16 - 1, 2**16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000


def released() -> memoryview:
    view = memoryview(make_broadcast().to_bytes())
    view.release()
    return view


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"", "of 132 to 393346 bytes, got 0"),
        (make_broadcast().to_bytes()[:-1], "bytes, got"),
        (make_broadcast().to_bytes() + b"\0", "bytes, got"),
        (bytearray(MAX_BROADCAST_BYTES + 1), f"got {MAX_BROADCAST_BYTES + 1}"),
        (memoryview(bytearray(2**20)).cast("d"), f"got {2**20}"),
        (patched(make_broadcast().to_bytes(), 0, b"FKSR"), "begins with b'FKSB', got b'FKSR'"),
        (patched(make_broadcast().to_bytes(), 4, struct.pack("<H", 1)), "format version 2, got 1"),
        (patched(make_broadcast().to_bytes(), 6, struct.pack("<H", 9)), "contract version 1, got 9"),
        (patched(make_broadcast().to_bytes(), 0, b"FKSE"), "none to evaluate, got 3"),
        (patched(make_broadcast(schedule=NO_STEPS).to_bytes(), 0, b"FKSB"), "one local step to train"),
        ("FKSB", "got str"),
        (None, "got NoneType"),
        ([70, 75, 83, 66], "got list"),
        (np.zeros(200, np.uint8), "got ndarray"),
        (released(), "a buffer without any"),
    ],
)
def test_what_is_no_message_is_a_typed_error(message: Any, error: str) -> None:
    client = make_client(WorkingCopy(make_model()))
    for read in (
        Broadcast.peek,
        Broadcast.from_bytes,
        client.handle,
        client.step,
        client.evaluate,
        client.load,
    ):
        with pytest.raises(MessageError, match=error):
            read(message)
