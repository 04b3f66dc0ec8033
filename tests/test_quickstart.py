"""The code of docs/quickstart.md runs, block after block, and its settings file is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedkseed.scenarios.settings import read_toml

PAGE = (Path(__file__).parent.parent / "docs" / "quickstart.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "quickstart"}
    found = blocks("python")
    assert len(found) == 4
    for block in found:
        exec(compile(block, "docs/quickstart.md", "exec"), names)
    losses = names["train_losses"]
    assert losses[-1] < losses[0]


def test_the_settings_file_is_one(tmp_path: Path) -> None:
    (block,) = blocks("toml")
    (tmp_path / "run.toml").write_text(block)
    assert read_toml(tmp_path / "run.toml")["sampling"] == "pro"
