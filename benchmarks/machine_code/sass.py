"""What every GPU kernel costs, read from machine code: instructions an element, registers, spills, ceilings.

    python -m benchmarks.machine_code.sass [--arch sm_90] [--json [FILE]] [--check] [--write-budget]

CUDA kernels come out of the built library, Triton's are compiled here as the package launches them. Counted
is the way that few_terms.py names, else the hot path, `paths.hot_path`: the innermost loop that makes most,
or the way through the kernel. Of a kernel of matrix products the loops around it are counted too, where its
operands are made. No GPU is needed and nothing is measured: a ceiling is what a chip could do at most,
chips.py.
--json without a file renews benchmarks/results/sass.json and its page.
Exit status: 0, 1 past the committed budget (--check), 2 if something needed is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.machine_code.chips import CHIPS
from benchmarks.machine_code.opcodes import CLASSES
from benchmarks.machine_code.page import in_words, page
from benchmarks.machine_code.rows import ARCHES, Row, cuda_rows, triton_rows
from benchmarks.machine_code.tools import ToolError
from fedkseed._extras import MissingExtraError

HERE = Path(__file__).resolve().parent
BUDGET = HERE / "budget.json"
RESULT = environment.REPOSITORY / "benchmarks" / "results" / "sass.json"
LIBRARY = environment.REPOSITORY / "fedkseed_kernels" / "_lib" / "libfedkseed_cuda.so"
#: What a budget leaves to another patch release of a compiler.
MARGIN = 1.01


def problems(rows: Sequence[Row], budget: dict[str, dict[str, Any]], arches: Sequence[str]) -> list[str]:
    """What is past the budget or not in it; spills, stack and barriers in a loop over terms never are."""
    found = []
    seen = {(row.arch, row.kernel): row for row in rows}
    for arch in arches:
        for kernel, limits in budget.get(arch, {}).items():
            row = seen.get((arch, kernel))
            if row is None:
                found.append(f"{arch} {kernel}: expected in the budget, got no such kernel")
                continue
            for name, limit in limits.items():
                if getattr(row, name) > limit:
                    found.append(
                        f"{arch} {kernel}: expected {name} at most {limit}, got {getattr(row, name)}"
                    )
    for (arch, kernel), row in seen.items():
        if kernel not in budget.get(arch, {}):
            found.append(f"{arch} {kernel}: expected a budget, got none; run with --write-budget")
        if row.spills or row.stack:
            found.append(f"{arch} {kernel}: expected no spills or stack, got {row.spills}, {row.stack}")
        if row.is_loop_over_terms and row.barriers_on_hot_path:
            found.append(f"{arch} {kernel}: expected no barrier in the loop, got {row.barriers_on_hot_path}")
    return found


def make_budget(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """A budget that these rows keep."""
    budget: dict[str, dict[str, Any]] = {}
    for row in rows:
        budget.setdefault(row.arch, {})[row.kernel] = {
            "instructions_per_element": round(row.instructions_per_element * MARGIN, 2),
            "registers": row.registers,
        }
    return budget


def print_table(rows: Sequence[Row]) -> None:
    """One line a kernel."""
    names = [name for name, _ in CLASSES] + ["control"]
    head = "  ".join(f"{name:>{max(len(name), 6)}}" for name in names)
    print(f"{'kernel':<48} {'arch':<7} {'per element':>11}  {head}  registers  spills  ceilings, T/s")
    for row in rows:
        classes = "  ".join(f"{row.classes.get(name, 0):>{max(len(name), 6)}.2f}" for name in names)
        per = f"{row.instructions_per_element:.2f}{'*' if row.is_loop_over_terms else ' '}"
        ceilings = "; ".join(f"{bound.chip} {in_words(asdict(bound))}" for bound in row.bounds)
        print(
            f"{row.kernel:<48} {row.arch:<7} {per:>11}  {classes}  {row.registers:>9}  {row.spills:>6}  "
            f"{ceilings}"
        )
    print("* per element and term. Ceilings: T elements (times terms) a second, as page.py explains them.")


def write_result(rows: Sequence[Row], file: Path) -> None:
    """The rows, in an order that no linker changes, with the chips as a result file; its page beside it."""
    content = {
        "environment": environment.describe(num_threads=1),
        "chips": [asdict(chip) for chip in CHIPS],
        "rows": [asdict(row) for row in sorted(rows, key=lambda row: (row.kernel, ARCHES.index(row.arch)))],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(content, file.name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, compare."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code.sass", description=description)
    parser.add_argument("--arch", choices=ARCHES, action="append", help="only this one (default: all)")
    parser.add_argument(
        "--library", type=Path, default=LIBRARY, help="the CUDA library (default: the package's)"
    )
    parser.add_argument("--only", choices=("cuda", "triton"), help="only these kernels")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=RESULT,
        metavar="FILE",
        help=f"write the rows to FILE (default: {RESULT.name} of the results) and its page beside it",
    )
    parser.add_argument("--check", action="store_true", help=f"fail past {BUDGET.name}")
    parser.add_argument("--write-budget", action="store_true", help=f"write {BUDGET.name} from these rows")
    options = parser.parse_args(arguments)
    arches = tuple(options.arch or ARCHES)
    rows: list[Row] = []
    try:
        if options.only != "triton":
            rows += cuda_rows(options.library, arches)
        if options.only != "cuda":
            rows += triton_rows(arches)
    except (ToolError, MissingExtraError) as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    if options.json:
        write_result(rows, options.json)
    budget: dict[str, dict[str, Any]] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if options.write_budget:
        for arch, kernels in make_budget(rows).items():
            kept = budget.get(arch, {}) if options.only else {}
            budget[arch] = {
                **{name: limits for name, limits in kept.items() if not name.startswith(options.only)},
                **kernels,
            }
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    if not options.check:
        return 0
    if options.only:
        budget = {
            arch: {name: limits for name, limits in kernels.items() if name.startswith(options.only)}
            for arch, kernels in budget.items()
        }
    found = problems(rows, budget, arches)
    for problem in found:
        print(f"sass: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
