"""A resident worker's life: make the client, answer messages until none comes for a while.

`fedkseed.resident.connect` starts a Python that calls `main`, and sends its `Orders` through stdin; what it
says goes to a log file beside its socket.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from fedkseed.federation.client import Client, check_made_client
from fedkseed.resident.frames import Answered, Asked, error_bytes, is_own, receive, send

logger = logging.getLogger("fedkseed.resident")

#: For the bytes of a request, which are all there when a caller connects; others wait meanwhile.
_SECONDS_FOR_REQUEST = 20.0


class Handler(Protocol):
    """What a worker holds: a `fedkseed.Client`, or what answers messages like one."""

    def handle(self, message: bytes) -> bytes:
        """The answer to a message of the server."""


@dataclass(frozen=True)
class Orders:
    """What a worker is started with.

    Attributes:
        path: of its socket.
        key: that it greets with.
        idle_timeout: seconds without a message after which it ends.
        make_client: as a pickle: it may need the modules below ``python_path``.
        python_path: where the caller finds its modules.
    """

    path: str
    key: bytes
    idle_timeout: float
    make_client: bytes
    python_path: tuple[str, ...]


@dataclass
class Trace:
    """What a worker did.

    Attributes:
        loads: models that were loaded: clients that were made.
        messages: that were answered, and how many of them failed.
        rebuilds: models of rounds that were rebuilt from w0; others were copied from the one before.
        seconds: of making the client.
    """

    loads: int = 0
    messages: int = 0
    failed: int = 0
    rebuilds: int = 0
    seconds: float = 0.0
    pid: int = field(default_factory=os.getpid)


def serve(listener: socket.socket, orders: Orders, client: Handler, trace: Trace) -> None:
    """Answers one connection after the other; returns when asked to, or when none came for a while."""
    listener.settimeout(orders.idle_timeout)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            logger.info("no message for %g s: ends", orders.idle_timeout)
            return
        with connection:
            if not is_own(connection):
                logger.warning("refused a caller of another user")
                continue
            connection.settimeout(_SECONDS_FOR_REQUEST)
            try:
                connection.sendall(orders.key)
                asked, message = receive(connection)
            except OSError as error:
                logger.debug("a caller went away: %s", error)  # one that only looks does, too
                continue
            if asked == Asked.HANDLE:
                answer = _answered(client, message, trace)
            else:
                answer = (Answered.DONE, json.dumps(vars(trace)).encode())
            with suppress(OSError):  # the caller went away; the next one asks again
                send(connection, *answer)
            if asked == Asked.STOP:
                logger.info("asked to end")
                return


def _answered(client: Handler, message: bytes, trace: Trace) -> tuple[Answered, bytes]:
    start, before = perf_counter(), _seconds_rebuild(client)
    trace.messages += 1
    try:
        reply = client.handle(message)
        if not isinstance(reply, (bytes, bytearray)):
            raise TypeError(f"expected handle to answer in bytes, got a {type(reply).__name__}")
    except Exception as error:
        trace.failed += 1
        logger.warning("message %d failed", trace.messages, exc_info=error)
        return Answered.FAILED, error_bytes(error)
    has_rebuilt = _seconds_rebuild(client) > before
    trace.rebuilds += has_rebuilt
    logger.info(
        "message %d answered in %.3f s, the round's model %s",
        trace.messages,
        perf_counter() - start,
        "rebuilt" if has_rebuilt else "as it was",
    )
    return Answered.DONE, reply


def _seconds_rebuild(client: Handler) -> float:
    return client.working.seconds_rebuild if isinstance(client, Client) else 0.0


def main() -> None:
    """Takes the orders from stdin and serves."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    orders: Orders = pickle.load(sys.stdin.buffer)
    sys.path[:] = [*orders.python_path]
    trace = Trace()
    start = perf_counter()
    make_client: Callable[[], Any] = pickle.loads(orders.make_client)
    client = check_made_client(make_client())
    trace.loads, trace.seconds = 1, perf_counter() - start
    logger.info("model loaded in %.1f s, process %d", trace.seconds, trace.pid)
    path = Path(orders.path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o177)  # the socket's mode is 0600 from its first instant
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        bound = path.stat()
        try:
            listener.listen(64)
            serve(listener, orders, client, trace)
        finally:
            # Where somebody removed this socket, another worker's may be there by now.
            with suppress(FileNotFoundError):
                if os.path.samestat(bound, path.lstat()):
                    path.unlink()
