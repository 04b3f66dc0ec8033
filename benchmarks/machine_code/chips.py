"""GPUs that the machine code is for, and what bounds a kernel on each: issue slots, a pipe, or memory.

A ceiling is the rate at which the busiest unit is busy all the time, at the highest clock. Latency, bytes in
flight, prologues and shared memory are not in it, and nothing here is measured.

Which pipe runs an instruction: NVIDIA's profiling guide of Nsight Compute, "Pipelines", and for GA100 and
GH100 forums.developer.nvidia.com/t/302018: integer products share the FMA pipe, all of it on GA100, its
heavy half on GH100; FP16 has a pipe of its own on GA100. Lanes: the table of arithmetic throughput in
NVIDIA's CUDA C++ programming guide, results for each clock and multiprocessor. No page of NVIDIA's that we
know gives these, so they are taken: IMAD.WIDE costs two of IMAD (both ceilings are kept, for two and for
one); I2FP and F2FP run on the ALU; a packed FFMA2 costs two of FFMA; GB100's pipes are GH100's; IMMA
reaches the vendor's int8 rate, which mma.sync does not on GH100 (arXiv:2402.13499) and may not on GB100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.machine_code.opcodes import base, classify
from benchmarks.machine_code.tools import ToolError

#: Thread instructions that a multiprocessor issues or runs each clock, on every chip here.
ISSUE_LANES = 128
ALU_LANES = 64
#: As an OpenCL benchmark of a GH200 has it too, int32 at half of fp32: github.com/mredenti/PowerCapping, in
#: the history of its folder configuration.
PRODUCT_LANES = 64
CONVERSION_LANES = 16
#: What a product of twice the width costs, in IMAD: as taken, and at best.
WIDE_COSTS = (2, 1)
#: Operations of IMMA.16832 for each of its 32 threads; a product and a sum are two.
_MATRIX_OPERATIONS = 16 * 8 * 32 * 2 // 32
_PIPES = {
    "fma": {"FFMA", "FMUL", "FADD"},
    "packed": {"FFMA2", "FMUL2", "FADD2"},
    "half": {"HFMA2", "HADD2", "HMUL2"},
    "product": {"IMAD"},
    "conversion": {"I2F", "F2F", "F2I", "MUFU", "POPC", "FLO", "BREV"},
    "fp64": {"DFMA", "DMUL", "DADD", "DSETP"},
    "tensor": {"IMMA"},
    "alu": {
        *("LOP3", "IADD3", "VIADD", "VIADDMNMX", "SHF", "LEA", "PRMT", "SEL", "SGXT", "BMSK", "IABS", "MOV"),
        *("ISETP", "IMNMX", "VIMNMX", "FSETP", "FSEL", "FMNMX", "PLOP3", "P2R", "R2P", "I2FP", "F2FP"),
    },
}
#: Kinds of instructions that take an issue slot and no arithmetic pipe, or one that never limits.
_NO_PIPE = ("move", "memory", "uniform", "control")


@dataclass(frozen=True)
class Chip:
    """A GPU.

    clock: the highest, in Hz. *_lanes: thread instructions each clock and multiprocessor.
    half_lanes: 0 if the FMA pipe runs FP16.
    int8_rate: the vendor's, dense operations a second of the tensor cores.
    bandwidth: the vendor's, bytes a second.
    copy: bytes read plus bytes written a second by a copy, the highest that we know of.
    """

    name: str
    arch: str
    num_sms: int
    clock: float
    fma_lanes: int
    half_lanes: int
    fp64_lanes: int
    int8_rate: float
    bandwidth: float
    copy: float
    source: str
    copy_source: str


_AZURE = "github.com/Azure/AI-benchmarking-guide, BabelStream copy"
_A100 = Chip(
    name="A100",
    arch="sm_80",
    num_sms=108,
    clock=1.41e9,
    fma_lanes=64,
    half_lanes=128,
    fp64_lanes=32,
    int8_rate=624e12,
    bandwidth=2.039e12,
    copy=1.74e12,
    source="NVIDIA's Ampere architecture whitepaper and A100 datasheet (SXM, 80 GB)",
    copy_source="github.com/RRZE-HPC/gpu-benches, gpu-stream/a100_80.txt, scale",
)
_H100 = Chip(
    name="H100",
    arch="sm_90",
    num_sms=132,
    clock=1.98e9,  # the datasheet's 67 TFLOPS fp32 are 132 x 128 x 2 of it
    fma_lanes=128,
    half_lanes=0,
    fp64_lanes=64,
    int8_rate=1979e12,
    bandwidth=3.35e12,
    copy=2.90e12,
    source="NVIDIA's Hopper architecture whitepaper and H100 datasheet (SXM)",
    copy_source=_AZURE,
)
_H200 = replace(_H100, name="H200", bandwidth=4.8e12, copy=4.01e12, source="NVIDIA's H200 datasheet (SXM)")
_B200 = Chip(
    name="B200",
    arch="sm_100",
    num_sms=148,
    clock=1.965e9,
    fma_lanes=128,
    half_lanes=0,
    fp64_lanes=64,
    int8_rate=4500e12,
    bandwidth=8.0e12,
    copy=6.7e12,
    source="NVIDIA's DGX B200 datasheet, an eighth; multiprocessors and clock: "
    "github.com/SemiAnalysisAI/microbench-blackwell",
    copy_source="none known; the H200's share of the vendor's number (reads alone reach 6.8 TB/s there)",
)
CHIPS = (_A100, _H100, _H200, _B200)


@dataclass(frozen=True)
class Bound:
    """What limits a kernel on a chip.

    limit: the unit, or memory. unit: the busiest one.
    ceiling: elements (times terms, in a loop) a second that the unit does; best_ceiling: with the lower
    cost of wide products. copy: elements a second at the copy's bandwidth; of_copy: the ceiling beside
    it. Both are None in a loop over terms.
    """

    chip: str
    limit: str
    unit: str
    ceiling: float
    best_ceiling: float
    copy: float | None
    of_copy: float | None


def work_of(counts: Mapping[str, float]) -> dict[str, float]:
    """What each pipe has to do for an element, in thread instructions; `issue`: all of them.

    Raises:
        ToolError: an arithmetic instruction whose pipe is not known.
    """
    work = {"issue": sum(counts.values())}
    for opcode, n in counts.items():
        pipe = next((name for name, bases in _PIPES.items() if base(opcode) in bases), None)
        if opcode.startswith(("IMAD.WIDE", "IMAD.HI")):
            pipe = "wide"
        if pipe is not None:
            work[pipe] = work.get(pipe, 0) + n
        elif classify(opcode) not in _NO_PIPE:
            raise ToolError(
                f"expected an instruction whose pipe chips.py knows, got {opcode}; add it to _PIPES"
            )
    return work


def _clocks(work: Mapping[str, float], chip: Chip, wide_cost: int) -> dict[str, float]:
    """Clocks of a multiprocessor that each unit is busy for one element."""
    of = {name: work.get(name, 0.0) for name in ("issue", "wide", *_PIPES)}
    products = of["product"] + wide_cost * of["wide"]
    fma = of["fma"] + 2 * of["packed"] + products + (0 if chip.half_lanes else of["half"])
    tensor_lanes = chip.int8_rate / _MATRIX_OPERATIONS / (chip.num_sms * chip.clock)
    return {
        "issue": of["issue"] / ISSUE_LANES,
        "FMA pipe": fma / chip.fma_lanes,
        "integer products": products / PRODUCT_LANES,
        "ALU": of["alu"] / ALU_LANES,
        "conversions": of["conversion"] / CONVERSION_LANES,
        "FP16 pipe": of["half"] / chip.half_lanes if chip.half_lanes else 0,
        "FP64 pipe": of["fp64"] / chip.fp64_lanes,
        "tensor cores": of["tensor"] / tensor_lanes,
    }


def bounds(work: Mapping[str, float], arch: str, bytes_per_element: int | None) -> tuple[Bound, ...]:
    """The bounds on each chip of an architecture.

    Args:
        bytes_per_element: None if memory does not count, in a loop over terms.
    """
    found = []
    for chip in CHIPS:
        if chip.arch != arch:
            continue
        clocks, best_clocks = (_clocks(work, chip, cost) for cost in WIDE_COSTS)
        unit = max(clocks, key=lambda name: clocks[name])
        ceiling = chip.num_sms * chip.clock / clocks[unit]
        copy = chip.copy / bytes_per_element if bytes_per_element else None
        found.append(
            Bound(
                chip=chip.name,
                limit="memory" if copy is not None and copy < ceiling else unit,
                unit=unit,
                ceiling=round(ceiling),
                best_ceiling=round(chip.num_sms * chip.clock / max(best_clocks.values())),
                copy=None if copy is None else round(copy),
                of_copy=None if copy is None else round(ceiling / copy, 3),
            )
        )
    return tuple(found)
