"""A ledger made ready to publish: applied once to its base, hashed, written with its card as a new folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedkseed._extras import require_extra
from fedkseed.data.asking import Asking
from fedkseed.data.built_in_models import model_source, published_as
from fedkseed.data.models import is_local, load_any_weights, revision_of
from fedkseed.files import FileTooLargeError, new_folder, read_bounded, write_atomically
from fedkseed.ledger import adapter as adapter_files
from fedkseed.ledger.adapter import add_adapter, config_digest
from fedkseed.ledger.card import CARD, card_text
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.origin import Hashes, Origin
from fedkseed.ledger.published import (
    LEDGER,
    Published,
    PublishedError,
    check_size,
    commit_of,
    dtype_of,
    file_hashes,
)
from fedkseed.ledger.signature import PrivateKey
from fedkseed.model.identity import IdentityError, ModelIdentity

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9.+-]{0,49})[\"']?[ \t]*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.MULTILINE | re.DOTALL)
_MAX_README_BYTES = 1 << 20


@dataclass(frozen=True)
class Publication:
    """What was written.

    Attributes:
        published: as it is read from the folder.
        num_bytes: of all files.
    """

    published: Published
    num_bytes: int


def write_published(
    ledger: Ledger,
    origin: Origin,
    folder: str | os.PathLike[str],
    base: str | Path,
    *,
    asking: Asking | None = None,
    adapter: Path | None = None,
    key: PrivateKey | None = None,
    trust_remote_code: bool = False,
    content: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Publication:
    """Writes a published ledger as a new folder, which appears when all of it is on the disk.

    The base is loaded and tuned, so that only a ledger that fits what its card names is published.

    Args:
        ledger: signed by ``key`` if one is given; else a signature that it has stays. That of an adapter
            gets a note of the adapter's settings, so that a signature covers them.
        origin: what it was made of; its hashes are set here. Of a base of the hub the revision becomes the
            commit that was loaded, if that is known; a licence that it lacks is looked for beside the base.
        folder: new or empty.
        base: built-in name, folder or hub id of w0 here.
        asking: how the model is asked; the ledger's note has its digest.
        adapter: of a LoRA ledger, the folder with the files of its adapter (`fedkseed.ledger.adapter`).
        trust_remote_code: whether code that lies beside the base's weights may run.
        content: of the tuned model, 64 hex digits, if it is known from the tuning: compared.
        say: told what is being done, a line each.

    Raises:
        FolderNotEmptyError: there is something at ``folder``.
        IdentityError: the base is not the one that the ledger was made from.
        PublishedError: another content, or a file of the adapter that is missing or too large.
        LedgerError, SigningKeyError, ModelError, FetchError, MissingExtraError, OSError: as `Ledger.sign` and
            `fedkseed.load`, and where the folder cannot be written.
    """
    with new_folder(folder) as staging:
        if origin.adapter is not None:
            _copy_adapter(adapter, staging, has_start=origin.adapter.seed is None)
            if key is not None or ledger.signature is None:  # else its maker's signature would be lost
                notes = {**ledger.notes, adapter_files.NOTE: config_digest(staging)}
                ledger = replace(ledger, notes=notes, signature=None)
        if key is not None:
            ledger = ledger.sign(key)
        ledger.save(staging / LEDGER)
        if asking is not None:
            asking.write(staging)
        say("Loading and verifying the base model, adding the ledger")
        source = model_source(base)
        model = load_any_weights(source, dtype_of(ledger, origin), trust_remote_code=trust_remote_code)
        origin = _completed(origin, base, source, commit_of(source))
        tuned = model if origin.adapter is None else add_adapter(model, staging, origin.adapter, ledger)
        try:
            ledger.apply_(tuned)
        except IdentityError as error:
            raise IdentityError(f"{error}; the base was loaded from {base or source}") from error
        found = ModelIdentity.of(tuned, ledger.frozen).content.hex()
        if content is not None and found != content:
            raise PublishedError(
                f"expected a tuned model of content {content[:16]}..., the one that its maker noted, got "
                f"{found[:16]}...: the ledger and what is noted of it belong to different models"
            )
        hashes = Hashes(ledger.identity.content.hex(), found, file_hashes(staging))
        origin = replace(origin, hashes=hashes)
        origin.write(staging)
        write_atomically(staging / CARD, card_text(origin, ledger).encode())
        Published.read(staging)
        num_bytes = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    return Publication(Published.read(folder), num_bytes)


def license_of(base: str | Path, source: str | Path) -> str | None:
    """The licence that a base's own card names; None if there is none to be had.

    Args:
        base: as it was named.
        source: folder or hub id that it stands for.
    """
    if Origin.of(base).source == "built-in":
        return published_as(Origin.of(base).base)[1]
    path = Path(source).expanduser() / CARD if is_local(source) else _card_of_hub(str(source))
    if path is None:
        return None
    try:
        text = read_bounded(path, _MAX_README_BYTES).decode("utf-8")
    except (OSError, FileTooLargeError, UnicodeDecodeError):
        return None
    front = _FRONT_MATTER.match(text)
    named = _LICENSE.search(front[1]) if front else None
    return named[1].lower() if named else None


def _card_of_hub(hub_id: str) -> Path | None:
    require_extra("hf", "huggingface_hub")
    import huggingface_hub

    try:
        revision, name = revision_of(hub_id), hub_id.partition("@")[0]
        return Path(huggingface_hub.hf_hub_download(name, CARD, revision=revision))
    except Exception:  # the package and its transport raise errors of many kinds; a card is not needed
        return None


def _completed(origin: Origin, base: str | Path, source: str | Path, commit: str | None) -> Origin:
    """The origin with the commit that was loaded, and with the licence of the base."""
    if origin.source == "hub" and commit is not None and not is_local(source):
        if origin.revision and _COMMIT.fullmatch(origin.revision) and origin.revision != commit:
            raise PublishedError(
                f"expected the base {origin.base} at revision {origin.revision}, got {commit}; "
                "name the revision: --base OWNER/NAME@REVISION"
            )
        origin = replace(origin, revision=commit)
    if origin.license is None:
        origin = replace(origin, license=license_of(base, source))
    return origin


def _copy_adapter(adapter: Path | None, staging: Path, *, has_start: bool) -> None:
    if adapter is None:
        raise PublishedError("expected the folder with the adapter's files of a LoRA ledger, got none")
    for name in (adapter_files.CONFIG, *((adapter_files.START,) if has_start else ())):
        check_size(adapter / name, name)
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(adapter / name, staging / name)
