"""The two messages of a round as bytes: a broadcast to one client, and that client's reply.

Little-endian. Each message is a header and a body; the header's last field is the CRC-32 of all the rest.

    broadcast   magic "FKSB", format version u16, tau u16, round u32, client u32, K u32, base seed u64,
                lr f64, eps f32, checksum u32 (44 bytes); then K coefficients f32; then tau indices u16
    reply       magic "FKSR", format version u16, tau u16, round u32, client u32, data size u32,
                checksum u32 (24 bytes); then tau scalars g f32, in the order of the schedule

At K = 4096 and tau = 200 that is 16,828 bytes down and 824 up.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed.seeds import MAX_CLIENTS, MAX_ROUNDS, MAX_SEEDS

FORMAT_VERSION = 1

_BROADCAST_MAGIC, _REPLY_MAGIC = b"FKSB", b"FKSR"
_BROADCAST = struct.Struct("<4sHHIIIQdfI")
_REPLY = struct.Struct("<4sHHIIII")
_CHECKSUM = struct.Struct("<I")


class MessageError(ValueError):
    """Bytes that are not a message of this format."""


class ProtocolError(ValueError):
    """A message that is well formed and does not belong here: of another round, client, pool or schedule."""


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What the server sends to one client: the round's model and what to do with it.

    Attributes:
        round: in [0, 2^24).
        client: in [0, 2^24).
        base_seed: of the seed pool, in [0, 2^64).
        lr: fp64.
        eps: fp32.
        coefficients: fp32 [K]; the round's model is w0 + sum_k coefficients_k z(seed_k).
        schedule: uint16 [tau], indices into the pool, one for each local step.
    """

    round: int
    client: int
    base_seed: int
    lr: float
    eps: float
    coefficients: NDArray[np.float32]
    schedule: NDArray[np.uint16]

    def to_bytes(self) -> bytes:
        """The message on the wire."""
        body = self.coefficients.astype("<f4").tobytes() + self.schedule.astype("<u2").tobytes()
        num_steps, num_seeds = len(self.schedule), len(self.coefficients)
        fields = (self.round, self.client, num_seeds, self.base_seed, self.lr, self.eps)
        return _seal(_BROADCAST, (_BROADCAST_MAGIC, FORMAT_VERSION, num_steps, *fields), body)

    @classmethod
    def from_bytes(cls, message: bytes) -> Broadcast:
        """The message that `to_bytes` wrote.

        Raises:
            MessageError: truncated, damaged, of another format or version, or a field out of range.
        """
        header = _open(_BROADCAST, _BROADCAST_MAGIC, "broadcast", message)
        num_steps, round, client, num_seeds, base_seed, lr, eps = header
        _check_length("broadcast", message, _BROADCAST.size + 4 * num_seeds + 2 * num_steps)
        _check_checksum("broadcast", _BROADCAST, message)
        coefficients = np.frombuffer(message, "<f4", num_seeds, _BROADCAST.size).astype(np.float32)
        first = _BROADCAST.size + 4 * num_seeds
        schedule = np.frombuffer(message, "<u2", num_steps, first).astype(np.uint16)
        _require(0 < num_seeds <= MAX_SEEDS, "a number of seeds in [1, 65536]", num_seeds)
        _require(num_steps > 0, "at least one local step", num_steps)
        _require(round < MAX_ROUNDS, f"a round below {MAX_ROUNDS}", round)
        _require(client < MAX_CLIENTS, f"a client below {MAX_CLIENTS}", client)
        _require(0 <= lr < math.inf, "a finite lr of at least 0", lr)
        _require(0 < eps < math.inf, "a finite eps above 0", eps)
        _require(bool(np.isfinite(coefficients).all()), "finite coefficients", "NaN or infinity")
        _require(int(schedule.max()) < num_seeds, f"indices below {num_seeds}", int(schedule.max()))
        return cls(round, client, base_seed, lr, eps, coefficients, schedule)


@dataclass(frozen=True, eq=False)
class Reply:
    """What a client sends back: scalars only.

    Attributes:
        round, client: as in the broadcast.
        data_size: of the client's training data, at least 1; in rows or whatever all clients count.
        scalars: g of each local step, fp32 [tau]; 0 for a step that was skipped.
    """

    round: int
    client: int
    data_size: int
    scalars: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """The message on the wire."""
        fields = (len(self.scalars), self.round, self.client, self.data_size)
        return _seal(_REPLY, (_REPLY_MAGIC, FORMAT_VERSION, *fields), self.scalars.astype("<f4").tobytes())

    @classmethod
    def from_bytes(cls, message: bytes) -> Reply:
        """The message that `to_bytes` wrote.

        Raises:
            MessageError: truncated, damaged, of another format or version, or a field out of range.
        """
        num_steps, round, client, data_size = _open(_REPLY, _REPLY_MAGIC, "reply", message)
        _check_length("reply", message, _REPLY.size + 4 * num_steps)
        _check_checksum("reply", _REPLY, message)
        scalars = np.frombuffer(message, "<f4", num_steps, _REPLY.size).astype(np.float32)
        _require(num_steps > 0, "at least one scalar", num_steps)
        _require(round < MAX_ROUNDS, f"a round below {MAX_ROUNDS}", round)
        _require(client < MAX_CLIENTS, f"a client below {MAX_CLIENTS}", client)
        _require(data_size > 0, "a data size of at least 1", data_size)
        _require(bool(np.isfinite(scalars).all()), "finite scalars", "NaN or infinity")
        return cls(round, client, data_size, scalars)


def _seal(header: struct.Struct, fields: tuple[object, ...], body: bytes) -> bytes:
    start = header.pack(*fields, 0)[: -_CHECKSUM.size]
    return start + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(start))) + body


def _open(header: struct.Struct, magic: bytes, kind: str, message: bytes) -> tuple[Any, ...]:
    """The header's fields without magic, version and checksum."""
    if not isinstance(message, bytes):
        raise MessageError(f"expected a {kind} as bytes, got {type(message).__name__}")
    if len(message) < header.size:
        raise MessageError(f"expected a {kind} of at least {header.size} bytes, got {len(message)}")
    found, version, *fields, _ = header.unpack_from(message)
    if found != magic:
        raise MessageError(f"expected a {kind} that begins with {magic!r}, got {found!r}")
    if version != FORMAT_VERSION:
        raise MessageError(
            f"expected format version {FORMAT_VERSION}, got {version}; both sides need the same release"
        )
    return tuple(fields)


def _check_length(kind: str, message: bytes, expected: int) -> None:
    _require(len(message) == expected, f"a {kind} of {expected} bytes", len(message))


def _check_checksum(kind: str, header: struct.Struct, message: bytes) -> None:
    view = memoryview(message)
    position = header.size - _CHECKSUM.size
    computed = zlib.crc32(view[header.size :], zlib.crc32(view[:position]))
    (stated,) = _CHECKSUM.unpack_from(message, position)
    _require(computed == stated, f"a {kind} with checksum {computed:08x}", f"{stated:08x}: it was damaged")


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise MessageError(f"expected {expected}, got {got}")
