"""What a ledger was made of: names without paths, one strict file, and one line for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.one_line import raised_line

from fedkseed.data.built_in_models import DEFAULT_MODEL
from fedkseed.ledger.origin import FILE, MAX_BYTES, AdapterStart, Hashes, Origin, OriginError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def whole() -> Origin:
    return Origin(
        "owner/name",
        "hub",
        COMMIT,
        "apache-2.0",
        "hub:owner/rows@v1",
        "ab" * 32,
        {"num_rounds": 9, "lr": 1e-4, "sampling": "uniform"},
        AdapterStart(2**64 - 1),
        Hashes("ab" * 32, "cd" * 32, {"ledger.safetensors": "ef" * 32}),
    )


@pytest.mark.parametrize("origin", [whole(), Origin("smollm2", "built-in"), Origin("w0", "folder")])
def test_an_origin_comes_back_out_of_its_file(origin: Origin, tmp_path: Path) -> None:
    origin.write(tmp_path)
    assert Origin.read(tmp_path) == origin
    assert json.loads((tmp_path / FILE).read_text())["base"]["name"] == origin.base


def test_a_base_is_named_as_it_is_loaded_and_a_folder_without_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w0").mkdir()
    assert Origin.of(tmp_path / "w0") == Origin.of(f"{tmp_path}/w0/") == Origin("w0", "folder")
    monkeypatch.chdir(tmp_path / "w0")
    assert Origin.of(".") == Origin("w0", "folder")
    assert Origin.of("../elsewhere").base == "elsewhere"
    assert Origin.of("") == Origin(DEFAULT_MODEL, "built-in")
    assert Origin.of("minilm").loaded_by == "minilm"
    assert Origin.of("owner/name", COMMIT).loaded_by == f"owner/name@{COMMIT}"
    assert Origin.of("owner/name@v1").revision == "v1"
    assert Origin.of("gpt2").loaded_by == "gpt2"
    assert Origin.of("./w0").loaded_by is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: Origin("/data/models/w0"),
        lambda: Origin("../w0"),
        lambda: Origin("owner/../w0"),
        lambda: Origin("https://host.example/owner/name"),
        lambda: Origin("file:w0"),
        lambda: Origin("owner/name\n"),
        lambda: Origin("a" * 300),
        lambda: Origin("models/w0", "folder"),
        lambda: Origin("..", "folder"),
        lambda: Origin("w0\x1b[2J", "folder"),
        lambda: Origin("w0", "built-in"),
        lambda: Origin("w0", "elsewhere"),  # type: ignore[arg-type]
        lambda: Origin(5),  # type: ignore[arg-type]
        lambda: Origin("owner/name", revision="../../etc"),
        lambda: Origin("owner/name", revision=""),
        lambda: Origin("w0", "folder", revision=COMMIT),
        lambda: Origin("owner/name", license="Apache 2\n"),
        lambda: Origin("owner/name", data="/data/rows.jsonl"),
        lambda: Origin("owner/name", data="rows/../../x"),
        lambda: Origin("owner/name", data="hub:/data/rows.jsonl"),
        lambda: Origin("owner/name", data="hub:a/b/c"),
        lambda: Origin("owner/name", data_digest="short"),
        lambda: Origin("owner/name", facts={"Rounds": 1}),
        lambda: Origin("owner/name", facts={"path": "/data"}),
        lambda: Origin("owner/name", facts={"rounds": True}),
        lambda: Origin("owner/name", facts={"loss": float("nan")}),
        lambda: Origin("owner/name", facts={f"f{n}": n for n in range(33)}),
        lambda: Origin("owner/name", facts=[]),  # type: ignore[arg-type]
        lambda: Origin("owner/name", adapter={"seed": 1}),  # type: ignore[arg-type]
        lambda: AdapterStart(-1),
        lambda: AdapterStart(2**64),
        lambda: AdapterStart(True),
        lambda: AdapterStart(0, "mixed"),
        lambda: AdapterStart(0, [1]),  # type: ignore[arg-type]
        lambda: Hashes("ab", "cd" * 32, {}),
        lambda: Hashes("ab" * 32, "cd" * 32, {"x": 1}),  # type: ignore[dict-item]
        lambda: Hashes("ab" * 32, "cd" * 32, []),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_another_form_is_one_line(call: Callable[[], object]) -> None:
    raised_line(OriginError, call)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(more=1),
        lambda found: found.pop("facts"),
        lambda found: found.update(format="another"),
        lambda found: found.update(version=2),
        lambda found: found.update(version=True),
        lambda found: found.update(base="owner/name"),
        lambda found: found["base"].update(name="../w0"),
        lambda found: found["base"].update(source=["hub"]),
        lambda found: found["base"].update(revision=7),
        lambda found: found["data"].pop("digest"),
        lambda found: found.update(facts=[1]),
        lambda found: found.update(adapter=5),
        lambda found: found["hashes"].update(files={"a": "b"}),
        lambda found: found["hashes"].update(files={f"{n}": "ab" * 32 for n in range(40)}),
    ],
)
def test_a_file_of_another_form_is_one_line(change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(whole().to_json())
    change(found)
    raised_line(OriginError, lambda: Origin.from_json(json.dumps(found)))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{" * 100, b"\xff", b"[" * MAX_BYTES * 2, b'{"format": NaN}', b"5"]
)
def test_bytes_that_are_no_origin_are_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(data)
    raised_line(OriginError, lambda: Origin.read(tmp_path))


def test_a_folder_without_the_file_is_one_line(tmp_path: Path) -> None:
    raised_line(OriginError, lambda: Origin.read(tmp_path))
    (tmp_path / FILE).mkdir()
    raised_line(OriginError, lambda: Origin.read(tmp_path))
