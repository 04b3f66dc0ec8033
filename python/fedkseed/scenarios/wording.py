"""Counts, amounts and durations as people read them."""

from __future__ import annotations

#: Seconds of a unit, its name, and what its plural has more.
_UNITS = ((365.25 * 86400, "year", "s"), (86400.0, "day", "s"), (3600.0, "h", ""), (60.0, "min", ""))


def counted(number: int, noun: str) -> str:
    """A number and a regular noun: "1 round", "2 rounds"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def amount(number: float) -> str:
    """A number with three digits at least, none of them an exponent's from a thousandth on."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """A time in the largest unit that it fills."""
    for size, unit, plural in _UNITS:
        if seconds >= size:
            text = amount(seconds / size)
            return f"{text} {unit}" + ("" if text == "1" else plural)
    return f"{seconds:.2g} s"
