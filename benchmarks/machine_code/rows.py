"""What each kernel costs, counted in its machine code: the rows of the tables."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine_code import paths, ways
from benchmarks.machine_code.chips import Bound, bounds, work_of
from benchmarks.machine_code.few_terms import ITEMSIZES
from benchmarks.machine_code.opcodes import classify
from benchmarks.machine_code.reader import Function, Usage, read_cubin, readable_name
from benchmarks.machine_code.rules import Rule, cuda_rules, num_fmas_of
from benchmarks.machine_code.tools import ToolError, extract_cubins
from fedkseed._extras import require_extra

ARCHES = ("sm_80", "sm_90", "sm_100")
#: Elements of a thread times terms in one turn of the loops around the matrix products of many_rademacher, as
#: csrc/cuda/many_rademacher.h has them: kOctet times kWordChunk and times kTermBlock.
TURNS_AROUND_MATRICES = (8 * 64, 8 * 256)
_PACKED_FMA = "FFMA2"  # of two elements, from sm_100 on


@dataclass(frozen=True)
class Row:
    """One kernel, or one way through it, on one architecture.

    work: thread instructions for each element, by the pipe that runs them.
    bytes_per_element: what a pass reads and writes; a loop over terms is not bound by them.
    """

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
    work: dict[str, float]
    bytes_per_element: int
    bounds: tuple[Bound, ...]


def _counts(function: Function, rule: Rule) -> tuple[dict[str, float], float, int]:
    """Opcodes for each element, elements of the hot path, and its barriers."""
    if rule.landmarks:
        opcodes = [instruction.opcode for instruction in ways.loop_past(function, rule.landmarks)]
        num_elements: float = rule.elements_of_turn
    else:
        path = paths.hot_path(function, rule.makes)
        opcodes = path.opcodes
        num_packed = sum(opcode.startswith(_PACKED_FMA) for opcode in opcodes) if rule.counts_fmas else 0
        num_elements = rule.num_elements(path.num_made + num_packed)
    counts = {opcode: n / num_elements for opcode, n in Counter(opcodes).items()}
    if rule.is_matrix_product:
        _, *around = paths.nested_loops(function, rule.makes)
        if len(around) != len(TURNS_AROUND_MATRICES):
            raise ToolError(f"expected two loops around the products of {rule.name}, got {len(around)}")
        for others, turn in zip(around, TURNS_AROUND_MATRICES, strict=True):
            for opcode, n in Counter(others).items():
                counts[opcode] = counts.get(opcode, 0) + n / turn
    return counts, num_elements, sum(opcode.startswith("BAR") for opcode in opcodes)


def measure(function: Function, usage: Usage, arch: str, rule: Rule) -> Row:
    """Count one kernel.

    Raises:
        ToolError: its machine code does not make what the rule says.
    """
    counts, num_elements, num_barriers = _counts(function, rule)
    classes: dict[str, float] = {}
    for opcode, n in counts.items():
        classes[classify(opcode)] = classes.get(classify(opcode), 0) + n
    work = work_of(counts)
    return Row(
        kernel=rule.name,
        arch=arch,
        instructions_per_element=round(work["issue"], 3),
        classes={name: round(n, 3) for name, n in sorted(classes.items(), key=lambda item: -item[1])},
        is_loop_over_terms=rule.is_loop,
        elements_of_hot_path=num_elements,
        barriers_on_hot_path=num_barriers,
        registers=usage.registers,
        stack=usage.stack,
        spills=usage.spills,
        work={pipe: round(n, 3) for pipe, n in work.items()},
        bytes_per_element=rule.bytes_per_element,
        bounds=bounds(work, arch, None if rule.is_loop else rule.bytes_per_element),
    )


def cuda_rows(library: Path, arches: Sequence[str]) -> Iterator[Row]:
    """The kernels of the built library.

    Raises:
        ToolError: it is not there, or lacks an architecture.
    """
    if not library.exists():
        raise ToolError(f"expected the CUDA library at {library}, got none; build it, or --only triton")
    with tempfile.TemporaryDirectory() as folder:
        cubins = extract_cubins(library, Path(folder))
        for arch in arches:
            if arch not in cubins:
                raise ToolError(f"expected machine code for {arch} in {library}, got {', '.join(cubins)}")
            for cubin in cubins[arch]:
                for function, usage in read_cubin(cubin):
                    for rule in cuda_rules(readable_name(function.name)):
                        yield measure(function, usage, arch, rule)


def triton_rows(arches: Sequence[str]) -> Iterator[Row]:
    """The Triton kernels, compiled here.

    Raises:
        MissingExtraError: the package triton is not installed.
    """
    require_extra("bench", "triton")
    from benchmarks.machine_code import triton_kernels

    moved = {"in place": 2, "out": 2, "pair": 3, "noise": 1, "rows": 2}
    residuals_moved = {"in place": 2, "out": 1, "pair": 1, "rows": 1}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        for arch in arches:
            for variant in triton_kernels.VARIANTS:
                compiled = triton_kernels.compile_variant(variant, triton_kernels.TARGETS[arch])
                cubin.write_bytes(compiled.asm["cubin"])
                ((function, usage),) = read_cubin(cubin)
                num_sides = 2 if variant.form == "pair" else 1
                num_moved = moved[variant.form]
                if variant.compensated:
                    num_moved += residuals_moved[variant.form]
                config = triton_kernels.config_of(variant)
                rule = Rule(
                    variant.name,
                    variant.family,
                    variant.num_terms,
                    ITEMSIZES[variant.dtype] * num_moved,
                    num_fmas_of(variant.dtype, num_sides, variant.compensated),
                    config.num_lanes * config.unroll,
                )
                yield measure(function, usage, arch, rule)
