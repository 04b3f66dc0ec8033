"""`fedkseed data show`: what it prints, draws and refuses; the commands of docs/data.md."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from support.data_samples import make_tokenizer

from fedkseed import cli
from fedkseed.cli import data as command
from fedkseed.data.errors import DataError
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.own import DataChoice, load_division
from fedkseed.data.templates import Template
from fedkseed.scenarios import built_in

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"
PNG = b"\x89PNG\r\n\x1a\n"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    rows = [
        {"text": f"text {number}", "label": ("good", "bad")[number % 2], "who": f"w{number % 3}"}
        for number in range(60)
    ]
    return write_lines(tmp_path / "reviews.jsonl", rows)


def test_clients_rows_and_labels_are_printed(reviews: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "show", "--data", reviews, "--partition", "by:who", "--held-out", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "classification: 48 rows of 3 clients to train on, 12 held out"
    assert "  60 rows read" in lines
    assert "  labels: bad (' bad'), good (' good')" in lines
    table = lines[lines.index("") + 1 :]
    assert [line.split() for line in table[:4]] == [
        ["client", "train", "held", "out", "label"],
        *(["w" + str(number), "16", "4", "bad", "10,", "good", "10"] for number in range(3)),
    ]
    assert re.fullmatch(r"first prompt \(custom\): 'text \d+\\nLabel:'", table[-2])
    assert table[-1] in ("its answer: ' bad'", "its answer: ' good'")


def test_what_is_held_out_whole_is_said(reviews: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--template", "chat", "--held-out-clients", "who=w1", "--partition", "dirichlet:who:1:2"]
    assert cli.main(["data", "show", "--data", reviews, *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^w1 +0 +20  \(held out whole\) bad 10, good 10$", out, re.M)
    assert re.search(r"^first prompt \(chat\): instruction 'text \d+'$", out, re.M)


def test_many_clients_are_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"p {number}", "completion": "x" * 500, "who": f"w\n{number // 4:03}"}
        for number in range(400)
    ]
    assert (
        cli.main(["data", "show", "--data", write_lines(tmp_path / "a.jsonl", rows), "--partition", "by:who"])
        == 0
    )
    out = capsys.readouterr().out
    assert "\nw\\n049 " in out
    assert "\nw\\n050" not in out
    assert "\n... and 50 more; clients train on 3 to 3 rows\n" in out
    assert max(map(len, out.splitlines())) < 600


def test_many_groups_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"text": f"t {number}", "label": f"l{number % 12:02}"} for number in range(240)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    division = load_division(DataChoice(path, "iid:1"), 0)
    line = next(line for line in command.lines(division) if line.startswith("client-0"))
    assert line.endswith(", ".join(f"l{number:02} 20" for number in range(8)) + ", 4 more")
    assert command.drawn(division).startswith(PNG)


@pytest.mark.parametrize("clients", [3, 70])
def test_a_picture_is_drawn(
    tmp_path: Path, reviews: str, clients: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"p {number}", "completion": "x", "who": f"_{number % clients} $a^"}
        for number in range(280)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    target = tmp_path / "rows.png"
    arguments = ["--partition", "by:who", "--held-out-clients", "0.3", "--out", str(target)]
    assert cli.main(["data", "show", "--data", path, *arguments]) == 0
    assert target.read_bytes().startswith(PNG)
    assert f"Written: {target}" in capsys.readouterr().out


def test_a_models_tokenizer_counts_what_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One token a character."""
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "p" * number, "completion": "c" * (40 if number < 3 else 4)} for number in range(1, 21)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    arguments = ["--template", "plain", "--model", str(tmp_path / "model"), "--max-length", "20"]
    assert cli.main(["data", "show", "--data", path, *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "of at most 20 tokens each: 6 prompts lose their beginning, 2 rows are left out, since their answer "
        "alone does not fit",
        "tokens of a row: 17.5 (median), 20 at most",
    ]


def test_a_models_tokenizer_checks_the_words(
    tmp_path: Path, reviews: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    command = ["data", "show", "--data", reviews, "--model", str(tmp_path / "model")]
    assert cli.main(command) == 2
    assert "expected a word of one token for the label 'bad', got 4 for ' bad'" in capsys.readouterr().err
    assert cli.main([*command, "--words", "good=g,bad=b", "--max-length", "12"]) == 0
    assert (
        "of at most 12 tokens each: 60 prompts lose their beginning\ntokens of a row: 12 (median), 12 at "
        in (capsys.readouterr().out)
    )
    assert cli.main([*command, "--max-length", "1"]) == 2
    assert "expected --max-length of at least 2, got 1" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path)]) == 2
    assert "tokenizer" in capsys.readouterr().err


def two_shops() -> FederatedData:
    rows = tuple(Row({"text": f"text {number}"}, ("a", "b")[number % 2]) for number in range(6))
    shops = (ClientRows("one", rows[:3], rows[3:4]), ClientRows("two", rows[4:], ()))
    return FederatedData(
        "classification", shops, (), Template.custom("{text}:"), ("a", "b"), (" a", " b"), ("a note",)
    )


def test_data_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(built_in, "load_sentiment", two_shops)
    assert cli.main(["data", "show", "--data", "sentiment"]) == 0
    out = capsys.readouterr().out
    assert "\n  a note\n" in out
    assert re.search(r"^one +3 +1  a 2, b 2$", out, re.M)
    assert cli.main(["data", "show", "--data", "instructions"]) == 2
    assert "expected --data other than instructions: a model's tokens" in capsys.readouterr().err
    assert cli.main(["data", "show"]) == 2
    assert "fedkseed data: expected --data, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "template", "words"),
    [
        ([], "{text}:", (" a", " b")),
        (
            ["--template", r"R: {text}\nS:", "--words", "b= great,a= poor"],
            "R: {text}\nS:",
            (" poor", " great"),
        ),
        (["--words", "a=x,b=y"], "{text}:", ("x", "y")),
        (["--classify", "head"], "{text}", ()),
        (["--classify", "head", "--template", "{text}!"], "{text}!", ()),
    ],
)
def test_sentences_of_the_package_may_be_asked_in_another_way(
    arguments: list[str], template: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built_in, "load_sentiment", two_shops)
    given = dict(zip([flag.lstrip("-") for flag in arguments[::2]], arguments[1::2], strict=True))
    data = built_in.load_data({"data": "sentiment", **given}, 0)
    assert data == dataclasses.replace(two_shops(), template=Template.custom(template), words=words)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"words": "a= x"}, "expected --words of the labels a, b, got a"),
        ({"words": "a= x,b= y,c= z"}, "expected --words of the labels a, b, got a, b, c"),
        ({"words": "a= x,b= y", "classify": "head"}, "expected no --words with --classify head"),
        ({"template": "{review}"}, "a placeholder out of text, got 'review'"),
        ({"template": "alpaca"}, "template alpaca: expected a placeholder out of text, got 'instruction'"),
        ({"template": "A b? {text}"}, "a template without labels and words in its own text, got 'a'"),
    ],
)
def test_sentences_of_the_package_are_not_asked_so(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built_in, "load_sentiment", two_shops)
    with pytest.raises(DataError, match=message):
        built_in.load_data({"data": "sentiment", **given}, 0)


def test_every_field_of_the_choice_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", "show", "--help"])
    out = capsys.readouterr().out
    for entry in dataclasses.fields(DataChoice):
        assert f"--{entry.name.replace('_', '-')} " in out


def test_bad_data_is_one_line_and_nothing_is_written(
    tmp_path: Path, reviews: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "rows.png"
    arguments = ["data", "show", "--data", reviews, "--label", "lable", "--out", str(target)]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedkseed data: --label: expected a field out of label, text, who, got 'lable'; ")
    assert not target.exists()


def test_a_missing_matplotlib_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["data", "show", "--data", "absent.jsonl", "--out", str(tmp_path / "rows.png")]) == 2
    assert "expected the package matplotlib, " in capsys.readouterr().err


# The page


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)


def test_the_pages_commands_print_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's Python block writes the files; each console block is a command and its output."""
    monkeypatch.chdir(tmp_path)
    (program,) = blocks("python")
    exec(program, {})
    consoles = blocks("console")
    assert len(consoles) >= 3
    for console in consoles:
        line, _, expected = console.partition("\n")
        while line.endswith("\\"):
            more, _, expected = expected.partition("\n")
            line = line[:-1] + more
        words = shlex.split(line.removeprefix("$ "))
        assert words[:3] == ["fedkseed", "data", "show"], line
        status = cli.main(words[1:])
        captured = capsys.readouterr()
        assert captured.out + captured.err == expected, line
        assert status == (2 if captured.err else 0)
