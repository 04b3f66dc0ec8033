"""The README's table of speeds is that of the committed results."""

from __future__ import annotations

import pytest

from benchmarks import speed_page
from benchmarks.common import pages


def test_the_readme_shows_the_committed_results() -> None:
    page = speed_page.README.read_text()
    assert speed_page.with_result(page) == page
    with pytest.raises(ValueError, match="got one without"):
        pages.with_part(page.replace(pages.END, ""), speed_page.MARK, "")


def test_ratios_are_of_the_medians_beside_them() -> None:
    def row(case: str, contestant: str, kind: str, median: float) -> dict[str, object]:
        return {"case": case, "contestant": contestant, "kind": kind, "seconds": {"median": median}}

    kernels = {
        "rows": [
            row(case, contestant, kind, median)
            for case in ("perturb", "update", "rebuild-4096", "rademacher-rebuild-4096")
            for contestant, kind, median in (
                ("ours (avx512)", "ours", 0.5),
                ("ours (avx2)", "ours", 0.75),
                ("official, as written", "official", 6000.0),
                ("official, without decay terms", "official", 3.0),
            )
        ]
    }
    steps = {
        "rows": [
            {"family": family, "batch_size": 1, "contestant": name, "seconds": {"median": median}}
            for family, medians in (
                (
                    "gaussian",
                    {"official step": 10.0, "MeZO-style torch step": 0.1, "streamed": 4, "inplace": 5},
                ),
                ("rademacher", {"streamed": 2.5, "inplace": 2.0}),
            )
            for name, median in (medians | {"two forwards": 0.2, "two forwards, fp32": 1.0}).items()
        ]
    }
    assert speed_page.table("Some CPU", kernels, steps).splitlines()[2:] == [
        "| perturb the weights | 6,000 s | 0.5 s | **1.2e+04x** |",
        "| restore and update them | 6,000 s | 0.5 s | **1.2e+04x** |",
        "| rebuild a model from 4,096 seeds | 6,000 s | 0.5 s | **1.2e+04x** |",
        "| the same, Rademacher noise | 6,000 s | 0.5 s | **1.2e+04x** |",
        "| a whole local step, `streamed` | 10 s | 4 s | **2.5x** |",
        "| of which two forward passes | | 0.2 s | |",
        "| a whole local step, `inplace`, Rademacher noise | 10 s | 2 s | **5x** |",
    ]
