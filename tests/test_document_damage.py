"""Files that a person or a fault has touched: a typed error in one line and little memory, always."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.damage import KINDS

_SCRIPT = Path(__file__).parent / "support" / "damage.py"
_ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
}
#: Above the process before.
_MOST_MB = 64


def lines(*arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments],
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 250), *(pytest.param(n, 2500, marks=pytest.mark.slow) for n in range(250, 10_000, 2500))],
)
def test_damaged_files_are_typed_errors(first: int, count: int, tmp_path: Path) -> None:
    found = lines("damage", str(tmp_path), *KINDS, "--first", str(first), "--count", str(count))
    assert [line["kind"] for line in found] == list(KINDS)
    for line in found:
        assert sum(line["counts"].values()) == count
        assert line["counts"].keys() != {"accepted"}, line["kind"]
        assert line["peak_mb"] < _MOST_MB, line


@pytest.mark.slow
def test_files_that_ask_for_memory_get_little(tmp_path: Path) -> None:
    lines("make", str(tmp_path), *KINDS)
    bombs = {name: len(list((tmp_path / name).iterdir())) for name in KINDS if (tmp_path / name).exists()}
    found = lines("bombs", str(tmp_path), *bombs)
    assert len(found) == sum(bombs.values()) >= 50
    for line in found:
        assert line["peak_mb"] < _MOST_MB, line
