"""The tuned model made from a ledger and its base model, in memory or as a folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from fedkseed.data.models import load_causal_lm, load_causal_lm_weights
from fedkseed.files import new_folder
from fedkseed.ledger.format import LedgerError
from fedkseed.ledger.ledger import Ledger, open_ledger
from fedkseed.ledger.signature import PublicKey
from fedkseed.model.identity import ModelIdentity


def load(
    ledger: Ledger | str | os.PathLike[str],
    base: nn.Module | str | Path,
    *,
    public_key: PublicKey | None = None,
) -> nn.Module:
    """The tuned model: the base with the ledger applied to it (`Ledger.apply_`).

    Args:
        ledger: a ledger, or the file of one.
        base: w0. A model is tuned in place and returned. A folder in the layout of `save_pretrained`, or a
            hub id, is loaded as a causal language model, on the CPU, in the dtype that the ledger names.
        public_key: if given, the ledger has to be signed by this key.

    Raises:
        LedgerError, SigningKeyError, OSError: as `Ledger.load` and `Ledger.verify`.
        IdentityError: the base is not the model that the ledger was made from; a model given is unchanged.
        ModelError, MissingExtraError: as `load_causal_lm`.
    """
    opened = open_ledger(ledger, public_key)
    model = base if isinstance(base, nn.Module) else load_causal_lm_weights(base, _dtype(opened))
    opened.apply_(model)
    return model


def write_tuned_model(
    ledger: Ledger | str | os.PathLike[str],
    base: str | Path,
    folder: str | os.PathLike[str],
    *,
    public_key: PublicKey | None = None,
) -> ModelIdentity:
    """Writes the tuned model and the base's tokenizer as a folder in the layout of `save_pretrained`.

    The folder appears when all of it is on the disk; if anything fails, nothing is left.

    Args: as `load`; ``folder`` is new or empty.

    Returns:
        The tuned model's identity, its content hash to be compared with that of the ledger's maker.

    Raises:
        FolderNotEmptyError: there is something at ``folder``.
        LedgerError, SigningKeyError, IdentityError, ModelError, MissingExtraError, OSError: as `load`, and
            where the folder cannot be written.
    """
    opened = open_ledger(ledger, public_key)
    with new_folder(folder) as staging:
        model, tokenizer = load_causal_lm(base, _dtype(opened))
        opened.apply_(model)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        return ModelIdentity.of(model, opened.frozen)


def _dtype(ledger: Ledger) -> torch.dtype:
    if ledger.identity.dtype == "mixed":
        raise LedgerError(
            "expected a ledger of weights in one dtype to load a base for, got mixed; "
            "load the base yourself and pass the model"
        )
    dtype: torch.dtype = getattr(torch, ledger.identity.dtype)
    return dtype
