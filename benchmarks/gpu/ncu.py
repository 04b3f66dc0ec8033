"""The part that profiles the CUDA kernels with ncu, and the program that is profiled.

The program, `python -m benchmarks.gpu.ncu`, launches each kernel once within a range of its own, after all
code was loaded: what a first use launches beside it is not profiled.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.channel import FAILED, REFUSED, Channel, PartEnded
from benchmarks.gpu.plan import KERNELS, Settings
from benchmarks.gpu.processes import describe_status, find_tool, stream

#: Issue slots, pipes, DRAM and registers by name; the sections add occupancy and the reasons of stalls.
METRICS = (
    "gpu__time_duration.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed.avg.per_cycle_active",
    "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
SECTIONS = ("LaunchStats", "Occupancy", "WarpStateStats")
#: Launches of the program, in their order.
LAUNCHES = (
    "K = 1",
    "K = 2",
    "pair",
    "stochastic",
    "residuals",
    "K = 256",
    "strided",
    "rademacher, K = 1",
    "rademacher, K = 256",
)
_ELEMENTS, _TINY_ELEMENTS = 1 << 26, 1 << 10
_IDENTITY = ("ID", "Kernel Name", "Block Size", "Grid Size", "CC")
_UNWANTED = ("Process ID", "Process Name", "Host Name", "Context", "Stream", "Device")


def run(settings: Settings, channel: Channel) -> None:
    """The part: a row for each launch, with its metrics as [value, unit]."""
    elements = _TINY_ELEMENTS if settings.is_dry_run else _ELEMENTS
    status, output = stream(command(find_tool("ncu"), settings.device, elements))
    kernels = parse(output)
    for position, kernel in enumerate(kernels):
        # One launch a call, in order: named only if nothing else was caught.
        name = LAUNCHES[position] if len(kernels) == len(LAUNCHES) else None
        channel.row({"launch": name, **kernel})
    judge(status, output, len(kernels))


def command(tool: str, device: str, num_elements: int) -> list[str]:
    """The command line of ncu over the program."""
    # ncu would hold the clocks at their base rate, which a shared machine may forbid and no other part has.
    line = [tool, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    line += ["--kernel-name", f"regex:{'|'.join(KERNELS)}", "--launch-count", str(len(LAUNCHES))]
    line += ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
    for section in SECTIONS:
        line += ["--section", section]
    return [*line, sys.executable, "-m", "benchmarks.gpu.ncu", device, str(num_elements)]


def judge(status: int, output: list[str], num_kernels: int) -> None:
    """Raises unless every launch was profiled.

    Raises:
        PartEnded: ncu refuses; it measured nothing, or not all.
    """
    errors = [text for text in output if text.startswith("==ERROR==")]
    if num_kernels == 0 and errors:
        raise PartEnded(REFUSED, f"ncu: {errors[0].removeprefix('==ERROR==').strip()}")
    if num_kernels == 0:
        raise PartEnded(FAILED, "ncu measured nothing: no kernel was profiled")
    if status != 0 or num_kernels != len(LAUNCHES):
        raise PartEnded(
            FAILED,
            f"expected {len(LAUNCHES)} kernels, got {num_kernels}; ncu ended with {describe_status(status)}",
        )


def parse(output: list[str]) -> list[dict[str, Any]]:
    """What ncu's CSV says of each kernel: its name, block, grid, and metrics as [value, unit]."""
    table = list(csv.reader(text for text in output if text.startswith('"')))
    while table and table[0][0] != "ID":
        del table[0]
    if len(table) < 3:  # names, units, a line for each kernel
        return []
    header, units, *lines = table
    kernels = []
    for values in lines:
        row = dict(zip(header, values, strict=False))
        metrics = {
            name: [_number(value), unit]
            for name, value, unit in zip(header, values, units, strict=False)
            if name not in _IDENTITY + _UNWANTED
        }
        kernels.append(
            {
                "kernel": row.get("Kernel Name"),
                "block": row.get("Block Size"),
                "grid": row.get("Grid Size"),
                "metrics": metrics,
            }
        )
    return kernels


def _number(text: str) -> float | str:
    """A number, with or without separators of thousands; any other text as it is."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return text
    return value if abs(value) < float("inf") else text


def launches(device: str, num_elements: int) -> dict[str, Callable[[], object]]:
    """A call for each of `LAUNCHES`, on weights of so many elements in bf16."""
    import torch

    import fedkseed_kernels
    from benchmarks.gpu.cases import make_residuals, make_weights

    (weight,) = make_weights([(num_elements // 1024, 1024)], torch.bfloat16, device)
    flat = weight.data
    out = [torch.empty_like(flat) for _ in range(2)]
    seeds = torch.arange(256, device=device)
    coeffs = torch.full((256,), 1e-4, device=device, dtype=torch.float64)
    in_place = fedkseed_kernels.prepare(flat)
    pair = fedkseed_kernels.prepare_pair(flat, *out)
    compensated = fedkseed_kernels.prepare(flat, residuals=make_residuals([flat]))
    turned = fedkseed_kernels.prepare(flat.t())
    rademacher = fedkseed_kernels.prepare(flat, family="rademacher")
    calls: tuple[Callable[[], object], ...] = (
        lambda: in_place.perturb_(5, 1e-3),
        lambda: in_place.seed_axpy_([5, 6], [1e-3, -1e-3]),
        lambda: pair.seed_axpy_pair([5], [1e-3]),
        lambda: in_place.perturb_(5, 1e-3, rounding="stochastic", rounding_seed=7),
        lambda: compensated.perturb_(5, 1e-3),
        lambda: in_place.seed_axpy_(seeds, coeffs),
        lambda: turned.perturb_(5, 1e-3),
        lambda: rademacher.perturb_(5, 1e-3),
        lambda: rademacher.seed_axpy_(seeds, coeffs),
    )
    return dict(zip(LAUNCHES, calls, strict=True))


def main() -> None:
    """The profiled program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ncu", description=__doc__)
    parser.add_argument("device", choices=("cuda", "cpu"), help="of the weights")
    parser.add_argument("num_elements", type=int, help="of the weights, a multiple of 1024")
    options = parser.parse_args()
    import torch

    import fedkseed_kernels

    calls = launches(options.device, options.num_elements)
    with fedkseed_kernels.backend("native" if options.device == "cuda" else "auto"):
        for call in calls.values():
            call()
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        for call in calls.values():
            call()
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
