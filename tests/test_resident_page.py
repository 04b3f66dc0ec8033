"""The figures of `docs/resident.md` are those of the committed result."""

from __future__ import annotations

import json
import re

from benchmarks.common.places import REPOSITORY, RESULTS_FOLDER


def test_the_page_shows_the_committed_result() -> None:
    page = (REPOSITORY / "docs" / "resident.md").read_text("utf-8")
    rows = json.loads((RESULTS_FOLDER / "resident.json").read_bytes())["rows"]
    assert len(rows) == 3
    for row in rows:
        found = re.search(
            rf"^\| {re.escape(row['way'])} \| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.MULTILINE
        )
        assert found is not None, row["way"]
        for text, number in zip(found.groups(), ("first", "second"), strict=True):
            seconds = row["seconds"][number]["median"]
            assert text == (f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}")
