"""What docstrings say of a class's fields, so that a field's help text stands once."""

from __future__ import annotations

import inspect
import re

_HEADING = "Attributes:"
_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>\S.*)")


def attributes_of(cls: type) -> dict[str, str]:
    """Each attribute that the docstring's "Attributes:" section names, with its text in one line.

    Those of base classes come first; a class's own text of a field replaces its base's. An entry may name
    several fields (``low, high: bounds of the range``).
    """
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        found.update(_section(owner.__dict__.get("__doc__") or ""))
    return found


def _section(docstring: str) -> dict[str, str]:
    lines = inspect.cleandoc(docstring).splitlines()
    if _HEADING not in lines:
        return {}
    texts: dict[str, list[str]] = {}
    names: list[str] = []
    for line in lines[lines.index(_HEADING) + 1 :]:
        if line and not line.startswith(" "):
            break  # the next section
        entry = _ENTRY.fullmatch(line[4:]) if line[:4] == " " * 4 and line[4:5] != " " else None
        if entry is not None:
            names = entry["names"].split(", ")
            texts.update({name: [entry["text"]] for name in names})
        elif line.strip():
            for name in names:
                texts[name].append(line.strip())
    return {name: " ".join(parts) for name, parts in texts.items()}
