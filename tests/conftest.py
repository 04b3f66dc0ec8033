"""The two tiers, and fixtures of several files.

`make test` runs the fast tier, what is not marked `slow`; `make test-slow` runs the rest. A family of cases
that go the same way carries `few`: without a number it keeps in the fast tier cases in which each pair of two
parameters' values occurs, with a number so many cases, spread evenly; its others are slow. Every test file
has a fast case.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run beside each other: a thread for each, unless it asks for more. Set before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _each_pair_once(family: list[pytest.Item]) -> list[pytest.Item]:
    """Cases in which each pair of values occurs, each chosen for most pairs not seen before."""
    pairs = {}
    for item in family:
        params = item.callspec.params  # type: ignore[attr-defined]
        values = sorted((name, repr(value)) for name, value in params.items())
        pairs[item] = set(combinations(values, min(2, len(values))))
    missing = set().union(*pairs.values())
    kept = []
    while missing:
        best = max(family, key=lambda item: len(pairs[item] & missing))
        missing -= pairs[best]
        kept.append(best)
    return kept


def _spread(family: list[pytest.Item], count: int) -> list[pytest.Item]:
    """So many cases of the family, at even distances, from the first on."""
    return [family[index * len(family) // count] for index in range(min(count, len(family)))]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the cases that `few` leaves out of the fast tier; a file that has no fast case is an error."""
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for family in families.values():
        marker = family[0].get_closest_marker("few")
        assert marker is not None
        kept = set(_spread(family, *marker.args) if marker.args else _each_pair_once(family))
        for item in family:
            if item not in kept:
                item.add_marker(pytest.mark.slow)
    if any("::" in argument for argument in config.args):
        return  # files may be collected in part
    with_fast_case = {item.path for item in items if not item.get_closest_marker("slow")}
    if without := sorted({str(item.path) for item in items} - {str(path) for path in with_fast_case}):
        # Not pytest's UsageError: of that a worker of pytest-xdist passes on that it came, and no text.
        raise AssertionError(
            f"expected a case that is not slow in every test file, got none in {', '.join(without)}: "
            "leave one case without the mark, or write a small one"
        )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of files."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDKSEED_CACHE", str(folder))
    return folder


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """SIGINT interrupts: a shell starts background jobs with it ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
