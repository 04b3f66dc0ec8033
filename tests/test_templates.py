"""Templates: prompts of fields, what is refused in one, and rows encoded by one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.data_samples import make_tokenizer

from fedkseed.data.errors import DataError
from fedkseed.data.federated import Row
from fedkseed.data.prompts import encode_example, encode_rows, encode_text, format_prompt
from fedkseed.data.templates import MAX_TEMPLATE_BYTES, TEMPLATE_NAMES, Template, read_template

BOTH = {"instruction": "Do it.", "input": "some {text}"}
ALONE = {"instruction": "Do it.", "input": ""}
CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
NO_CONTEXT = "Below is an instruction that describes a task. "
ALPACA = "Write a response that appropriately completes the request.\n\n"
DOLLY = "Write a response for the task request.\n\n"
WITH = "### Instruction:\nDo it.\n\n### Input:\nsome {text}\n\n### Response:"
WITHOUT = "### Instruction:\nDo it.\n\n### Response:"


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("plain", BOTH, "Do it.\nsome {text}\n"),
        ("plain", ALONE, "Do it.\n"),
        ("plain", {"instruction": "", "input": "x"}, "x\n"),
        ("alpaca", BOTH, f"{CONTEXT}{ALPACA}{WITH}\n"),
        ("alpaca", ALONE, f"{NO_CONTEXT}{ALPACA}{WITHOUT}\n"),
        ("fedkseed-ni", BOTH, f"{CONTEXT}{ALPACA}{WITH}"),
        (
            "fedkseed-ni",
            ALONE,
            f"{CONTEXT}{ALPACA}### Instruction:\nDo it.\n\n### Input:\n\n\n### Response:",
        ),
        ("fedkseed-dolly", BOTH, f"{CONTEXT}{DOLLY}{WITH}"),
        ("fedkseed-dolly", ALONE, f"{NO_CONTEXT}{DOLLY}{WITHOUT}"),
        ("chat", BOTH, "<s>system Do it.</s><s>user some {text}</s><s>assistant "),
        ("chat", ALONE, "<s>user Do it.</s><s>assistant "),
    ],
)
def test_a_template_of_the_package_makes_this_prompt(
    name: str, fields: dict[str, str], expected: str
) -> None:
    tokenizer = make_tokenizer()
    template = Template.named(name)
    assert template.prompt(tokenizer, fields) == expected
    assert template.adds_special_tokens == (name != "chat")
    assert template.placeholders() == ("instruction", "input")
    if name in ("plain", "alpaca", "chat"):
        assert format_prompt(tokenizer, fields["instruction"], fields["input"], name) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_row_without_an_input_is_one_with_an_empty_one(name: str) -> None:
    template = Template.named(name)
    alone = template.prompt(make_tokenizer(), {"instruction": "Do it."})
    assert alone == template.prompt(make_tokenizer(), ALONE)


def test_the_texts_of_the_paper_are_quoted_in_notice() -> None:
    notice = (Path(__file__).resolve().parent.parent / "NOTICE").read_text()
    assert "zhenqincn/FedKSeed" in notice
    assert "fedkseed-ni" in notice
    assert "fedkseed-dolly" in notice


def test_a_template_of_ones_own_takes_fields_by_name() -> None:
    template = Template.custom("{{{review text}}} by {author}: {review text}")
    assert template.placeholders() == ("review text", "author")
    fields = {"review text": "good {author}", "author": "me", "more": ""}
    assert template.prompt(make_tokenizer(None), fields) == "{good {author}} by me: good {author}"
    assert template.adds_special_tokens
    assert template.literals == "{ } by  :  "
    template.check_fields(fields)
    with pytest.raises(DataError, match="a placeholder out of author, review, got 'review text'; the near"):
        template.check_fields(["review", "author"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no placeholder", "expected a template with a placeholder such as {text}, got 'no placeholder'"),
        ("{{text}}", "expected a template with a placeholder"),
        ("", "expected a template with a placeholder"),
        ("{text", r"braces stand in pairs, got '{text' .*written twice: {{ or }}"),
        ("text}", "braces stand in pairs"),
        ("{text} {", "braces stand in pairs"),
        ("{a.b}", r"the name of a field alone in a placeholder, got {a.b}; attributes, indices"),
        ("{a[0]}", r"got {a\[0\]}"),
        ("{a!r}", r"got {a!r}"),
        ("{a:>9}", r"got {a:>9}"),
        ("{a:{b}}", r"got {a:{b}}"),
        ("{}", r"got {}"),
        ("{a.__class__}", r"got {a.__class__}"),
    ],
)
def test_a_text_that_is_not_a_template_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Template.custom(text)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("chat", Template.named("chat")),
        ("{text} It was", Template.custom("{text} It was")),
        (r"Review: {text}\nSentiment:", Template.custom("Review: {text}\nSentiment:")),
        ("Review: {text}\nSentiment:", Template.custom("Review: {text}\nSentiment:")),
    ],
)
def test_a_setting_names_a_template_or_writes_it_out(setting: str, expected: Template) -> None:
    assert Template.of(setting) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("alpacca", "the nearest is 'alpaca'"),
        ("text}", "braces stand in pairs"),
        ("{{text}}", "expected a template with a placeholder"),
    ],
)
def test_a_setting_that_is_no_template_is_refused(setting: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Template.of(setting)


def test_names_of_templates_are_checked() -> None:
    with pytest.raises(DataError, match="out of alpaca, .*, got 'alpacca'; the nearest is 'alpaca'"):
        Template.named("alpacca")
    with pytest.raises(DataError, match="expected a template's name out of .*, got 'mine'"):
        Template("mine", "{text}")
    with pytest.raises(DataError, match="own text of the template alpaca, got '{text}'; name it custom"):
        Template("alpaca", "{text}")
    with pytest.raises(DataError, match="a tokenizer with a chat template"):
        Template.named("chat").prompt(make_tokenizer(None), ALONE)
    with pytest.raises(DataError, match="template alpaca: expected a placeholder out of input, text"):
        Template.named("alpaca").prompt(make_tokenizer(), {"text": "x"})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"{text} It was", "{text} It was"),
        (b"{text} It was\n", "{text} It was"),
        (b"{text}\r\nIt was\n\n", "{text}\nIt was\n"),
        ("\ufeff{text} é".encode(), "{text} é"),
    ],
)
def test_a_template_file_is_its_text_without_the_last_newline(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    assert read_template(path) == Template.custom(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff{text}", "mine.txt: expected UTF-8, got other bytes at offset 0"),
        (b"{text}" + b" " * MAX_TEMPLATE_BYTES, "of at most 65536 bytes, got more"),
        (b"", "mine.txt: expected a template with a placeholder"),
        (b"{a", "mine.txt: expected a template whose braces"),
        (None, "expected a template file, got: .*mine.txt"),
    ],
)
def test_a_file_that_is_not_a_template_is_refused(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "mine.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_template(path)


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    error = DataError(f"got {'a'}\n\x1b[31m\u2028é\ud800 {'x' * 2000}")
    assert str(error).startswith("got a\\n\\x1b[31m\\u2028é\\ud800 xxx")
    assert len(str(error)) < 1000
    assert str(error).endswith("x...")


def test_a_random_text_is_a_template_or_refused() -> None:
    generator = random.Random(0)
    pieces = ["{", "}", "{{", "}}", "a", "{a}", ".", "[0]", "!r", ":>9", "\n", "\0", " ", "é"]
    taken = 0
    for _ in range(2000):
        text = "".join(generator.choices(pieces, k=generator.randrange(8)))
        try:
            template = Template.custom(text)
        except DataError:
            continue
        names = template.placeholders()
        prompt = template.prompt(make_tokenizer(), dict.fromkeys(names, "X")) if taken < 50 else "X"
        assert "X" in prompt
        taken += 1
    assert taken > 100


# Rows as tokens


def test_rows_become_tokens_and_what_was_cut_is_counted() -> None:
    tokenizer: Any = make_tokenizer()
    template = Template.custom("{text}: ")
    rows = [
        Row({"text": "short"}, "yes"),
        Row({"text": "a text that is long"}, "yes"),
        Row({"text": "x"}, "an answer that is long"),
        Row({"text": "x"}, "nine char"),
    ]
    encoded, cuts = encode_rows(tokenizer, rows, template, max_length=12)
    assert (cuts.shortened, cuts.dropped) == (2, 1)
    texts = [tokenizer.convert_ids_to_tokens(list(row.input_ids)) for row in encoded]
    assert ["".join(text) for text in texts] == ["short: yes</s>", "s long: yes</s>", ": nine char</s>"]
    assert [row.num_prompt for row in encoded] == [7, 8, 2]
    assert encode_rows(tokenizer, rows[:1], template, max_length=11) == (encoded[:1], cuts.__class__())


def test_text_and_example_are_encoded_alike() -> None:
    tokenizer = make_tokenizer()

    class Example:
        instruction, input, output = "do it", "in", "out"

    for style in ("plain", "alpaca", "chat"):
        template = Template.named(style)
        prompt = template.prompt(tokenizer, {"instruction": "do it", "input": "in"})
        encoded = encode_text(
            tokenizer, prompt, "out", adds_special_tokens=template.adds_special_tokens, max_length=1024
        )
        assert encoded == encode_example(tokenizer, Example(), style)  # type: ignore[arg-type]
        row = Row({"instruction": "do it", "input": "in"}, "out")
        assert encode_rows(tokenizer, [row], template, 1024)[0] == [encoded]
    with pytest.raises(ValueError, match=r"response of at most 2 tokens \(max_length=4\), got 3"):
        encode_text(tokenizer, "a", "out", adds_special_tokens=True, max_length=4)
