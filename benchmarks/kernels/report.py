"""The Markdown report of result files: `python -m benchmarks.kernels.report benchmarks/results/NAME.json`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.memory import LIMIT_BYTES
from benchmarks.kernels import cases, results

Row = Mapping[str, Any]

#: A row is called bound by what alone explains at least this share of its time.
BOUND_SHARE = 0.7

#: Load average that a machine may have without this run before its report says that it was busy.
IDLE_LOAD = 0.5

_AGAINST = (cases.AS_WRITTEN, cases.WITHOUT_DECAY, cases.RANDN_LIKE, cases.BERNOULLI)


def build(document: results.Document) -> str:
    """The report as Markdown.

    Raises:
        ResultError: the document does not hold what it must.
    """
    results.check(document)
    rows: list[Row] = document["rows"]
    parts = [_heading(document), _summary(rows)]
    parts += [_case(rows, case) for case in dict.fromkeys(row["case"] for row in rows)]
    parts.append(_memory(document["memory"]))
    return "\n".join(parts)


def _heading(document: results.Document) -> str:
    environment, settings = document["environment"], document["settings"]
    flags = ", ".join(environment["cpu_flags"]) or "no flags"
    kernels = f"{environment['fedkseed_kernels']} (contract {environment['contract_version']})"
    facts = {
        "CPU": f"{environment['cpu']} ({environment['machine']}; {flags})",
        "Logical CPUs": environment["num_cpus"],
        "Threads": settings["num_threads"],
        "Instruction set chosen": results.best_isa(document["rows"]),
        "Weights": f"{settings['model']}, {document['num_parameters']:,} parameters in {settings['dtype']}",
        "Versions": f"fedkseed-kernels {kernels}, "
        f"torch {environment['torch']}, NumPy {environment['numpy']}, Python {environment['python']}, "
        f"{environment['system']}",
        "Commit": environment["commit"],
        "Date": environment["date"],
        "Load before and after": _load(environment, settings["num_threads"]),
        "Command": f"`{document['command']}`",
    }
    lines = ["# Kernel benchmark", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += [
        "",
        "Medians; in brackets the 20th and 80th percentile. *Extrapolated*: one seed's pass, median times K.",
    ]
    lines += ["How to read the columns: `benchmarks/README.md`.", ""]
    return "\n".join(lines)


def _load(environment: Mapping[str, Any], num_threads: int) -> str:
    before, after = environment["load_average"], environment["load_average_after"]
    busy = before > IDLE_LOAD or after > num_threads + IDLE_LOAD
    return f"{before}, {after}" + (
        " **other processes ran: times and ratios are not to be relied on**" if busy else ""
    )


def _summary(rows: Sequence[Row]) -> str:
    """How many times faster ours is, one line a case and instruction set."""
    lines = ["## Times faster", ""]
    lines += [_table_row(["operation", "isa", *(f"than {name}" for name in _AGAINST), "seconds"])]
    lines += [_table_row(["---"] * (3 + len(_AGAINST)))]
    for row in rows:
        if row["kind"] == "ours":
            ratios = [_ratio(row, _find(rows, row["case"], name)) for name in _AGAINST]
            lines.append(_table_row([row["title"], row["isa"], *ratios, _seconds(row)]))
    return "\n".join([*lines, ""])


def _case(rows: Sequence[Row], case: str) -> str:
    listed = [row for row in rows if row["case"] == case]
    copy = next(row for row in listed if row["kind"] == "copy")
    lines = [f"## {listed[0]['title']}", ""]
    header = ["", "ours is faster by", "seconds", "samples", "GB/s", "of copy", "G normals/s", "bound by"]
    lines += [_table_row(header), _table_row(["---"] * len(header))]
    first_own = next((row for row in listed if row["kind"] == "ours"), None)
    for row in listed:
        num = f"{len(row['samples'])} of one seed" if row["extrapolated"] else str(len(row["samples"]))
        lines.append(
            _table_row(
                [
                    row["contestant"] + (" (extrapolated)" if row["extrapolated"] else ""),
                    _ratio(first_own, row) if row["kind"] in ("official", "torch") else "",
                    _seconds(row),
                    num,
                    "" if row["kind"] == "noise" else _number(row["gb_per_s"]),
                    "" if row["kind"] in ("noise", "copy") else f"{row['gb_per_s'] / copy['gb_per_s']:.1%}",
                    "" if row["kind"] == "copy" else _number(row["g_normals_per_s"]),
                    bound(row, rows),
                ]
            )
        )
    return "\n".join([*lines, ""])


def bound(row: Row, rows: Sequence[Row]) -> str:
    """What bounds a row: the share of its time that its memory traffic, and its arithmetic, would take alone.

    Memory: the weights read and written once at the case's copy bandwidth. Arithmetic, for ours: the normals
    at the rate of the same kernel's longest loop over seeds. For torch's passes: drawing the noise alone.
    """
    if row["kind"] in ("copy", "noise"):
        return ""
    copy = _find(rows, row["case"], cases.COPY)
    noise = _find(rows, row["case"], cases.NOISE_ALONE)
    seconds = row["seconds"]["median"]
    if row["kind"] != "ours":
        if noise is None or (row["family"] == "rademacher" and row["kind"] == "torch"):
            return ""
        num_passes = 2 if row["operation"] == "update" and row["kind"] == "official" else 1
        share = num_passes * noise["seconds"]["median"] / seconds
        return f"{share:.0%} is drawing noise, the rest temporaries"
    longest = _longest_loop(row, rows)
    if longest is row:
        return (
            "arithmetic: this row defines the loop's rate"
            if row["num_seeds"] > 1
            else "unknown: no loop over seeds"
        )
    memory = row["num_bytes"] / (copy["gb_per_s"] * 1e9) / seconds if copy is not None else 0.0
    arithmetic = row["g_normals_per_s"] / longest["g_normals_per_s"]
    shares = f"memory {memory:.0%}, arithmetic {arithmetic:.0%} of the time"
    name, share = max((("memory", memory), ("arithmetic", arithmetic)), key=lambda item: item[1])
    return f"{name} ({shares})" if share >= BOUND_SHARE else f"neither alone ({shares})"


def _longest_loop(row: Row, rows: Sequence[Row]) -> Row:
    same = [r for r in rows if r["kind"] == "ours" and (r["isa"], r["family"]) == (row["isa"], row["family"])]
    return max(same, key=lambda r: int(r["num_seeds"]))


def _memory(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return "## Peak memory\n\nNot measured on this system.\n"
    header = ["call", "elements", "K", "dtype", "tensor, bytes", "growth of the peak, bytes"]
    lines = ["## Peak memory", "", _table_row(header), _table_row(["---"] * len(header))]
    for entry in entries:
        cells = [entry["operation"], f"{entry['num_elements']:,}", entry["num_seeds"], entry["dtype"]]
        lines.append(_table_row([*cells, f"{entry['tensor_bytes']:,}", f"{entry['growth_bytes']:,}"]))
    lines += [
        "",
        f"perturb and rebuild must stay under {LIMIT_BYTES:,} bytes; randn_like is the control.",
        "",
    ]
    return "\n".join(lines)


def _find(rows: Sequence[Row], case: str, contestant: str) -> Row | None:
    return next((row for row in rows if (row["case"], row["contestant"]) == (case, contestant)), None)


def _ratio(own: Row | None, other: Row | None) -> str:
    if own is None or other is None:
        return ""
    return f"**{_number(other['seconds']['median'] / own['seconds']['median'])}x**"


def _seconds(row: Row) -> str:
    median, p20, p80 = (_number(row["seconds"][name]) for name in ("median", "p20", "p80"))
    return median if len(row["samples"]) == 1 else f"{median} [{p20}, {p80}]"


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.2e}"


def _table_row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def write(path: Path) -> Path:
    """Writes the report beside its result file; returns its path."""
    target = path.with_suffix(".md")
    target.write_text(build(results.read(path)))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files written by benchmarks.kernels")
    for path in parser.parse_args().results:
        print(write(path))


if __name__ == "__main__":
    main()
