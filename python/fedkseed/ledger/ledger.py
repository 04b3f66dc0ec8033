"""The ledger: a fine-tuned model in 16 KB, w0 + sum_k c_k z(seed_k) as a base seed and K coefficients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import fedkseed_kernels
from fedkseed._progress import pieces
from fedkseed.files import FileTooLargeError, read_bounded, write_atomically
from fedkseed.ledger import fields as ledger_fields
from fedkseed.ledger import format as ledger_format
from fedkseed.ledger import signature
from fedkseed.ledger.format import (
    LedgerDamagedError,
    LedgerError,
    LedgerSignatureError,
    LedgerTooLargeError,
    LedgerUnsignedError,
)
from fedkseed.ledger.signature import PrivateKey, PublicKey, Signature
from fedkseed.model.identity import IdentityError, ModelIdentity
from fedkseed.model.manifest import ModelParameters
from fedkseed.model.overlaps import check_overlaps
from fedkseed.model.placement import PreparedTensors
from fedkseed.seeds import SeedPool


@dataclass(frozen=True, eq=False)
class Ledger:
    """A fine-tuned model as what was added to w0: w = round(w0 + sum_k coefficients[k] z(seed_k)).

    seed_k is candidate seed k of the base seed (contract, section 9). The tuned parameters get the noise of
    their manifest index as stream; frozen ones stay what they are in w0. Two ledgers are equal if they are
    the same bytes.

    Attributes:
        base_seed: any integer; in [0, 2^64) after construction.
        coefficients: fp32 [K], K in [1, 65536], finite, read-only; others are rounded once to fp32.
        identity: of w0, with the tuned set that ``frozen`` says.
        frozen: manifest indices of the parameters that are not tuned, ascending.
        notes: free texts, such as {"num_rounds": "40"}: names of [a-z0-9_], printable ASCII without quotes
            and backslashes; at most 8 of them, together at most 128 characters.
        family: of the noise: "gaussian" or "rademacher".
        contract_version: of the noise.
        signature: over the bytes of this ledger without a signature; `sign` makes it. Nobody has checked it
            until `verify` did.

    Raises:
        TypeError: a field of another type.
        LedgerContractError: another contract version or family.
        LedgerError: another field out of range.
    """

    base_seed: int
    coefficients: NDArray[np.float32]
    identity: ModelIdentity
    frozen: Sequence[int] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    family: str = "gaussian"
    contract_version: int = fedkseed_kernels.CONTRACT_VERSION
    signature: Signature | None = None

    def __post_init__(self) -> None:
        ledger_fields.check_noise(self.contract_version, self.family)
        ledger_fields.check_identity(self.identity)
        for name, check in (
            ("base_seed", ledger_fields.check_base_seed),
            ("coefficients", ledger_fields.check_coefficients),
            ("frozen", ledger_fields.check_frozen),
            ("notes", ledger_fields.check_notes),
        ):
            object.__setattr__(self, name, check(getattr(self, name)))

    @classmethod
    def of(
        cls,
        w0: nn.Module,
        seed_pool: SeedPool,
        coefficients: NDArray[np.float32] | NDArray[np.float64],
        notes: Mapping[str, str] | None = None,
        *,
        family: str = "gaussian",
    ) -> Ledger:
        """The ledger of coefficients on a model that holds w0 now; what is frozen in it counts as frozen.

        It cannot check that the coefficients belong to this model: that they were gathered from this w0,
        with the parameters numbered by its manifest (an optimizer made of a plain list numbers them by their
        place in it), with these ones frozen, along this pool's seeds and this family's noise. Otherwise the
        ledger is that of another model than the tuned one. The optimizer knows: `fedkseed.optim.ledgers`
        compares.

        Args:
            family: of the noise that the coefficients belong to, `FedKSeedSGD.family` for example.

        Raises:
            LedgerContractError: an unknown family.
            LedgerError: not one finite coefficient for each seed of the pool.
            TypeError, ValueError: as `ModelIdentity.of`.
        """
        rounded = ledger_fields.check_coefficients(coefficients)
        if len(rounded) != seed_pool.num_seeds:
            raise LedgerError(f"expected {seed_pool.num_seeds} coefficients, got {len(rounded)}")
        known = ModelParameters.of(w0)
        identity = ModelIdentity.of_parameters(known)
        return cls(seed_pool.base_seed, rounded, identity, known.frozen, dict(notes or {}), family)

    @property
    def num_seeds(self) -> int:
        """K."""
        return len(self.coefficients)

    @property
    def seed_pool(self) -> SeedPool:
        """The candidate seeds that the coefficients belong to."""
        return SeedPool(self.base_seed, self.num_seeds)

    def __eq__(self, other: object) -> bool:
        return self.to_bytes() == other.to_bytes() if isinstance(other, Ledger) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file (`fedkseed.ledger.format`); the same ledger gives the same bytes everywhere."""
        metadata = ledger_fields.to_metadata(
            self.base_seed,
            self.identity,
            self.frozen,
            self.notes,
            self.family,
            self.contract_version,
            self.signature,
        )
        return ledger_format.encode(metadata, self.coefficients)

    @classmethod
    def from_bytes(cls, data: bytes, *, public_key: PublicKey | None = None) -> Ledger:
        """The ledger that `to_bytes` wrote; every other byte string is refused.

        Args:
            public_key: if given, the ledger has to be signed by this key.

        Raises:
            LedgerError: too large, damaged, of another format or contract version, unsigned, wrongly signed:
                a subclass for each.
            SigningKeyError, OSError, MissingExtraError: the public key cannot be had.
        """
        metadata, coefficients = ledger_format.decode(data)
        ledger = cls(coefficients=coefficients, **ledger_fields.from_metadata(metadata))
        if ledger.to_bytes() != data:
            raise LedgerDamagedError(
                "expected every entry in its one form, got another; write the ledger anew"
            )
        if public_key is not None:
            ledger.verify(public_key)
        return ledger

    def save(self, path: str | os.PathLike[str], key: PrivateKey | None = None) -> None:
        """Writes the file atomically; with a key, signed by it. Without one a signature it has is kept.

        Raises:
            OSError: as `write_atomically`.
            SigningKeyError, MissingExtraError: as `sign`.
        """
        write_atomically(path, (self if key is None else self.sign(key)).to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, public_key: PublicKey | None = None) -> Ledger:
        """The ledger in a file, of which at most `ledger_format.MAX_BYTES` are read.

        Raises:
            OSError: the file cannot be read.
            LedgerError, SigningKeyError, MissingExtraError: as `from_bytes`.
        """
        try:
            data = read_bounded(path, ledger_format.MAX_BYTES)
        except FileTooLargeError as error:
            raise LedgerTooLargeError(f"no ledger: {error}") from error
        return cls.from_bytes(data, public_key=public_key)

    def sign(self, key: PrivateKey) -> Ledger:
        """This ledger with a signature over its bytes without one.

        Raises:
            SigningKeyError, OSError: not a private key of Ed25519, or a file without one.
            MissingExtraError: the package cryptography is not installed.
        """
        return replace(self, signature=signature.sign(self._unsigned_bytes(), key))

    def is_signed_by_its_key(self) -> bool:
        """Whether there is a signature that the owner of the key in it has made of this ledger.

        Whose key that is, nothing says: for trust ask `verify` for a key that you know.

        Raises:
            MissingExtraError: the package cryptography is not installed.
        """
        return self.signature is not None and self.signature.is_of(self._unsigned_bytes())

    def verify(self, public_key: PublicKey) -> None:
        """Raises unless the owner of this key signed this ledger.

        Raises:
            LedgerUnsignedError, LedgerSignatureError: not so.
            SigningKeyError, OSError, MissingExtraError: the public key cannot be had.
        """
        wanted = signature.public_key_bytes(public_key)
        if self.signature is None:
            raise LedgerUnsignedError(
                f"expected a ledger signed by {wanted.hex()}, got one without a signature"
            )
        if self.signature.public_key != wanted:
            raise LedgerSignatureError(
                f"expected a ledger signed by {wanted.hex()}, got one by {self.signature.public_key.hex()}"
            )
        if not self.is_signed_by_its_key():
            raise LedgerSignatureError(
                f"expected a ledger signed by {wanted.hex()}, got a signature that is not of this ledger"
            )

    @torch.no_grad()
    def apply_(self, model: nn.Module, *, public_key: PublicKey | None = None) -> None:
        """Adds the ledger to w0 in place, round(w0 + sum_k c_k z_k) to nearest: one pass over what is tuned.

        The model has to hold w0. Which of its parameters require gradients does not matter: the ledger says
        which are tuned. Applying twice is refused, as the weights are no longer w0.

        Args:
            public_key: if given, the ledger has to be signed by this key.

        Mutates: the model's tuned parameters; nothing if an error is raised.

        Raises:
            IdentityError: another model, or other weights.
            LedgerUnsignedError, LedgerSignatureError: as `verify`.
            TypeError, ValueError, RuntimeError: as `ModelIdentity.of`, `check_overlaps` and
                `PreparedTensors`.
        """
        if public_key is not None:
            self.verify(public_key)
        known = ModelParameters.of(model)
        parameters = known.named
        if self.frozen and self.frozen[-1] >= len(parameters):
            raise IdentityError(
                f"expected a model of more than {self.frozen[-1]} parameters, got {len(parameters)}; "
                "use the model this was made from"
            )
        self.identity.require(ModelIdentity.of_parameters(known, self.frozen))
        frozen = frozenset(self.frozen)
        streams = [stream for stream in range(len(parameters)) if stream not in frozen]
        names = [parameters[stream][0] for stream in streams]
        tensors = [parameters[stream][1] for stream in streams]
        check_overlaps(names, tensors, model, known)
        PreparedTensors(tensors, streams, self.family, names=names)  # all of them, or it raises
        for piece in pieces([tensor.numel() for tensor in tensors], "rebuilding the model"):
            weights = PreparedTensors(
                [tensors[index] for index in piece],
                [streams[index] for index in piece],
                self.family,
                names=[names[index] for index in piece],
            )
            weights.seed_axpy_(self.seed_pool.seeds, self.coefficients)

    def _unsigned_bytes(self) -> bytes:
        return replace(self, signature=None).to_bytes()


def open_ledger(ledger: Ledger | str | os.PathLike[str], public_key: PublicKey | None = None) -> Ledger:
    """The ledger given, or the one in the file named; signed by the key, if one is given.

    Raises:
        LedgerError, SigningKeyError, MissingExtraError, OSError: as `Ledger.load`.
    """
    if not isinstance(ledger, Ledger):
        return Ledger.load(ledger, public_key=public_key)
    if public_key is not None:
        ledger.verify(public_key)
    return ledger
