"""A plugin of pytest that hands a part's channel what ran, as it runs: a killed run loses none of it.

`-p benchmarks.gpu.pytest_rows --gpu-rows FILE`. Counts by outcome and reasons of skips become the note
"tests"; each test that fails is a row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.channel import append

_NOTE_SECONDS = 0.5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-rows", type=Path, help="file that gets a line of JSON for each result")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-rows")
    # The workers of pytest-xdist report to the process that started them.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Rows(path))


class _Rows:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()
        self._noted = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test once: its call, or the stage around it that did not pass."""
        if report.when == "call" or not report.passed:
            self._count(report, "error" if report.failed and report.when != "call" else report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._count(report, "error" if report.failed else report.outcome)

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self) -> Iterator[None]:
        self._note()
        yield

    def _count(self, report: pytest.TestReport | pytest.CollectReport, outcome: str) -> None:
        self._outcomes[outcome] += 1
        if outcome == "skipped":
            self._skips[_reason(report)] += 1
        elif outcome != "passed":
            row = {"test": report.nodeid, "outcome": outcome, "message": _message(report)}
            append(self._path, {"row": row, "text": f"{outcome}: {report.nodeid}"})
        if time.monotonic() - self._noted > _NOTE_SECONDS:
            self._note()

    def _note(self) -> None:
        self._noted = time.monotonic()
        skips = dict(self._skips)
        append(self._path, {"note": {"tests": dict(self._outcomes) | ({"skips": skips} if skips else {})}})


def _reason(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(reason).removeprefix("Skipped: ")


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr if crash is None else crash.message)[-600:]
