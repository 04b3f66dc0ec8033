"""Ledgers for tests, and a writer of their files that shares no code with the package."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from fedkseed import Ledger, ModelIdentity
from fedkseed.ledger.signature import Signature

IDENTITY = ModelIdentity(bytes(range(32)), bytes(range(32, 64)), "bfloat16")
# Kept exactly: both zeros, a subnormal, the largest number.
COEFFICIENTS = np.array([0.5, -0.0, 0.0, 1e-45, -3.4028235e38], dtype=np.float32)
SIGNATURE = Signature(bytes(range(100, 132)), bytes(range(64)))


def small(**changes: Any) -> Ledger:
    fields = {"frozen": (0, 9, 10), "notes": {"num_rounds": "40", "creator": "a test"}}
    return Ledger(2**64 - 3, COEFFICIENTS, IDENTITY, **{**fields, **changes})


def large() -> Ledger:
    """The largest ledger that is promised to stay within 17,500 bytes."""
    coefficients = np.random.default_rng(5).standard_normal(4096).astype(np.float32)
    return Ledger(
        2**64 - 1,
        coefficients,
        IDENTITY,
        frozen=range(1, 700, 2),
        notes={name: name * 15 for name in "abcdefgh"},
        signature=SIGNATURE,
    )


def sealed(entries: dict[str, Any], body: bytes, **header: Any) -> bytes:
    """A file with a right checksum and a header of the caller's, written without the package's code."""
    tensor = {"data_offsets": [0, len(body)], "dtype": "F32", "shape": [len(body) // 4]}

    def assemble() -> bytes:
        text = json.dumps(
            {"__metadata__": entries, "coefficients": tensor, **header}, separators=(",", ":"), sort_keys=True
        ).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + body

    entries = dict(entries)
    entries.pop("checksum", None)
    entries["checksum"] = hashlib.sha256(assemble()).hexdigest()
    return assemble()


def entries_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    entries: dict[str, Any] = json.loads(data[8 : 8 + length])["__metadata__"]
    return entries
