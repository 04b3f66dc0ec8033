"""The page of a result file: chips, and what bounds the passes over bf16 weights on each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEAD = """# What the machine code allows

`python -m benchmarks.machine_code.sass --json` made this page and {name} from the kernels' machine code; no
GPU was used, and nothing is measured. `benchmarks/machine_code/chips.py` says how a ceiling is made, what
is taken where NVIDIA gives no number, and what is left out (latency, bytes in flight, prologues).

## Chips

Lanes are results for each clock and multiprocessor, which issues for 128 threads a clock. *Copy* is bytes
read plus bytes written.

{chips}

## Passes over bf16 weights

*SASS* is instructions an element (and term, in a K loop). A cell is a ceiling in T elements a second (times
terms, in a K loop) and what sets it: memory, where a copy of the same bytes is slower than the busiest
unit, whose own ceiling stands behind; or the unit, and what its ceiling is of the copy's rate. Two numbers:
IMAD.WIDE at half of IMAD's rate, and at IMAD's. Other dtypes are in {name}.

{rows}
"""


def in_words(bound: Mapping[str, Any]) -> str:
    """A bound in a cell: ceiling, what sets it, and what that is beside memory or the busiest unit."""
    ceiling, best = f"{bound['ceiling'] / 1e12:.2f}", f"{bound['best_ceiling'] / 1e12:.2f}"
    of_unit = ceiling if best == ceiling else f"{ceiling} to {best}"
    if bound["limit"] == "memory":
        return f"{bound['copy'] / 1e12:.2f} memory ({bound['unit']} {of_unit})"
    of_copy = "" if bound["of_copy"] is None else f" ({bound['of_copy']:.0%} of copy)"
    return f"{of_unit} {bound['unit']}{of_copy}"


_CHIPS = (
    *("chip", "", "multiprocessors", "clock, GHz", "fp32 lanes", "fp64 lanes", "int8, dense TOPS"),
    *("vendor's TB/s", "copy, TB/s", "sources"),
)


def _chip(chip: Mapping[str, Any]) -> str:
    cells = (
        *(chip["name"], chip["arch"], chip["num_sms"], f"{chip['clock'] / 1e9:.4g}"),
        *(chip["fma_lanes"], chip["fp64_lanes"], f"{chip['int8_rate'] / 1e12:,.0f}"),
        *(f"{chip['bandwidth'] / 1e12:.3g}", f"{chip['copy'] / 1e12:.3g}"),
        f"{chip['source']}. Copy: {chip['copy_source']}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _passes(rows: list[Mapping[str, Any]], chips: list[Mapping[str, Any]]) -> str:
    """One line a pass and compiler, the compilers beside each other."""
    arches = list(dict.fromkeys(chip["arch"] for chip in chips))
    columns = [(arch, [chip["name"] for chip in chips if chip["arch"] == arch]) for arch in arches]
    found: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}  # by pass, compiler and architecture
    for row in rows:
        compiler, name = row["kernel"].split(" ", 1)
        if " bf16, " in name:
            found.setdefault(name.replace(" bf16", ""), {}).setdefault(compiler, {})[row["arch"]] = row
    names = [name for arch, chips_of in columns for name in (f"{arch} SASS", *chips_of)]
    lines = [f"| pass | by | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for name in sorted(found):
        for compiler, by_arch in sorted(found[name].items()):
            cells = [name, compiler]
            for arch, chips_of in columns:
                row_of = by_arch.get(arch)
                cells.append(f"{row_of['instructions_per_element']:.2f}" if row_of else "")
                bounds = {bound["chip"]: bound for bound in row_of["bounds"]} if row_of else {}
                cells += [in_words(bounds[chip]) if chip in bounds else "" for chip in chips_of]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(content: Mapping[str, Any], name: str) -> str:
    """The page of a result file of this name."""
    head = (f"| {' | '.join(_CHIPS)} |", f"|{'---|' * len(_CHIPS)}")
    chips = "\n".join((*head, *map(_chip, content["chips"])))
    return _HEAD.format(name=name, chips=chips, rows=_passes(content["rows"], content["chips"]))
