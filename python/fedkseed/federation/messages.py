"""The two messages of a round as bytes: a broadcast to one client, and that client's reply.

docs/protocol.md shows every byte. At K = 4096 and tau = 200 a broadcast has 16,916 bytes and a reply 860, for
FedKSeed and FedKSeed-Pro alike: who draws the schedule, the server, sends it, whatever it was drawn from.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkseed.model.identity import DTYPE_CODES, DTYPES_BY_CODE, ModelIdentity
from fedkseed.seeds import MAX_CLIENTS, MAX_ROUNDS, MAX_SEEDS, MAX_STEPS
from fedkseed_kernels import CONTRACT_VERSION, FAMILIES

#: Version of the bytes of both messages; apart from the noise contract's.
MESSAGE_FORMAT = 2

#: Bytes of a run's name, and of the digest that binds a reply to its broadcast (SHA-256).
RUN_ID_BYTES, DIGEST_BYTES = 16, 32

#: What a message of the server asks for, by its first bytes.
_KINDS: Mapping[bytes, Literal["train", "evaluate"]] = {b"FKSB": "train", b"FKSE": "evaluate"}
_MAGICS = {kind: magic for magic, kind in _KINDS.items()}
_REPLY_MAGIC = b"FKSR"
#: Magic, format version, contract version, family, dtype, tau, K, round, eps, lr, base seed, run id,
#: structure hash, content hash, bound of |g|; the coefficients follow, then client, schedule and checksum.
_BROADCAST = struct.Struct("<4sHHBBHIIfdQ16s32s32sf")
_CLIENT = struct.Struct("<I")
#: Magic, format version, contract version, tau, round, client, data size, digest; then scalars, checksum.
_REPLY = struct.Struct("<4sHHIIII32s")
_VERSIONS = struct.Struct("<4sHH")
_CHECKSUM = struct.Struct("<I")
CHECKSUM_BYTES = _CHECKSUM.size
_FP32_TINY, _FP32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

#: Scalars that are read in one pass: bounds the memory beside the replies themselves.
_SCALARS_AT_ONCE = 1 << 18

BROADCAST_OVERHEAD = _BROADCAST.size + _CLIENT.size + _CHECKSUM.size
REPLY_OVERHEAD = _REPLY.size + _CHECKSUM.size


def broadcast_bytes(num_seeds: int, num_steps: int) -> int:
    """Bytes of a broadcast of so many coefficients, and of a schedule of so many steps."""
    return BROADCAST_OVERHEAD + 4 * num_seeds + 2 * num_steps


def reply_bytes(num_steps: int) -> int:
    """Bytes of a reply of so many scalars."""
    return REPLY_OVERHEAD + 4 * num_steps


#: A message as it comes in; what is sent is always bytes.
MessageBytes: TypeAlias = bytes | bytearray | memoryview

#: No message is longer; what is longer is refused by its length alone.
MAX_BROADCAST_BYTES = broadcast_bytes(MAX_SEEDS, MAX_STEPS - 1)
MAX_REPLY_BYTES = reply_bytes(MAX_STEPS - 1)


class MessageError(ValueError):
    """Bytes that are not a message of this format and this noise contract, or a field out of its range."""


class ProtocolError(ValueError):
    """A message that is well formed and does not belong here: of another round, client, pool or run."""


class Peeked(NamedTuple):
    """The first fields of a message of the server; see `Broadcast`."""

    kind: Literal["train", "evaluate"]
    round: int
    client: int
    num_steps: int
    num_seeds: int
    run_id: bytes


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What the server sends to one client: the round's model and what to do with it.

    Without a schedule it asks for an evaluation of that model.

    Attributes:
        round: in [0, 2^24).
        client: in [0, 2^24).
        run_id: name of the federation's run, 16 bytes.
        identity: of w0.
        base_seed: of the seed pool, in [0, 2^64).
        lr: fp64.
        eps: fp32.
        max_abs_g: fp32, the bound to which the client clips its g.
        coefficients: fp32 [K]; the round's model is w0 + sum_k coefficients_k z(seed_k).
        schedule: uint16 [tau], indices into the pool, one for each local step; empty: evaluate.
        family: of the noise.
    """

    round: int
    client: int
    run_id: bytes
    identity: ModelIdentity
    base_seed: int
    lr: float
    eps: float
    max_abs_g: float
    coefficients: NDArray[np.float32]
    schedule: NDArray[np.uint16]
    family: str = "gaussian"

    @property
    def kind(self) -> Literal["train", "evaluate"]:
        """What is asked for: local steps, or scores of the model."""
        return "train" if len(self.schedule) else "evaluate"

    def to_bytes(self) -> bytes:
        """The message on the wire.

        Raises:
            MessageError: a field out of range.
        """
        return BroadcastWriter(self).message(self.client, self.schedule)

    @classmethod
    def from_bytes(cls, message: MessageBytes) -> Broadcast:
        """The message that `to_bytes` wrote.

        Raises:
            MessageError: truncated, too long, damaged, of another format or contract version, or a field out
                of range; constant memory whatever the length.
        """
        message, header = _read_header(message)
        family, dtype, num_steps, num_seeds, round, eps, lr, base_seed, run_id = header[3:12]
        structure, content, max_abs_g = header[12:]
        check_checksum("broadcast", message)
        _require(family < len(FAMILIES), f"a noise family below {len(FAMILIES)}", family)
        _require(dtype in DTYPES_BY_CODE, f"a dtype code out of {sorted(DTYPES_BY_CODE)}", dtype)
        after = _BROADCAST.size + 4 * num_seeds
        (client,) = _CLIENT.unpack_from(message, after)
        broadcast = cls(
            round,
            client,
            run_id,
            ModelIdentity(structure, content, DTYPES_BY_CODE[dtype]),
            base_seed,
            lr,
            eps,
            max_abs_g,
            np.frombuffer(message, "<f4", num_seeds, _BROADCAST.size).astype(np.float32),
            np.frombuffer(message, "<u2", num_steps, after + _CLIENT.size).astype(np.uint16),
            FAMILIES[family],
        )
        broadcast.check()
        return broadcast

    @staticmethod
    def peek(message: MessageBytes) -> Peeked:
        """What the message is, for whom and of which run, without reading coefficients and schedule.

        Neither the checksum nor the ranges of fields are looked at: for choosing who answers, not for trust.

        Raises:
            MessageError: truncated, too long, or of another format or contract version.
        """
        message, header = _read_header(message)
        num_steps, num_seeds, round = header[5:8]
        (client,) = _CLIENT.unpack_from(message, _BROADCAST.size + 4 * num_seeds)
        return Peeked(_KINDS[header[0]], round, client, num_steps, num_seeds, header[11])

    def check(self) -> None:
        """Raises unless every field is in its range.

        Raises:
            MessageError: one is not; says which.
        """
        num_seeds, num_steps = len(self.coefficients), len(self.schedule)
        _require(1 <= num_seeds <= MAX_SEEDS, f"a number of seeds in [1, {MAX_SEEDS}]", num_seeds)
        check_round_and_client(self.round, self.client)
        _require(num_steps < MAX_STEPS, f"fewer than {MAX_STEPS} local steps", num_steps)
        _require(len(self.run_id) == RUN_ID_BYTES, f"a run id of {RUN_ID_BYTES} bytes", len(self.run_id))
        _require(
            self.identity.dtype in DTYPE_CODES, f"a dtype out of {list(DTYPE_CODES)}", self.identity.dtype
        )
        hashes = (len(self.identity.structure), len(self.identity.content))
        _require(hashes == (DIGEST_BYTES, DIGEST_BYTES), f"two hashes of {DIGEST_BYTES} bytes", hashes)
        _require(0 <= self.base_seed < 2**64, "a base seed in [0, 2^64)", self.base_seed)
        _require(0 <= self.lr < math.inf, "a finite lr of at least 0", self.lr)
        for name, value in (("eps", self.eps), ("bound of |g|", self.max_abs_g)):
            _require(_FP32_TINY <= value < math.inf, f"a positive normal fp32 as {name}", value)
        _require(
            moves_within_fp32(self.lr, self.eps, self.max_abs_g),
            "lr, eps and bound of |g| whose steps lie within fp32",
            (self.lr, self.eps, self.max_abs_g),
        )
        _require(self.family in FAMILIES, f"a noise family out of {list(FAMILIES)}", self.family)
        _require(bool(np.isfinite(self.coefficients).all()), "finite coefficients", "NaN or infinity")
        largest = int(self.schedule.max(initial=0))
        _require(largest < num_seeds, f"schedule indices below {num_seeds}", largest)


def _read_header(message: MessageBytes) -> tuple[bytes, tuple[Any, ...]]:
    """A message of the server as bytes, of the length that it states, and its first fields."""
    raw = broadcast_as_bytes(message)
    kind = _KINDS.get(raw[:4], "train")
    check_versions("broadcast", _MAGICS[kind], raw)
    header = _BROADCAST.unpack_from(raw)
    num_steps, num_seeds = header[5:7]
    _check_length("broadcast", raw, broadcast_bytes(num_seeds, num_steps))
    if (num_steps == 0) != (kind == "evaluate"):
        raise MessageError(
            f"expected at least one local step to train and none to evaluate, got {num_steps} to {kind}"
        )
    return raw, header


def moves_within_fp32(lr: float, eps: float, max_abs_g: float) -> bool:
    """Whether every coefficient of a step is finite in fp32: the move back by 2 eps, the update by lr g."""
    return 2 * eps + lr * max_abs_g <= _FP32_MAX


class BroadcastWriter:
    """The broadcasts of one round: they differ in client and schedule alone, and those stand at the end.

    A message costs O(tau) and a copy: header, coefficients, and checksum and digest over them are made once.

    Args:
        template: any broadcast of the round.

    Raises:
        MessageError: a field of the template out of range.
    """

    def __init__(self, template: Broadcast) -> None:
        template.check()
        self._prefix = (
            _BROADCAST.pack(
                _MAGICS[template.kind],
                MESSAGE_FORMAT,
                CONTRACT_VERSION,
                FAMILIES.index(template.family),
                DTYPE_CODES[template.identity.dtype],
                len(template.schedule),
                len(template.coefficients),
                template.round,
                template.eps,
                template.lr,
                template.base_seed,
                template.run_id,
                template.identity.structure,
                template.identity.content,
                template.max_abs_g,
            )
            + template.coefficients.astype("<f4").tobytes()
        )
        self._checksum = zlib.crc32(self._prefix)
        self._digest = hashlib.sha256(self._prefix)

    def message(self, client: int, schedule: NDArray[np.uint16]) -> bytes:
        """The broadcast to ``client``; the schedule is as long as the template's."""
        return self._prefix + self._rest(client, schedule)

    def digest(self, client: int, schedule: NDArray[np.uint16]) -> bytes:
        """`broadcast_digest` of that message, without making it."""
        digest = self._digest.copy()
        digest.update(self._rest(client, schedule))
        return digest.digest()

    def _rest(self, client: int, schedule: NDArray[np.uint16]) -> bytes:
        rest = _CLIENT.pack(client) + schedule.astype("<u2", copy=False).tobytes()
        return rest + _CHECKSUM.pack(zlib.crc32(rest, self._checksum))


def broadcast_digest(message: bytes) -> bytes:
    """What binds a reply to the broadcast it answers: SHA-256 of all its bytes."""
    return hashlib.sha256(message).digest()


@dataclass(frozen=True, eq=False)
class Reply:
    """What a client sends back: scalars only.

    Attributes:
        round, client: as in the broadcast.
        data_size: of the client's training data, in [1, 2^32); in rows or whatever all clients count.
        digest: `broadcast_digest` of the broadcast that this answers.
        scalars: g of each local step, fp32 [tau]; 0 for a step that was skipped.
    """

    round: int
    client: int
    data_size: int
    digest: bytes
    scalars: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """The message on the wire.

        Raises:
            MessageError: a field out of range.
        """
        num_steps = len(self.scalars)
        _check_common(self.round, self.client, num_steps)
        _require(1 <= self.data_size < 2**32, "a data size in [1, 2^32)", self.data_size)
        _require(len(self.digest) == DIGEST_BYTES, f"a digest of {DIGEST_BYTES} bytes", len(self.digest))
        _require(bool(np.isfinite(self.scalars).all()), "finite scalars", "NaN or infinity")
        versions = (_REPLY_MAGIC, MESSAGE_FORMAT, CONTRACT_VERSION)
        start = _REPLY.pack(*versions, num_steps, self.round, self.client, self.data_size, self.digest)
        message = start + self.scalars.astype("<f4").tobytes()
        return message + _CHECKSUM.pack(zlib.crc32(message))

    @classmethod
    def from_bytes(cls, message: MessageBytes) -> Reply:
        """The message that `to_bytes` wrote.

        Raises:
            MessageError: truncated, too long, damaged, of another format or contract version, or a field out
                of range; constant memory whatever the length.
        """
        message = reply_as_bytes(message)
        header = read_reply_header(message)
        scalars = np.frombuffer(message, "<f4", header.num_steps, _REPLY.size).astype(np.float32)
        _require(bool(np.isfinite(scalars).all()), "finite scalars", "NaN or infinity")
        return cls(header.round, header.client, header.data_size, header.digest, scalars)


class ReplyHeader(NamedTuple):
    """The fields of a reply before its scalars; see `Reply`."""

    num_steps: int
    round: int
    client: int
    data_size: int
    digest: bytes


def read_reply_header(message: bytes) -> ReplyHeader:
    """The header of a whole and undamaged reply; its scalars are not looked at.

    Raises:
        MessageError: as `Reply.from_bytes`, but for scalars that are not finite.
    """
    message = reply_as_bytes(message)
    check_versions("reply", _REPLY_MAGIC, message)
    header = ReplyHeader._make(_REPLY.unpack_from(message)[3:])
    _check_length("reply", message, reply_bytes(header.num_steps))
    check_checksum("reply", message)
    _check_common(header.round, header.client, header.num_steps)
    _require(header.data_size >= 1, "a data size of at least 1", header.data_size)
    return header


def scalars_in_parts(
    messages: Sequence[bytes], num_steps: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """`read_scalars` of a few messages at a time: which of them, and their scalars."""
    at_once = max(1, _SCALARS_AT_ONCE // num_steps)
    for start in range(0, len(messages), at_once):
        part = slice(start, start + at_once)
        yield part, read_scalars(list(messages[part]))


def read_scalars(messages: list[bytes]) -> NDArray[np.float32]:
    """The scalars of replies that `read_reply_header` took, all of one tau: fp32 [len(messages), tau]."""
    bodies = b"".join([message[_REPLY.size : -_CHECKSUM.size] for message in messages])
    return np.frombuffer(bodies, "<f4").astype(np.float32, copy=False).reshape(len(messages), -1)


def as_bytes(kind: str, message: MessageBytes, shortest: int, longest: int) -> bytes:
    """A message that came in, if its length is possible; a copy is made of what is not bytes.

    Raises:
        MessageError: of another type or length; no byte is read.
    """
    if not isinstance(message, (bytes, bytearray, memoryview)):
        raise MessageError(
            f"expected a {kind} as bytes, bytearray or memoryview, got {type(message).__name__}"
        )
    try:
        num_bytes = memoryview(message).nbytes
    except ValueError as error:  # a memoryview that its owner has released
        raise MessageError(f"expected a {kind} as bytes, got a buffer without any: {error}") from error
    if not shortest <= num_bytes <= longest:
        raise MessageError(f"expected a {kind} of {shortest} to {longest} bytes, got {num_bytes}")
    return bytes(message)


def broadcast_as_bytes(message: MessageBytes) -> bytes:
    """`as_bytes` of a message of the server.

    Raises:
        MessageError: of another type or length.
    """
    return as_bytes("broadcast", message, BROADCAST_OVERHEAD, MAX_BROADCAST_BYTES)


def reply_as_bytes(message: MessageBytes) -> bytes:
    """`as_bytes` of a reply.

    Raises:
        MessageError: of another type or length.
    """
    return as_bytes("reply", message, REPLY_OVERHEAD, MAX_REPLY_BYTES)


def check_versions(kind: str, magic: bytes, message: bytes) -> None:
    """Raises unless a message begins with these bytes and the versions of this release.

    Raises:
        MessageError: it does not; says in what.
    """
    found: tuple[Any, ...] = _VERSIONS.unpack_from(message)
    if found != (magic, MESSAGE_FORMAT, CONTRACT_VERSION):
        if found[0] != magic:
            raise MessageError(f"expected a {kind} that begins with {magic!r}, got {found[0]!r}")
        versions = zip(("format", "contract"), (MESSAGE_FORMAT, CONTRACT_VERSION), found[1:], strict=True)
        for name, wanted, got in versions:
            _require(got == wanted, f"{name} version {wanted}", f"{got}; both sides need the same release")


def _check_length(kind: str, message: bytes, expected: int) -> None:
    if len(message) != expected:
        raise MessageError(f"expected a {kind} of {expected} bytes, got {len(message)}")


def check_checksum(kind: str, message: bytes) -> None:
    """Raises unless a message ends in the CRC-32 of all before.

    Raises:
        MessageError: it does not.
    """
    computed = zlib.crc32(memoryview(message)[: -_CHECKSUM.size])
    (stated,) = _CHECKSUM.unpack_from(message, len(message) - _CHECKSUM.size)
    if computed != stated:
        raise MessageError(
            f"expected a {kind} with checksum {computed:08x}, got {stated:08x}: it was damaged"
        )


def check_round_and_client(round: int, client: int) -> None:
    """Raises unless both numbers are in their range.

    Raises:
        MessageError: one is not.
    """
    if not (0 <= round < MAX_ROUNDS and 0 <= client < MAX_CLIENTS):
        _require(0 <= round < MAX_ROUNDS, f"a round below {MAX_ROUNDS}", round)
        _require(0 <= client < MAX_CLIENTS, f"a client below {MAX_CLIENTS}", client)


def _check_common(round: int, client: int, num_steps: int) -> None:
    check_round_and_client(round, client)
    if not 1 <= num_steps < MAX_STEPS:
        _require(num_steps >= 1, "at least one local step", num_steps)
        _require(num_steps < MAX_STEPS, f"fewer than {MAX_STEPS} local steps", num_steps)


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise MessageError(f"expected {expected}, got {got}")
