"""Labels of a classification, and the words that answer them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from fedkseed.data.errors import DataError
from fedkseed.data.templates import Template

MAX_LABELS = 1000
#: What answers a classification.
WORDS, HEAD = "words", "head"


def parse_words(text: str) -> dict[str, str]:
    """Words by label of ``LABEL=WORD,LABEL=WORD``; a word is taken with its spaces.

    Raises:
        DataError: another form, or a label or word twice.
    """
    words: dict[str, str] = {}
    for part in text.split(","):
        label, equals, word = part.partition("=")
        label = label.strip()
        if not equals or not label or not word.strip():
            raise DataError(f"expected --words as LABEL=WORD,LABEL=WORD,..., got {text[:80]!r}")
        if label in words or word in words.values():
            raise DataError(f"expected each label and each word once in --words, got {part[:80]!r} again")
        words[label] = word
    return words


def words_of(labels: Collection[str]) -> dict[str, str]:
    """Words by label if none were given: the label's text after a space."""
    return {label: f" {label}" for label in labels}


def check_labels(labels: Collection[str]) -> None:
    """Checks that there is something to tell apart.

    Raises:
        DataError: fewer than two labels, or more than `MAX_LABELS`.
    """
    if len(labels) < 2:
        raise DataError(f"expected at least two labels, got {', '.join(labels)[:80] or 'none'} alone")
    if len(labels) > MAX_LABELS:
        raise DataError(
            f"expected at most {MAX_LABELS:,} labels, got {len(labels):,}; is the field of --label the right "
            "one? Instructions have --output"
        )


def check_template(template: Template, words: Mapping[str, str]) -> None:
    """Checks that the template's own text has none of the labels and words: it would speak for them.

    Raises:
        DataError: one stands in it, in whatever case.
    """
    for label, word in words.items():
        for shown in (label, word.strip()):
            if re.search(rf"(?<!\w){re.escape(shown)}(?!\w)", template.literals, re.IGNORECASE):
                raise DataError(
                    f"expected a template without labels and words in its own text, got {shown[:80]!r} in "
                    f"{template.text[:80]!r}; reword it or name other --words"
                )
