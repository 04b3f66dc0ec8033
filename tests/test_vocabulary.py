"""Words that docs/glossary.md retired, and phrases that are not plain English, stay out of tracked files."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".h", ".inc", ".cpp", ".cu", ".md")
# The history may say what a thing was called; this file lists the words.
APART = ("CHANGELOG.md", "tests/test_vocabulary.py")

RETIRED = re.compile(
    "|".join(
        (
            # csrc: ready terms, into, instantiate.h, octet.h, runs, RoundingBits
            r"fk_schedule|\bfused\.inc|kernels_of\.h|[pP]iece\.h|slots_per_row|row_length|RoundingNoise",
            r"gives? the folder free",  # releases the folder
            r"clock on the wall",  # wall-clock time
            r"nobody waits",  # the host does not synchronise for them
            r"by nobody",  # never read; nothing imports it
            r"what came of it",  # its outcome
            r"for want of memory",  # out of memory
            r"one amid\b",  # one in the middle
            r"\bfp(?:16|32|64)(?<=\ban fp..)(?=[.,;:)\"`])",  # an fp32 value
        )
    ),
    re.IGNORECASE | re.MULTILINE,
)
# A docstring names the thing or says what happens. In, For, On, Over and With may begin a whole sentence.
FRAGMENT = re.compile(
    r"(?:Nothing if|(?:Of|To|From|As|At|By|Back|Among|Beside|Into|Under|Within|Without)\b)", re.ASCII
)


def retired_words(text: str) -> list[str]:
    """Each retired word or phrase in a text, with its line."""
    return [f"{text.count(chr(10), 0, found.start()) + 1}: {found[0]}" for found in RETIRED.finditer(text)]


def fragments(source: str) -> Iterator[str]:
    """Each docstring of a module that begins with a preposition and no subject, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring and FRAGMENT.match(docstring):
                yield f"{node.body[0].lineno}: {docstring.splitlines()[0]}"


def tracked_files() -> list[str]:
    """Names of the text files of the repository; skips the test in a tree without git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    names = listed.stdout.decode().split("\0")
    return [
        name for name in names if name.endswith(SUFFIXES) and name not in APART and (ROOT / name).exists()
    ]


def test_no_file_has_a_retired_word() -> None:
    found = [
        f"{name}:{word}"
        for name in tracked_files()
        for word in retired_words((ROOT / name).read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


def test_every_docstring_begins_with_its_subject() -> None:
    found = [
        f"{name}:{text}"
        for name in tracked_files()
        if name.endswith(".py")
        for text in fragments((ROOT / name).read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "struct fk_schedule {",
        '#include "cuda/kernels_of.h"',
        "#include <piece.h>",
        "leaving it gives the folder free",
        "x = y  # read by nobody",
        "Nobody waits for their values.",
        "alpha is an fp32.",
        "a single one amid.",
        "(an fp64)",
    ],
)
def test_a_retired_word_is_found(text: str) -> None:
    assert len(retired_words(f"\n{text}")) == 1
    assert retired_words(f"\n{text}")[0].startswith("2: ")


def test_what_is_like_a_retired_word_is_not() -> None:
    assert not retired_words(
        "an fp32 value, an fp32\nvalue's dtype fp32. one fused pass; masterpiece; amidst"
    )


@pytest.mark.parametrize("first", ["Of the weights.", "To w.", "From a to b.", "Nothing if it is so."])
def test_a_docstring_without_a_subject_is_found(first: str) -> None:
    source = f'def one() -> None:\n    """{first}"""\n'
    assert list(fragments(source)) == [f"2: {first}"]
    assert not list(fragments(source.replace(first, f"Noun. {first}")))
    assert not list(fragments(source.replace(first, "Total of a list.")))
