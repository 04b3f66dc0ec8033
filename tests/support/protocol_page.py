"""Support for tests that read bytes as docs/protocol.md says."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"


def fields_of_the_page(title: str, sizes: dict[str, int]) -> list[tuple[str, str, int]]:
    """(name, struct code, offset) of each row of the page's table under a heading."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| ([^|]+) \|", section, re.MULTILINE)
    assert len(rows) > 5
    return [
        (name.strip(), code, int(eval(offset, {"__builtins__": {}}, sizes))) for offset, code, name in rows
    ]


def read_by_the_page(title: str, message: bytes, sizes: dict[str, int]) -> dict[str, Any]:
    """The fields of a message by name, each from where the page says to where the next one begins."""
    found: dict[str, Any] = {}
    names = "|".join(sizes)
    end = 0
    for name, code, offset in fields_of_the_page(title, sizes):
        whole = "<" + re.sub(rf"\b({names})\b", lambda match: str(sizes[match[1]]), code).replace(" ", "")
        assert offset == end, f"{name} begins where the field before it ends"
        value = struct.unpack_from(whole, message, offset)
        found[name] = value[0] if len(value) == 1 else value
        end = offset + struct.calcsize(whole)
    assert end == len(message)
    return found
