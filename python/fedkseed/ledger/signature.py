"""Ed25519 signatures and their keys (RFC 8032), by the library cryptography, which the extra `sign` brings.

A private key is given as a PEM file (PKCS 8, without a password) or as a key object of that library; a public
key as a PEM file (SubjectPublicKeyInfo), as a key object, or as its 32 bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from fedkseed._extras import require_extra
from fedkseed.files import FileTooLargeError, read_bounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_KEY_BYTES, SIGNATURE_BYTES = 32, 64
_MAX_KEY_FILE = 16 << 10

_PRIME = 2**255 - 19
#: y of a point of order 8 of the curve (RFC 8032, section 5.1); -y is that of another.
_ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
#: y of all eight points of small order: those of order 4, of order 1, of order 2, of order 8.
_SMALL_ORDER = (0, 1, _PRIME - 1, _ORDER_8, _PRIME - _ORDER_8)

PrivateKey: TypeAlias = Union[str, os.PathLike[str], "Ed25519PrivateKey"]
PublicKey: TypeAlias = Union[str, os.PathLike[str], bytes, "Ed25519PublicKey"]


class SigningKeyError(ValueError):
    """A key that is none of Ed25519, or a file that holds none."""


@dataclass(frozen=True)
class Signature:
    """An Ed25519 signature, 64 bytes, and the public key, 32 bytes, that its maker says it is of."""

    public_key: bytes
    value: bytes

    def __post_init__(self) -> None:
        found = (len(self.public_key), len(self.value))
        if found != (PUBLIC_KEY_BYTES, SIGNATURE_BYTES):
            raise ValueError(
                f"expected a public key of {PUBLIC_KEY_BYTES} bytes and a signature of {SIGNATURE_BYTES}, "
                f"got {found[0]} and {found[1]}"
            )

    def is_of(self, message: bytes) -> bool:
        """Whether the owner of `public_key` signed this message; a key of small order has no owner.

        Raises:
            MissingExtraError: the package cryptography is not installed.
        """
        require_extra("sign", "cryptography")
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        if _is_of_small_order(self.public_key):
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(self.value, message)
        except InvalidSignature:
            return False
        return True


def sign(message: bytes, key: PrivateKey) -> Signature:
    """The signature of a message; the same bytes at every call, as Ed25519 draws nothing.

    Raises:
        SigningKeyError: not a private key of Ed25519, or a file without one.
        OSError: the file cannot be read.
        MissingExtraError: the package cryptography is not installed.
    """
    private = _private_key(key)
    return Signature(private.public_key().public_bytes_raw(), private.sign(message))


def public_key_bytes(key: PublicKey) -> bytes:
    """The 32 bytes of a public key.

    Raises:
        SigningKeyError, OSError, MissingExtraError: as `sign`; bytes of another length; a key of small order,
            for which anybody can make signatures.
    """
    raw = key if isinstance(key, bytes) else _raw_public_key(key)
    if len(raw) != PUBLIC_KEY_BYTES:
        raise SigningKeyError(f"expected a public key of {PUBLIC_KEY_BYTES} bytes, got {len(raw)}")
    if _is_of_small_order(raw):
        raise SigningKeyError(
            f"expected the public key of somebody, got {raw.hex()}, a point of small order: anybody can sign "
            "with it; ask the owner for the key again"
        )
    return raw


def _raw_public_key(key: str | os.PathLike[str] | Ed25519PublicKey) -> bytes:
    require_extra("sign", "cryptography")
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found: object = key
    if isinstance(key, (str, os.PathLike)):
        try:
            found = load_pem_public_key(_read_key(key))
        except (ValueError, UnsupportedAlgorithm, InternalError) as error:
            raise SigningKeyError(f"expected a public key as PEM in {key}, got none: {error}") from error
    if not isinstance(found, Ed25519PublicKey):
        raise SigningKeyError(f"expected a public key of Ed25519, got {type(found).__name__}")
    return found.public_bytes_raw()


def make_key_pair(private: str | os.PathLike[str], public: str | os.PathLike[str]) -> bytes:
    """Makes a new key pair as two PEM files: the private one for its owner's eyes only (mode 0600).

    Neither file may be there already: a key that is overwritten is lost for ever.

    Returns:
        The 32 bytes of the public key.

    Raises:
        FileExistsError: a file of one of the names is there; nothing is written.
        OSError: no such folder, no space, no permission; nothing is left over.
        MissingExtraError: the package cryptography is not installed.
    """
    require_extra("sign", "cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _write_new(private, private_pem, 0o600)
    try:
        _write_new(public, public_pem, 0o644)
    except BaseException:
        os.unlink(private)
        raise
    return key.public_key().public_bytes_raw()


def _private_key(key: PrivateKey) -> Ed25519PrivateKey:
    require_extra("sign", "cryptography")
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    found: object = key
    if isinstance(key, (str, os.PathLike)):
        try:
            found = load_pem_private_key(_read_key(key), password=None)
        except TypeError as error:  # what the library raises for a key with a password
            raise SigningKeyError(
                f"expected a private key without a password in {key}, got one with; "
                "load it with the library cryptography and pass the key object"
            ) from error
        except (ValueError, UnsupportedAlgorithm, InternalError) as error:
            raise SigningKeyError(f"expected a private key as PEM in {key}, got none: {error}") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise SigningKeyError(f"expected a private key of Ed25519, got {type(found).__name__}")
    return found


def _is_of_small_order(key: bytes) -> bool:
    """Whether the bytes are one of the eight points of small order, in any of their encodings."""
    y = int.from_bytes(key, "little") & (2**255 - 1)  # the last bit is the sign of x
    return y % _PRIME in _SMALL_ORDER


def _read_key(path: str | os.PathLike[str]) -> bytes:
    try:
        return read_bounded(path, _MAX_KEY_FILE)
    except FileTooLargeError as error:
        raise SigningKeyError(f"expected a key as PEM in {path}, got a file too large for one") from error


def _write_new(path: str | os.PathLike[str], data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(path).unlink()
        raise
