"""Readers of a user's rows: JSON lines, CSV, Parquet, `datasets` on a local folder, Natural Instructions."""

from __future__ import annotations

import importlib.util
import json
import random
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fedkseed.data.errors import DataError
from fedkseed.data.natural_instructions import MAX_INPUT_CHARACTERS, read_tasks
from fedkseed.data.own import DataChoice, load_own
from fedkseed.data.sources import MAX_ROW_BYTES, open_hub, open_source, parse_hub

ROWS = [{"text": f'été {number},\n"so"', "label": number % 2, "more": None} for number in range(5)]
CSV = 'text,label\n"é, so",1\nplain,0\n\n"two\nlines",1\n'


def rows_of(path: Path | str, names: list[str] | None = None) -> list[dict[str, Any]]:
    source = open_source(str(path))
    return [dict(record.values) for record in source.records(names or list(source.fields))]


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def as_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# JSON lines


def test_json_lines_are_rows_of_the_fields_that_are_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.JSONL", "\ufeff\n" + as_lines(ROWS) + "\n\n" + json.dumps({"text": "x"}))
    source = open_source(str(path))
    assert source.fields == ("text", "label", "more")
    records = list(source.records(["label", "text"]))
    assert [dict(record.values) for record in records[:5]] == [
        {"label": row["label"], "text": row["text"]} for row in ROWS
    ]
    assert records[5].values == {"text": "x"}
    assert [record.where for record in records][::5] == [f"line 2 of {path}", f"line 9 of {path}"]
    assert next(iter(source.records(["text"]))).values == {"text": ROWS[0]["text"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected at least one row in .*rows.jsonl, got none"),
        (b"\n \n", "expected at least one row"),
        (b'{"a": "x"}\n{"a": "x"\n', "expected JSON in line 2 of .*rows.jsonl, got"),
        (b'{"a": "x"}\n["a"]\n', r"expected one JSON object a line, got \"\['a'\]\" in line 2 of"),
        (b'"a"\n', "expected one JSON object a line, got 'a' in line 1 of"),
        (b'{"a": "x"}\n{"a": NaN}\n', "expected JSON in line 2 of .*, got: NaN"),
        (b'{"a": "x"}\n{"a": "\xff"}\n', "in UTF-8 in line 2 of .*: .* in position 7"),
        (b'{"a": "x"}\n{"a": ' + b"[" * 99 + b"]" * 99 + b"}", "expected at most 32 levels .* line 2"),
        (b'{"a": "' + b"x" * MAX_ROW_BYTES + b'"}', "expected JSON of at most 1,048,576 bytes in line 1 of"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
    ],
)
def test_a_line_that_is_no_row_is_refused_with_its_number(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        rows_of(written(tmp_path / "rows.jsonl", data), ["a"])
    assert "\n" not in str(error.value)


def test_a_large_file_is_read_a_line_at_a_time(tmp_path: Path) -> None:
    line = json.dumps({"text": "a", "long": "x" * 100_000}) + "\n"
    path = written(tmp_path / "rows.jsonl", line * 300)
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_source(str(path)).records(["text"])) == 300
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


# CSV


@pytest.mark.parametrize("data", [CSV, "\ufeff" + CSV, CSV.replace("\n", "\r\n")])
def test_csv_rows_have_the_headers_names(tmp_path: Path, data: str) -> None:
    path = written(tmp_path / "rows.csv", data)
    source = open_source(str(path))
    assert source.fields == ("text", "label")
    records = list(source.records(["label", "text"]))
    newline = "\r\n" if "\r" in data else "\n"
    assert [record.values for record in records] == [
        {"text": "é, so", "label": "1"},
        {"text": "plain", "label": "0"},
        {"text": f"two{newline}lines", "label": "1"},
    ]
    assert [record.where for record in records] == [f"line {number} of {path}" for number in (2, 3, 5)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected at least one row in .*rows.csv, got none"),
        (b"a,b\n1,2\n1,2,3\n", "expected 2 columns as in the header, got 3 in line 3 of .*rows.csv; a text"),
        (b"a,b\n1\n", "expected 2 columns as in the header, got 1 in line 2"),
        (b"a,a\n1,2\n", "expected different columns in the header of .*, got 'a' twice"),
        (b"a;b\n1;2\n", "expected columns with commas between them in .*, got 'a;b'"),
        (b'a,b\n"1"2,3\n', "expected CSV in line 2 of"),
        (b'a,b\n"1,3\n', "expected CSV in line 2 of .*: unexpected end of data"),
        (b"a,b\n1,\xff\n", "expected UTF-8 in line 2 of .*, got other bytes at offset 6"),
        (b'a,b\n"' + b"x\n" * MAX_ROW_BYTES, "expected (a record of at most|CSV in line 2)"),
        (b"a,b\n" + b"," * MAX_ROW_BYTES + b",", "expected a record of at most 1,048,576 bytes, .* line 2"),
    ],
)
def test_csv_that_is_none_is_refused_with_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        rows_of(written(tmp_path / "rows.csv", data))
    assert "\n" not in str(error.value)


def test_a_csv_with_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path / "rows.csv", "a,b\n")) == []


# Parquet and the hub's package


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra data: pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_have_the_columns_names(tmp_path: Path) -> None:
    columns = {"text": [f"é {number}" for number in range(600)], "label": list(range(600))}
    path = write_parquet(tmp_path / "rows.parquet", {**columns, "other": [None] * 600})
    source = open_source(str(path))
    assert source.fields == ("text", "label", "other")
    records = list(source.records(["label", "text"]))
    assert [record.values["text"] for record in records] == columns["text"]
    assert [record.values["label"] for record in records] == columns["label"]
    assert records[599].where == f"row 600 of {path}"
    assert set(records[0].values) == {"label", "text"}


def test_parquet_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"text": ["x"] * 300})
    with pytest.raises(DataError, match="expected Parquet in .*none.parquet, got: "):
        rows_of(written(tmp_path / "none.parquet", b"PAR1 and more"))
    with pytest.raises(DataError, match="expected Parquet in .*cut.parquet, got: "):
        rows_of(written(tmp_path / "cut.parquet", path.read_bytes()[:-40]))
    with pytest.raises(DataError, match="expected at least one row in .*empty.parquet, got none"):
        rows_of(write_parquet(tmp_path / "empty.parquet", {"text": []}))


@pytest.fixture
def quiet_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `datasets` with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets", reason="a hub's data set needs the extra data: not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("quiet_datasets")
def test_a_data_set_of_the_hub_is_read_through_its_package(tmp_path: Path) -> None:
    """A local folder of files goes the same way as a name on the hub."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(300)]
    written(folder / "train.jsonl", as_lines(rows))
    written(folder / "test.jsonl", as_lines(rows[:3]))
    source = open_hub(str(folder), None, "main")
    assert source.fields == ("text", "label")
    records = list(source.records(["label", "text"]))
    assert [dict(record.values) for record in records] == rows
    assert records[-1].where == f"row 300 of {folder}"
    data = load_own(DataChoice(f"hub:{folder}@main", partition="iid:3"), 0)
    assert data.labels == ("0", "1")
    assert sum(len(client.train) + len(client.held_out) for client in data.clients) == 300


@pytest.mark.usefixtures("quiet_datasets")
def test_numbered_classes_are_read_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    written(
        folder / "train.csv", "text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(20)) + "x,-1\n"
    )
    card = (
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': neg\n          '1': pos\n---\n"
    )
    (folder / "README.md").write_text(card)
    records = list(open_hub(str(folder), None, None).records(["text", "label"]))
    assert [record.values["label"] for record in records[:3]] == ["neg", "pos", "neg"]
    assert records[-1].values == {"text": "x", "label": None}


@pytest.mark.usefixtures("quiet_datasets")
def test_a_data_set_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the data set .*absent at 1, got: ") as error:
        open_source(f"hub:{tmp_path / 'absent'}@1")
    assert "\n" not in str(error.value)
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in ("test", "validation"):
        written(folder / f"{split}.jsonl", as_lines([{"text": "x"}]))
    with pytest.raises(DataError, match="expected a split train of .*, got the splits test, validation"):
        open_source(f"hub:{folder}@1")


def test_the_name_of_a_hubs_data_set() -> None:
    assert parse_hub("hub:owner/name@abc") == ("owner/name", None, "abc")
    assert parse_hub("hub:owner/name:small@v1@x") == ("owner/name", "small", "v1@x")
    for wrong in ("hub:owner/name", "hub:owner/name@", "hub:@abc", "hub:owner/name:@abc", "hub:"):
        with pytest.raises(DataError, match=r"expected hub:NAME\[:CONFIG\]@REVISION, got"):
            open_source(wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows.json", r"expected data of a known form \(\*.jsonl, .*\), got 'rows.json'"),
        ("", "of a known form"),
        ("absent.jsonl", "expected a file, got 'absent.jsonl', which is none"),
        (".", "of a known form"),
    ],
)
def test_a_source_of_no_known_form_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(text)


# Natural Instructions


def write_tasks(folder: Path, sizes: dict[str, int], test: list[str]) -> Path:
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for name, size in sizes.items():
        instances = [
            {"id": str(number), "input": f"{name} {number}", "output": [f"out {number}", "other"]}
            for number in range(size)
        ]
        task = {"Definition": [f"Do {name}.", "more"], "Instances": instances}
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(task))
    train = [name for name in sizes if name not in test]
    for split, names in (("train", train), ("test", test)):
        (folder / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(names) + "\n")
    return folder


def test_natural_instructions_are_drawn_by_the_papers_rules(tmp_path: Path) -> None:
    folder = write_tasks(
        tmp_path / "ni", {"a": 100, "b": 19, "c": 21, "t": 1500, "u": 30, "v": 7}, ["t", "u", "v"]
    )
    path = folder / "tasks" / "a.json"
    task = json.loads(path.read_text())
    task["Instances"][0]["input"] = "x" * MAX_INPUT_CHARACTERS
    task["Instances"][1]["input"] = "x" * (MAX_INPUT_CHARACTERS - 1)
    task["Instances"][2]["output"] = [" "]
    path.write_text(json.dumps(task))
    tasks = read_tasks(folder, 0.1, seed=5)
    assert [(client.name, len(client.train), len(client.held_out)) for client in tasks.clients] == [
        ("a", int(0.2 * 98), 2),
        ("c", 4, 1),
    ]
    assert [(client.name, len(client.held_out)) for client in tasks.unseen] == [
        ("t", 30),
        ("u", 20),
        ("v", 7),
    ]
    row = tasks.clients[1].train[0]
    assert row.fields["instruction"] == "Do c."
    assert row.fields["input"].replace("c", "out") == row.response
    assert tasks.notes == (
        "1 instances of 1024 characters or more left out",
        "1 instances without an answer left out",
        "1 training tasks of under 20 instances left out",
    )
    assert tasks == read_tasks(folder, 0.1, seed=5)
    assert tasks != read_tasks(folder, 0.1, seed=6)
    data = load_own(DataChoice(str(folder)), 5)
    assert (data.clients, data.unseen) == (tasks.clients, tasks.unseen)
    assert data.template.name == "fedkseed-ni"


def test_no_prompt_of_natural_instructions_is_on_both_sides(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "ni", {"a": 60, "t": 20}, ["t"])
    for name, texts in (("a", 30), ("t", 4)):
        path = folder / "tasks" / f"{name}.json"
        task = json.loads(path.read_text())
        task["Definition"] = ["The same."]
        for number, instance in enumerate(task["Instances"]):
            instance["input"] = f"text {number % texts}"
        path.write_text(json.dumps(task))
    for seed in range(20):
        tasks = read_tasks(folder, 0.5, seed)
        trained = {row.fields["input"] for row in tasks.clients[0].train}
        held_out = {row.fields["input"] for row in tasks.clients[0].held_out}
        assert len(tasks.clients[0].train) == 12
        assert held_out
        assert not trained & held_out
        assert not trained & {row.fields["input"] for client in tasks.unseen for row in client.held_out}


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("tasks/a.json", None, "expected a task's file, got: .*a.json"),
        ("tasks/a.json", b"{", "expected a task's file, got: expected JSON in .*a.json"),
        ("tasks/a.json", b"[]", 'expected "Definition" as a list that begins with a text in .*a.json'),
        ("tasks/a.json", b'{"Definition": ["x"]}', 'expected "Instances" as a list in'),
        ("tasks/a.json", b'{"Definition": ["x"], "Instances": [3]}', 'expected "output" .* in instance 1 of'),
        (
            "tasks/a.json",
            b'{"Definition": ["x"], "Instances": [{"output": ["y"], "input": null}]}',
            "expected \"input\" as text in instance 1 of .*a.json, got 'None'",
        ),
        ("tasks/a.json", b'{"Definition": ["x"], "Instances": []}', "expected a training task with at least"),
        ("splits/default/train_tasks.txt", None, "expected a list of tasks, one a line, at"),
        ("splits/default/train_tasks.txt", b"\xff", "expected a list of tasks, one a line, at"),
        ("splits/default/train_tasks.txt", b"../a", "expected names of tasks in .*, got '../a'"),
        ("splits/default/train_tasks.txt", b"a\na\n", "expected each task once in .*, got 'a' twice"),
    ],
)
def test_a_folder_that_is_not_natural_instructions_is_refused(
    tmp_path: Path, file: str, data: bytes | None, message: str
) -> None:
    folder = write_tasks(tmp_path / "ni", {"a": 30, "t": 20}, ["t"])
    if data is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_own(DataChoice(str(folder)), 0)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"input": "x"}, "expected no --input with a folder of Natural Instructions"),
        ({"held_out_clients": "0.5"}, "expected no --held-out-clients"),
        ({"partition": "iid:3"}, "expected by:task as the partition of Natural Instructions, got 'iid:3'"),
        ({"template": "alpca"}, "the nearest is 'alpaca'"),
    ],
)
def test_what_natural_instructions_do_not_take(tmp_path: Path, choice: dict[str, str], message: str) -> None:
    folder = write_tasks(tmp_path / "ni", {"a": 30, "t": 20}, ["t"])
    with pytest.raises(DataError, match=message):
        load_own(DataChoice(str(folder), **choice), 0)  # type: ignore[arg-type]


# Mutations


def mutated(data: bytes, generator: random.Random) -> bytes:
    """One of a few damages that files meet."""
    changed = bytearray(data)
    for _ in range(generator.randrange(1, 4)):
        at = generator.randrange(len(changed) + 1)
        kind = generator.randrange(5)
        if kind == 0 and changed:
            changed[at % len(changed)] = generator.randrange(256)
        elif kind == 1:
            changed[at:at] = generator.randbytes(generator.randrange(1, 5))
        elif kind == 2:
            del changed[at : at + generator.randrange(1, 30)]
        elif kind == 3:
            changed[at:at] = generator.choice(
                [
                    b"null",
                    b"NaN",
                    b'"',
                    b"{",
                    b"[" * 99,
                    b"1e999",
                    b"\r",
                    b"\0",
                    b"\\ud800",
                    b",",
                    b"\n",
                    b"[]",
                ]
            )
        else:
            changed[at:at] = changed[: generator.randrange(len(changed) + 1)]
    return bytes(changed)


def samples(tmp_path: Path) -> dict[str, bytes]:
    """Small files of every form that can be read here, by their names."""
    rows = [{"text": f"text {number}", "label": f"l{number % 2}", "n": number} for number in range(12)]
    found = {
        "rows.jsonl": as_lines(rows).encode(),
        "rows.csv": ("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in rows)).encode(),
        "ni/tasks/a.json": b"",
        "ni/splits/default/train_tasks.txt": b"",
    }
    folder = write_tasks(tmp_path / "ni", {"a": 25, "t": 20}, ["t"])
    for name in found:
        if name.startswith("ni/"):
            found[name] = (folder.parent / name).read_bytes()
    for name, data in found.items():
        if not name.startswith("ni/"):
            (tmp_path / name).write_bytes(data)
    if importlib.util.find_spec("pyarrow") is not None:
        columns = {key: [row[key] for row in rows] for key in ("text", "label")}
        found["rows.parquet"] = write_parquet(tmp_path / "rows.parquet", columns).read_bytes()
    return found


@pytest.mark.parametrize("rounds", [400, pytest.param(2_000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, rounds: int) -> None:
    """`DataError` of one line and nothing else, within 64 MB."""
    generator = random.Random(14)
    outcomes: list[str] = []
    before = 0
    for name, data in samples(tmp_path).items():
        path = tmp_path / name
        load_own(DataChoice(str(tmp_path / "ni" if name.startswith("ni") else path)), 0)
        before = before or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(rounds):
            path.write_bytes(mutated(data, generator))
            outcomes.append(outcome(tmp_path / "ni" if name.startswith("ni") else path))
        path.write_bytes(data)
    refusals = [text for text in outcomes if text]
    assert all(len(text.splitlines()) == 1 and len(text) < 1000 for text in refusals)
    assert len(refusals) > rounds
    assert len(outcomes) - len(refusals) > rounds / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def outcome(path: Path) -> str:
    """What the error says; empty if the data is taken."""
    try:
        load_own(DataChoice(str(path)), 0)
    except DataError as error:
        return str(error)
    return ""
