"""A resident worker and its callers among parties that they must not trust, and bytes that mean nothing."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.resident_clients import make_echo, make_none
from support.running import SECONDS

from fedkseed import MessageError
from fedkseed.federation.messages import MAX_BROADCAST_BYTES
from fedkseed.resident import ResidentError, connect, connection, frames, worker
from fedkseed.resident.frames import KEY_BYTES, Answered, Asked, receive, receive_exactly, send

KEY = bytes(range(KEY_BYTES))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "sockets"
    place.mkdir(mode=0o700)
    return place


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[Path, worker.Trace]]:
    """A worker in a thread of this process: where it listens, and what it did."""
    path, trace = folder / "served.socket", worker.Trace()
    orders = worker.Orders(str(path), KEY, SECONDS, b"", ())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        serving = threading.Thread(target=worker.serve, args=(listener, orders, make_echo(folder), trace))
        serving.start()
        yield path, trace
        with call(path) as caller:
            send(caller, Asked.STOP, b"")
        serving.join(SECONDS)
        assert not serving.is_alive()


def call(path: Path) -> socket.socket:
    """A connection that was greeted."""
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    caller.settimeout(SECONDS)
    caller.connect(str(path))
    assert receive_exactly(caller, KEY_BYTES) == KEY
    return caller


def assert_answers(path: Path) -> None:
    with call(path) as caller:
        send(caller, Asked.HANDLE, b"good")
        assert receive(caller) == (Answered.DONE, b"answer to good")


def test_a_thousand_callers_that_say_nothing_sensible_leave_the_worker_as_it_was(
    served: tuple[Path, worker.Trace],
) -> None:
    path, trace = served
    generator = np.random.default_rng(7)
    for number in range(1000):
        junk = generator.bytes(int(generator.integers(0, 12)))
        if junk[:1] == bytes([Asked.STOP]):
            continue
        with call(path) as caller:
            caller.sendall(junk)
        if number % 200 == 0:
            assert_answers(path)
    assert_answers(path)
    assert (trace.messages, trace.failed) == (6, 0)


@pytest.mark.parametrize("announced", [2**32 - 1, frames._MAX_BYTES + 1])
def test_a_frame_that_says_it_is_endless_is_not_waited_for(
    served: tuple[Path, worker.Trace], monkeypatch: pytest.MonkeyPatch, announced: int
) -> None:
    path, _ = served
    monkeypatch.setattr(worker, "_SECONDS_FOR_REQUEST", SECONDS)
    with call(path) as caller:
        caller.settimeout(SECONDS / 4)
        caller.sendall(struct.pack("<BI", Asked.HANDLE, announced))
        assert caller.recv(1) == b""
    assert_answers(path)


def test_a_caller_that_stops_in_mid_message_does_not_hold_up_others(
    served: tuple[Path, worker.Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = served
    monkeypatch.setattr(worker, "_SECONDS_FOR_REQUEST", 0.2)
    with call(path) as silent, call(path) as half:
        half.sendall(struct.pack("<BI", Asked.HANDLE, 100) + b"half")
        assert_answers(path)
        assert silent.recv(1) == half.recv(1) == b""


def test_a_caller_of_another_user_is_not_greeted(
    served: tuple[Path, worker.Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trace = served
    with monkeypatch.context() as patch:
        patch.setattr(worker, "is_own", lambda _: False)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            caller.settimeout(SECONDS)
            caller.connect(str(path))
            assert caller.recv(1) == b""
    assert trace.messages == 0
    assert_answers(path)


def test_the_user_is_the_one_that_the_system_names(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        assert frames.is_own(left)
        monkeypatch.setattr("os.getuid", lambda: 4321)
        assert not frames.is_own(left)


def test_a_worker_of_another_client_or_user_is_told_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = connect(make_none, folder)
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as impostor:
        impostor.bind(str(resident.path))
        impostor.listen()

        def listen() -> None:
            for _ in range(4):  # a look whether it is there, and a message, twice
                caller, _ = impostor.accept()
                with caller, suppress(ConnectionError):
                    caller.settimeout(SECONDS)
                    caller.sendall(KEY)
                    heard.append(caller.recv(100))

        listening = threading.Thread(target=listen, daemon=True)
        listening.start()
        with pytest.raises(ResidentError, match="this client's worker at .*, got another one's; remove it"):
            resident.handle(b"secret")
        monkeypatch.setattr(connection, "is_own", lambda _: False)
        with pytest.raises(ResidentError, match="a worker of this user at .*, got one of another; remove it"):
            resident.handle(b"secret")
        listening.join(SECONDS)
        assert not listening.is_alive()
    assert not any(heard)


@pytest.mark.parametrize("message", [bytes(MAX_BROADCAST_BYTES + 1), "text", 5])
def test_what_no_client_takes_starts_no_worker(folder: Path, message: object) -> None:
    with pytest.raises(MessageError, match="expected a message"):
        connect(make_none, folder).handle(message)  # type: ignore[arg-type]
    assert list(folder.iterdir()) == []
