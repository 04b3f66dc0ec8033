"""The tuned model made from a ledger and its base model, in memory or as a folder, and how it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fedkseed.data.asking import FILE, NOTE, Asking, AskingError
from fedkseed.data.models import load_any, load_any_weights
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
    trust_remote_code: bool = False,
) -> nn.Module:
    """The tuned model: the base with the ledger applied to it (`Ledger.apply_`).

    Args:
        ledger: a ledger, or the file of one.
        base: w0. A model is tuned in place and returned. A folder in the layout of `save_pretrained`, or a
            hub id, is loaded as the language model or classifier that its config.json names, on the CPU, in
            the dtype that the ledger names.
        public_key: if given, the ledger has to be signed by this key.
        trust_remote_code: whether code that lies beside the base's weights may run; never asked.

    Raises:
        LedgerError, SigningKeyError, OSError: as `Ledger.load` and `Ledger.verify`.
        IdentityError: the base is not the model that the ledger was made from; a model given is unchanged.
        ModelError, MissingExtraError: as `fedkseed.data.models.load_any`.
    """
    opened = open_ledger(ledger, public_key)
    if isinstance(base, nn.Module):
        model = base
    else:
        model = load_any_weights(base, ledger_dtype(opened), trust_remote_code=trust_remote_code)
    opened.apply_(model)
    return model


def _silent(_: str) -> None:
    """What is done is not told."""


def write_tuned_model(
    ledger: Ledger | str | os.PathLike[str],
    base: str | Path,
    folder: str | os.PathLike[str],
    *,
    public_key: PublicKey | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = _silent,
) -> ModelIdentity:
    """Writes the tuned model and the base's tokenizer as a folder in the layout of `save_pretrained`.

    What the ledger was tuned with (`find_asking`) is written beside them. The folder appears when all of it
    is on the disk; if anything fails, nothing is left.

    Args: as `load`; ``folder`` is new or empty, ``say`` is told what is being done, a line each.

    Returns:
        The tuned model's identity, its content hash to be compared with that of the ledger's maker.

    Raises:
        FolderNotEmptyError: there is something at ``folder``.
        AskingError: as `find_asking`.
        LedgerError, SigningKeyError, IdentityError, ModelError, MissingExtraError, OSError: as `load`, and
            where the folder cannot be written.
    """
    opened = open_ledger(ledger, public_key)
    asking = None if isinstance(ledger, Ledger) else find_asking(opened, Path(ledger).parent)
    with new_folder(folder) as staging:
        say("Loading and verifying the base model, adding the ledger")
        model, tokenizer = load_any(base, ledger_dtype(opened), trust_remote_code=trust_remote_code)
        opened.apply_(model)
        say("Writing the tuned model")
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if asking is not None:
            asking.write(staging)
        return ModelIdentity.of(model, opened.frozen)


def find_asking(ledger: Ledger, folder: Path) -> Asking | None:
    """What the ledger was tuned with, from the file beside it.

    None if the ledger names nothing of the kind, or if there is no file: a ledger travels alone, too.

    Raises:
        AskingError: the file is damaged, or not the one that the ledger's note names.
    """
    noted = ledger.notes.get(NOTE)
    asking = Asking.read(folder) if noted is not None else None
    if asking is not None and asking.digest != noted:
        raise AskingError(
            f"expected {folder / FILE} with digest {noted}, the one that the ledger was tuned with, "
            f"got {asking.digest}; put that file beside the ledger, or none"
        )
    return asking


def ledger_dtype(ledger: Ledger) -> torch.dtype:
    """The dtype of the weights that the ledger was made from.

    Raises:
        LedgerError: they have several.
    """
    if ledger.identity.dtype == "mixed":
        raise LedgerError(
            "expected a ledger of weights in one dtype to load a base for, got mixed; "
            "load the base yourself and pass the model"
        )
    dtype: torch.dtype = getattr(torch, ledger.identity.dtype)
    return dtype
