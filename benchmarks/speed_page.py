"""The README's table of speeds, made from committed results: `python -m benchmarks.speed_page`."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import pages
from benchmarks.common.constants import RESULTS_FOLDER
from benchmarks.common.environment import REPOSITORY
from benchmarks.kernels import cases
from benchmarks.step import contestants as step_contestants
from fedkseed.files import write_atomically

MARK = "<!-- made by benchmarks.speed_page from results/ -->"
README = REPOSITORY / "README.md"
#: Of one machine: the kernels alone, and whole local steps.
KERNELS, STEPS = (
    RESULTS_FOLDER / f"{what}-amd-epyc-avx2-2t-smollm2-bf16.json" for what in ("kernels", "step")
)
_CASES = {
    "perturb": "perturb the weights",
    "update": "restore and update them",
    "rebuild-4096": "rebuild a model from 4,096 seeds",
    "rademacher-rebuild-4096": "the same, Rademacher noise",
}

Document = dict[str, Any]


def table(kernels: Document, steps: Document) -> str:
    """Seconds beside the official algorithm's, and the ratio; of the fastest storage mode for whole steps."""
    lines = ["| | official | here | |", "|---|---|---|---|"]
    for case, title in _CASES.items():
        seconds = {
            row["kind"] if row["kind"] == "ours" else row["contestant"]: row["seconds"]["median"]
            for row in kernels["rows"]
            if row["case"] == case
        }
        lines.append(_line(title, seconds[cases.AS_WRITTEN], seconds["ours"]))
    official = _steps(steps, "gaussian").pop(step_contestants.OFFICIAL)
    for family in ("gaussian", "rademacher"):
        ours = {
            name: seconds
            for name, seconds in _steps(steps, family).items()
            if not name.startswith("two forwards")
            and name not in (step_contestants.OFFICIAL, step_contestants.MEZO)
        }
        best = min(ours, key=ours.__getitem__)
        noise = "" if family == "gaussian" else ", Rademacher noise"
        lines.append(_line(f"a whole local step, `{best}`{noise}", official, ours[best]))
        if family == "gaussian":
            forwards = _steps(steps, family)[step_contestants.FORWARDS_FP32]
            lines.append(_line("of which two forward passes in fp32", None, forwards))
    return "\n".join(lines)


def _steps(steps: Document, family: str) -> dict[str, float]:
    return {
        row["contestant"]: row["seconds"]["median"]
        for row in steps["rows"]
        if row["family"] == family and row["batch_size"] == 1
    }


def _line(title: str, official: float | None, ours: float) -> str:
    if official is None:
        return f"| {title} | | {_seconds(ours)} | |"
    return f"| {title} | {_seconds(official)} | {_seconds(ours)} | **{official / ours:.3g}x** |"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def with_result(page: str) -> str:
    """The page with its table made from the committed results."""
    return pages.with_part(page, MARK, table(*(json.loads(path.read_bytes()) for path in (KERNELS, STEPS))))


def main() -> None:
    """Writes the table into the README."""
    write_atomically(README, with_result(README.read_text()).encode())


if __name__ == "__main__":
    main()
