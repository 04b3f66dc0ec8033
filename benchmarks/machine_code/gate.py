"""What the noise contract costs: instructions per normal of its bare loop over seeds, read from machine code.

    python -m benchmarks.machine_code.gate [--arch sm_90] [--json FILE]

Philox, the Gaussian transform and one fma are compiled by nvcc (gate.cu) and by Triton (gate_triton.py) and
disassembled, and the instructions of the innermost loop counted. No GPU is needed. The rates of the CPU
kernels on this machine are recorded beside them. Exit status: 0 within the limits, 1 past one of them, 2 if
something needed is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.machine_code.paths import innermost_loop
from benchmarks.machine_code.reader import read_cubin
from benchmarks.machine_code.tools import ToolError as GateError
from benchmarks.machine_code.tools import disassembly, run
from fedkseed._extras import MissingExtraError, require_extra

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "gate.cu"
INCLUDE = environment.REPOSITORY / "csrc" / "include"

#: Most instructions per normal, without spills.
LIMITS = {"nvcc": 24.8, "triton": 26.0}
GROUPS_PER_THREAD = (4, 8)
GROUP_SIZE = 8
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-cubin")

CPU_NUM_ELEMENTS = 1 << 13
CPU_NUM_SEEDS = 1024
CPU_REPEATS = 9


@dataclass(frozen=True)
class Count:
    """The loop of one kernel. Instruction counts are per thread and iteration."""

    compiler: str
    arch: str
    groups_per_thread: int
    instructions_per_normal: float
    limit: float
    registers: int
    spill_instructions: int
    instructions: dict[str, int]

    @property
    def passed(self) -> bool:
        return self.instructions_per_normal <= self.limit and self.spill_instructions == 0


def find_nvcc() -> str:
    """The CUDA compiler, of $CUDA_HOME or on PATH.

    Raises:
        GateError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        raise GateError("expected nvcc in $CUDA_HOME/bin or on PATH, got none; install the CUDA toolkit")
    return found


def count_loop(cubin: Path, compiler: str, arch: str, groups_per_thread: int) -> Count:
    """Disassemble a kernel and count its loop.

    Raises:
        GateError: the loop found does not make the expected number of normals.
    """
    sass = disassembly(cubin)
    ((_, usage),) = read_cubin(cubin)
    loop = innermost_loop(sass)
    num_normals = GROUP_SIZE * groups_per_thread
    # A word converts two integers to float, for the exponent and for the angle, and gives two normals.
    found = sum(opcode.startswith("I2F") for opcode in loop)
    if found != num_normals:
        raise GateError(f"expected a loop that makes {num_normals} normals, got one that makes {found}")
    return Count(
        compiler=compiler,
        arch=arch,
        groups_per_thread=groups_per_thread,
        instructions_per_normal=round(len(loop) / num_normals, 4),
        limit=LIMITS[compiler],
        registers=usage.registers,
        spill_instructions=usage.spills,
        instructions=dict(Counter(loop).most_common()),
    )


def count_nvcc(arch: str, groups_per_thread: int) -> Count:
    """Compile gate.cu for one number of groups a thread, and count."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "gate.cubin")
        macro = f"-DFK_GROUPS_PER_THREAD={groups_per_thread}"
        run([find_nvcc(), *NVCC_FLAGS, f"-arch={arch}", f"-I{INCLUDE}", macro, "-o", str(cubin), str(SOURCE)])
        return count_loop(cubin, "nvcc", arch, groups_per_thread)


def count_triton(arch: str) -> Count:
    """Compile the Triton kernel, and count.

    Raises:
        MissingExtraError: the package triton is not installed.
    """
    require_extra("bench", "triton")
    from benchmarks.machine_code import gate_triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "gate.cubin")
        cubin.write_bytes(gate_triton.compile_cubin(int(arch.removeprefix("sm_"))))
        return count_loop(cubin, "triton", arch, gate_triton.GROUPS_PER_THREAD)


def cpu_rates() -> dict[str, dict[str, Any]]:
    """Rates by instruction set of the library: normals per second of that loop on one thread, or why not.

    Seconds are the thread's own, so that a busy machine tells the same.
    """
    import torch

    import fedkseed_kernels

    if reason := fedkseed_kernels.unavailable("native", "cpu"):
        return {"native": {"reason": reason}}
    info = fedkseed_kernels.info()
    rates: dict[str, dict[str, Any]] = {}
    weights = torch.zeros(CPU_NUM_ELEMENTS)
    seeds = list(range(CPU_NUM_SEEDS))
    coefficients = [1e-3] * CPU_NUM_SEEDS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for isa in info["cpu_isas_built"]:
            if isa not in info["cpu_isas_usable"]:
                rates[isa] = {"reason": "this CPU does not have it"}
                continue
            seconds = []
            with fedkseed_kernels.backend("native"), fedkseed_kernels.cpu_isa(isa):
                for _ in range(CPU_REPEATS):
                    start = time.thread_time()
                    fedkseed_kernels.seed_axpy_([weights], seeds, coefficients)
                    seconds.append(time.thread_time() - start)
            rate = CPU_NUM_ELEMENTS * CPU_NUM_SEEDS / statistics.median(seconds)
            rates[isa] = {"normals_per_second": round(rate), "threads": 1}
    finally:
        torch.set_num_threads(threads)
    return rates


def measure(arch: str) -> list[Count]:
    """All counts for one architecture.

    Raises:
        GateError: a compiler or tool is missing, or a loop is not the expected one.
    """
    if not re.fullmatch(r"sm_\d+", arch):
        raise GateError(f"expected an architecture like sm_90, got {arch!r}")
    return [*(count_nvcc(arch, groups) for groups in GROUPS_PER_THREAD), count_triton(arch)]


def report(counts: Sequence[Count], rates: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of the result file."""
    import triton

    nvcc_release = re.search(r"V([\d.]+)", run([find_nvcc(), "--version"]))
    return {
        "environment": environment.describe(num_threads=1),
        "compilers": {
            "nvcc": nvcc_release.group(1) if nvcc_release else "unknown",
            "triton": triton.__version__,
        },
        "gpu": [{**asdict(count), "passed": count.passed} for count in counts],
        "cpu": rates,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the result file."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code.gate", description=description)
    parser.add_argument("--arch", default="sm_90", help="GPU architecture (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    options = parser.parse_args(arguments)
    try:
        counts = measure(options.arch)
        rates = cpu_rates()
        result = report(counts, rates)
    except (GateError, MissingExtraError) as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    print("compiler  arch    groups/thread  instructions/normal  limit  registers  spills")
    for count in counts:
        print(
            f"{count.compiler:<9} {count.arch:<7} {count.groups_per_thread:>13}  "
            f"{count.instructions_per_normal:>19.2f}  {count.limit:>5.1f}  {count.registers:>9}  "
            f"{count.spill_instructions:>6}{'' if count.passed else '  PAST THE LIMIT'}"
        )
    for isa, row in rates.items():
        rate = row.get("normals_per_second")
        text = row["reason"] if rate is None else f"{rate / 1e9:.2f} G normals/s on one thread"
        print(f"cpu {isa}: {text}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(count.passed for count in counts) else 1


if __name__ == "__main__":
    sys.exit(main())
