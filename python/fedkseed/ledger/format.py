"""The bytes of a ledger file: a safetensors file with one tensor, one way of writing it, and a checksum.

    8 bytes        length of the header, u64
    header         JSON: {"__metadata__": {name: text, ...},
                          "coefficients": {"data_offsets": [0, 4 K], "dtype": "F32", "shape": [K]}}
                   ASCII, keys sorted, no white space but spaces at the end up to a multiple of 8 bytes
    4 K bytes      the coefficients, fp32

Integers and floats are little-endian. The metadata's "checksum" is the SHA-256, in hex, of the file as it is
without that entry. A reader writes what it has read anew and compares all bytes, so a file that differs in
one bit from what a writer wrote is refused. `fedkseed.ledger.fields` says what the metadata's entries mean.

The safetensors library reads these files. It does not write them: it puts the metadata in another order at
every run (seen in 0.8.0), and the same ledger has to be the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedkseed.seeds import MAX_SEEDS

#: Version of the file's layout and of the meaning of its entries; apart from the noise contract's.
LEDGER_FORMAT = 1

_FORMAT = "fedkseed-ledger"
_TENSOR = "coefficients"
_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 24 << 10
#: No ledger is larger, so nothing larger is read.
MAX_BYTES = _LENGTH_BYTES + MAX_HEADER_BYTES + 4 * MAX_SEEDS


class LedgerError(ValueError):
    """Not a ledger that can be used; the subclasses say why."""


class LedgerDamagedError(LedgerError):
    """Bytes that no writer of ledgers has written: cut off, changed, or something else altogether."""


class LedgerTooLargeError(LedgerError):
    """More bytes than any ledger has; they were not looked at."""


class LedgerFormatError(LedgerError):
    """A ledger of another format version."""


class LedgerContractError(LedgerError):
    """A ledger of another version of the noise contract, or of noise that no ledger may be made of yet."""


class LedgerUnsignedError(LedgerError):
    """A signature was asked for, and the ledger has none."""


class LedgerSignatureError(LedgerError):
    """Signed by another key than the one asked for, or the signature is of something else."""


def encode(metadata: Mapping[str, str], coefficients: NDArray[np.float32]) -> bytes:
    """The file.

    Args:
        metadata: all entries but the format, its version and the checksum.
        coefficients: fp32 [K].

    Raises:
        LedgerTooLargeError: the metadata does not fit into the header.
    """
    body = coefficients.astype("<f4").tobytes()
    entries = {**metadata, "format": _FORMAT, "format_version": str(LEDGER_FORMAT)}
    checksum = hashlib.sha256(_assemble(entries, body)).hexdigest()
    return _assemble({**entries, "checksum": checksum}, body)


def decode(data: bytes) -> tuple[dict[str, str], NDArray[np.float32]]:
    """(metadata, coefficients) that `encode` wrote; constant memory, and no code of the file is run.

    Raises:
        TypeError: not bytes.
        LedgerTooLargeError, LedgerFormatError, LedgerDamagedError: as they say.
    """
    if not isinstance(data, bytes):
        raise TypeError(f"expected a ledger as bytes, got {type(data).__name__}")
    if len(data) > MAX_BYTES:
        raise LedgerTooLargeError(f"expected a ledger of at most {MAX_BYTES:,} bytes, got {len(data):,}")
    entries = _read_entries(data)
    if entries.get("format") != _FORMAT:
        raise _damaged("a ledger", "a safetensors file of another kind")
    if entries.get("format_version") != str(LEDGER_FORMAT):
        raise LedgerFormatError(
            f"expected a ledger of format version {LEDGER_FORMAT}, got {entries.get('format_version')!r}; "
            "use the release of fedkseed-kernels that it was made with, or a newer one"
        )
    body = data[_LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little") :]
    if len(body) % 4 != 0 or not 4 <= len(body) <= 4 * MAX_SEEDS:
        raise _damaged(f"1 to {MAX_SEEDS} coefficients of 4 bytes", f"{len(body)} bytes")
    coefficients = np.frombuffer(body, "<f4").astype(np.float32)
    metadata = {
        name: text for name, text in entries.items() if name not in ("format", "format_version", "checksum")
    }
    if encode(metadata, coefficients) != data:
        raise _damaged("a ledger with the checksum of its content", "another one")
    return metadata, coefficients


def _assemble(entries: Mapping[str, str], body: bytes) -> bytes:
    tensor = {"dtype": "F32", "shape": [len(body) // 4], "data_offsets": [0, len(body)]}
    header = json.dumps(
        {"__metadata__": entries, _TENSOR: tensor}, ensure_ascii=True, separators=(",", ":"), sort_keys=True
    ).encode("ascii")
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise LedgerTooLargeError(
            f"expected a header of at most {MAX_HEADER_BYTES:,} bytes, got {len(header):,}"
        )
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + body


def _read_entries(data: bytes) -> dict[str, str]:
    """The header's metadata, nothing else of it checked."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    available = len(data) - _LENGTH_BYTES
    if not 0 < length <= min(available, MAX_HEADER_BYTES):
        raise _damaged(f"a header within {len(data):,} bytes", f"one of {length:,}")
    try:
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length].decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise _damaged("a header in JSON", str(error)) from error
    entries = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(text, str) for text in entries.values()):
        raise _damaged("metadata of names and texts in the header", "something else")
    return entries


def _damaged(expected: str, got: str) -> LedgerDamagedError:
    return LedgerDamagedError(
        f"expected {expected}, got {got}: no ledger, or one that was damaged; fetch the file again"
    )
