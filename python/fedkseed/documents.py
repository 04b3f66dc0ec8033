"""Readers of JSON, JSON lines and TOML that a person or a fault may have touched: bounded, with one error.

A document is refused before it is parsed if it is too long or nested too deeply, so that the largest one
costs at most 64 MB of memory, whatever stands in it. Beyond what the formats say, duplicate keys, NaN and
infinity, numbers of more than `MAX_DIGITS` digits and texts without UTF-8 (lone surrogates) are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterator
from typing import Any, BinaryIO

#: Bytes of a JSON document. Python's objects take up to 50 times as much.
MAX_JSON_BYTES = 1 << 20
#: Bytes of one JSON line: who asks for the next one still has the value of the last one.
MAX_LINE_BYTES = MAX_JSON_BYTES // 2
#: Bytes of a TOML file: its parser takes up to 500 times as much.
MAX_TOML_BYTES = 1 << 16
#: Arrays and objects within each other.
MAX_DEPTH = 32
#: Digits of a number, its point and exponent included.
MAX_DIGITS = 100

_MAX_SHOWN = 200
_BOM = b"\xef\xbb\xbf"
#: A string (the last one may lack its end) or a bracket.
_JSON_PARTS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
#: A string, a comment, a bracket, a dot between keys, or what ends a key.
_TOML_PARTS = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5}|\\?\Z|"{1,2}\Z)'
    r"|'''(?:[^']|'(?!''))*+(?:'{3,5}|'{0,2}\Z)"
    r'|"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"?'
    r"|'[^'\n]*+'?"
    r"|\#[^\n]*+|[\[\]{}.=,\n]",
    re.DOTALL,
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class DocumentError(ValueError):
    """A document that is not of its format, too large, nested too deeply, or with values that are refused.

    Attributes:
        line: of a file of JSON lines, the one that is refused, from 1; None where it is the whole file.
    """

    line: int | None = None


def parse_json(
    data: bytes | str, where: str, *, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_DEPTH
) -> Any:
    """The value of a JSON document.

    Args:
        data: the document; text in UTF-8.
        where: what the errors call it.
        max_bytes, max_depth: the bounds.

    Raises:
        DocumentError: as the module says.
    """
    text = _decoded(data, "JSON", where, max_bytes)
    if text.count("[") + text.count("{") > max_depth:
        _check_json_depth(text, where, max_depth)
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"expected JSON in {where}, got: {shown(error)}") from error
    if _SURROGATE.search(text):
        _check_values(value, where, max_depth)
    return value


def read_json(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_DEPTH
) -> Any:
    """The value of a JSON file; as `parse_json`.

    Raises:
        DocumentError: as the module says.
        OSError: the file cannot be read.
    """
    return parse_json(_read(path, max_bytes), str(path), max_bytes=max_bytes, max_depth=max_depth)


def json_lines(
    source: str | os.PathLike[str] | BinaryIO,
    where: str | None = None,
    *,
    max_line_bytes: int = MAX_LINE_BYTES,
    max_bytes: int | None = None,
    max_depth: int = MAX_DEPTH,
) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line of a file of JSON lines that is not blank, one at a time.

    Lines end with a line feed, the last one may end with the file.

    Args:
        source: a path, or an open binary file, which is read from where it stands and left open.
        where: what the errors call it; None: the path.
        max_line_bytes, max_depth: the bounds of a line.
        max_bytes: the bound of all lines together; None: none, a caller who keeps no rows needs none.

    Raises:
        DocumentError: as the module says, with the number of the line.
        OSError: the file cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield from json_lines(
                file,
                str(source) if where is None else where,
                max_line_bytes=max_line_bytes,
                max_bytes=max_bytes,
                max_depth=max_depth,
            )
        return
    name = "the file" if where is None else where
    number = total = 0
    while line := source.readline(max_line_bytes + 1):
        number += 1
        total += len(line)
        if max_bytes is not None and total > max_bytes:
            raise DocumentError(f"expected at most {max_bytes:,} bytes in {name}, got more")
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip() and len(line) <= max_line_bytes:
            continue
        try:
            here = f"line {number} of {name}"
            value = parse_json(line, here, max_bytes=max_line_bytes, max_depth=max_depth)
        except DocumentError as error:
            error.line = number
            raise
        yield number, value


def parse_toml(data: bytes | str, where: str) -> dict[str, Any]:
    """The keys of a TOML document of at most `MAX_TOML_BYTES`.

    Args:
        data: the document; text in UTF-8.
        where: what the errors call it.

    Raises:
        DocumentError: as the module says.
    """
    text = _decoded(data, "TOML", where, MAX_TOML_BYTES)
    _check_toml_depth(text, where)
    try:
        value = tomllib.loads(text, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"expected TOML in {where}, got: {shown(error)}") from error
    _check_values(value, where, MAX_DEPTH)
    return value


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys of a TOML file; as `parse_toml`.

    Raises:
        DocumentError: as the module says.
        OSError: the file cannot be read.
    """
    return parse_toml(_read(path, MAX_TOML_BYTES), str(path))


def shown(value: Any) -> str:
    """A value of a document for a message: one line, cut off where it is long."""
    text = str(value)
    if not text.isprintable():
        text = repr(text)[1:-1]
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def finite(value: Any) -> Any:
    """The value with null in place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The file's bytes, one more than ``max_bytes`` at most: enough to be refused by."""
    with open(path, "rb") as file:
        return file.read(max_bytes + 1)


def _decoded(data: bytes | str, format: str, where: str, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise DocumentError(f"expected {format} of at most {max_bytes:,} bytes in {where}, got more")
    try:
        if isinstance(data, bytes):
            return data.removeprefix(_BOM).decode("utf-8")
        data.encode("utf-8")
    except UnicodeError as error:
        raise DocumentError(f"expected {format} in UTF-8 in {where}, got: {error}") from error
    return data


def _check_json_depth(text: str, where: str, max_depth: int) -> None:
    depth = 0
    for part in _JSON_PARTS.finditer(text):
        mark = text[part.start()]
        if mark in "[{":
            depth += 1
            _check_depth(depth, where, max_depth)
        elif mark in "]}":
            depth -= 1


def _check_toml_depth(text: str, where: str) -> None:
    """Brackets within brackets, and keys like a.b.c, which are tables within tables."""
    depth = keys = 0
    for part in _TOML_PARTS.finditer(text):
        mark = text[part.start()]
        if mark == ".":
            keys += 1
        elif mark in "[]{}=,\n":
            keys = 0
            depth += (mark in "[{") - (mark in "]}")
        _check_depth(max(depth, keys + 1), where, MAX_DEPTH)


def _check_depth(depth: int, where: str, max_depth: int) -> None:
    if depth > max_depth:
        raise DocumentError(f"expected at most {max_depth} levels within each other in {where}, got more")


def _check_values(value: Any, where: str, max_depth: int) -> None:
    """Raises for texts without UTF-8, integers of too many digits and levels beyond the bound."""
    level = [value]
    depth = 0
    while level:
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                below += entry.keys()
                below += entry.values()
            elif isinstance(entry, list):
                below += entry
            elif isinstance(entry, str):
                try:
                    entry.encode("utf-8")
                except UnicodeError as error:
                    raise DocumentError(f"expected text in {where}, got: {shown(error)}") from error
            elif isinstance(entry, int) and abs(entry) >= 10**MAX_DIGITS:
                raise DocumentError(f"expected numbers of at most {MAX_DIGITS} digits in {where}, got more")
        level = below
        depth += 1
        _check_depth(depth - 1, where, max_depth)


def _number(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text}, which is not finite")
    return number


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    return int(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text}, which is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)!r} twice")
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_number, parse_int=_integer, parse_constant=_constant
)
