"""Which model a ledger or a message is about: hashes of its structure and of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from fedkseed._progress import pieces
from fedkseed.model.manifest import Manifest, ModelParameters
from fedkseed.model.waiting import flush_waiting

#: The dtypes that weights may have, "mixed" if they have several: their codes in messages and states.
DTYPE_CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "float64": 4, "mixed": 0}
DTYPES_BY_CODE = {code: name for name, code in DTYPE_CODES.items()}

#: Bytes hashed at a time, so that hashing needs no copy of a large parameter.
_PIECE = 1 << 24


class IdentityError(ValueError):
    """Another model than the one expected: other names or shapes, other weights, or another dtype."""


@dataclass(frozen=True)
class ModelIdentity:
    """The model that coefficients are added to.

    Attributes:
        structure: SHA-256 (32 bytes) over each parameter's name, full shape and whether it is tuned, in
            manifest order.
        content: SHA-256 (32 bytes) over each parameter's dtype and its elements, row-major, little-endian.
        dtype: of the parameters, a name out of `DTYPE_CODES`; "mixed" if they have several.
    """

    structure: bytes
    content: bytes
    dtype: str

    @classmethod
    def of(cls, model: nn.Module, frozen: Collection[int] | None = None) -> ModelIdentity:
        """The identity of a model as its weights stand now; reads every byte of its parameters.

        Buffers are no part of it.

        Args:
            frozen: manifest indices of the parameters that are not tuned; those with
                ``requires_grad=False`` if None.

        Raises:
            TypeError, ValueError: as `Manifest.of`; a parameter that is sharded or on the meta device.
        """
        return cls.of_parameters(ModelParameters.of(model), frozen)

    @classmethod
    def of_parameters(cls, known: ModelParameters, frozen: Collection[int] | None = None) -> ModelIdentity:
        """`of` the model whose parameters these are.

        Raises:
            ValueError: a parameter that is sharded or on the meta device.
        """
        left_alone = frozenset(known.frozen if frozen is None else frozen)
        flush_waiting(known.parameters)
        tuned = [index not in left_alone for index in range(len(known.parameters))]
        return cls.of_weights(known.manifest, tuned, [weight.detach() for weight in known.parameters])

    @classmethod
    def of_weights(cls, manifest: Manifest, tuned: list[bool], weights: list[torch.Tensor]) -> ModelIdentity:
        """The identity of a model that has these weights in manifest order; reads every byte of them.

        Raises:
            ValueError: not one flag and tensor for each entry; a tensor sharded or on the meta device.
        """
        for name, shape, weight in zip(manifest.names, manifest.shapes, weights, strict=True):
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"expected whole weights in memory, got shape {tuple(weight.shape)} of {name} "
                    f"{shape}, a shard; load the full model first"
                )
        dtypes = {_dtype_name(weight.dtype) for weight in weights}
        return cls(
            structure_hash(manifest, tuned),
            content_hash(list(zip(manifest.names, weights, strict=True))),
            dtypes.pop() if len(dtypes) == 1 else "mixed",
        )

    def require(self, found: ModelIdentity) -> None:
        """Raises unless ``found`` is this model.

        Raises:
            IdentityError: it is not; says in what.
        """
        if found.structure != self.structure:
            raise IdentityError(
                f"expected a model of structure {_short(self.structure)}, got {_short(found.structure)}: "
                "other parameter names, shapes or frozen parameters; use the model this was made from"
            )
        if found.dtype != self.dtype:
            raise IdentityError(
                f"expected weights in {self.dtype}, got {found.dtype}; load the model in {self.dtype}"
            )
        if found.content != self.content:
            raise IdentityError(
                f"expected weights of content {_short(self.content)}, got {_short(found.content)}: "
                "the same shapes, other numbers; use the very weights this was made from"
            )


def frozen_indices(model: nn.Module) -> tuple[int, ...]:
    """Manifest indices of the parameters with ``requires_grad=False``, ascending.

    Raises:
        TypeError, ValueError: as `Manifest.of`.
    """
    return ModelParameters.of(model).frozen


def structure_hash(manifest: Manifest, tuned: list[bool]) -> bytes:
    """SHA-256 over, for each parameter: length of the name u32, name (UTF-8), tuned u8, rank u32, sizes u64.

    Integers are little-endian.
    """
    if len(tuned) != len(manifest):
        raise ValueError(f"expected one flag for each of {len(manifest)} parameters, got {len(tuned)}")
    digest = hashlib.sha256()
    for name, shape, flag in zip(manifest.names, manifest.shapes, tuned, strict=True):
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
        digest.update(bytes([flag]) + len(shape).to_bytes(4, "little"))
        for size in shape:
            digest.update(size.to_bytes(8, "little"))
    return digest.digest()


def content_hash(parameters: list[tuple[str, torch.Tensor]]) -> bytes:
    """SHA-256 over, for each (name, tensor): length of the dtype's name u32, that name, then the elements.

    Raises:
        ValueError: a tensor without data of its own (meta device, freed), sharded or not dense, named.
    """
    digest = hashlib.sha256()
    for piece in pieces([parameter.numel() for _, parameter in parameters], "verifying the weights"):
        for name, parameter in (parameters[index] for index in piece):
            _add_weights(digest, name, parameter)
    return digest.digest()


def _add_weights(digest: hashlib._Hash, name: str, parameter: torch.Tensor) -> None:
    """One parameter's part of `content_hash`."""
    if parameter.layout is not torch.strided:
        raise ValueError(f"expected dense weights, got {name} of layout {parameter.layout}; make it dense")
    is_ordinary = type(parameter.data) is torch.Tensor and not parameter.is_meta
    if not is_ordinary or (parameter.numel() > 0 and not parameter.data_ptr()):
        raise ValueError(
            f"expected whole weights in memory, got {name} as {type(parameter.data).__name__} on "
            f"{parameter.device}; load the full model first"
        )
    dtype = _dtype_name(parameter.dtype).encode()
    digest.update(len(dtype).to_bytes(4, "little") + dtype)
    flat = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _PIECE):
        digest.update(flat[start : start + _PIECE].cpu().numpy().data)


def _short(digest: bytes) -> str:
    return digest.hex()[:16]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
