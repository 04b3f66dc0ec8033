"""What passes through a resident worker's socket: a request, an answer, a connection each.

The worker greets with the key that says what it holds. Then comes one request: what is asked (u8), length
(u32), bytes; and one answer: how it went (u8), length (u32), bytes. Integers are little-endian, errors JSON.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from enum import IntEnum

from fedkseed.federation.messages import MAX_BROADCAST_BYTES, MessageError, ProtocolError
from fedkseed.model.identity import IdentityError

KEY_BYTES = 32
_FRAME = struct.Struct("<BI")
#: struct ucred of Linux: process, user, group.
_CREDENTIALS = struct.Struct("3i")
#: No request or answer is longer.
_MAX_BYTES = MAX_BROADCAST_BYTES + 4096
_MAX_ERROR_TEXT = 4096

#: Errors that are raised again on the caller's side as what they were.
_TYPES: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (MessageError, ProtocolError, IdentityError)
}


class ResidentError(RuntimeError):
    """A resident worker that cannot start, cannot be reached or failed; the next message starts a new one."""


class Asked(IntEnum):
    """What a caller asks for."""

    HANDLE = 1
    INFO = 2
    STOP = 3


class Answered(IntEnum):
    """How it went."""

    DONE = 0
    FAILED = 1


def send(to: socket.socket, kind: int, data: bytes) -> None:
    """Sends one frame.

    Raises:
        OSError: the other side is gone, or takes too long.
    """
    to.sendall(_FRAME.pack(kind, len(data)) + data)


def receive(source: socket.socket) -> tuple[int, bytes]:
    """One frame: its kind and its bytes.

    Raises:
        ConnectionError: the other side ended it, or it is longer than any frame.
        OSError: the other side takes too long.
    """
    kind, length = _FRAME.unpack(receive_exactly(source, _FRAME.size))
    if length > _MAX_BYTES:
        raise ConnectionError(f"expected a frame of at most {_MAX_BYTES} bytes, got {length}")
    return kind, receive_exactly(source, length)


def receive_exactly(source: socket.socket, num_bytes: int) -> bytes:
    """So many bytes.

    Raises:
        ConnectionError: the other side ended before.
        OSError: it takes too long.
    """
    parts = bytearray()
    while len(parts) < num_bytes:
        part = source.recv(num_bytes - len(parts))
        if not part:
            raise ConnectionError(f"expected {num_bytes} bytes, got the end after {len(parts)}")
        parts += part
    return bytes(parts)


def is_own(other: socket.socket) -> bool:
    """Whether the other side of a local socket is a process of this user."""
    found = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(found)
    return bool(user == os.getuid())


def error_bytes(error: Exception) -> bytes:
    """An error as an answer."""
    text = str(error)[:_MAX_ERROR_TEXT]
    return json.dumps({"type": type(error).__name__, "text": text}).encode()


def error_of(data: bytes) -> Exception:
    """The error of an answer: of its own type, or a `ResidentError` that names it."""
    found = json.loads(data)
    kind = _TYPES.get(found["type"])
    return kind(found["text"]) if kind is not None else ResidentError(f"{found['type']}: {found['text']}")
