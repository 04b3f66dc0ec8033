"""The tuned model made from a ledger and its base model, in memory or as a folder, and how it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from fedkseed.data.asking import FILE, NOTE, Asking, AskingError
from fedkseed.data.models import load_any, load_any_weights
from fedkseed.files import new_folder
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.published import Published, PublishedError, dtype_of
from fedkseed.ledger.signature import PublicKey
from fedkseed.ledger.sources import open_source
from fedkseed.model.identity import ModelIdentity


def load(
    source: Ledger | str | os.PathLike[str],
    base: nn.Module | str | Path | None = None,
    *,
    public_key: PublicKey | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The tuned model: the base with the ledger applied to it (`Ledger.apply_`).

    Args:
        source: a ledger, the file of one, the folder of a published one (`fedkseed publish`), or the hub id
            of one, "owner/name" or "owner/name@revision".
        base: w0; None: the one that the card of a published ledger names, in the revision it names. A model
            is tuned in place and returned. A folder in the layout of `save_pretrained`, or a hub id, is
            loaded as the language model or classifier that its config.json names, on the CPU, in the dtype
            that the ledger names.
        public_key: if given, the ledger has to be signed by this key.
        trust_remote_code: whether code that lies beside the base's weights may run; never asked.

    Returns:
        The model; of a published LoRA ledger a PeftModel around the base. Of a published ledger it has the
        content that the card names.

    Raises:
        PublishedError: a folder without a card, files or a tuned model that are not what the card says, a hub
            id that cannot be reached, or no base, where there is none that a card names.
        LedgerError, AskingError, SigningKeyError, OSError: as `Ledger.load` and `Ledger.verify`.
        IdentityError: the base is not the model that the ledger was made from; a model given is unchanged,
            but for the adapter of a LoRA ledger.
        ModelError, FetchError, MissingExtraError: as `fedkseed.data.models.load_any`.
    """
    found = open_source(source, public_key)
    if isinstance(base, nn.Module):
        if isinstance(found, Published):
            return found.tuned(base)
        found.apply_(base)
        return base
    if isinstance(found, Published):
        return found.load(base, trust_remote_code=trust_remote_code)
    model = load_any_weights(_given(base), dtype_of(found), trust_remote_code=trust_remote_code)
    found.apply_(model)
    return model


def _given(base: str | Path | None) -> str | Path:
    if base is None:
        raise PublishedError(
            "expected the base of the ledger (base=, --base), got none: a ledger alone does not say where "
            "its base is, a published one does (fedkseed publish)"
        )
    return base


def _silent(_: str) -> None:
    """What is done is not told."""


def write_tuned_model(
    source: Ledger | str | os.PathLike[str],
    base: str | Path | None,
    folder: str | os.PathLike[str],
    *,
    public_key: PublicKey | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = _silent,
) -> ModelIdentity:
    """Writes the tuned model and the base's tokenizer as a folder in the layout of `save_pretrained`.

    What the ledger was tuned with (`find_asking`) is written beside them. Of a published LoRA ledger the
    adapter alone is written, as peft saves it. The folder appears when all of it is on the disk; if anything
    fails, nothing is left.

    Args: as `load`; ``folder`` is new or empty, ``say`` is told what is being done, a line each.

    Returns:
        The tuned model's identity, its content hash to be compared with that of the ledger's maker.

    Raises:
        FolderNotEmptyError: there is something at ``folder``.
        AskingError: as `find_asking`.
        LedgerError, SigningKeyError, IdentityError, ModelError, MissingExtraError, OSError: as `load`, and
            where the folder cannot be written.
    """
    opened = open_source(source, public_key)
    if isinstance(opened, Published):
        ledger, asking = opened.ledger, opened.asking
    else:
        ledger = opened
        asking = None if isinstance(source, Ledger) else find_asking(opened, Path(source).parent)
    with new_folder(folder) as staging:
        say("Loading and verifying the base model, adding the ledger")
        if isinstance(opened, Published):
            model, tokenizer = opened.load_with_tokenizer(base, trust_remote_code=trust_remote_code)
        else:
            model, tokenizer = load_any(_given(base), dtype_of(opened), trust_remote_code=trust_remote_code)
            opened.apply_(model)
        say("Writing the tuned model")
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if asking is not None:
            asking.write(staging)
        return ModelIdentity.of(model, ledger.frozen)


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
