"""The ledger as a value and as a file: the same ledger is the same bytes."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from support.ledgers import COEFFICIENTS, IDENTITY, SIGNATURE, entries_of, large, sealed, small

from fedkseed import Ledger, LedgerError, ModelIdentity
from fedkseed.ledger import fields as ledger_fields
from fedkseed.ledger import format as ledger_format
from fedkseed.ledger.format import MAX_BYTES, LedgerContractError
from fedkseed_kernels import CONTRACT_VERSION

# What is written


def test_the_file_written_out_by_hand() -> None:
    entries = {
        "base_seed": "18446744073709551613",
        "content": bytes(range(32, 64)).hex(),
        "contract_version": "1",
        "dtype": "bfloat16",
        "family": "gaussian",
        "format": "fedkseed-ledger",
        "format_version": "1",
        "frozen": "601",
        "note_creator": "a test",
        "note_num_rounds": "40",
        "structure": bytes(range(32)).hex(),
    }
    assert small().to_bytes() == sealed(entries, COEFFICIENTS.astype("<f4").tobytes())
    entries |= {"public_key": bytes(range(100, 132)).hex(), "signature": bytes(range(64)).hex()}
    assert small(signature=SIGNATURE).to_bytes() == sealed(entries, COEFFICIENTS.astype("<f4").tobytes())


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    small().save(tmp_path / "ledger")
    with safe_open(tmp_path / "ledger", "numpy") as opened:
        assert list(opened.keys()) == ["coefficients"]
        assert opened.get_tensor("coefficients").tobytes() == COEFFICIENTS.tobytes()
        assert opened.metadata() == entries_of(small().to_bytes())


@pytest.mark.parametrize(
    "ledger",
    [
        small(),
        small(signature=SIGNATURE),
        large(),
        Ledger(-1, np.ones(1), ModelIdentity(bytes(32), bytes(32), "mixed")),
        Ledger(0, np.full(65536, 0.1), IDENTITY, frozen=range(65536)),
    ],
)
def test_round_trip(ledger: Ledger, tmp_path: Path) -> None:
    ledger.save(tmp_path / "ledger")
    read = Ledger.load(str(tmp_path / "ledger"))
    assert read == ledger
    assert hash(read) == hash(ledger)
    assert (read.base_seed, read.identity, read.frozen) == (ledger.base_seed, ledger.identity, ledger.frozen)
    assert (read.notes, read.signature) == (ledger.notes, ledger.signature)
    assert read.coefficients.dtype == np.float32
    assert read.coefficients.tobytes() == ledger.coefficients.tobytes()
    assert (
        (tmp_path / "ledger").read_bytes() == read.to_bytes() == pickle.loads(pickle.dumps(read)).to_bytes()
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["ledger"]


_WRITES = """
import sys
import numpy as np
from fedkseed import Ledger, ModelIdentity
identity = ModelIdentity(bytes(range(32)), bytes(range(32, 64)), "bfloat16")
coefficients = np.array([0.5, -0.0, 0.0, 1e-45, -3.4028235e38])
notes = {"creator": "a test", "num_rounds": "40"}
sys.stdout.buffer.write(Ledger(-3, coefficients, identity, [0, 9, 10], notes).to_bytes())
"""


def test_another_process_writes_the_same_bytes() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", _WRITES]
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout == (
        small().to_bytes()
    )


def test_size() -> None:
    assert len(large().to_bytes()) <= 17_500
    plain = Ledger(2**64 - 1, np.ones(4096), IDENTITY)
    assert len(plain.to_bytes()) < 17_000
    largest = Ledger(2**64 - 1, np.ones(65536), IDENTITY, range(65536), large().notes, signature=SIGNATURE)
    assert len(largest.to_bytes()) <= MAX_BYTES


def test_what_makes_two_ledgers_unlike() -> None:
    others = [
        small(frozen=(0, 9)),
        small(notes={}),
        small(signature=SIGNATURE),
        replace(small(), base_seed=1),
        replace(small(), coefficients=np.abs(COEFFICIENTS)),
        replace(small(), identity=replace(IDENTITY, content=bytes(32))),
        replace(small(), identity=replace(IDENTITY, structure=bytes(32))),
        replace(small(), identity=replace(IDENTITY, dtype="float32")),
    ]
    assert len({small(), *others}) == 1 + len(others)
    assert small() != small().to_bytes()


# What is refused in a ledger


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"coefficients": np.array([1.0, np.nan])}, LedgerError, "finite in fp32, got nan at 1"),
        ({"coefficients": np.array([-1e39])}, LedgerError, "finite in fp32, got -1e[+]39 at 0"),
        (
            {"coefficients": np.zeros(0)},
            LedgerError,
            r"1 to 65536 coefficients, got an array of shape \(0,\)",
        ),
        ({"coefficients": np.zeros((2, 2))}, LedgerError, r"shape \(2, 2\)"),
        ({"coefficients": np.zeros(65537)}, LedgerError, "1 to 65536"),
        ({"coefficients": np.zeros(3, np.int32)}, TypeError, "floating-point numbers, got int32"),
        ({"base_seed": 1.0}, TypeError, "expected an integer base_seed, got 1.0"),
        ({"base_seed": True}, TypeError, "expected an integer base_seed"),
        (
            {"family": "hadamard"},
            LedgerContractError,
            "one of the families gaussian, rademacher, got 'hadamard'",
        ),
        ({"contract_version": CONTRACT_VERSION + 1}, LedgerContractError, "use a release"),
        ({"identity": "model"}, TypeError, "expected a ModelIdentity, got str"),
        ({"identity": replace(IDENTITY, content=b"")}, LedgerError, "got 32 and 0"),
        ({"identity": replace(IDENTITY, dtype="int64")}, LedgerError, "got 'int64'"),
        ({"frozen": (1, 1)}, LedgerError, r"ascending manifest indices .* got \(1, 1\)"),
        ({"frozen": (-1,)}, LedgerError, "ascending"),
        ({"frozen": (65536,)}, LedgerError, "ascending"),
        ({"frozen": range(9, -1, -1)}, LedgerError, "got 10 others"),
        ({"notes": {"Name": ""}}, LedgerError, "names of .* got 'Name': ''"),
        ({"notes": {"": "x"}}, LedgerError, "names of"),
        ({"notes": {"a": "line\n"}}, LedgerError, "printable ASCII"),
        ({"notes": {"a": "x" * 128}}, LedgerError, "got 1 of 129"),
    ],
)
def test_bad_fields(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(small(), **fields)


def test_nothing_of_the_callers_is_kept_by_reference() -> None:
    coefficients, notes = np.ones(3, np.float32), {"a": "b"}
    ledger = Ledger(1, coefficients, IDENTITY, notes=notes)
    before = ledger.to_bytes()
    coefficients[0], notes["a"] = 2, "c"
    assert ledger.to_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        ledger.coefficients[0] = 2
    assert not np.shares_memory(replace(ledger).coefficients, ledger.coefficients)


def test_the_format_is_pinned() -> None:
    """Files are out there: whoever changes this digest makes format version 2."""
    assert ledger_format.LEDGER_FORMAT == 1
    digest = hashlib.sha256(small(signature=SIGNATURE).to_bytes()).hexdigest()
    assert digest == "539febb18308ee0927a9d97351f97b8716aed63f6841863bad2431d2b1955010"


def test_the_page_about_the_format() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "ledger.md").read_text()
    documented = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", page, re.M))))
    written = {re.sub("^note_.*", "note_NAME", name) for name in entries_of(large().to_bytes())}
    assert documented == written
    assert f"{MAX_BYTES:,} bytes" in page
    assert (
        f"at most {ledger_fields.MAX_NOTES} of them, {ledger_fields.MAX_NOTE_CHARACTERS} characters" in page
    )
    for digits, meaning in ((ledger_format.LEDGER_FORMAT, "format_version"), (CONTRACT_VERSION, "contract")):
        assert re.search(rf"`{meaning}.*`{digits}`", page)
