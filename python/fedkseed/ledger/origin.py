"""What a ledger was made of and how: base, data, federation and hashes, as a file that lies beside it.

`FILE`, JSON in UTF-8 of at most `MAX_BYTES`, has these keys and no others:

format, version    "fedkseed-origin", 1
base               {name, source, revision, license}: `Origin.base`, `Origin.source`, and null where unknown
data               {name, digest}: "" and null where unknown
facts              {name: number or text}: `Origin.facts`
adapter            null, or {seed, base_dtype}: `AdapterStart`
hashes             null before the ledger is published, or {base, tuned, files}: `Hashes`
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedkseed.data.built_in_models import BUILT_IN_MODELS, DEFAULT_MODEL
from fedkseed.data.models import is_local
from fedkseed.documents import DocumentError, parse_json, shown
from fedkseed.files import FileTooLargeError, read_bounded, write_atomically
from fedkseed.ledger.format import LedgerError
from fedkseed.model.identity import DTYPE_CODES

#: Its file beside a ledger.
FILE = "origin.json"
MAX_BYTES = 1 << 16
#: Facts of one origin, and characters of a name or a text in it.
MAX_FACTS, MAX_CHARACTERS = 32, 200

_FORMAT, _VERSION = "fedkseed-origin", 1
_KEYS = ("format", "version", "base", "data", "facts", "adapter", "hashes")
_SOURCES = ("hub", "built-in", "folder")
_HASH = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{32,64}")
_FACT = re.compile(r"[a-z][a-z0-9_]{0,39}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,49}")
#: "name" or "owner/name", as the hub spells its ids; a name never begins with a dot.
_HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
#: A commit, a tag or a branch, refs/pr/1 for example.
_REVISION = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)*", re.ASCII)
_DATA_SET = "hub:"


class OriginError(LedgerError):
    """A `FILE` that is none, or an origin with values that no origin may have."""


@dataclass(frozen=True)
class AdapterStart:
    """Where the low-rank matrices of a LoRA ledger began.

    Attributes:
        seed: of the rule that makes them (`fedkseed.ledger.adapter_start`), in [0, 2^64); None: the numbers
            themselves are stored beside the ledger.
        base_dtype: of the base's own weights: the matrices beside them may have another one.

    Raises:
        OriginError: another seed, or a dtype that no weights have.
    """

    seed: int | None = None
    base_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.base_dtype, str) or self.base_dtype not in DTYPE_CODES.keys() - {"mixed"}:
            raise OriginError(f"expected the dtype of the base's weights, got {shown(self.base_dtype)}")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < 2**64):
            raise OriginError(f"expected a seed of the adapter in [0, 2^64), got {shown(self.seed)}")


@dataclass(frozen=True)
class Hashes:
    """What a published ledger is held to.

    Attributes:
        base: content hash of w0, 64 hex digits (`fedkseed.ModelIdentity`); of a LoRA ledger with its adapter.
        tuned: content hash of the tuned model.
        files: SHA-256 of each file beside the origin, by its name in the folder.

    Raises:
        OriginError: something else than hashes.
    """

    base: str
    tuned: str
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        if not isinstance(self.files, Mapping) or len(self.files) > MAX_FACTS:
            raise OriginError(f"expected hashes of a few files by name, got {shown(self.files)}")
        for name, value in {"base": self.base, "tuned": self.tuned, **self.files}.items():
            if not isinstance(value, str) or not _HASH.fullmatch(value):
                raise OriginError(f"expected a hash of 64 hex digits for {shown(name)}, got {shown(value)}")


@dataclass(frozen=True)
class Origin:
    """What a ledger was made of and how; names alone, never a path of the machine that made it.

    `of` makes one of what a base is loaded by; it needs no simulation.

    Attributes:
        base: hub id, built-in name, or the last part of a folder's path.
        source: which of these.
        revision: of the hub, a commit if that is known; None: unknown, or no model of the hub.
        license: of the base, an identifier as the hub writes it (apache-2.0); None: unknown.
        data: name of the data set, hub:NAME[:CONFIG]@REVISION or that of a file; "": not said.
        data_digest: hex digits that tell these rows from others; None: not said.
        facts: of the tuning, by names of [a-z0-9_]: finite numbers, or texts without a slash; at most 32.
            `fedkseed.ledger.card` has words for some names (num_rounds, num_clients, bytes_down, bytes_up,
            lr, eps, num_local_steps).
        adapter: of a LoRA ledger; None: the base's own parameters are tuned.
        hashes: None before it is published.

    Raises:
        OriginError: a value of another form; one line.
    """

    base: str
    source: Literal["hub", "built-in", "folder"] = "hub"
    revision: str | None = None
    license: str | None = None
    data: str = ""
    data_digest: str | None = None
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    adapter: AdapterStart | None = None
    hashes: Hashes | None = None

    def __post_init__(self) -> None:
        _check_base(self.base, self.source)
        if self.revision is not None and (self.source != "hub" or not _is(_REVISION, self.revision)):
            raise OriginError(
                f"expected a revision (commit or tag) of a model of the hub, got {shown(self.revision)}"
            )
        if self.license is not None and not _is(_LICENSE, self.license):
            raise OriginError(
                f"expected a licence by its identifier, such as apache-2.0, got {shown(self.license)}"
            )
        _check_data(self.data)
        if self.data_digest is not None and not _is(_DIGEST, self.data_digest):
            raise OriginError(f"expected 32 to 64 hex digits of the data, got {shown(self.data_digest)}")
        object.__setattr__(self, "facts", _checked_facts(self.facts))
        for name, kind in (("adapter", AdapterStart), ("hashes", Hashes)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise OriginError(f"expected {kind.__name__} or None as {name}, got {type(value).__name__}")

    @classmethod
    def of(cls, base: str | os.PathLike[str], revision: str | None = None, **others: Any) -> Origin:
        """The origin of a ledger whose base is loaded by this name or path; of a path the last part is kept.

        Args:
            base: folder, hub id ("owner/name" or "owner/name@revision") or built-in name; "": the built-in
                model that is taken where none is named.
            revision: of a hub id; a folder has none.
            others: the fields of this class.

        Raises:
            OriginError: as the class.
        """
        named = base if isinstance(base, str) else Path(base)
        if named == "":
            named = DEFAULT_MODEL
        if named in BUILT_IN_MODELS:
            return cls(str(named), "built-in", None, **others)
        if is_local(named):
            return cls(Path(named).expanduser().resolve().name, "folder", None, **others)
        name, at, tag = str(named).partition("@")
        return cls(name, "hub", tag if at else revision, **others)

    @property
    def loaded_by(self) -> str | None:
        """What loads the base anywhere: built-in name, or hub id with the revision; None: it was a folder."""
        if self.source == "folder":
            return None
        return f"{self.base}@{self.revision}" if self.revision else self.base

    @property
    def revision_text(self) -> str:
        """The revision of the base, in words where there is none."""
        return self.revision or ("pinned by the package" if self.source == "built-in" else "not known")

    def to_json(self) -> str:
        """The content of `FILE`."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "base": {
                "name": self.base,
                "source": self.source,
                "revision": self.revision,
                "license": self.license,
            },
            "data": {"name": self.data, "digest": self.data_digest},
            "facts": dict(self.facts),
            "adapter": None
            if self.adapter is None
            else {"seed": self.adapter.seed, "base_dtype": self.adapter.base_dtype},
            "hashes": None
            if self.hashes is None
            else {"base": self.hashes.base, "tuned": self.hashes.tuned, "files": dict(self.hashes.files)},
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = FILE) -> Origin:
        """What `to_json` made.

        Raises:
            OriginError: it is something else; ``where`` says what. One line.
        """
        try:
            found = parse_json(text, where, max_bytes=MAX_BYTES)
        except DocumentError as error:
            raise OriginError(str(error)) from error
        content = _entries(found, _KEYS, where)
        if content["format"] != _FORMAT:
            raise OriginError(f"expected {_FORMAT} in {where}, got {shown(content['format'])}")
        if type(content["version"]) is not int or content["version"] != _VERSION:
            raise OriginError(
                f"expected version {_VERSION} of {where}, got {shown(content['version'])}; "
                "install a newer release"
            )
        base = _entries(content["base"], ("name", "source", "revision", "license"), f"base of {where}")
        data = _entries(content["data"], ("name", "digest"), f"data of {where}")
        adapter, hashes = content["adapter"], content["hashes"]
        try:
            return cls(
                base["name"],
                base["source"],
                base["revision"],
                base["license"],
                data["name"],
                data["digest"],
                content["facts"],
                None
                if adapter is None
                else AdapterStart(**_entries(adapter, ("seed", "base_dtype"), f"adapter of {where}")),
                None
                if hashes is None
                else Hashes(**_entries(hashes, ("base", "tuned", "files"), f"hashes of {where}")),
            )
        except OriginError as error:
            raise OriginError(f"{where}: {error}") from error

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Origin:
        """That of a folder.

        Raises:
            OriginError: the file is not there, cannot be read, is too large or another one.
        """
        path = Path(folder) / FILE
        try:
            data = read_bounded(path, MAX_BYTES)
        except (OSError, FileTooLargeError) as error:
            raise OriginError(f"expected what a ledger was made of in {path}, got: {error}") from error
        return cls.from_json(data, str(path))

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes `FILE` into a folder, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        write_atomically(Path(folder) / FILE, self.to_json().encode())

    @property
    def sha256(self) -> str:
        """SHA-256 of `FILE`, 64 hex digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _is(pattern: re.Pattern[str], value: object) -> bool:
    """Whether it is a text of this form, of no unusual length, that leads to no folder above."""
    return (
        isinstance(value, str)
        and len(value) <= MAX_CHARACTERS
        and pattern.fullmatch(value) is not None
        and ".." not in value
    )


def _check_base(base: object, source: object) -> None:
    if source not in _SOURCES:
        raise OriginError(f"expected the base's source as {', '.join(_SOURCES)}, got {shown(source)}")
    if source == "built-in" and base not in BUILT_IN_MODELS:
        raise OriginError(
            f"expected a built-in base out of {', '.join(BUILT_IN_MODELS)}, got {shown(base)}; "
            "install a newer release"
        )
    if source == "hub" and not _is(_HUB_ID, base):
        raise OriginError(f"expected the base's hub id as owner/name, got {shown(base)}")
    if source == "folder" and not _is_name(base):
        raise OriginError(f"expected the name of the base's folder without a path, got {shown(base)}")


def _check_data(data: object) -> None:
    name = data.removeprefix(_DATA_SET) if isinstance(data, str) else None
    # A data set of the hub is owner/name; a file is its name alone.
    if data == "" or (data != name and _is_name(str(name).replace("/", "", 1))) or _is_name(name):
        return
    raise OriginError(f"expected the name of the data without a path, got {shown(data)}")


def _is_name(value: object) -> bool:
    """Whether it is the name of a file or folder: one line, no path, none that is hidden."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_CHARACTERS
        and value.isprintable()
        and not any(mark in value for mark in "/\\")
        and not value.startswith(".")
    )


def _checked_facts(facts: object) -> dict[str, int | float | str]:
    if not isinstance(facts, Mapping) or len(facts) > MAX_FACTS:
        raise OriginError(f"expected at most {MAX_FACTS} facts by name, got {shown(facts)}")
    for name, value in facts.items():
        if not isinstance(name, str) or not _FACT.fullmatch(name):
            raise OriginError(f"expected names of facts of [a-z0-9_], got {shown(name)}")
        is_number = type(value) is int or (type(value) is float and math.isfinite(value))
        if not is_number and not _is_name(value):
            raise OriginError(
                f"expected a finite number or a text of one line without a slash for {name}, "
                f"got {shown(value)}"
            )
    return dict(facts)


def _entries(found: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(found, dict) or found.keys() != set(names):
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise OriginError(f"expected {', '.join(names)} in {where}, got {shown(got)}")
    return found
