"""The fields of a ledger: what they may be, and how they stand as texts in the file's metadata.

base_seed          decimal
content            of w0, hex of 32 bytes (`fedkseed.model.identity`)
contract_version   decimal
dtype              of w0
family             of the noise
frozen             hexadecimal number of which bit i says that the parameter of manifest index i is frozen
structure          of w0 and the tuned set, hex of 32 bytes
note_NAME          free text
public_key, signature    hex of 32 and 64 bytes; both or neither
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed.ledger.format import LedgerContractError, LedgerDamagedError, LedgerError
from fedkseed.ledger.signature import Signature
from fedkseed.model.identity import DTYPE_CODES, ModelIdentity
from fedkseed.seeds import MAX_SEEDS
from fedkseed_kernels import CONTRACT_VERSION, FAMILIES

#: A frozen parameter is one bit in the header.
MAX_PARAMETERS = 1 << 16
#: How many notes there may be, and characters of all of them together, names included. So a signed ledger of
#: K = 4096 stays within 17,500 bytes for every model of up to 700 parameters.
MAX_NOTES, MAX_NOTE_CHARACTERS = 8, 128

_NOTE_NAME = re.compile(r"[a-z0-9_]+")
_NOTE_TEXT = re.compile(r"[ !#-\[\]-~]*")  # printable ASCII but " and \, which JSON would escape
_NOTE_PREFIX = "note_"
_REQUIRED = {"base_seed", "content", "contract_version", "dtype", "family", "frozen", "structure"}
_OF_SIGNATURE = {"public_key", "signature"}


def check_noise(contract_version: int, family: str) -> None:
    """Refuses noise that this release cannot make.

    Raises:
        LedgerContractError: another contract version, or an unknown family.
    """
    if contract_version != CONTRACT_VERSION:
        raise LedgerContractError(
            f"expected a ledger of contract version {CONTRACT_VERSION}, got {contract_version!r}; "
            "use a release of fedkseed-kernels that has that version"
        )
    if family not in FAMILIES:
        raise LedgerContractError(
            f"expected noise of one of the families {', '.join(FAMILIES)}, got {family!r}; "
            "use a release of fedkseed-kernels that has that family"
        )


def check_base_seed(base_seed: object) -> int:
    """The base seed mod 2^64.

    Raises:
        TypeError: not an integer.
    """
    if isinstance(base_seed, bool) or not isinstance(base_seed, int):
        raise TypeError(f"expected an integer base_seed, got {base_seed!r}")
    return base_seed % 2**64


def check_coefficients(coefficients: Any) -> NDArray[np.float32]:
    """A read-only copy in fp32, rounded once.

    Raises:
        TypeError: not floating-point numbers.
        LedgerError: none, too many, of another rank, or one is NaN or infinite in fp32.
    """
    array = np.asarray(coefficients)
    if array.dtype.kind != "f":
        raise TypeError(f"expected coefficients as an array of floating-point numbers, got {array.dtype}")
    if array.ndim != 1 or not 1 <= len(array) <= MAX_SEEDS:
        raise LedgerError(f"expected 1 to {MAX_SEEDS} coefficients, got an array of shape {array.shape}")
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32)
    if not (finite := np.isfinite(rounded)).all():
        first = int(np.argmin(finite))
        raise LedgerError(f"expected coefficients that are finite in fp32, got {array[first]} at {first}")
    rounded.flags.writeable = False
    return rounded


def check_identity(identity: object) -> None:
    """Refuses hashes of another length and unknown dtypes.

    Raises:
        TypeError: not a ModelIdentity.
        LedgerError: as said.
    """
    if not isinstance(identity, ModelIdentity):
        raise TypeError(f"expected a ModelIdentity, got {type(identity).__name__}")
    if (len(identity.structure), len(identity.content)) != (32, 32):
        raise LedgerError(
            "expected hashes of 32 bytes in the identity, "
            f"got {len(identity.structure)} and {len(identity.content)}"
        )
    if identity.dtype not in DTYPE_CODES:
        raise LedgerError(f"expected weights in one of {', '.join(DTYPE_CODES)}, got {identity.dtype!r}")


def check_frozen(frozen: Sequence[int]) -> tuple[int, ...]:
    """The indices as a tuple.

    Raises:
        LedgerError: not ascending, or out of range.
    """
    indices = tuple(frozen)
    pairs = zip((-1, *indices), (*indices, MAX_PARAMETERS), strict=True)
    if not all(before < after for before, after in pairs):
        raise LedgerError(
            f"expected ascending manifest indices in [0, {MAX_PARAMETERS}) of the frozen parameters, "
            f"got {indices if len(indices) < 9 else f'{len(indices)} others'}"
        )
    return indices


def check_notes(notes: Mapping[str, str]) -> dict[str, str]:
    """A copy.

    Raises:
        LedgerError: a name or a text with other characters than allowed, or too many of them.
    """
    for name, text in notes.items():
        if not (_NOTE_NAME.fullmatch(name) and _NOTE_TEXT.fullmatch(text)):
            raise LedgerError(
                "expected notes with names of [a-z0-9_] and texts of printable ASCII without quotes and "
                f"backslashes, got {name!r}: {text!r}"
            )
    length = sum(len(name) + len(text) for name, text in notes.items())
    if len(notes) > MAX_NOTES or length > MAX_NOTE_CHARACTERS:
        raise LedgerError(
            f"expected at most {MAX_NOTES} notes of {MAX_NOTE_CHARACTERS} characters in all, "
            f"got {len(notes)} of {length}"
        )
    return dict(notes)


def to_metadata(
    base_seed: int,
    identity: ModelIdentity,
    frozen: Sequence[int],
    notes: Mapping[str, str],
    family: str,
    contract_version: int,
    signature: Signature | None,
) -> dict[str, str]:
    """Checked fields as the texts of the file."""
    flags = np.zeros(frozen[-1] + 1 if frozen else 0, np.uint8)
    flags[list(frozen)] = 1
    mask = int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
    metadata = {
        "base_seed": str(base_seed),
        "content": identity.content.hex(),
        "contract_version": str(contract_version),
        "dtype": identity.dtype,
        "family": family,
        "frozen": f"{mask:x}",
        "structure": identity.structure.hex(),
        **{_NOTE_PREFIX + name: text for name, text in notes.items()},
    }
    if signature is not None:
        metadata |= {"public_key": signature.public_key.hex(), "signature": signature.value.hex()}
    return metadata


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields by name, as `to_metadata` takes them; what values they may have is left to the checks.

    Raises:
        LedgerContractError: as `check_noise`.
        LedgerDamagedError: an entry is missing, unknown or no number.
    """
    found = {name for name in metadata if not name.startswith(_NOTE_PREFIX)}
    if found not in (_REQUIRED, _REQUIRED | _OF_SIGNATURE):
        raise LedgerDamagedError(f"expected the entries {sorted(_REQUIRED)}, got {sorted(found)}")
    try:
        contract_version = int(metadata["contract_version"])
        check_noise(contract_version, metadata["family"])
        mask = int(metadata["frozen"], 16)
        if not 0 <= mask < 1 << MAX_PARAMETERS:
            raise LedgerDamagedError(f"expected at most {MAX_PARAMETERS} parameters, got frozen ones beyond")
        flags = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), np.uint8)
        return {
            "base_seed": int(metadata["base_seed"]),
            "identity": ModelIdentity(
                bytes.fromhex(metadata["structure"]), bytes.fromhex(metadata["content"]), metadata["dtype"]
            ),
            "frozen": tuple(np.flatnonzero(np.unpackbits(flags, bitorder="little")).tolist()),
            "notes": {
                name.removeprefix(_NOTE_PREFIX): text
                for name, text in metadata.items()
                if name.startswith(_NOTE_PREFIX)
            },
            "family": metadata["family"],
            "contract_version": contract_version,
            "signature": Signature(
                bytes.fromhex(metadata["public_key"]), bytes.fromhex(metadata["signature"])
            )
            if "signature" in metadata
            else None,
        }
    except LedgerError:
        raise
    except ValueError as error:
        raise LedgerDamagedError(f"expected numbers and hashes in the metadata, got: {error}") from error
