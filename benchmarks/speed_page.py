"""The README's tables of speeds, made from committed results: `python -m benchmarks.speed_page`."""

from __future__ import annotations

import json
from typing import Any

import fedkseed_kernels
from benchmarks.common import pages
from benchmarks.common.places import REPOSITORY, RESULTS_FOLDER
from benchmarks.kernels import cases
from benchmarks.models import modes as step_modes
from benchmarks.step import contestants as step_contestants
from fedkseed.files import write_atomically

MARK = "<!-- made by benchmarks.speed_page from results/ -->"
README = REPOSITORY / "README.md"
#: For each processor, two cores of it: the results of the kernels alone, and of whole local steps.
PROCESSORS = {
    "AMD Zen 3 (AVX2)": (
        "kernels-amd-epyc-avx2-2t-smollm2-bf16.json",
        "step-amd-epyc-avx2-2t-smollm2-bf16.json",
    ),
    "Intel Xeon (AVX-512)": (
        "kernels-intel-r-xeon-r-processor-avx512-2t-smollm2-bf16.json",
        "step-intel-xeon-avx512-2t-smollm2-bf16.json",
    ),
}
_CASES = {
    "perturb": "perturb the weights",
    "update": "restore and update them",
    "rebuild-4096": "rebuild a model from 4,096 seeds",
    "rademacher-rebuild-4096": "the same, Rademacher noise",
}

Document = dict[str, Any]


def table(processor: str, kernels: Document, steps: Document) -> str:
    """Seconds beside the official algorithm's, and the ratio; of the fastest storage mode for whole steps."""
    lines = [f"| {processor} | official | here | |", "|---|---|---|---|"]
    for case, title in _CASES.items():
        rows = [row for row in kernels["rows"] if row["case"] == case]
        (official,) = (row["seconds"]["median"] for row in rows if row["contestant"] == cases.AS_WRITTEN)
        ours = min(row["seconds"]["median"] for row in rows if row["kind"] == "ours")
        lines.append(_line(title, official, ours))
    official = _steps(steps, "gaussian").pop(step_contestants.OFFICIAL)
    for family in fedkseed_kernels.FAMILIES:
        modes = {
            name: seconds
            for name, seconds in _steps(steps, family).items()
            if not name.startswith("two forwards")
            and name not in (step_contestants.OFFICIAL, step_contestants.MEZO)
        }
        best = min(modes, key=modes.__getitem__)
        noise = "" if family == "gaussian" else ", Rademacher noise"
        lines.append(_line(f"a whole local step, `{best}`{noise}", official, modes[best]))
        if family == "gaussian":
            in_fp32 = step_modes.computes_in_fp32(best)
            name = step_contestants.FORWARDS_FP32 if in_fp32 else step_contestants.FORWARDS
            title = "of which two forward passes" + (" in fp32" if in_fp32 else "")
            lines.append(_line(title, None, _steps(steps, family)[name]))
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
    """The page with its tables made from the committed results."""
    tables = []
    for processor, names in PROCESSORS.items():
        kernels, steps = (json.loads((RESULTS_FOLDER / name).read_bytes()) for name in names)
        tables.append(table(processor, kernels, steps))
    return pages.with_part(page, MARK, "\n\n".join(tables))


def main() -> None:
    """Writes the tables into the README."""
    write_atomically(README, with_result(README.read_text()).encode())


if __name__ == "__main__":
    main()
