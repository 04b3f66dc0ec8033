"""How a tuned model is asked: the template, labels and words that it was tuned with, as a file beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedkseed.data.errors import DataError
from fedkseed.data.templates import CHAT, CUSTOM, INPUT, INSTRUCTION, PLAIN, Template
from fedkseed.documents import DocumentError, parse_json, shown
from fedkseed.files import FileTooLargeError, read_bounded, write_atomically

#: Its file in a model's folder, and beside the ledger in a run's.
FILE = "fedkseed.json"
#: Name of a ledger's note that holds `Asking.digest`; the text itself is too long for a note.
NOTE = "asking"
MAX_BYTES = 1 << 20
_VERSION = 1
_KEYS = ("version", "template", "labels", "words")


class AskingError(ValueError):
    """A `FILE` that is not one, or a question that does not fit the template."""


class HasChatTemplate(Protocol):
    """What `Asking.of_tokenizer` needs of a tokenizer."""

    chat_template: Any


@dataclass(frozen=True)
class Asking:
    """What makes a prompt of a question, and what the answers mean.

    Attributes:
        template: makes the prompt.
        labels: of a classification, at least two; else empty.
        words: the text that answers each label; empty with a classifier's head.

    Raises:
        AskingError: a label or a word twice, a single label, or not one word for each label.
    """

    template: Template
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("labels", "words"):
            texts = tuple(getattr(self, name))
            object.__setattr__(self, name, texts)
            if not all(isinstance(text, str) and text for text in texts) or len(set(texts)) < len(texts):
                raise AskingError(f"expected {name} as texts, each once, got {str(texts)[:80]}")
        if len(self.labels) == 1:
            raise AskingError(f"expected at least two labels, got {self.labels[0][:80]!r} alone")
        if self.words and len(self.words) != len(self.labels):
            raise AskingError(
                f"expected a word for each of {len(self.labels)} labels, got {len(self.words)} words"
            )

    @classmethod
    def of_tokenizer(cls, tokenizer: HasChatTemplate) -> Asking:
        """Instructions in the tokenizer's own chat template if it has one, else as they stand."""
        return cls(Template.named(CHAT if tokenizer.chat_template else PLAIN))

    def to_json(self) -> str:
        """The content of `FILE`."""
        content = {
            "version": _VERSION,
            "template": {"name": self.template.name, "text": self.template.text},
            "labels": self.labels,
            "words": self.words,
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = FILE) -> Asking:
        """What `to_json` made.

        Raises:
            AskingError: it is something else; ``where`` says what.
        """
        try:
            found = parse_json(text, where, max_bytes=MAX_BYTES)
        except DocumentError as error:
            raise AskingError(str(error)) from error
        if not isinstance(found, dict) or found.keys() != set(_KEYS):
            got = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise AskingError(f"expected {', '.join(_KEYS)} in {where}, got {str(got)[:80]}")
        if type(found["version"]) is not int or found["version"] != _VERSION:
            raise AskingError(
                f"expected version {_VERSION} of {where}, got {shown(found['version'])}; "
                "install a newer release"
            )
        template = found["template"]
        if not (
            isinstance(template, dict)
            and template.keys() == {"name", "text"}
            and all(isinstance(value, str) for value in template.values())
        ):
            raise AskingError(f"expected a template of name and text in {where}, got {str(template)[:80]}")
        for name in ("labels", "words"):
            if not isinstance(found[name], list):
                raise AskingError(f"expected a list of {name} in {where}, got {str(found[name])[:80]}")
        try:
            return cls(Template(**template), tuple(found["labels"]), tuple(found["words"]))
        except (DataError, AskingError, TypeError) as error:
            raise AskingError(f"{where}: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> Asking | None:
        """That of a folder; None if it has no `FILE`.

        Raises:
            AskingError: the file cannot be read or is another one.
        """
        path = folder / FILE
        try:
            return cls.from_json(read_bounded(path, MAX_BYTES), str(path))
        except FileNotFoundError:
            return None
        except (OSError, FileTooLargeError) as error:
            raise AskingError(f"expected {path} to be readable, got: {error}") from error

    def write(self, folder: Path) -> None:
        """Writes `FILE` into a folder, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        write_atomically(folder / FILE, self.to_json().encode())

    @property
    def digest(self) -> str:
        """32 hex digits of the SHA-256 of `to_json`, short enough for a ledger's note."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def fields(self, text: str, context: str = "", given: Mapping[str, str] | None = None) -> dict[str, str]:
        """The template's fields of a question.

        Of the package's templates the text is the instruction and the context the input. Of another one the
        text is its only field, or the last one, and the context the one named "context", or the first one.

        Args:
            text: the question.
            context: a text beside it; may be empty.
            given: fields by name, which are then no place for ``text`` and ``context``.

        Raises:
            AskingError: an empty question, other bytes than UTF-8, a field without a text, or a text without
                a field.
        """
        given = dict(given or {})
        names = self.template.placeholders()
        if unknown := sorted(given.keys() - set(names)):
            raise AskingError(
                f"expected fields out of {', '.join(names)}, those of the template, got {unknown[0][:80]!r}"
            )
        if not text.strip():
            raise AskingError("expected a text to ask, got an empty one")
        free = [name for name in names if name not in given]
        roles = _roles(self.template, free, bool(context))
        if roles is None:
            raise AskingError(
                f"expected a field of the template for each text, got {1 + bool(context)} for "
                f"{', '.join(free) or 'none'}; leave one out"
            )
        found = given | dict(zip(roles, (text, context), strict=False))
        if missing := [name for name in names if name not in found]:
            raise AskingError(
                f"expected a text for each field of the template ({', '.join(names)}), got none for "
                f"{missing[0]}; give it: --field {missing[0]}=TEXT"
            )
        for name, value in found.items():
            try:
                value.encode("utf-8")
            except UnicodeError as error:
                raise AskingError(f"expected text in UTF-8 for {name}, got: {error}") from error
        return {name: found[name] for name in names}


def _roles(template: Template, free: Sequence[str], has_context: bool) -> tuple[str, ...] | None:
    """The fields of the text and of the context among those that are free; None if there are too few."""
    if len(free) < 1 + has_context:
        return None
    if template.name != CUSTOM:
        return tuple(name for name in (INSTRUCTION, INPUT) if name in free)
    if not has_context:
        return (free[-1],)
    context = "context" if "context" in free else free[0]
    return (next(name for name in reversed(free) if name != context), context)
