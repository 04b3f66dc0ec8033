"""A user's own data as a federation: fields, templates, labels, what is held out and what is refused."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedkseed._documented import attributes_of
from fedkseed.data.errors import DataError
from fedkseed.data.federated import FederatedData, Row
from fedkseed.data.own import DataChoice, load_division, load_own

CATEGORIES = ("open_qa", "closed_qa", "summarization")


def dolly(number: int) -> dict[str, Any]:
    return {
        "instruction": f"Question {number}?",
        "context": f"Context {number}." if number % 2 else "",
        "response": f"Answer {number}.",
        "category": CATEGORIES[number % 3],
    }


def review(number: int) -> dict[str, Any]:
    return {
        "text": f"Sentence {number}, so",
        "label": ("good", "bad")[number % 2],
        "source": "abc"[number % 3],
    }


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture
def dollies(tmp_path: Path) -> str:
    return write_lines(tmp_path / "dolly.jsonl", [dolly(number) for number in range(90)])


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    return write_csv(tmp_path / "reviews.csv", [review(number) for number in range(60)])


def sizes(data: FederatedData) -> list[tuple[str, int, int]]:
    return [
        (client.name, len(client.train), len(client.held_out)) for client in (*data.clients, *data.unseen)
    ]


def sides(data: FederatedData) -> tuple[list[Row], list[Row]]:
    """Rows that are trained on, and rows that are not."""
    held_out = [row for client in (*data.clients, *data.unseen) for row in client.held_out]
    return [row for client in data.clients for row in client.train], held_out


# What is guessed


def test_a_file_of_dollys_schema_needs_no_flags(dollies: str) -> None:
    data = load_own(DataChoice(dollies), 0)
    assert data.kind == "instructions"
    assert sizes(data) == [("closed_qa", 27, 3), ("open_qa", 27, 3), ("summarization", 27, 3)]
    assert data.template.name == "fedkseed-dolly"
    assert data.labels == data.words == ()
    assert data.notes == (
        "fields, guessed (Dolly): input instruction, context context, output response",
        "template, none was named: fedkseed-dolly",
        "partition, none was named: by:category",
        "90 rows read",
    )
    row = data.clients[0].train[0]
    number = row.response.removeprefix("Answer ")[:-1]
    assert row.fields == {
        "instruction": f"Question {number}?",
        "input": f"Context {number}." if int(number) % 2 else "",
    }


def test_a_csv_of_labelled_sentences_needs_no_flags(reviews: str) -> None:
    data = load_own(DataChoice(reviews), 0)
    assert data.kind == "classification"
    assert (data.labels, data.words) == (("bad", "good"), (" bad", " good"))
    assert data.template.text == "{text}\nLabel:"
    assert len(data.clients) == 8
    assert "partition, none was named: iid:8" in data.notes
    train, held_out = sides(data)
    assert len(train) + len(held_out) == 60
    assert all(set(row.fields) == {"text"} and row.response in data.labels for row in train)
    head = load_own(DataChoice(reviews, classify="head"), 0)
    assert (head.labels, head.words, head.template.text) == (("bad", "good"), (), "{text}")


@pytest.mark.parametrize(
    ("names", "kind", "template"),
    [
        (("instruction", "input", "output"), "instructions", "alpaca"),
        (("instruction", "context", "response"), "instructions", "fedkseed-dolly"),
        (("prompt", "completion"), "instructions", "alpaca"),
        (("sentence", "label"), "classification", "custom"),
        (("label", "text"), "classification", "custom"),
    ],
)
def test_known_schemas(tmp_path: Path, names: tuple[str, ...], kind: str, template: str) -> None:
    rows = [
        {name: f"{name} {number % 2 if name == 'label' else number}" for name in names}
        for number in range(20)
    ]
    data = load_own(DataChoice(write_lines(tmp_path / "a.jsonl", rows), template="plain"), 0)
    assert data.kind == kind
    assert data.template.name == "plain"
    assert load_own(DataChoice(str(tmp_path / "a.jsonl"), words=""), 0).template.name == template


# What is named


def test_named_fields_are_taken(tmp_path: Path) -> None:
    rows = [{"q": f"q {n}", "a": f"a {n}", "side": f"s {n}", "who": n % 4} for n in range(40)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = load_own(
        DataChoice(path, "by:who", input="q", context="side", output="a", template="alpaca", held_out=0.5), 0
    )
    assert sizes(data) == [("0", 5, 5), ("1", 5, 5), ("2", 5, 5), ("3", 5, 5)]
    row = data.clients[0].train[0]
    number = row.response[2:]
    assert row.fields == {"instruction": f"q {number}", "input": f"s {number}"}
    assert not any("guessed" in note or "none was named" in note for note in data.notes)
    alone = load_own(DataChoice(path, "by:who", input="q", output="a"), 0)
    assert set(alone.clients[0].train[0].fields) == {"instruction"}


def test_a_template_file_names_the_fields(tmp_path: Path, dollies: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("{context} -> {instruction} =\n")
    data = load_own(DataChoice(dollies, template_file=str(file)), 0)
    assert data.template.text == "{context} -> {instruction} ="
    assert set(data.clients[0].train[0].fields) == {"context", "instruction"}
    labelled = load_own(DataChoice(dollies, template_file=str(file), label="category"), 0)
    assert labelled.labels == tuple(sorted(CATEGORIES))
    file.write_text("{contxt}")
    with pytest.raises(
        DataError, match="template custom: expected a placeholder out of .*the nearest is 'context'"
    ):
        load_own(DataChoice(dollies, template_file=str(file)), 0)
    file.write_text("{instruction}")
    with pytest.raises(DataError, match="expected --input as a placeholder of the template, got 'context'"):
        load_own(DataChoice(dollies, template_file=str(file), input="context", output="response"), 0)
    file.write_text("{instruction} {response}")
    with pytest.raises(DataError, match="prompts without their answers, got the field response as both"):
        load_own(DataChoice(dollies, template_file=str(file)), 0)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 1], ("0", "1")),
        ([True, False], ("false", "true")),
        ([" a", "b "], ("a", "b")),
        ([1.5, 2], ("1.5", "2")),
    ],
)
def test_numbers_and_booleans_are_labels_by_their_text(
    tmp_path: Path, values: list[Any], labels: tuple[str, ...]
) -> None:
    rows = [{"text": f"text {number}", "label": values[number % 2]} for number in range(30)]
    assert load_own(DataChoice(write_lines(tmp_path / "rows.jsonl", rows)), 0).labels == labels


def test_words_answer_the_labels_in_the_labels_order(reviews: str) -> None:
    data = load_own(DataChoice(reviews, words="good= great, bad= terrible"), 0)
    assert (data.labels, data.words) == (("bad", "good"), (" terrible", " great"))
    more = load_own(DataChoice(reviews, words="good= great,bad= terrible,odd= odd"), 0)
    assert more.words == (" terrible", " great", " odd")
    assert "labels of --words without a row: odd" in more.notes


# What is held out


def test_rows_that_stand_twice_are_never_on_both_sides(tmp_path: Path) -> None:
    rows = [dolly(number) for number in range(60)]
    again = [{**row, "category": CATEGORIES[number % 3]} for number, row in enumerate(rows[:20], 1)]
    other = [{**row, "response": "Another."} for row in rows[:30]]
    moved = [{**row, "response": "A third.", "category": "open_qa"} for row in rows[10:20]]
    path = write_lines(tmp_path / "rows.jsonl", [*rows, *again, *other, *moved])
    for seed in range(5):
        for partition in ("by:category", "iid:6", "dirichlet:category:0.5:4"):
            data = load_own(DataChoice(path, partition, held_out=0.3), seed)
            train, held_out = sides(data)
            assert len(train) + len(held_out) == 100
            assert held_out
            prompts = [{tuple(sorted(row.fields.items())) for row in rows} for rows in (train, held_out)]
            assert not prompts[0] & prompts[1]
    assert data.notes[-2:] == (
        "20 rows left out: the same prompt and answer as an earlier row",
        "40 rows with another answer to an earlier row's prompt: kept on the side of that row",
    )


def test_clients_are_held_out_by_a_field(dollies: str) -> None:
    data = load_own(
        DataChoice(dollies, "dirichlet:category:5:4", held_out_clients="category=summarization"), 0
    )
    assert len(data.clients) == 4
    (unseen,) = data.unseen
    assert (unseen.name, len(unseen.train), len(unseen.held_out)) == ("summarization", 0, 30)
    numbers = {int(row.response.removeprefix("Answer ")[:-1]) % 3 for row in unseen.held_out}
    assert numbers == {CATEGORIES.index("summarization")}
    assert {int(row.response.removeprefix("Answer ")[:-1]) % 3 for row in sides(data)[0]} == {0, 1}


def test_clients_are_held_out_by_a_share(reviews: str) -> None:
    data = load_own(DataChoice(reviews, "iid:10", held_out_clients="0.2", held_out=0), 0)
    assert len(data.clients) == 8
    assert [len(client.held_out) for client in data.unseen] == [6, 6]
    assert not any(client.held_out for client in data.clients)
    assert "8 clients without held-out rows: " in data.notes[-1]


def test_rows_of_held_out_clients_that_are_trained_on_are_left_out(tmp_path: Path) -> None:
    rows = [dolly(number) for number in range(60)]
    again = [{**row, "response": "Other.", "category": "summarization"} for row in rows[:6]]
    path = write_lines(tmp_path / "rows.jsonl", [*rows, *again])
    choice = DataChoice(path, held_out_clients="category=summarization", held_out=0)
    data = load_own(choice, 0)
    assert len(data.unseen[0].held_out) == 20 + 2
    assert any("4 rows of held-out clients left out: their prompts" in note for note in data.notes)


def test_what_is_empty_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [dolly(number) for number in range(30)]
    rows[3]["response"] = " \n"
    rows[4].update(instruction="", context=" ")
    data = load_own(DataChoice(write_lines(tmp_path / "rows.jsonl", rows)), 0)
    assert len([*sides(data)[0], *sides(data)[1]]) == 28
    assert data.notes[-1] == "2 rows left out: no prompt or no answer"


def test_equal_seeds_and_rows_give_equal_federations(tmp_path: Path, dollies: str) -> None:
    choice = DataChoice(dollies, "dirichlet:category:0.5:4", held_out_clients="0.25")
    data = load_own(choice, 3)
    assert data == load_own(choice, 3)
    assert data.clients != load_own(choice, 4).clients
    shuffled = [dict(sorted(dolly(number).items(), reverse=number % 2 == 0)) for number in range(90)]
    path = write_lines(tmp_path / "other.jsonl", shuffled)
    assert load_own(DataChoice(path, choice.partition, held_out_clients="0.25"), 3) == data
    as_csv = write_csv(
        tmp_path / "other.csv", [dict(reversed(dolly(number).items())) for number in range(90)]
    )
    assert load_own(DataChoice(as_csv, choice.partition, held_out_clients="0.25"), 3) == data


def test_names_and_notes_are_printable(tmp_path: Path) -> None:
    rows = [{**dolly(number), "category": f"a\x1b[31m{number % 2}"} for number in range(40)]
    division = load_division(DataChoice(write_lines(tmp_path / "rows.jsonl", rows)), 0)
    assert [client.name for client in division.data.clients] == ["a\\x1b[31m0", "a\\x1b[31m1"]
    assert list(division.groups) == ["a\\x1b[31m0", "a\\x1b[31m1"]
    assert all(note.isprintable() for note in division.data.notes)


def test_no_two_clients_have_one_name_and_no_row_is_lost(tmp_path: Path) -> None:
    who = ("", "(empty)", "\u200b", "\\u200b", "kept")
    rows = [{**review(number), "who": who[number % 5]} for number in range(60)]
    path = write_csv(tmp_path / "rows.csv", rows)
    division = load_division(DataChoice(path, partition="by:who", label="label", input="text"), 1)
    names = [client.name for client in division.data.clients]
    assert names == ["((empty))", "(empty)", "\\u200b", "kept", "\\u200b (2)"]
    assert sum(len(client.train) + len(client.held_out) for client in division.data.clients) == 60
    assert {name: sum(count.values()) for name, count in division.groups.items()} == dict.fromkeys(names, 12)


def test_groups_count_all_rows_of_a_client(dollies: str, reviews: str) -> None:
    division = load_division(DataChoice(dollies, held_out_clients="category=open_qa"), 0)
    assert division.grouped_by == "category"
    assert {name: dict(groups) for name, groups in division.groups.items()} == {
        name: {name: 30} for name in CATEGORIES
    }
    division = load_division(DataChoice(reviews, "by:source"), 0)
    assert division.grouped_by == "label"
    assert {name: sum(groups.values()) for name, groups in division.groups.items()} == dict.fromkeys(
        "abc", 20
    )


# What is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"input": "txt"},
            "--input: expected a field out of label, source, text, got 'txt'; the nearest is 'text'",
        ),
        ({"label": "Lable"}, "--label: expected a field out of .*; the nearest is 'label'"),
        ({"partition": "by:sourc"}, "the partition's field out of .*the nearest is 'source'"),
        ({"held_out_clients": "sorce=a"}, "the held-out clients' field out of .*the nearest is 'source'"),
        ({"held_out_clients": "source=d"}, "a held-out value of source out of a, b, c, got 'd'"),
        ({"partition": "iid:61"}, "at most as many clients as rows, got 61 clients for 60 rows"),
        ({"partition": "iid:60"}, "expected held-out rows, got none from 60 clients; raise --held-out"),
        ({"held_out": 0.0}, "expected held-out rows, got none from 8 clients"),
        ({"label": "label", "output": "source"}, "either --label .* or --output .*, got both"),
        ({"input": "label"}, "prompts without their answers, got the field label as both"),
        ({"template": "alpacca"}, "a template out of .*; the nearest is 'alpaca'"),
        ({"template": "{txt}"}, "a placeholder out of label, source, text, got 'txt'; the nearest is 'text'"),
        ({"template": "{text"}, "braces stand in pairs"),
        ({"words": "good= a,bd= b"}, "a label of --words out of bd, good, got 'bad'; .* 'bd' in line 3 of"),
        ({"words": "good= great"}, "a label of --words out of good, got 'bad' in line 3 of"),
        ({"words": "good= a,bad= a"}, "each label and each word once in --words, got 'bad= a' again"),
        ({"words": "good= a,good= b"}, "each label and each word once"),
        ({"words": "good"}, "--words as LABEL=WORD,LABEL=WORD,..., got 'good'"),
        ({"words": "good= ,bad= b"}, "--words as LABEL=WORD"),
        ({"words": "good= label,bad= b"}, "without labels and words in its own text, got 'label' in"),
        ({"label": "source", "input": "text", "words": "a= x,b= y,c= Label"}, "got 'Label' in"),
        ({"words": "a= b,c= d", "output": "label", "input": "text"}, "--words with --label alone"),
    ],
)
def test_a_choice_that_does_not_fit_is_one_line(reviews: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_own(DataChoice(reviews, **flags), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data": ""}, "expected --data, got none"),
        ({"classify": "word"}, "expected --classify out of head, words, got 'word'; the nearest is 'words'"),
        ({"template": "plain", "template_file": "x"}, "either --template or --template-file, got both"),
        ({"classify": "head", "words": "a=b"}, "expected no --words with --classify head"),
        ({"held_out": 1.0}, r"expected --held-out in \[0, 1\), got 1.0"),
        ({"held_out": float("nan")}, "expected --held-out"),
    ],
)
def test_choices_that_cannot_stand_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DataChoice(**{"data": "rows.jsonl", **flags})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "expected a value in the field text, got null in line 4 of .*; write an empty text"),
        ({"text": 3.5}, r"expected text in the field text, got 3.5 \(float\) in line 4 of"),
        ({"text": True}, r"expected text in the field text, got True \(bool\) in line 4"),
        ({"text": ["a"]}, r"expected text in the field text, got \['a'\] \(list\) in line 4"),
        ({"label": None}, "a value in the field label, got null in line 4"),
        ({"label": {}}, r"expected a text, number or boolean in the field label, got {} \(dict\) in line 4"),
        ({"text": ...}, "expected the field text in every row, got none in line 4 of"),
        ({"label": "x" * 201}, "at most 200 characters in the field label, .*, got 201 in line 4"),
        ({"source": ["a"]}, "a text, number or boolean in the field source"),
    ],
)
def test_a_value_that_is_no_text_is_refused_with_its_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rows = [review(number) for number in range(12)]
    rows[3].update(changes)
    rows[3] = {name: value for name, value in rows[3].items() if value is not ...}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        load_own(DataChoice(path, "by:source"), 0)


def test_nan_is_refused_with_its_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra data: pyarrow is not installed")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["a", "b", "c"], "label": [1.0, 2.0, float("nan")]})
    parquet.write_table(table, path)
    with pytest.raises(DataError, match="a value in the field label, got nan in row 3 of .*rows.parquet"):
        load_own(DataChoice(str(path)), 0)


def test_one_label_alone_is_refused(tmp_path: Path) -> None:
    rows = [{**review(number), "label": "good"} for number in range(12)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for words in ("", "good= great,bad= terrible"):
        with pytest.raises(DataError, match="expected at least two labels, got good alone"):
            load_own(DataChoice(path, words=words), 0)


def test_texts_taken_for_labels_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"t {number}", "label": f"l {number}"} for number in range(1001)]
    with pytest.raises(DataError, match="expected at most 1,000 labels, got 1,001; is the field of --label"):
        load_own(DataChoice(write_lines(tmp_path / "rows.jsonl", rows)), 0)


def test_a_label_in_the_templates_text_is_refused_but_not_in_a_word_of_it(tmp_path: Path) -> None:
    rows = [{"text": f"t {number}", "label": ("a", "Bel")[number % 2]} for number in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    load_own(DataChoice(path), 0)
    file = tmp_path / "t.txt"
    file.write_text("{text} bel or not:")
    with pytest.raises(DataError, match="without labels and words in its own text, got 'Bel' in '{text} bel"):
        load_own(DataChoice(path, template_file=str(file)), 0)
    load_own(DataChoice(path, template_file=str(file), classify="head"), 0)


def test_an_unknown_schema_names_its_fields(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(
        DataError, match="expected --input and either --output or --label .*, got the fields q, a, "
    ):
        load_own(DataChoice(path), 0)


def test_a_file_of_empty_rows_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "", "label": "a"}] * 3)
    with pytest.raises(DataError, match="at least one row with a prompt and an answer in .*, got none"):
        load_own(DataChoice(path), 0)
    with pytest.raises(DataError, match="at least one row with a prompt and an answer in .*, got none"):
        (tmp_path / "rows.csv").write_text("text,label\n")
        load_own(DataChoice(str(tmp_path / "rows.csv")), 0)


def test_a_random_choice_is_taken_or_refused_in_one_line(dollies: str, reviews: str) -> None:
    generator = random.Random(14)
    pieces = [
        "by:",
        "iid:",
        "dirichlet:",
        "category",
        "label",
        "text",
        "response",
        "instruction",
        ":",
        "=",
        ",",
    ]
    pieces += [
        "3",
        "0.5",
        "",
        "nan",
        "\0",
        "\n",
        "é",
        "{text}",
        "alpaca",
        "good",
        "open_qa",
        "words",
        "head",
        "x" * 300,
    ]
    names = [name for name in DataChoice.__dataclass_fields__ if name not in ("data", "held_out", "classify")]
    outcomes: Counter[bool] = Counter()
    for _ in range(1500):
        flags: dict[str, Any] = {
            name: "".join(generator.choices(pieces, k=generator.randrange(1, 5)))
            for name in generator.sample(names, generator.randrange(3))
        }
        flags["data"] = generator.choice([dollies, reviews, reviews, "".join(generator.choices(pieces, k=3))])
        refusal = refused(flags)
        outcomes[bool(refusal)] += 1
        assert len(refusal.splitlines()) < 2, flags
    assert outcomes[False] > 200 < outcomes[True]


def refused(flags: dict[str, Any]) -> str:
    """What the error says; empty if the choice is taken."""
    try:
        load_own(DataChoice(**flags), 0)
    except DataError as error:
        return str(error)
    return ""


def test_every_field_of_the_choice_is_documented() -> None:
    documented = attributes_of(DataChoice)
    assert list(documented) == list(DataChoice.__dataclass_fields__)
    assert all(len(text) < 120 for text in documented.values())
