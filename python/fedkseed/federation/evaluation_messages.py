"""A client's answer to an evaluation message, as bytes; docs/protocol.md shows every byte.

The message itself is a `Broadcast` without a schedule.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedkseed.federation.messages import (
    CHECKSUM_BYTES,
    DIGEST_BYTES,
    MESSAGE_FORMAT,
    MessageBytes,
    MessageError,
    as_bytes,
    check_checksum,
    check_round_and_client,
    check_versions,
)
from fedkseed_kernels import CONTRACT_VERSION

_MAGIC = b"FKSV"
#: Magic, format version, contract version, number of scores, round, client, number of examples, digest; then
#: each score as length of its name, name, value; checksum.
_HEADER = struct.Struct("<4sHHIIII32s")
_NAME_LENGTH = struct.Struct("<B")
_VALUE = struct.Struct("<d")

MAX_SCORES, MAX_NAME = 32, 64
_NAME = re.compile(rf"[ -~]{{1,{MAX_NAME}}}")
#: No answer is longer.
MAX_EVALUATION_BYTES = (
    _HEADER.size + MAX_SCORES * (_NAME_LENGTH.size + MAX_NAME + _VALUE.size) + CHECKSUM_BYTES
)


@dataclass(frozen=True)
class EvaluationReply:
    """What a client found about the model that it was sent.

    Attributes:
        round, client: as in the message.
        num_examples: behind the scores, in [1, 2^32): their weight in a mean over clients.
        digest: `broadcast_digest` of the message that this answers.
        scores: finite numbers by name; names of 1 to 64 printable ASCII characters, at most 32.
    """

    round: int
    client: int
    num_examples: int
    digest: bytes
    scores: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The answer on the wire; scores in the order of their names.

        Raises:
            MessageError: a field out of range.
        """
        self._check()
        message = _HEADER.pack(
            _MAGIC,
            MESSAGE_FORMAT,
            CONTRACT_VERSION,
            len(self.scores),
            self.round,
            self.client,
            self.num_examples,
            self.digest,
        )
        for name, value in sorted(self.scores.items()):
            message += _NAME_LENGTH.pack(len(name)) + name.encode("ascii") + _VALUE.pack(value)
        return message + struct.pack("<I", zlib.crc32(message))

    @classmethod
    def from_bytes(cls, message: MessageBytes) -> EvaluationReply:
        """The answer that `to_bytes` wrote; every other byte string is refused.

        Raises:
            MessageError: truncated, too long, damaged, of another format or contract version, or a field out
                of range; constant memory whatever the length.
        """
        raw = evaluation_as_bytes(message)
        check_versions("answer to an evaluation", _MAGIC, raw)
        check_checksum("answer to an evaluation", raw)
        *_, num_scores, round, client, num_examples, digest = _HEADER.unpack_from(raw)
        scores: dict[str, float] = {}
        place, end = _HEADER.size, len(raw) - CHECKSUM_BYTES
        while place < end:
            length = raw[place]
            name = raw[place + 1 : place + 1 + length].decode("latin-1")
            place += 1 + length
            if place + _VALUE.size > end:
                raise MessageError("expected scores of a name and a number each, got one that is cut off")
            (scores[name],) = _VALUE.unpack_from(raw, place)
            place += _VALUE.size
        if len(scores) != num_scores:
            raise MessageError(f"expected {num_scores} scores, got {len(scores)}")
        found = cls(round, client, num_examples, digest, scores)
        if found.to_bytes() != raw:
            raise MessageError("expected scores in the order of their names, each once, got another order")
        return found

    def _check(self) -> None:
        check_round_and_client(self.round, self.client)
        if not 1 <= self.num_examples < 2**32:
            raise MessageError(f"expected a number of examples in [1, 2^32), got {self.num_examples}")
        if len(self.digest) != DIGEST_BYTES:
            raise MessageError(f"expected a digest of {DIGEST_BYTES} bytes, got {len(self.digest)}")
        if len(self.scores) > MAX_SCORES:
            raise MessageError(f"expected at most {MAX_SCORES} scores, got {len(self.scores)}")
        for name, value in self.scores.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise MessageError(
                    f"expected names of 1 to {MAX_NAME} printable ASCII characters, got {repr(name)[:99]}"
                )
            if not math.isfinite(value):
                raise MessageError(f"expected finite scores, got {name} = {value}")


def evaluation_as_bytes(message: MessageBytes) -> bytes:
    """`as_bytes` of an answer to an evaluation.

    Raises:
        MessageError: of another type or length.
    """
    shortest = _HEADER.size + CHECKSUM_BYTES
    return as_bytes("answer to an evaluation", message, shortest, MAX_EVALUATION_BYTES)
