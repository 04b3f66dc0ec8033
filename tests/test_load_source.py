"""What `fedkseed.load` takes: a ledger, a file, a folder, a hub id; a hub that is a folder on this disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import DryRunError
from support.data_samples import save_model
from support.one_line import raised_line

import fedkseed
from fedkseed import Ledger, ModelIdentity, SeedPool, cli
from fedkseed.data.models import is_local, load_any_weights, revision_of
from fedkseed.ledger import Origin
from fedkseed.ledger.publish import write_published
from fedkseed.ledger.published import FILES, LEDGER, Published, PublishedError
from fedkseed.ledger.sources import is_hub_id, open_source

COMMITS = ("0" * 39 + "1", "0" * 39 + "2")


class Made(NamedTuple):
    """A published ledger, its base and the content of its tuned model."""

    published: Path
    base: Path
    content: str


@pytest.fixture
def made(tmp_path: Path) -> Made:
    save_model(tmp_path / "w0")
    model = load_any_weights(tmp_path / "w0")
    ledger = Ledger.of(model, SeedPool(6, 8), np.full(8, 1e-2))
    origin = Origin("w0", "folder", license="mit")
    write_published(ledger, origin, tmp_path / "published", tmp_path / "w0")
    ledger.apply_(model)
    return Made(tmp_path / "published", tmp_path / "w0", content(model))


def content(model: torch.nn.Module) -> str:
    return ModelIdentity.of(model).content.hex()


def test_a_ledger_and_its_file_are_taken_with_a_base(made: Made, tmp_path: Path) -> None:
    ledger = Ledger.load(made.published / LEDGER)
    ledger.save(tmp_path / "alone.ledger")
    for source in (ledger, tmp_path / "alone.ledger", str(tmp_path / "alone.ledger")):
        assert content(fedkseed.load(source, base=made.base)) == made.content
        assert "base=" in raised_line(PublishedError, lambda source=source: fedkseed.load(source))  # type: ignore[misc]
    assert isinstance(open_source(made.published / LEDGER), Published)
    with pytest.raises(FileNotFoundError):
        fedkseed.load(tmp_path / "absent.ledger", base=made.base)
    with pytest.raises(FileNotFoundError):
        fedkseed.load("absent", base=made.base)


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("owner/name", True),
        ("owner/name@v1", True),
        ("owner/name@refs/pr/1", True),
        ("name", False),
        ("runs/ledger.safetensors", False),
        ("runs/my.ledger", False),
        ("./owner/name", False),
        ("a/b/c", False),
        ("/owner/name", False),
        ("~/name", False),
        ("https://host.example/owner/name", False),
        ("owner/../name", False),
        ("owner/na me", False),
    ],
)
def test_a_hub_id_is_told_from_a_path(text: str, is_id: bool) -> None:
    assert is_hub_id(text) is is_id
    assert not is_hub_id(Path(text))


def test_a_folder_of_that_name_goes_before_the_hub(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.published, "owner/name")
    assert content(fedkseed.load("owner/name", made.base)) == made.content


@pytest.mark.parametrize(
    ("text", "revision"),
    [("owner/name", "main"), ("owner/name@v1", "v1"), ("owner/name@refs/pr/1", "refs/pr/1"), (".", "main")],
)
def test_a_base_of_the_hub_may_name_its_revision(text: str, revision: str) -> None:
    assert revision_of(text) == revision
    assert is_local(text) == (text == ".")


Call = Callable[..., Any]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Call], list[dict[str, Any]]]:
    """What puts a function in the place of snapshot_download, and gives the calls that it gets."""

    def put(answer: Call) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def download(name: str, **arguments: Any) -> Any:
            calls.append({"name": name, **arguments})
            return answer(**arguments)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    return put


def planned(folder: Path, **sizes: int) -> list[Any]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [
        SimpleNamespace(
            filename=str(path.relative_to(folder)),
            file_size=sizes.get(path.stem, path.stat().st_size),
            commit_hash=COMMITS[0],
        )
        for path in found
    ]


def test_of_the_hub_nothing_but_a_ledgers_files_is_fetched_at_one_commit(made: Made, hub: Any) -> None:
    def answer(*, dry_run: bool = False, **_: Any) -> Any:
        return planned(made.published) if dry_run else str(made.published)

    calls = hub(answer)
    tuned = fedkseed.load("owner/ledger@v1", made.base)
    assert content(tuned) == made.content
    assert [call["name"] for call in calls] == ["owner/ledger"] * 2
    assert [call["revision"] for call in calls] == ["v1", COMMITS[0]]
    assert all(call["allow_patterns"] == list(FILES) for call in calls)


def test_a_file_of_the_hub_that_is_too_large_is_not_fetched(made: Made, hub: Any) -> None:
    def answer(*, dry_run: bool = False, **_: Any) -> Any:
        assert dry_run
        return planned(made.published, README=1 << 40)

    hub(answer)
    assert "nothing was fetched" in raised_line(PublishedError, lambda: fedkseed.load("o/n", made.base))


def test_without_a_network_the_cache_is_asked(made: Made, hub: Any) -> None:
    def answer(*, dry_run: bool = False, **_: Any) -> Any:
        if dry_run:
            raise DryRunError("no network")
        return str(made.published)

    hub(answer)
    assert content(fedkseed.load("owner/ledger", made.base)) == made.content


def test_a_hub_that_cannot_be_reached_is_one_line(
    made: Made, hub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(**_: Any) -> Any:
        raise OSError("no way to\nthe host")

    hub(answer)
    text = raised_line(PublishedError, lambda: fedkseed.load("owner/ledger", made.base))
    assert "owner/ledger" in text
    assert "no way to" in text
    for command in (
        ["ask", "owner/ledger", "x"],
        ["inspect", "owner/ledger"],
        ["apply", "owner/ledger", "--out", "x"],
    ):
        capsys.readouterr()
        assert cli.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "owner/ledger" in line


def test_a_repository_without_a_card_is_one_line(made: Made, hub: Any, tmp_path: Path) -> None:
    hub(lambda dry_run=False, **_: [] if dry_run else str(tmp_path))
    text = raised_line(PublishedError, lambda: fedkseed.load("owner/ledger", made.base))
    assert "at owner/ledger, got a folder without README.md" in text


#: What runs in a process of its own, as the hub's package reads its environment once.
_OFFLINE = """
import json, sys
from pathlib import Path
import fedkseed
from fedkseed import IdentityError, ModelIdentity
from fedkseed.ledger import Origin, PublishedError
from fedkseed.scenarios.publishing import publish

run, out, cache, commits = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
found = {}
origin = publish(run, out, base="owner/w0").published.origin
found["origin"] = [origin.base, origin.source, origin.revision, origin.license]
ledger = cache / "models--owner--ledger"
(ledger / "snapshots").mkdir(parents=True)
(ledger / "refs").mkdir()
(ledger / "refs/main").write_text(commits[0])
out.rename(ledger / "snapshots" / commits[0])
(cache / "models--owner--w0/refs/main").write_text(commits[1])  # the owner has gone on
found["content"] = ModelIdentity.of(fedkseed.load("owner/ledger")).content.hex()
for name, call in {
    "other": lambda: fedkseed.load("owner/ledger", "owner/w0"),
    "named": lambda: publish(run, out, base="owner/w0"),
    "absent": lambda: fedkseed.load("owner/absent"),
}.items():
    try:
        call()
    except (IdentityError, PublishedError) as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_base_of_the_hub_is_loaded_in_the_revision_that_the_card_names(made: Made, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    other = load_any_weights(made.base)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)  # type: ignore[union-attr, operator]
    folder = cache / "models--owner--w0"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMITS[0])
    for commit in COMMITS:
        shutil.copytree(made.base, folder / "snapshots" / commit)
        (folder / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n")
    other.save_pretrained(folder / "snapshots" / COMMITS[1])
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(made.published / LEDGER, run)
    Origin("w0", "folder").write(run)
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-c", _OFFLINE, run, tmp_path / "out", cache, *COMMITS],
        env={
            **os.environ,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["origin"] == ["owner/w0", "hub", COMMITS[0], "mit"]
    assert found["content"] == made.content
    kind, text = found["other"]
    assert kind == "IdentityError"
    assert f"at revision {COMMITS[0]}" in text
    assert f"loaded was revision {COMMITS[1]}" in text
    assert found["named"][0] == "IdentityError"
    assert found["absent"][0] == "PublishedError"
    assert not (tmp_path / "out").exists()
