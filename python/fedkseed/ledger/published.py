"""A published ledger: a folder with the ledger, what it was made of and a card, nothing of the weights.

README.md                            the card (`fedkseed.ledger.card`)
origin.json                          `fedkseed.ledger.origin.Origin`, with the hashes of all but the card
ledger.safetensors                   `fedkseed.ledger.Ledger`
fedkseed.json                        how the model is asked (`fedkseed.data.asking`), if that is known
adapter/adapter_config.json          of a LoRA ledger (`fedkseed.ledger.adapter`)
adapter/adapter_start.safetensors    of a LoRA ledger whose start no seed makes
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedkseed._extras import require_extra
from fedkseed.data import asking as asking_file
from fedkseed.data.asking import NOTE, Asking
from fedkseed.data.built_in_models import model_source
from fedkseed.data.models import is_local, load_any, load_any_weights, revision_of
from fedkseed.files import FileTooLargeError, read_bounded
from fedkseed.ledger import adapter as adapter_files
from fedkseed.ledger.adapter import add_adapter, config_digest, has_adapter
from fedkseed.ledger.card import CARD, MAX_CARD_BYTES, check_card
from fedkseed.ledger.format import MAX_BYTES, LedgerError
from fedkseed.ledger.ledger import Ledger
from fedkseed.ledger.origin import FILE, Hashes, Origin
from fedkseed.ledger.origin import MAX_BYTES as MAX_ORIGIN_BYTES
from fedkseed.ledger.signature import PublicKey
from fedkseed.model.identity import IdentityError, ModelIdentity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEDGER = "ledger.safetensors"
#: Every file that such a folder may have, and bytes that are read of it.
FILES: Mapping[str, int] = {
    CARD: MAX_CARD_BYTES,
    FILE: MAX_ORIGIN_BYTES,
    LEDGER: MAX_BYTES,
    asking_file.FILE: asking_file.MAX_BYTES,
    adapter_files.CONFIG: adapter_files.MAX_CONFIG_BYTES,
    adapter_files.START: 1 << 30,
}
_PIECE = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")


class PublishedError(LedgerError):
    """A published ledger that cannot be had, or whose files do not belong together."""


@dataclass(frozen=True)
class Published:
    """A published ledger whose files belong together; its base has not been looked at.

    Attributes:
        folder: of it.
        name: what errors call it: the folder, or its hub id.
        ledger, origin: of the folder.
        asking: how the model is asked; None if that is not known.
    """

    folder: Path
    name: str
    ledger: Ledger
    origin: Origin
    asking: Asking | None

    @classmethod
    def read(
        cls, folder: str | os.PathLike[str], public_key: PublicKey | None = None, name: str = ""
    ) -> Published:
        """That of a folder; every hash but those of base and tuned model is compared.

        Args:
            public_key: if given, the ledger has to be signed by this key.
            name: what errors call it; "": the folder.

        Raises:
            PublishedError: no card, a file that is missing, too large or changed; one line.
            OriginError, LedgerError, AskingError: a damaged file.
            SigningKeyError, MissingExtraError: as `Ledger.load`.
        """
        folder = Path(folder)
        name = name or str(folder)
        missing = [entry for entry in (CARD, FILE, LEDGER) if not (folder / entry).is_file()]
        if missing:
            raise PublishedError(
                f"expected a published ledger ({CARD}, {FILE}, {LEDGER}) at {name}, got a folder without "
                f"{missing[0]}; fedkseed publish RUN DIR makes one"
            )
        origin = Origin.read(folder)
        if origin.hashes is None:
            raise PublishedError(
                f"expected hashes in {FILE} of {name}, got none: the ledger has not been published yet; "
                "fedkseed publish DIR NEW_DIR does it"
            )
        if _sha256(folder / FILE, FILES[FILE]) != origin.sha256:
            raise PublishedError(f"expected {FILE} of {name} as publish writes it, got it changed")
        check_card(_text(folder / CARD), origin, f"the card of {name}")
        check_files(folder, origin, name)
        ledger = Ledger.load(folder / LEDGER, public_key=public_key)
        if ledger.identity.content.hex() != origin.hashes.base:
            raise PublishedError(
                f"expected the base's content {origin.hashes.base[:16]}... in the ledger of {name}, as its "
                f"card says, got {ledger.identity.content.hex()[:16]}...; fetch the folder again"
            )
        noted = ledger.notes.get(adapter_files.NOTE)
        if noted is not None and (origin.adapter is None or config_digest(folder) != noted):
            raise PublishedError(
                f"expected {adapter_files.CONFIG} of {name} with digest {noted}, as the ledger says, got "
                "another; fetch the folder again"
            )
        return cls(folder, name, ledger, origin, _asking(folder, ledger, name))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base is loaded in.

        Raises:
            LedgerError: its weights have several.
        """
        return dtype_of(self.ledger, self.origin)

    def base(self, given: str | Path | None = None) -> str | Path:
        """Folder or hub id of the base: the one given, else the one that the card names, revision and all.

        Raises:
            PublishedError: none is given, and the card names a folder of its maker's.
            FetchError, ModelError, MissingExtraError: a built-in model cannot be had.
        """
        named = given or self.origin.loaded_by
        if named is None:
            raise PublishedError(
                f"expected the base of {self.name} to be given (base=, --base), got none: its card names a "
                f"folder called {self.origin.base}, of weights with content {self.hashes.base[:16]}..."
            )
        return model_source(named)

    def load(self, base: str | Path | None = None, *, trust_remote_code: bool = False) -> nn.Module:
        """The tuned model of a base that is loaded; as `fedkseed.load`."""
        source = self.base(base)
        model = load_any_weights(source, self.dtype, trust_remote_code=trust_remote_code)
        return self.tuned(model, source)

    def load_with_tokenizer(
        self, base: str | Path | None = None, *, trust_remote_code: bool = False
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The tuned model and the base's tokenizer; of a LoRA ledger the model is a PeftModel."""
        source = self.base(base)
        model, tokenizer = load_any(source, self.dtype, trust_remote_code=trust_remote_code)
        return self.tuned(model, source), tokenizer  # type: ignore[return-value]

    def tuned(self, base: nn.Module, source: str | Path = "") -> nn.Module:
        """The tuned model, made of a model that holds the base's weights, in place.

        Args:
            base: the model.
            source: folder or hub id that it was loaded from; "": not known.

        Mutates: ``base``; it is unchanged if it is refused, but for an adapter that was added.

        Raises:
            IdentityError: another base; says which one the card names.
            PublishedError: the tuned model is not the one that the card names: its maker's hash is of
                another one.
            OriginError, MissingExtraError: as `add_adapter`.
        """
        origin, ledger = self.origin, self.ledger
        try:
            model = base
            if origin.adapter is not None and not has_adapter(base):
                model = add_adapter(base, self.folder, origin.adapter, ledger)
            ledger.apply_(model)
        except IdentityError as error:
            raise IdentityError(f"{error}; {self._about_base(source)}") from error
        found = ModelIdentity.of(model, ledger.frozen).content.hex()
        if found != self.hashes.tuned:
            raise PublishedError(
                f"expected a tuned model of content {self.hashes.tuned[:16]}..., as the card of {self.name} "
                f"says, got {found[:16]}...: the card is of another ledger; tell its maker"
            )
        return model

    @property
    def hashes(self) -> Hashes:
        """What the folder, the base and the tuned model are held to."""
        assert self.origin.hashes is not None  # `read` has seen them
        return self.origin.hashes

    def _about_base(self, source: str | Path) -> str:
        """Which base the card names, and which revision was loaded if that is known."""
        named = f"the card of {self.name} names the base {self.origin.base}"
        if self.origin.source == "hub":
            named += f" at revision {self.origin.revision or 'not known'}"
        loaded = commit_of(source)
        return f"{named}, loaded was revision {loaded}" if loaded else named


def check_files(folder: Path, origin: Origin, name: str) -> None:
    """Raises unless the files of a folder are those that the origin has hashes of, all of them.

    Raises:
        PublishedError: a file is missing, one too many, too large, or another; names it.
    """
    hashes = {} if origin.hashes is None else origin.hashes.files
    present = {entry for entry in FILES if (folder / entry).exists()} - {CARD, FILE}
    for entry in sorted(present | hashes.keys()):
        found = _sha256(folder / entry, FILES[entry]) if entry in present else "no such file"
        wanted = hashes.get(entry, "no such file")
        if found != wanted:
            raise PublishedError(
                f"expected {entry[:80]!r} of {name} with SHA-256 {wanted[:16]}, as its card says, got "
                f"{found[:16]}: the file was changed, or left out; fetch the folder again"
            )
    if (origin.adapter is not None) != (adapter_files.CONFIG in hashes):
        raise PublishedError(f"expected {adapter_files.CONFIG} in {name} just where {FILE} has an adapter")


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a folder that an origin has hashes of, by name.

    Raises:
        PublishedError: one is too large.
    """
    return {
        entry: _sha256(folder / entry, limit)
        for entry, limit in FILES.items()
        if entry not in (CARD, FILE) and (folder / entry).exists()
    }


def check_size(path: Path, entry: str) -> None:
    """Raises unless a file is there and no larger than a published one of that name may be.

    Raises:
        PublishedError: as said; names it.
    """
    if not path.is_file() or path.stat().st_size > FILES[entry]:
        found = f"{path.stat().st_size:,}" if path.is_file() else "no such file"
        raise PublishedError(f"expected {path} of at most {FILES[entry]:,} bytes, got {found}")


def dtype_of(ledger: Ledger, origin: Origin | None = None) -> torch.dtype:
    """The dtype of the weights that a ledger was made from; of a LoRA ledger, of those beside the matrices.

    Raises:
        LedgerError: they have several.
    """
    name = ledger.identity.dtype if origin is None or origin.adapter is None else origin.adapter.base_dtype
    if name == "mixed":
        raise LedgerError(
            "expected a ledger of weights in one dtype to load a base for, got mixed; "
            "load the base yourself and pass the model"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def commit_of(source: str | Path) -> str | None:
    """The commit of the hub that a model was loaded from, as the hub's cache has it; None if it has none.

    Args:
        source: hub id, with a revision or not; of a folder there is no commit.
    """
    if source == "" or is_local(source):
        return None
    require_extra("hf", "huggingface_hub")
    import huggingface_hub

    name = str(source).partition("@")[0]
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision_of(source))
    found = Path(cached).parent.name if isinstance(cached, str) else ""
    return found if _COMMIT.fullmatch(found) else None


def _asking(folder: Path, ledger: Ledger, name: str) -> Asking | None:
    asking, noted = Asking.read(folder), ledger.notes.get(NOTE)
    if asking is not None and asking.digest != noted:
        raise PublishedError(
            f"expected {asking_file.FILE} of {name} with digest {noted}, the one that the ledger was tuned "
            f"with, got {asking.digest}"
        )
    return asking


def _text(path: Path) -> str:
    try:
        return read_bounded(path, FILES[CARD]).decode("utf-8")
    except (OSError, FileTooLargeError, UnicodeDecodeError) as error:
        raise PublishedError(f"expected a card in {path}, got: {error}") from error


def _sha256(path: Path, limit: int) -> str:
    if not path.is_file():
        raise PublishedError(f"expected a file, got {path}, which is none")
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                size += len(piece)
                if size > limit:
                    raise PublishedError(f"expected at most {limit:,} bytes in {path}, got more")
                digest.update(piece)
    except OSError as error:
        raise PublishedError(f"expected a file that can be read, got {path}: {error}") from error
    return digest.hexdigest()
