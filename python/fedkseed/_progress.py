"""Progress bars of long work: silent unless a command asks for them, and only after two seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

AnyT = TypeVar("AnyT")
ItemT = TypeVar("ItemT", bound=Sequence[Any])

_is_shown: ContextVar[bool] = ContextVar("is_shown", default=False)

#: Seconds after which work shows a bar, and pieces that it is divided into for that.
_DELAY, _NUM_PIECES = 2.0, 64


@contextmanager
def bars() -> Iterator[None]:
    """A context in which long work shows how far it is, with rate and time left, on a terminal."""
    before = _is_shown.set(True)
    try:
        yield
    finally:
        _is_shown.reset(before)


def pieces(sizes: Sequence[int], what: str) -> Iterator[list[int]]:
    """Positions in order, in pieces of like size, with a bar beside them; all in one piece outside of `bars`.

    Args:
        sizes: the work of each position.
        what: the bar's text.
    """
    if not _is_shown.get() or not sizes:
        yield list(range(len(sizes)))
        return
    from tqdm import tqdm

    enough = max(1, sum(sizes) // _NUM_PIECES)
    with tqdm(
        total=sum(sizes), desc=what, unit="", unit_scale=True, leave=False, delay=_DELAY, disable=None
    ) as bar:
        piece: list[int] = []
        size = 0
        for position, own in enumerate(sizes):
            piece.append(position)
            size += own
            if size >= enough or position == len(sizes) - 1:
                yield piece
                bar.update(size)
                piece, size = [], 0


def counted(items: Iterable[AnyT], what: str, unit: str) -> Iterator[AnyT]:
    """Items in order, with how many there were and how fast beside them: nobody knows how many will come."""
    if not _is_shown.get():
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, desc=what, unit=unit, leave=False, delay=_DELAY, disable=None)


def each(items: Sequence[ItemT], what: str) -> Iterator[ItemT]:
    """Items in order, with a bar beside them: for each as much work as its length."""
    for piece in pieces([len(item) for item in items], what):
        yield from (items[position] for position in piece)
