"""The ledger of a walk: its coefficients, on the w0 that it began at and on no other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedkseed.ledger.format import LedgerError
from fedkseed.ledger.ledger import Ledger
from fedkseed.model.identity import IdentityError
from fedkseed.model.manifest import Manifest, manifest_parameters
from fedkseed.seeds import SeedPool


def ledger_of(
    manifest: Manifest | None,
    tuned: Iterable[tuple[int, torch.Tensor]],
    seed_pool: SeedPool,
    coefficients: NDArray[np.float64],
    family: str,
    w0: nn.Module,
    notes: Mapping[str, str] | None = None,
) -> Ledger:
    """The ledger of coefficients that were gathered on a model made like w0, which holds w0 still.

    What `Ledger.of` takes on trust is compared here: names and shapes, which parameters are frozen, and the
    tuned ones' dtypes. That w0's numbers are those that the walk began at, nobody can tell afterwards.

    Args:
        manifest: of the tuned model; None if none gave the noise its streams.
        tuned: (stream, weight) of what was tuned, as it stands now.
        family: of the noise.
        w0: another model than the tuned one, with the same parameters frozen.
        notes: see `Ledger`.

    Raises:
        LedgerError: no manifest, a coefficient that is not finite in fp32, or notes that no ledger may have.
        IdentityError: w0 is the tuned model, or one with another manifest, frozen set or dtype; the first
            parameter that differs is named.
        TypeError, ValueError: as `ModelIdentity.of`.
    """
    if manifest is None:
        raise LedgerError(
            "expected an optimizer that knows the model, got one made of a list, where a tensor's noise "
            "depends on its place in that list; give the optimizer the model, or model= beside the list"
        )
    _check_manifest(manifest, Manifest.of(w0))
    weights = dict(tuned)
    for stream, (name, found) in enumerate(manifest_parameters(w0)):
        weight = weights.get(stream)
        if weight is not None and _is_same_memory(found, weight):
            raise IdentityError(
                f"expected a model that holds w0, got the tuned one: they share {name}; "
                "load the base model anew, or copy it before the first step"
            )
        if found.requires_grad != (weight is not None):
            raise IdentityError(
                f"expected {name} in w0 to be {'frozen' if weight is None else 'tuned'} as in the walk, got "
                f"it {'tuned' if weight is None else 'frozen'}; set its requires_grad to {weight is not None}"
            )
        if weight is not None and found.dtype != weight.dtype:
            raise IdentityError(
                f"expected {name} in w0 in {_name(weight.dtype)} as in the tuned model, got it in "
                f"{_name(found.dtype)}; load w0 in the dtype that the walk began at"
            )
    return Ledger.of(w0, seed_pool, coefficients, notes, family=family)


def _check_manifest(expected: Manifest, found: Manifest) -> None:
    theirs = dict(zip(found.names, found.shapes, strict=True))
    for stream, (name, shape) in enumerate(zip(expected.names, expected.shapes, strict=True)):
        if stream >= len(found) or found.names[stream] != name:
            other = f"{found.names[stream]} in its place" if stream < len(found) else "no parameter any more"
            raise IdentityError(
                f"expected {name} as parameter {stream} of w0, got {other}; "
                "build w0 as the tuned model was built, adapters and tied weights included"
            )
        if theirs[name] != shape:
            raise IdentityError(
                f"expected {name} in w0 in shape {shape}, got {theirs[name]}; "
                "build w0 as the tuned model was built"
            )
    if len(found) > len(expected):
        raise IdentityError(
            f"expected w0 to have the tuned model's {len(expected)} parameters, got "
            f"{found.names[len(expected)]} after them; build w0 as the tuned model was built"
        )


def _is_same_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left is right or (
        left.device == right.device and left.numel() > 0 and left.data_ptr() == right.data_ptr() != 0
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
