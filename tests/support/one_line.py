"""Errors that a user reads on one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def raised_line(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> str:
    """What the error says that the call raises; fails unless it is one line of a length to read."""
    with pytest.raises(error) as raised:
        call()
    text = str(raised.value)
    assert text
    assert text.isprintable()
    assert len(text) < 900
    return text
