"""The error of everything that is read as data, and the nearest right name that its messages propose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """A data file, or a choice of what to do with it, does not hold what it should."""


def choose_from(what: str, given: str, known: Iterable[str]) -> str:
    """The message of a name that is none of the known ones: "expected WHAT out of ..., got ...", with the
    nearest of them."""
    names = sorted(known)
    by_folded = {name.casefold(): name for name in reversed(names)}
    nearest = difflib.get_close_matches(given.casefold(), list(by_folded), n=1)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    advice = f"; the nearest is {by_folded[nearest[0]]!r}" if nearest else ""
    return f"expected {what} out of {listed or 'none'}, got {given[:80]!r}{advice}"
