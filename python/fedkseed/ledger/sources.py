"""What a ledger is opened from: a file, a published folder, or a repository of the hub that holds one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fedkseed._extras import require_extra
from fedkseed.data.models import is_local
from fedkseed.documents import shown
from fedkseed.ledger.card import CARD
from fedkseed.ledger.ledger import Ledger, open_ledger
from fedkseed.ledger.published import FILES, LEDGER, Published, PublishedError
from fedkseed.ledger.signature import PublicKey

#: "owner/name" or "owner/name@revision": ledgers have owners, and a file called so is looked for first.
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}(?:@[\w./-]{1,100})?", re.ASCII)
#: Ends of names that are files', not repositories'.
_SUFFIXES = (".safetensors", ".ledger")


def open_source(
    source: Ledger | str | os.PathLike[str], public_key: PublicKey | None = None
) -> Ledger | Published:
    """A ledger, or a published one with its card.

    The file of a published folder stands for the folder, so that its base is known.

    Args:
        source: a ledger, the file of one, a published folder, or a hub id, "owner/name" or
            "owner/name@revision", which is fetched into the cache of `huggingface_hub`.
        public_key: if given, the ledger has to be signed by this key.

    Raises:
        LedgerError, SigningKeyError, OSError: as `Ledger.load` and `Published.read`.
        PublishedError: a hub id that cannot be reached.
        MissingExtraError: a package of an extra is not installed.
    """
    if isinstance(source, Ledger):
        return open_ledger(source, public_key)
    path = Path(source).expanduser()
    if path.is_dir():
        return Published.read(path, public_key)
    if path.name == LEDGER and (path.parent / CARD).is_file():
        return Published.read(path.parent, public_key)
    if is_hub_id(source):
        return Published.read(fetch_published(str(source)), public_key, str(source))
    return Ledger.load(path, public_key=public_key)


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether a repository of the hub is meant: a text of that form, with no file or folder of that name."""
    return (
        isinstance(source, str)
        and _HUB_ID.fullmatch(source) is not None
        and not is_local(source)
        and not source.endswith(_SUFFIXES)
    )


def fetch_published(hub_id: str) -> Path:
    """The folder, in the cache of `huggingface_hub`, with the files of a published ledger of the hub.

    Nothing else of the repository is fetched, and nothing at all if one of these files is too large for one.
    Without a network the cache is asked.

    Raises:
        PublishedError: it cannot be had; says what was tried. One line.
        MissingExtraError: huggingface_hub is not installed.
    """
    require_extra("hf", "huggingface_hub")
    import huggingface_hub
    from huggingface_hub.errors import DryRunError

    name, _, revision = hub_id.partition("@")
    wanted: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(FILES)}
    try:
        try:
            planned: Any = huggingface_hub.snapshot_download(name, dry_run=True, **wanted)
        except DryRunError:  # no network: what is in the cache is there
            planned = []
        for file in planned:
            if (file.file_size or 0) > (limit := FILES[file.filename]):
                raise PublishedError(
                    f"expected at most {limit:,} bytes of {file.filename} in {hub_id}, got "
                    f"{file.file_size:,}; nothing was fetched"
                )
            wanted["revision"] = file.commit_hash  # what is fetched is what was looked at
        return Path(huggingface_hub.snapshot_download(name, **wanted))
    except PublishedError:
        raise
    except Exception as error:  # the package and its transport raise errors of many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PublishedError(
            f"expected a ledger's file, a published folder or a hub id that can be reached, got {hub_id}: no "
            f"file or folder here has that name, and the hub says: {shown(first)}; look at the name, at the "
            "network or, of a private one, at your login"
        ) from error
