"""The text that describes a ledger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkseed import Ledger, ModelIdentity
from fedkseed.ledger.describe import describe
from fedkseed.ledger.format import LedgerDamagedError
from fedkseed.ledger.signature import public_key_bytes

IDENTITY = ModelIdentity(bytes(range(32)), bytes(range(32, 64)), "bfloat16")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
LEDGER = Ledger(
    99,
    np.array([0.0, 3e-4, -0.0, -4e-4, *[0.0] * 6]),
    IDENTITY,
    frozen=(0, 2, 3, 4, 9),
    notes={"num_rounds": "40", "creator": "a test"},
)


def test_the_whole_text() -> None:
    assert describe(LEDGER).splitlines() == [
        f"size             {len(LEDGER.to_bytes())} bytes",
        "versions         ledger format 1, noise contract 1",
        "noise            gaussian, base seed 99, K = 10 candidate seeds",
        "coefficients     2 not zero, norm 0.0005",
        "largest          c[3] = -0.0004, c[1] = 0.0003",
        f"base weights     bfloat16, content {bytes(range(32, 64)).hex()}",
        f"structure        {bytes(range(32)).hex()}",
        "frozen           parameters 0, 2-4, 9 (5 in all)",
        "note creator     a test",
        "note num_rounds  40",
        "signature        none",
    ]


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.ledger"
    LEDGER.sign(KEY).save(path)
    lines = dict(line.split("  ", 1) for line in describe(path).splitlines())
    assert lines["file"].strip() == str(path)
    assert lines["size"].strip() == f"{path.stat().st_size:,} bytes"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LedgerDamagedError):
        describe(path)


def test_signatures() -> None:
    public = public_key_bytes(KEY.public_key())
    signed = LEDGER.sign(KEY)
    last = describe(signed).splitlines()[-1]
    assert last.startswith("signature ")
    assert f"by {public.hex()} (whose key that is, nothing here says), checked" in last
    assert describe(signed, public_key=public).endswith(f"by {public.hex()}, checked, and the key asked for")
    moved = Ledger(100, LEDGER.coefficients, IDENTITY, signature=signed.signature)
    assert describe(moved).endswith("BROKEN: not of this ledger")


def test_extremes() -> None:
    zero = describe(Ledger(0, np.zeros(3), IDENTITY))
    assert "0 not zero, norm 0\n" in zero
    assert "largest       none\n" in zero
    assert "frozen        none\n" in zero
    largest = describe(Ledger(0, np.full(65536, 3e38), IDENTITY, frozen=range(65536)))
    assert "65536 not zero, norm 7.68e+40\n" in largest
    assert "parameters 0-65535 (65536 in all)" in largest
