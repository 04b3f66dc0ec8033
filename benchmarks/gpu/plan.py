"""The plan of a run: its parts in the order of their value, and what each is to take and may take.

The estimates are those of a review by machine code and host measurements, for an H200 with 16 cores; no GPU
has run the parts yet. Each holds some 5 s for the part's own process: Python, torch, a context on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: Seconds of a whole run; the estimates of the default parts add up to at most as many.
SECONDS = 420
#: Seconds before the first part begins: Python and torch of the command itself, nvidia-smi.
START_SECONDS = 10
#: Names of the CUDA library's kernels, without namespaces and template arguments; ncu and compute-sanitizer
#: choose kernels by them.
KERNELS = ("few_terms", "many_gaussian", "many_rademacher", "strided")
#: Backends of ours by the names that rows give them.
BACKENDS = {"cuda": "native", "triton": "triton"}


@dataclass(frozen=True)
class Settings:
    """What is common to all parts of a run.

    Attributes:
        dtypes: of the weights that passes are timed over, keys of `constants.DTYPES`; the first one in the
            part `passes`, the others in `other-dtypes`.
        is_dry_run: whether tiny sizes run on the processor, to try the parts; figures then mean nothing.
    """

    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    is_dry_run: bool = False

    @property
    def device(self) -> str:
        """The device of the tensors, "cuda" or "cpu"."""
        return "cpu" if self.is_dry_run else "cuda"


@dataclass(frozen=True)
class Part:
    """A part of a run, in a process of its own.

    Attributes:
        name: as `--parts` has it.
        run: its function, as "module.function" of `benchmarks.gpu`.
        log: the log that its output goes to; some parts share one.
        estimate: seconds that it is expected to take; with fewer left it is not begun.
        bound: seconds after which it is ended.
        shows: what its result says.
        is_default: whether it runs without being asked for.
    """

    name: str
    run: str
    log: str
    estimate: int
    bound: int
    shows: str
    is_default: bool = True


PARTS = (
    Part("smoke", "smoke.run", "measure", 25, 60, "every kind of pass, CUDA and Triton, has the CPU's bits"),
    Part(
        "passes",
        "passes.first_dtype",
        "measure",
        50,
        90,
        "copy bandwidth; passes over 1.4 G weights of the first dtype: seconds on the GPU and on the host",
    ),
    Part("native-tests", "tests.native", "tests", 35, 75, "tests/gpu of the CUDA library, bit for bit"),
    Part(
        "steps-1",
        "steps.batch_1",
        "measure",
        40,
        75,
        "whole steps of a Llama of 1.2 G parameters, batch 1 x 512, in every storage mode",
    ),
    Part("triton-tests", "tests.triton", "tests", 55, 110, "tests/gpu of the Triton kernels, bit for bit"),
    Part("memcheck", "tests.memcheck", "sanitizer", 75, 110, "no kernel reads or writes outside its tensors"),
    Part("ncu", "ncu.run", "ncu", 25, 60, "what bounds the CUDA kernels: issue slots, pipes, DRAM, stalls"),
    Part("steps-8", "steps.batch_8", "measure", 55, 80, "the same steps, batch 8, without fp32 forwards"),
    Part("other-dtypes", "passes.other_dtypes", "measure", 40, 70, "the passes over the other dtypes"),
    Part(
        "steps-memory",
        "steps.memory",
        "measure",
        65,
        120,
        "peak memory of each step beyond that of its forwards",
        is_default=False,
    ),
    Part("racecheck", "tests.racecheck", "sanitizer", 60, 110, "no race in shared memory", is_default=False),
)
BY_NAME = {part.name: part for part in PARTS}
DEFAULT = tuple(part.name for part in PARTS if part.is_default)


def estimate(names: Iterable[str]) -> int:
    """Seconds that a run of these parts is expected to take, its own start included."""
    return START_SECONDS + sum(BY_NAME[name].estimate for name in names)


def table() -> str:
    """The plan as a table in Markdown."""
    lines = ["| part | expected | ended after | shows |", "| --- | --- | --- | --- |"]
    for part in PARTS:
        name = f"`{part.name}`" + ("" if part.is_default else ", only when asked for")
        lines.append(f"| {name} | {part.estimate} s | {part.bound} s | {part.shows} |")
    lines.append(f"| the default parts with {START_SECONDS} s to start | {estimate(DEFAULT)} s | | |")
    return "\n".join(lines)
