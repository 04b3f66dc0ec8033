"""The environment in a resident worker's key: what changes its answers, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.resident_clients import make_none

from fedkseed.resident import connect
from fedkseed.resident.environment import VARIABLES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "resident.md"


@pytest.mark.parametrize("variable", VARIABLES)
def test_another_value_is_another_worker_and_empty_is_not_unset(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sockets"
    monkeypatch.delenv(variable, raising=False)
    paths = [connect(make_none, folder).path]
    for value in ("", "1", "2"):
        monkeypatch.setenv(variable, value)
        paths.append(connect(make_none, folder).path)
    assert len(set(paths)) == 4
    monkeypatch.delenv(variable)
    assert connect(make_none, folder).path == paths[0]


def test_variables_that_no_answer_depends_on_leave_the_worker_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = connect(make_none, tmp_path / "sockets").path
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("FEDKSEED_CACHE", "/elsewhere")
    assert connect(make_none, tmp_path / "sockets").path == before


def test_the_page_names_every_one_of_them() -> None:
    line = PAGE.read_text().split("Of the environment")[1].split("under others")[0]
    assert sorted(re.findall(r"`([A-Z0-9_]+)`", line)) == sorted(VARIABLES)
