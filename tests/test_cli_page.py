"""docs/cli.md is what the parser says: every command and option of it, in any terminal."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedkseed.cli import make_parser
from fedkseed.cli.page import commands, options, render

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and all below it."""
    yield parser
    for child in commands(parser).values():
        yield from parsers(child)


def sections(page: str) -> dict[str, str]:
    """What stands under each command's heading."""
    parts = re.split(r"^## (.+)$", page, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def missing(page: str) -> list[str]:
    """Commands and options of the parser that the page has not."""
    found = sections(page)
    absent = []
    for parser in parsers(make_parser()):
        text = found.get(parser.prog, "")
        names = {name for action in options(parser) for name in action.option_strings}
        absent += [f"{parser.prog} {name}" for name in sorted(names) if f"`{name}" not in text]
    return absent


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == render(make_parser()), (
        "docs/cli.md is not what the parser says: python -m fedkseed.cli.page > docs/cli.md"
    )


def test_every_option_stands_under_its_command() -> None:
    page = PAGE.read_text("utf-8")
    assert missing(page) == []
    assert sections(page).keys() == {parser.prog for parser in parsers(make_parser())}
    assert {"fedkseed ask", "fedkseed simulate"} <= sections(page).keys()
    # It can be seen to miss one: --json stands under several commands.
    head, _, tail = page.partition("## fedkseed ask")
    assert missing(head + "## fedkseed ask" + tail.replace("`--json`", "", 1)) == ["fedkseed ask --json"]


@pytest.mark.parametrize("columns", ["20", "400"])
def test_the_page_does_not_depend_on_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = render(make_parser())
    monkeypatch.setenv("COLUMNS", columns)
    assert render(make_parser()) == before


def test_every_form_of_an_argument_is_shown() -> None:
    parser = argparse.ArgumentParser(prog="x", description="Does | it.")
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="from where")
    parser.add_argument("--must", required=True, help="what it needs")
    parser.add_argument("-n", "--number", type=int, default=3, choices=(1, 3), help="how many")
    parser.add_argument("--said", default="a", help="a text (%(default)s)")
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    group = parser.add_argument_group("Own data", "Read from files.")
    group.add_argument("--pair", nargs=2, metavar=("FIRST", "SECOND"), help="two of them")
    below = parser.add_subparsers(prog="x").add_parser("y", help="the other", description="Other.")
    below.add_argument("files", nargs="*", metavar="FILE", help="files")
    page = render(parser)
    for line in (
        "Does \\| it.",
        "    x --must MUST [OPTIONS] [SOURCE] COMMAND ...",
        "    x y [FILE ...]",
        "| [`y`](#x-y) | the other |",
        "| `--must MUST` | what it needs; required |",
        "| `-n {1,3}`, `--number {1,3}` | how many (3) |",
        "| `--said SAID` | a text (a) |",
        "### Own data",
        "| `--pair FIRST SECOND` | two of them |",
        "| `FILE` | files |",
    ):
        assert line in page.splitlines()
    assert "hidden" not in page
