"""The table of `docs/transformers.md` is that of the committed result, whose bound on memory holds."""

from __future__ import annotations

import json

from benchmarks.trainer import __main__ as page
from benchmarks.trainer.ways import WAYS


def test_the_page_shows_the_committed_result() -> None:
    text = page.PAGE.read_text("utf-8")
    assert page.with_result(text) == text


def test_every_way_is_measured_and_set_beside_the_evaluation() -> None:
    rows = [{"way": name, "peak_bytes": 10**9 + i * 10**8, "seconds": 2.0} for i, name in enumerate(WAYS)]
    environment = {"cpu": "A processor", "num_threads": 2}
    lines = page.table({"environment": environment, "rows": rows}).splitlines()
    assert len(lines) == 2 + len(WAYS)
    assert lines[2].endswith("| 1,000 MB | 1.00 | 2.00 | 1.0 |")
    assert lines[-1].endswith("| 1,800 MB | 1.80 | 2.00 | 1.0 |")


def test_a_step_in_place_takes_the_memory_of_an_evaluation() -> None:
    rows = {row["way"]: row["peak_bytes"] for row in json.loads(page.RESULT.read_bytes())["rows"]}
    assert abs(rows["inplace"] / rows["evaluate"] - 1) < 0.05
