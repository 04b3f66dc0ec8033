"""The file that says how a tuned model is asked: read back as it was written, refused when it is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedkseed.data.asking import FILE, MAX_BYTES, Asking, AskingError
from fedkseed.data.templates import TEMPLATE_NAMES, Template

SENTIMENT = Asking(Template.custom("Review: {text}\nIt was"), ("bad", "good"), (" terrible", " gr\u00e9at"))


@pytest.mark.parametrize(
    "asking",
    [
        SENTIMENT,
        Asking(Template.custom("{a} {{b}} {c}"), ("x", "y", "z")),
        *map(Asking, map(Template.named, TEMPLATE_NAMES)),
    ],
    ids=lambda asking: asking.template.name,
)
def test_the_file_gives_back_what_was_written(asking: Asking, tmp_path: Path) -> None:
    assert Asking.from_json(asking.to_json()) == asking
    assert Asking.read(tmp_path) is None
    asking.write(tmp_path)
    assert (tmp_path / FILE).read_text("utf-8") == asking.to_json()
    assert Asking.read(tmp_path) == asking
    assert len(asking.digest) == 32
    assert asking.digest == Asking.from_json(asking.to_json()).digest


def test_the_digest_is_of_all_that_is_asked() -> None:
    others = [
        Asking(Template.custom("Review: {text}\nIt is"), SENTIMENT.labels, SENTIMENT.words),
        Asking(SENTIMENT.template, ("bad", "fine"), SENTIMENT.words),
        Asking(SENTIMENT.template, SENTIMENT.labels, SENTIMENT.words[::-1]),
        Asking(SENTIMENT.template, SENTIMENT.labels),
    ]
    assert len({asking.digest for asking in (SENTIMENT, *others)}) == 5
    # It stands in ledgers: the text that it is made of must not change.
    assert SENTIMENT.digest == "1b44e1d52865825f8f41b8231fe451df"


def changed(**entries: Any) -> str:
    return json.dumps({**json.loads(SENTIMENT.to_json()), **entries})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON in"),
        ("[" * 5000, "levels within each other"),
        ("null", "expected version, template, labels, words in .*, got NoneType"),
        ("{}", r"got \[\]"),
        (changed(more=1), "expected version, template, labels, words"),
        (changed(version=2), "expected version 1 of .*, got 2; install a newer release"),
        (changed(version=True), "expected version 1 of .*, got True"),
        (changed(template="chat"), "expected a template of name and text"),
        (changed(template={"name": "chat", "text": 5}), "expected a template of name and text"),
        (changed(template={"name": "chats", "text": ""}), "expected a template's name out of"),
        (changed(template={"name": "custom", "text": "no field"}), "expected a template with a placeholder"),
        (changed(template={"name": "custom", "text": "{a.b}"}), "expected the name of a field alone"),
        (changed(labels="ab"), "expected a list of labels"),
        (changed(labels=[1, 2]), "expected labels as texts, each once"),
        (changed(labels=["a", "a"]), "expected labels as texts, each once"),
        (changed(labels=[["a"], ["b"]]), "expected labels as texts, each once"),
        (changed(labels=["a"], words=["b"]), "expected at least two labels, got 'a' alone"),
        (changed(words=["b"]), "expected a word for each of 2 labels, got 1 words"),
        (changed(words=["", "b"]), "expected words as texts, each once"),
        (" " * (MAX_BYTES + 1), "at most 1,048,576 bytes"),
    ],
)
def test_another_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(AskingError, match=message) as caught:
        Asking.read(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(AskingError, match="to be readable, got: "):
        Asking.read(tmp_path)


@pytest.mark.parametrize(
    ("template", "arguments", "fields"),
    [
        ("plain", ("q",), {"instruction": "q", "input": ""}),
        ("fedkseed-ni", ("q", "c"), {"instruction": "q", "input": "c"}),
        ("chat", ("q", "", {"input": "x"}), {"instruction": "q", "input": "x"}),
        ("chat", ("q", "", {"instruction": "x"}), {"instruction": "x", "input": "q"}),
        ("{sentence}!", ("q",), {"sentence": "q"}),
        ("{before} {asked}", ("q", "c"), {"before": "c", "asked": "q"}),
        ("{asked} {context}", ("q", "c"), {"asked": "q", "context": "c"}),
        ("{a} {b} {c}", ("q", "", {"a": "1", "c": "3"}), {"a": "1", "b": "q", "c": "3"}),
    ],
)
def test_texts_find_their_fields(template: str, arguments: Any, fields: dict[str, str]) -> None:
    chosen = Template.custom(template) if "{" in template else Template.named(template)
    assert Asking(chosen).fields(*arguments) == fields


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        ("{a}", (" \n",), "expected a text to ask, got an empty one"),
        (
            "{a} {b}",
            ("q",),
            r"for each field of the template \(a, b\), got none for a; give it: --field a=TEXT",
        ),
        ("{a}", ("q", "c"), "expected a field of the template for each text, got 2 for a"),
        ("{a}", ("q", "", {"a": "x"}), "got 1 for none; leave one out"),
        ("{a} {b}", ("q", "", {"c": "x"}), "expected fields out of a, b, .* got 'c'"),
    ],
)
def test_a_question_that_does_not_fit(template: str, arguments: Any, message: str) -> None:
    with pytest.raises(AskingError, match=message):
        Asking(Template.custom(template)).fields(*arguments)
