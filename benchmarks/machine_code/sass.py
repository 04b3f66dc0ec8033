"""What every GPU kernel costs, read from machine code: instructions an element, registers, spills, ceilings.

    python -m benchmarks.machine_code.sass [--arch sm_90] [--json FILE] [--check] [--write-budget]

CUDA kernels come out of the built library, Triton's are compiled here as the package launches them. Counted
is the hot path, `paths.hot_path`: the innermost loop that makes most, else the way through the kernel.
Of a kernel of matrix products the loops around it are counted too, where its operands are made.
No GPU is needed. A ceiling is what an H100 could do at most, by issue slots and by memory; nothing is
measured. Exit status: 0, 1 past the committed budget (--check), 2 if something needed is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.machine_code import paths, reader
from benchmarks.machine_code.opcodes import CLASSES, classify
from benchmarks.machine_code.reader import Function, Usage
from benchmarks.machine_code.tools import ToolError, extract_cubins
from fedkseed._extras import MissingExtraError, require_extra

HERE = Path(__file__).resolve().parent
BUDGET = HERE / "budget.json"
LIBRARY = environment.REPOSITORY / "fedkseed_kernels" / "_lib" / "libfedkseed_cuda.so"
ARCHES = ("sm_80", "sm_90", "sm_100")

#: H100 SXM: 132 SMs issue 4 instructions for 32 lanes each clock of 1.755 GHz; 3.35 TB/s.
ISSUE_SLOTS_PER_SECOND = 132 * 128 * 1.755e9
BYTES_PER_SECOND = 3.35e12
#: What a budget leaves to another patch release of a compiler.
MARGIN = 1.01
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}

_INTEGER_TO_FLOAT = re.compile(r"I2FP?(\.F32\.S32|\.S32)?$")  # two a word, which gives two normals
_FMA = re.compile(r"[FD]FMA")  # of a short Rademacher kernel: alpha w + acc, and Rule.num_fmas says what else
_PACKED_FMA = "FFMA2"  # of two elements, from sm_100 on
_PHILOX = re.compile(r"IMAD\.WIDE")  # 16 to 20 a call
_MATRIX = re.compile(r"IMMA")  # of 16 elements and 32 terms, by 32 threads
_ELEMENTS_OF_MATRIX = 16

#: Elements of a thread times terms in one turn of the loops around the matrix products of many_rademacher, as
#: csrc/cuda/many_rademacher.h has them: kOctet times kWordChunk and times kTermBlock.
TURNS_AROUND_MATRICES = (8 * 64, 8 * 256)


@dataclass(frozen=True)
class Rule:
    """How to read one kernel: its name in the tables, what makes an element, and the memory that one moves.

    num_terms 0: a loop over any number of terms; the count is then per element and term.
    num_fmas: of a short Rademacher kernel, fma that an element takes (`num_fmas_of`).
    elements_of_turn: of a loop over Rademacher terms, elements times terms of a turn; 0 if they are summed
    as matrix products.
    """

    name: str
    family: str
    num_terms: int
    bytes_per_element: int
    num_fmas: int = 1
    elements_of_turn: int = 8

    @property
    def makes(self) -> re.Pattern[str]:
        if self.family == "gaussian":
            return _INTEGER_TO_FLOAT
        if not self.is_loop:
            return _FMA
        return _PHILOX if self.elements_of_turn else _MATRIX

    @property
    def is_loop(self) -> bool:
        return self.num_terms == 0

    def num_elements(self, num_made: int) -> float:
        """Elements (times terms, in a loop) of a path that makes so many.

        Raises:
            ToolError: a turn of the loop makes no noise.
        """
        if self.family == "gaussian":
            return num_made / max(self.num_terms, 1)
        if not self.is_loop:
            return num_made / self.num_fmas
        if not self.elements_of_turn:
            return num_made * _ELEMENTS_OF_MATRIX
        if num_made < paths.PHILOX_PRODUCTS:
            raise ToolError(f"expected Philox in a turn of the loop of {self.name}, got {num_made} products")
        return self.elements_of_turn


def num_fmas_of(dtype: str, num_sides: int, is_compensated: bool) -> int:
    """alpha w + acc on each side, and w itself where it is a compensated fp16 weight."""
    return num_sides + (is_compensated and dtype == "fp16")


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    kernel: str
    arch: str
    instructions_per_element: float
    classes: dict[str, float]
    is_loop_over_terms: bool
    elements_of_hot_path: float
    barriers_on_hot_path: int
    registers: int
    stack: int
    spills: int
    issue_ceiling: float
    memory_ceiling: float

    @property
    def bound(self) -> str:
        """What limits one pass (a loop over terms: one of a single term) on an H100."""
        return "memory" if self.memory_ceiling < self.issue_ceiling else "issue"


def measure(function: Function, usage: Usage, arch: str, rule: Rule) -> Row:
    """Count one kernel.

    Raises:
        ToolError: its machine code does not make what the rule says.
    """
    path = paths.hot_path(function, rule.makes)
    num_packed = sum(opcode.startswith(_PACKED_FMA) for opcode in path.opcodes) if rule.makes is _FMA else 0
    num_elements = rule.num_elements(path.num_made + num_packed)
    counts = {name: n / num_elements for name, n in Counter(map(classify, path.opcodes)).items()}
    if rule.makes is _MATRIX:
        _, *around = paths.nested_loops(function, rule.makes)
        if len(around) != len(TURNS_AROUND_MATRICES):
            raise ToolError(f"expected two loops around the products of {rule.name}, got {len(around)}")
        for opcodes, turn in zip(around, TURNS_AROUND_MATRICES, strict=True):
            for name, n in Counter(map(classify, opcodes)).items():
                counts[name] = counts.get(name, 0) + n / turn
    total = sum(counts.values())
    return Row(
        kernel=rule.name,
        arch=arch,
        instructions_per_element=round(total, 3),
        classes={name: round(n, 3) for name, n in sorted(counts.items(), key=lambda item: -item[1])},
        is_loop_over_terms=rule.is_loop,
        elements_of_hot_path=num_elements,
        barriers_on_hot_path=sum(opcode.startswith("BAR") for opcode in path.opcodes),
        registers=usage.registers,
        stack=usage.stack,
        spills=usage.spills,
        issue_ceiling=ISSUE_SLOTS_PER_SECOND / total,
        memory_ceiling=BYTES_PER_SECOND / rule.bytes_per_element,
    )


_CUDA_NAME = re.compile(r"(\w+)<(\w+)(?:, (\w+))?(?:, (\d+))?(?:, ([01]))?>$")


def cuda_rule(name: str) -> Rule | None:
    """The rule of a kernel of csrc/cuda by its readable name; None for the test-only ones, without a dtype.

    Raises:
        ToolError: the name is none that this tool knows.
    """
    found = _CUDA_NAME.match(name)
    if found is None:
        return None
    kernel, storage, family, num_terms, compensated = found.groups()
    dtype = storage.lower()
    if kernel in ("many_gaussian", "many_rademacher") and family is None:
        family = kernel.removeprefix("many_")
    elif kernel not in ("few_terms", "strided") or family is None:
        raise ToolError(
            f"expected a kernel that benchmarks/machine_code/sass.py has a rule for, got {name}; add one"
        )
    family = family.lower()
    terms = int(num_terms or 0)
    form = f"K = {terms}" if terms else "K loop"
    is_compensated = compensated == "1"
    suffix = ", runs" if kernel == "strided" else ", compensated" if is_compensated else ""
    label = f"cuda {family} {dtype}, {form}{suffix}"
    of_turn = 0 if kernel == "many_rademacher" else 8
    moved = 2 * ITEMSIZES[dtype] * (2 if is_compensated else 1)
    # Kernels of two terms serve both kinds of weights; most fma lie on the way of compensated ones.
    num_fmas = num_fmas_of(dtype, 1, is_compensated or terms > 1)
    return Rule(label, family, terms, moved, num_fmas, of_turn)


def cuda_rows(library: Path, arches: Sequence[str]) -> Iterator[Row]:
    """The kernels of the built library."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = extract_cubins(library, Path(folder))
        for arch in arches:
            if arch not in cubins:
                raise ToolError(f"expected machine code for {arch} in {library}, got {', '.join(cubins)}")
            for cubin in cubins[arch]:
                for function, usage in reader.read_cubin(cubin):
                    rule = cuda_rule(reader.readable_name(function.name))
                    if rule is not None:
                        yield measure(function, usage, arch, rule)


def triton_rows(arches: Sequence[str]) -> Iterator[Row]:
    """The Triton kernels, compiled here.

    Raises:
        MissingExtraError: the package triton is not installed.
    """
    require_extra("bench", "triton")
    from benchmarks.machine_code import triton_kernels

    moved = {"in place": 2, "pair": 3, "noise": 1, "rows": 2}
    residuals_moved = {"in place": 2, "pair": 1, "rows": 1}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        for arch in arches:
            for variant in triton_kernels.VARIANTS:
                compiled = triton_kernels.compile_variant(variant, triton_kernels.TARGETS[arch])
                cubin.write_bytes(compiled.asm["cubin"])
                ((function, usage),) = reader.read_cubin(cubin)
                num_sides = 2 if variant.form == "pair" else 1
                num_moved = moved[variant.form]
                if variant.compensated:
                    num_moved += residuals_moved[variant.form]
                config = triton_kernels.config_of(variant)
                of_turn = config.num_lanes * config.unroll
                rule = Rule(
                    variant.name,
                    variant.family,
                    variant.num_terms,
                    ITEMSIZES[variant.dtype] * num_moved,
                    num_fmas_of(variant.dtype, num_sides, variant.compensated),
                    of_turn,
                )
                yield measure(function, usage, arch, rule)


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
    print(f"{'kernel':<48} {'arch':<7} {'per element':>11}  {head}  registers  spills  T/s issue  T/s memory")
    for row in rows:
        classes = "  ".join(f"{row.classes.get(name, 0):>{max(len(name), 6)}.2f}" for name in names)
        per = f"{row.instructions_per_element:.2f}{'*' if row.is_loop_over_terms else ' '}"
        print(
            f"{row.kernel:<48} {row.arch:<7} {per:>11}  {classes}  {row.registers:>9}  {row.spills:>6}  "
            f"{row.issue_ceiling / 1e12:>9.2f}  {row.memory_ceiling / 1e12:>10.2f}"
        )
    print(
        "* per element and term. Ceilings: T elements/s of an H100, by issue slots and, one pass, by memory."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, compare."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code.sass", description=description)
    parser.add_argument("--arch", choices=ARCHES, action="append", help="only this one (default: all)")
    parser.add_argument(
        "--library", type=Path, default=LIBRARY, help="the CUDA library (default: the package's)"
    )
    parser.add_argument("--only", choices=("cuda", "triton"), help="only these kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--check", action="store_true", help=f"fail past {BUDGET.name}")
    parser.add_argument("--write-budget", action="store_true", help=f"write {BUDGET.name} from these rows")
    options = parser.parse_args(arguments)
    arches = tuple(options.arch or ARCHES)
    rows: list[Row] = []
    try:
        if options.only != "triton":
            if not options.library.exists():
                raise ToolError(
                    f"expected the CUDA library at {options.library}, got none; build it, or --only triton"
                )
            rows += cuda_rows(options.library, arches)
        if options.only != "cuda":
            rows += triton_rows(arches)
    except (ToolError, MissingExtraError) as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    if options.json:
        described = environment.describe(num_threads=1)
        content = {"environment": described, "rows": [{**asdict(row), "bound": row.bound} for row in rows]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    budget: dict[str, dict[str, Any]] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if options.write_budget:
        for arch, kernels in make_budget(rows).items():
            budget[arch] = {**budget.get(arch, {}), **kernels}
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
