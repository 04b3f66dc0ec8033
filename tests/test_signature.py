"""Ed25519 keys and signatures: RFC 8032's vectors, keys in files, and ledgers that have to be signed."""

from __future__ import annotations

import base64
import importlib.util
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedkseed import Ledger, LedgerError, ModelIdentity
from fedkseed._extras import MissingExtraError
from fedkseed.ledger.describe import describe
from fedkseed.ledger.format import LedgerSignatureError, LedgerUnsignedError
from fedkseed.ledger.signature import Signature, SigningKeyError, make_key_pair, public_key_bytes, sign

# RFC 8032, section 7.1, tests 1 and 3: secret key, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]
LEDGER = Ledger(
    7, np.array([0.5, -0.25]), ModelIdentity(bytes(32), bytes(32), "float32"), notes={"creator": "a test"}
)


def private_pem(key: Any, password: bytes | None = None) -> bytes:
    encryption: Any = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return pem


def public_pem(key: Any) -> bytes:
    pem: bytes = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    make_key_pair(tmp_path / "private.pem", tmp_path / "public.pem")
    return tmp_path / "private.pem", tmp_path / "public.pem"


@pytest.mark.parametrize(("secret", "public", "message", "value"), RFC_8032)
def test_published_vectors(secret: str, public: str, message: str, value: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    signature = sign(bytes.fromhex(message), key)
    assert signature == Signature(bytes.fromhex(public), bytes.fromhex(value))
    assert signature.is_of(bytes.fromhex(message))
    assert not signature.is_of(bytes.fromhex(message) + b"\0")
    assert not Signature(bytes.fromhex(public), bytes(64)).is_of(bytes.fromhex(message))


def test_a_key_pair_in_files(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        public = make_key_pair(tmp_path / "private.pem", str(tmp_path / "public.pem"))
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "private.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "public.pem").stat().st_mode) == 0o644
    assert sign(b"x", tmp_path / "private.pem").public_key == public
    assert public_key_bytes(tmp_path / "public.pem") == public_key_bytes(public) == public
    assert public_key_bytes(Ed25519PublicKey.from_public_bytes(public)) == public


def test_no_key_is_ever_overwritten(tmp_path: Path) -> None:
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    public.write_text("kept")
    with pytest.raises(FileExistsError):
        make_key_pair(private, public)
    assert not private.exists()
    private.write_text("kept")
    public.unlink()
    with pytest.raises(FileExistsError):
        make_key_pair(private, public)
    assert private.read_text() == "kept"
    assert not public.exists()
    with pytest.raises(FileNotFoundError):
        make_key_pair(tmp_path / "new.pem", tmp_path / "absent" / "public.pem")
    assert not (tmp_path / "new.pem").exists()


def test_keys_that_are_none(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    elliptic = ec.generate_private_key(ec.SECP256R1())
    files = {
        "text": b"no key",
        "empty": b"",
        "large": b"x" * 20_000,
        "locked": private_pem(Ed25519PrivateKey.generate(), b"password"),
        "other": private_pem(elliptic),
        "other_public": public_pem(elliptic.public_key()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, message in {
        "text": "expected a private key as PEM in .*text, got none",
        "empty": "got none",
        "large": "a file too large for one",
        "locked": "without a password in .*locked, got one with",
        "other": "expected a private key of Ed25519, got .*EC",
        public.name: "got none",
    }.items():
        with pytest.raises(SigningKeyError, match=message):
            sign(b"x", tmp_path / name)
    for name, message in {
        "text": "expected a public key as PEM in .*text, got none",
        "large": "a file too large for one",
        "other_public": "expected a public key of Ed25519, got .*EC",
        private.name: "got none",
    }.items():
        with pytest.raises(SigningKeyError, match=message):
            public_key_bytes(tmp_path / name)
    with pytest.raises(SigningKeyError, match="public key of 32 bytes, got 31"):
        public_key_bytes(bytes(31))
    with pytest.raises(SigningKeyError, match="private key of Ed25519, got RSA"):
        sign(b"x", rsa.generate_private_key(65537, 2048))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        sign(b"x", tmp_path / "absent")
    with pytest.raises(ValueError, match="got 32 and 63"):
        Signature(bytes(32), bytes(63))


# Ledgers


def test_a_signed_ledger(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    path = tmp_path / "ledger"
    LEDGER.save(path, private)
    ledger = Ledger.load(path, public_key=public)
    assert ledger.is_signed_by_its_key()
    assert ledger == LEDGER.sign(private) != LEDGER
    assert replace(ledger, signature=None) == LEDGER
    ledger.save(path)
    assert Ledger.load(path, public_key=public_key_bytes(public)) == ledger


def test_what_is_signed_is_the_file_without_its_signature(keys: tuple[Path, Path]) -> None:
    signed = LEDGER.sign(keys[0])
    assert signed.signature is not None
    key = Ed25519PublicKey.from_public_bytes(signed.signature.public_key)
    key.verify(signed.signature.value, LEDGER.to_bytes())


def test_ledgers_that_are_not_signed_by_the_key_asked_for(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    asked = public_key_bytes(public)
    other = Ed25519PrivateKey.generate()
    signed = LEDGER.sign(private)
    assert signed.signature is not None
    refused: list[tuple[Ledger, type[LedgerError], str]] = [
        (LEDGER, LedgerUnsignedError, f"signed by {asked.hex()}, got one without a signature"),
        (
            LEDGER.sign(other),
            LedgerSignatureError,
            f"got one by {public_key_bytes(other.public_key()).hex()}",
        ),
        # Signed by another, who writes the wanted key into it.
        (
            replace(LEDGER, signature=Signature(asked, sign(LEDGER.to_bytes(), other).value)),
            LedgerSignatureError,
            "a signature that is not of this ledger",
        ),
        *(
            (changed, LedgerSignatureError, "a signature that is not of this ledger")
            for changed in (
                replace(signed, base_seed=8),
                replace(signed, coefficients=np.array([0.5, -0.5])),
                replace(signed, frozen=(3,)),
                replace(signed, notes={}),
                replace(signed, identity=ModelIdentity(bytes(32), bytes(32), "float16")),
            )
        ),
    ]
    path = tmp_path / "ledger"
    for ledger, error, message in refused:
        ledger.save(path)
        assert Ledger.load(path) == ledger
        with pytest.raises(error, match=message):
            Ledger.load(path, public_key=public)
        with pytest.raises(error, match=message):
            describe(path, public_key=public)
    assert not LEDGER.is_signed_by_its_key()
    assert LEDGER.sign(other).is_signed_by_its_key()
    assert not replace(signed, base_seed=8).is_signed_by_its_key()


def test_without_the_library(keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsigned and signed ledgers are read all the same; what needs the library names the extra."""
    data = LEDGER.sign(keys[0]).to_bytes()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "cryptography" else find_spec(name)
    )
    ledger = Ledger.from_bytes(data)
    assert ledger.signature is not None
    for call in (
        lambda: ledger.sign(keys[0]),
        lambda: ledger.verify(ledger.signature.public_key),
        lambda: Ledger.from_bytes(data, public_key=keys[1]),
        lambda: make_key_pair("private.pem", "public.pem"),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install 'fedkseed-kernels\[sign\]'"):
            call()
    assert "not checked: expected the package cryptography" in describe(ledger)


PRIME = 2**255 - 19
D = -121665 * pow(121666, -1, PRIME) % PRIME


def root(square: int) -> int | None:
    """A square root mod p, if there is one (RFC 8032, section 5.1.3)."""
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if x * x % PRIME != square % PRIME:
        x = x * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    return x if x * x % PRIME == square % PRIME else None


def doubled(point: tuple[int, int]) -> tuple[int, int]:
    x, y = point
    product = D * x * x * y * y
    return (
        2 * x * y * pow(1 + product, -1, PRIME) % PRIME,
        (y * y + x * x) * pow(1 - product, -1, PRIME) % PRIME,
    )


def small_order_keys() -> list[bytes]:
    """All encodings of points P with 8 P = 0, found by arithmetic: -x^2 + y^2 = 1 + d x^2 y^2."""
    # 2 P has order 1, 2 or 4 and so y in {1, -1, 0}: of order 8 are the P with x^2 = y^2 or x^2 = -y^2.
    ys = {0, 1, PRIME - 1}
    for s in (1, -1):
        # With x^2 = s y^2 the curve says d s y^4 + (s - 1) y^2 + 1 = 0.
        a, b = D * s, s - 1
        between = root((b * b - 4 * a) % PRIME)
        if between is None:
            continue
        for half in (between, -between):
            y = root((-b + half) * pow(2 * a, -1, PRIME) % PRIME)
            if y is not None:
                ys |= {y, PRIME - y}
    keys = []
    for y in ys:
        x = root((y * y - 1) * pow(D * y * y + 1, -1, PRIME) % PRIME)
        assert x is not None
        point = (x, y)
        for _ in range(3):
            point = doubled(point)
        assert point == (0, 1)
        encodings = [y] + [y + PRIME] * (y + PRIME < 2**255)
        keys += [(value | top << 255).to_bytes(32, "little") for value in encodings for top in (0, 1)]
    return keys


def test_keys_of_small_order_sign_nothing_and_are_refused(tmp_path: Path) -> None:
    keys = small_order_keys()
    assert len(keys) == len(set(keys)) == 14  # eight points, and six more encodings
    order_1 = (1).to_bytes(32, "little")
    assert order_1 in keys
    forged = Signature(order_1, order_1 + bytes(32))
    # The library takes it: S B = R + k A with S = 0 and R = A = 0.
    Ed25519PublicKey.from_public_bytes(order_1).verify(forged.value, b"anything")
    for key in keys:
        assert not Signature(key, key + bytes(32)).is_of(b"anything")
        assert not Signature(key, order_1 + bytes(32)).is_of(b"anything")
        with pytest.raises(SigningKeyError, match="small order"):
            public_key_bytes(key)
    ledger = replace(LEDGER, signature=forged)
    assert not ledger.is_signed_by_its_key()
    assert "BROKEN" in describe(ledger)
    path = tmp_path / "key.pem"
    path.write_bytes(public_pem(Ed25519PublicKey.from_public_bytes(order_1)))
    for known in (path, order_1, Ed25519PublicKey.from_public_bytes(order_1)):
        with pytest.raises(SigningKeyError, match="small order"):
            ledger.verify(known)
    near = (2).to_bytes(32, "little")
    assert public_key_bytes(near) == near


@pytest.mark.parametrize("name", ["x25519", "x448", "ed25519", "ed448"])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 56, 57, 58, 114])
def test_private_keys_of_any_length_are_typed_errors(tmp_path: Path, name: str, length: int) -> None:
    number = {"x25519": 110, "x448": 111, "ed25519": 112, "ed448": 113}[name]
    content = bytes([4, length]) + bytes(length)
    whole = bytes([2, 1, 0, 48, 5, 6, 3, 43, 101, number, 4, len(content)]) + content
    text = base64.encodebytes(bytes([48, len(whole)]) + whole).decode()
    path = tmp_path / "key.pem"
    path.write_text(f"-----BEGIN PRIVATE KEY-----\n{text}-----END PRIVATE KEY-----\n")
    if (name, length) == ("ed25519", 32):
        sign(b"", path)
    else:
        with pytest.raises(SigningKeyError, match="expected a private key"):
            sign(b"", path)


def test_damaged_and_foreign_private_keys_are_typed_errors(tmp_path: Path) -> None:
    """Cut off, changed and shortened at random, in the text and in the DER within it: a key or an error."""
    generator, path = np.random.default_rng(6), tmp_path / "key.pem"
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    elliptic = ec.derive_private_key(7, ec.SECP256R1())
    texts = [private_pem(key), private_pem(elliptic), public_pem(key.public_key())]
    bodies = [
        (text.splitlines(), bytearray(base64.b64decode(b"".join(text.splitlines()[1:-1])))) for text in texts
    ]
    num_refused = 0
    for number in range(600):
        if number % 2:
            damaged = bytearray(texts[number % 3])
            start = int(generator.integers(len(damaged)))
            damaged[start : start + int(generator.integers(1, 9))] = generator.bytes(number % 4)
        else:
            lines, body = bodies[number % 3]
            changed = bytearray(body)
            changed[int(generator.integers(len(body)))] = int(generator.integers(256))
            damaged = lines[0] + b"\n" + base64.encodebytes(changed[: len(body) - number % 5]) + lines[-1]
        path.write_bytes(damaged)
        try:
            sign(b"x", path)
        except SigningKeyError:
            num_refused += 1
    assert 300 < num_refused < 600  # some places do not matter to the library


@pytest.mark.parametrize(
    "key", [None, 1, bytes(32), bytearray(32), memoryview(bytes(32)), [], object, "a\0b"]
)
def test_what_is_neither_file_nor_key_is_a_typed_error(key: Any) -> None:
    with pytest.raises(SigningKeyError, match="expected a private key"):
        sign(b"x", key)
    if not isinstance(key, bytes):
        with pytest.raises(SigningKeyError, match="expected a public key"):
            public_key_bytes(key)


def test_a_folder_as_a_key_is_an_error_of_the_system(tmp_path: Path) -> None:
    for read in (lambda: sign(b"x", tmp_path), lambda: public_key_bytes(tmp_path)):
        with pytest.raises(IsADirectoryError):
            read()
