"""JSON, JSON lines and TOML: what is refused, with one error and one line."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path

import pytest

from fedkseed.documents import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    MAX_LINE_BYTES,
    MAX_TOML_BYTES,
    DocumentError,
    json_lines,
    parse_json,
    parse_toml,
    read_json,
    read_toml,
)

GOOD_JSON = [
    '{"a": [1, -2.5, 1e3, true, null, "\\ud83d\\ude00 \\u00e9 ü"], "b": {"c": {}}}',
    '"[[[[ {{{{ \\" ]"',
    "  7 ",
    "[" * MAX_DEPTH + "]" * MAX_DEPTH,
    "[" + ",".join(["[[]]"] * 1000) + "]",
    '["' + "[" * 1000 + '\\\\", "' + "\\n" * 1000 + '"]',
    "1" * 100,
]
BAD_JSON = {
    "": "Expecting value",
    "[1,": "Expecting value",
    "{'a': 1}": "property name",
    "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1): "levels",
    "[" * 100_000: "levels",
    '{"":' * 100_000: "levels",
    '"' + '\\"' * 100_000: "Unterminated",
    "[NaN]": "NaN",
    "[Infinity]": "Infinity",
    "[-Infinity]": "-Infinity",
    "1e999": "finite",
    "1" * 5000: "digits",
    "0." + "1" * 5000: "digits",
    '{"a": 1, "b": 2, "a": 3}': "'a' twice",
    '["\\ud800"]': "surrogates",
    '{"\\udfff": 1}': "surrogates",
    "\ud800": "surrogates",
    "[1] [2]": "Extra data",
}
GOOD_TOML = [
    "a = 1\nb.c.d = 2.5\n[t.u]\ne = [[1], [2.5, 3.5]]\nf = {g = 'x', h = {}}\n[[v]]\n[[v]]\n",
    'a = """\n[[[[[ "" \\""" \'\'\' """\nb = \'\'\'\n]]]] """ \'\' \'\'\'\n# [[[[[ "\nc = \'"[\'\nd = "\'{"',
    "a = \"\"\"x\"\"\"\"\"\nb = '''x'''''\nc = []",
    'a = "' + "." * 1000 + '" # ' + "." * 1000,
    "a = [" + "1.5, " * 1000 + "]",
    "d = 1979-05-27T07:32:00Z",
    "\n".join(f"[{name}]" for name in range(1000)),
]
BAD_TOML = {
    "a = ": "Invalid value",
    "a = 1\na = 2": "overwrite",
    "a = " + "[" * 1000 + "]" * 1000: "levels",
    "a = " + "{a=" * 1000: "levels",
    "a." * 30_000 + "a = 1": "levels",
    "[" + "a." * 100 + "a]": "levels",
    'a = """"""' + "[" * 1000: "levels",
    'a = """x""" # """\nb = ' + "[" * 1000: "levels",
    "a = nan": "finite",
    "a = -inf": "finite",
    "a = 1e999": "finite",
    "a = 0x" + "f" * 5000: "digits",
    "a = " + "1" * 5000: "digits",
    'a = "\\ud800"': "scalar",
    "a = 2001-02-30": "date",
}


@pytest.mark.parametrize("text", GOOD_JSON)
def test_json_within_the_bounds_is_what_json_says(text: str) -> None:
    assert parse_json(text, "here") == json.loads(text)
    assert parse_json(b"\xef\xbb\xbf" + text.encode(), "here") == json.loads(text)


@pytest.mark.parametrize(("text", "reason"), BAD_JSON.items(), ids=range(len(BAD_JSON)))
def test_other_json_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason) as caught:
        parse_json(text, "here")
    message = str(caught.value)
    assert message.startswith("expected ")
    assert "here" in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("text", GOOD_TOML)
def test_toml_within_the_bounds_is_what_tomllib_says(text: str) -> None:
    assert parse_toml(text, "here") == tomllib.loads(text)


@pytest.mark.parametrize(("text", "reason"), BAD_TOML.items(), ids=range(len(BAD_TOML)))
def test_other_toml_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason) as caught:
        parse_toml(text, "here")
    message = str(caught.value)
    assert message.startswith("expected ")
    assert "here" in message
    assert len(message) < 400


def test_files_have_a_bound_and_are_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for reader, size, empty in ((read_json, MAX_JSON_BYTES, b"{}"), (read_toml, MAX_TOML_BYTES, b"")):
        path.write_bytes(empty.ljust(size))
        assert reader(path) == {}
        path.write_bytes(empty.ljust(size + 1))
        with pytest.raises(DocumentError, match=f"at most {size:,} bytes"):
            reader(path)
        path.write_bytes(b'"\xff"')
        with pytest.raises(DocumentError, match="UTF-8"):
            reader(path)
        with pytest.raises(FileNotFoundError):
            reader(tmp_path / "nowhere")


def test_json_lines_come_one_at_a_time_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\n  \n"\u2028"\n[2]'.encode())
    assert list(json_lines(path)) == [(1, {"a": 1}), (4, "\u2028"), (5, [2])]
    file = io.BytesIO(b"1\n2\n[\n3\n")
    lines = json_lines(file, "member")
    assert [next(lines), next(lines)] == [(1, 1), (2, 2)]
    with pytest.raises(DocumentError, match="line 3 of member") as caught:
        next(lines)
    assert caught.value.line == 3
    assert not file.closed


def test_a_line_and_all_lines_have_bounds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[]\n" + b" " * MAX_LINE_BYTES + b"\n")
    with pytest.raises(DocumentError, match=f"at most {MAX_LINE_BYTES:,} bytes in line 2 of"):
        list(json_lines(path))
    path.write_bytes(b"[]\n" * 100)
    assert len(list(json_lines(path, max_bytes=300))) == 100
    with pytest.raises(DocumentError, match="at most 299 bytes"):
        list(json_lines(path, max_bytes=299))
    with pytest.raises(DocumentError, match="at most 1 levels"):
        list(json_lines(io.BytesIO(b"[[]]"), max_depth=1))
