"""The error of everything that is read as data, and the nearest right name that its messages propose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MAX_CHARACTERS = 900


class DataError(ValueError):
    """A data file, or a choice of what to do with it, does not hold what it should.

    The message is one line of bounded length, whatever the data that it quotes: characters that are not
    printable stand in it as escapes.
    """

    def __init__(self, message: str) -> None:
        shown = printable(message[:_MAX_CHARACTERS])
        super().__init__(shown + ("..." if len(message) > _MAX_CHARACTERS else ""))


def printable(text: str) -> str:
    """The text in one line: characters that are not printable stand in it as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def choose_from(what: str, given: str, known: Iterable[str]) -> str:
    """The message of a name that is none of the known ones: "expected WHAT out of ..., got ...", with the
    nearest of them."""
    names = sorted(known)
    by_folded = {name.casefold(): name for name in reversed(names)}
    nearest = difflib.get_close_matches(given.casefold(), list(by_folded), n=1)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    advice = f"; the nearest is {by_folded[nearest[0]]!r}" if nearest else ""
    return f"expected {what} out of {listed or 'none'}, got {given[:80]!r}{advice}"
