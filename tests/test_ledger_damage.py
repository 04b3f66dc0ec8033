"""All bytes but those that a writer of ledgers wrote are refused, in constant memory, and change nothing."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ledgers import COEFFICIENTS, SIGNATURE, entries_of, large, sealed, small
from support.unchanged import stored_bytes

import fedkseed
from fedkseed import Ledger, LedgerError, SeedPool
from fedkseed.ledger.format import (
    MAX_BYTES,
    LedgerContractError,
    LedgerDamagedError,
    LedgerFormatError,
    LedgerTooLargeError,
)


@pytest.mark.parametrize("ledger", [small(), small(signature=SIGNATURE)], ids=["unsigned", "signed"])
def test_every_bit_flipped(ledger: Ledger) -> None:
    data = bytearray(ledger.to_bytes())
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(LedgerError):
                Ledger.from_bytes(bytes(data))
            data[position] ^= 1 << bit
    assert Ledger.from_bytes(bytes(data)) == ledger


def test_one_bit_flipped_at_each_byte_of_a_large_one() -> None:
    data = bytearray(large().to_bytes())
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        with pytest.raises(LedgerError):
            Ledger.from_bytes(bytes(data))
        data[position] ^= 1 << position % 8


def test_damaged_files_leave_the_model_alone(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    whole = Ledger.of(model, SeedPool(1, 4), np.ones(4)).to_bytes()
    before = [stored_bytes(parameter) for parameter in model.parameters()]
    path = tmp_path / "ledger"
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        for damaged in (bytes(data), whole[:position]):
            path.write_bytes(damaged)
            with pytest.raises(LedgerError):
                fedkseed.load(path, model)
    assert [stored_bytes(parameter) for parameter in model.parameters()] == before
    path.write_bytes(whole)
    fedkseed.load(path, model)
    assert [stored_bytes(parameter) for parameter in model.parameters()] != before


@pytest.mark.parametrize("ledger", [small(), large()], ids=["small", "large"])
def test_cut_off_at_each_length_or_too_long(ledger: Ledger) -> None:
    data = ledger.to_bytes()
    for length in range(len(data)):
        with pytest.raises(LedgerDamagedError):
            Ledger.from_bytes(data[:length])
    for tail in (b"\0", b"\0" * 4, data):
        with pytest.raises(LedgerDamagedError):
            Ledger.from_bytes(data + tail)


def test_random_bytes() -> None:
    generator = np.random.default_rng(11)
    whole = small(signature=SIGNATURE).to_bytes()
    for number in range(20_000):
        data = bytearray(whole)
        first, second = sorted(generator.integers(0, len(data), 2).tolist())
        kind = number % 4
        if kind == 0:  # noise alone, with a length of a header that fits
            data[8:] = generator.bytes(len(data) - 8)
        elif kind == 1:  # noise from somewhere to somewhere
            data[first : second + 1] = generator.bytes(second + 1 - first)
        elif kind == 2:  # a piece left out
            del data[first : second + 1]
        else:  # a piece twice
            data[first:first] = data[first : second + 1]
        with pytest.raises(LedgerError):
            Ledger.from_bytes(bytes(data))


@pytest.mark.slow
def test_a_million_random_byte_strings() -> None:
    noise = np.random.default_rng(12).bytes(1_000_200)
    for start in range(1_000_000):
        length = noise[start] % 200
        # Every other one claims a header that fits, so that more than the length is looked at.
        head = bytes([max(length - 9, 0), 0, 0, 0, 0, 0, 0, 0, 123]) if start % 2 else b""
        try:
            Ledger.from_bytes(head + noise[start : start + length])
        except LedgerError:
            continue
        raise AssertionError(f"accepted {noise[start : start + length]!r}")


def test_a_file_of_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    small().save(path)
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(
            LedgerTooLargeError, match=r"expected at most 286,\d{3} bytes in .*ledger, got more"
        ):
            Ledger.load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_BYTES
    finally:
        tracemalloc.stop()
    with pytest.raises(LedgerTooLargeError, match="expected a ledger of at most"):
        Ledger.from_bytes(bytes(MAX_BYTES + 1))


def test_a_header_that_claims_more_than_there_is() -> None:
    entries, body = entries_of(small().to_bytes()), COEFFICIENTS.tobytes()
    huge = {"data_offsets": [0, 1 << 62], "dtype": "F32", "shape": [1 << 60]}
    tracemalloc.start()
    try:
        with pytest.raises(LedgerDamagedError):
            Ledger.from_bytes(sealed(entries, body, coefficients=huge))
        for length in (1 << 63, (1 << 64) - 1, MAX_BYTES, len(small().to_bytes()) - 7):
            with pytest.raises(LedgerDamagedError, match=f"got one of {length:,}"):
                Ledger.from_bytes(length.to_bytes(8, "little") + small().to_bytes()[8:])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def rewritten(**changes: Any) -> bytes:
    """A small ledger with other entries, None for one left out, and the right checksum."""
    entries = {**entries_of(small().to_bytes()), **changes}
    kept = {name: text for name, text in entries.items() if text is not None}
    return sealed(kept, COEFFICIENTS.tobytes())


def test_rewriting_nothing_gives_the_file() -> None:
    assert rewritten() == small().to_bytes()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (rewritten(format_version="2"), LedgerFormatError, "expected a ledger of format version 1, got '2'"),
        (rewritten(format_version=None), LedgerFormatError, "got None; use the release"),
        (rewritten(format="pt"), LedgerDamagedError, "a safetensors file of another kind"),
        (
            rewritten(contract_version="2"),
            LedgerContractError,
            "expected a ledger of contract version 1, got 2",
        ),
        (
            rewritten(contract_version="one"),
            LedgerDamagedError,
            "expected numbers and hashes in the metadata",
        ),
        (rewritten(family="hadamard"), LedgerContractError, "families gaussian, rademacher, got 'hadamard'"),
        (rewritten(base_seed="01"), LedgerDamagedError, "every entry in its one form"),
        (rewritten(base_seed=str(2**64)), LedgerDamagedError, "every entry in its one form"),
        (rewritten(base_seed="9" * 5000), LedgerDamagedError, "expected numbers"),
        (rewritten(base_seed="-1"), LedgerDamagedError, "every entry in its one form"),
        (rewritten(frozen="0x601"), LedgerDamagedError, "every entry in its one form"),
        (rewritten(frozen="-1"), LedgerDamagedError, "at most 65536 parameters"),
        (rewritten(frozen="1" + "0" * 16384), LedgerDamagedError, "at most 65536 parameters"),
        (rewritten(frozen="frozen"), LedgerDamagedError, "expected numbers and hashes"),
        (rewritten(structure="00" * 31), LedgerError, "hashes of 32 bytes in the identity, got 31 and 32"),
        (rewritten(content="AB" * 32), LedgerDamagedError, "every entry in its one form"),
        (rewritten(content=" " + "ab" * 32), LedgerDamagedError, "every entry in its one form"),
        (rewritten(dtype="int8"), LedgerError, "expected weights in one of float32, .* got 'int8'"),
        (rewritten(dtype=None), LedgerDamagedError, "expected the entries"),
        (rewritten(more="x"), LedgerDamagedError, "expected the entries"),
        (rewritten(signature="00" * 64), LedgerDamagedError, "expected the entries"),
        (rewritten(signature="00" * 63, public_key="00" * 32), LedgerDamagedError, "signature of 64, got 32"),
        (rewritten(note_long="x" * 129), LedgerError, "at most 8 notes of 128 characters"),
        (rewritten(**{f"note_{n}": "" for n in range(9)}), LedgerError, "got 11 of"),
        (rewritten(note_quote='"'), LedgerError, "printable ASCII without quotes"),
        (rewritten(note_accent="\u00e9"), LedgerError, "printable ASCII without quotes"),
        (rewritten(dtype=7), LedgerDamagedError, "metadata of names and texts"),
        (sealed(entries_of(small().to_bytes()), b""), LedgerDamagedError, "got 0 bytes"),
        (sealed(entries_of(small().to_bytes()), bytes(6)), LedgerDamagedError, "got 6 bytes"),
        (
            sealed(entries_of(small().to_bytes()), np.array([1, np.nan], "<f4").tobytes()),
            LedgerError,
            "finite in fp32, got nan at 1",
        ),
        (
            sealed(entries_of(small().to_bytes()), COEFFICIENTS.tobytes(), more={}),
            LedgerDamagedError,
            "the checksum of its content",
        ),
    ],
)
def test_a_wrong_entry_under_a_right_checksum(data: bytes, error: type[LedgerError], message: str) -> None:
    with pytest.raises(error, match=message):
        Ledger.from_bytes(data)


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + COEFFICIENTS.tobytes()


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 20_000,
        b'{"a":' * 4_000,
        b"1" * 20_000,
        b"null",
        b"[]",
        b"{}",
        b'{"__metadata__":[]}',
        b'{"__metadata__":NaN}',
        b"\xff\xfe{\0}\0",
        '{"__metadata__":{"format":"\u00e9"}}'.encode(),
        b'{"__metadata__":{"format":"fedkseed-ledger","format_version":"1","note_a":"\\ud800"}}',
    ],
    ids=lambda header: header[:12].decode("latin-1"),
)
def test_headers_that_are_no_ledgers(header: bytes) -> None:
    with pytest.raises(LedgerDamagedError):
        Ledger.from_bytes(with_header(header))


def test_the_same_content_written_otherwise() -> None:
    data = small().to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entries = header.replace(b'"base_seed":"18446744073709551613",', b"", 1)
    assert len(entries) < len(header)
    variants: list[Callable[[], bytes]] = [
        lambda: header + b" " * (-len(header) % 8 + 8),
        lambda: b" " + header + b" " * (-(len(header) + 1) % 8),
        lambda: header.replace(b'"frozen":"601"', b'"frozen":"601","frozen":"601"'),
        lambda: entries.replace(b'"structure"', b'"base_seed":"18446744073709551613","structure"'),
        lambda: header.replace(b'"bfloat16"', b'"\\u0062float16"'),
    ]
    for variant in variants:
        assert json.loads(variant()) == json.loads(header)
        with pytest.raises(LedgerDamagedError, match="the checksum of its content"):
            Ledger.from_bytes(with_header(variant()))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Ledger.load(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        Ledger.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        small().save(tmp_path / "absent" / "ledger")
    with pytest.raises(TypeError, match="expected a ledger as bytes, got str"):
        Ledger.from_bytes("ledger")  # type: ignore[arg-type]


def test_every_error_can_be_caught_by_its_name() -> None:
    names = {error.__name__ for error in LedgerError.__subclasses__()}
    assert {"LedgerDamagedError", "LedgerSignatureError"} < names < set(fedkseed.ledger.__all__)
