"""Messages that nobody honest sends: random bytes, and honest messages damaged, forged, cut and spliced."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from support.messages import REPLY_HEADER, patched, sealed

#: Of a reply: SHA-256 of the broadcast that it answers.
_DIGEST = slice(REPLY_HEADER - 32, REPLY_HEADER)


def forged(generator: np.random.Generator, message: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """The message with some bytes between ``start`` and ``stop`` replaced, under a right checksum."""
    raw = bytearray(message)
    stop = len(raw) - 4 if stop is None else stop
    for position in generator.choice(np.arange(start, stop), generator.integers(1, 4), replace=False):
        raw[position] ^= int(generator.integers(1, 256))
    return sealed(bytes(raw))


def hostile(generator: np.random.Generator, known: Sequence[bytes]) -> bytes:
    """A message that no reader may take: random, damaged, cut, lengthened, or spliced from two.

    Args:
        generator: decides.
        known: honest messages, of both directions, that it is made of.
    """
    message = known[generator.integers(len(known))]
    other = known[generator.integers(len(known))]
    position = int(generator.integers(1, len(message)))
    match generator.integers(7):
        case 0:
            return generator.bytes(int(generator.integers(0, 300)))
        case 1:
            return message[:4] + generator.bytes(len(message) - 4)
        case 2:
            return message[:position]
        case 3:
            return message + generator.bytes(int(generator.integers(1, 9)))
        case 4:
            raw = bytearray(message)
            raw[position] ^= int(generator.integers(1, 256))
            return bytes(raw)
        case 5:
            spliced = message[:position] + other[position:]
            return spliced if spliced not in known else b""
        case _:
            return sealed(generator.bytes(4) + message[4:])


def forged_reply(generator: np.random.Generator, reply: bytes) -> bytes:
    """A reply with a right checksum that no server takes: to another broadcast, or with a g out of bounds."""
    if generator.integers(2):
        return forged(generator, reply, _DIGEST.start, _DIGEST.stop)
    num_steps = (len(reply) - REPLY_HEADER - 4) // 4
    position = REPLY_HEADER + 4 * int(generator.integers(num_steps))
    worse = generator.choice([float("nan"), float("inf"), -3e38, 3e38])
    return patched(reply, position, struct.pack("<f", worse))
