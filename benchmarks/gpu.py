"""All that only a GPU can show, in one command of at most eight minutes: `python -m benchmarks.gpu`.

(a) and (b): tests/gpu, the bits of every kernel beside the CPU's, all 2^32 words among them. (c):
compute-sanitizer over a part of them. (d): times of every pass over 1.4 G weights, beside copy bandwidth, the
official algorithm and torch, and ncu's rates of the two hottest kernels. Writes `results/gpu-<device>.json`,
with what a tool refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, gpu_cases
from benchmarks.measure import spread
from benchmarks.results import RESULTS_FOLDER
from benchmarks.settings import DTYPES
from fedkseed.files import write_atomically

_REBUILD_SEEDS = (1, 16, 256, 4096)
_OFFICIAL_SEEDS = 16
_COPY_BYTES = 4 << 30
_LONG_SECONDS = 0.5  # a pass above this is timed once
_KEPT_OUTPUT = 4000
_DRIVER = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"]


def describe() -> dict[str, Any]:
    """Device, driver, versions, commit, date."""
    properties = torch.cuda.get_device_properties(0)
    import triton

    return {
        **environment.describe(torch.get_num_threads()),
        "device": properties.name,
        "num_multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": _output(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"]
        ),
        "triton": triton.__version__,
    }


def run_tests(limit: float) -> dict[str, Any]:
    """tests/gpu in a process of their own: whether they passed, and the end of what they printed."""
    return _run([sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"], limit)


def sanitize(limit: float) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck over the small tests, or what it said when it refused."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    tests = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-x", "-p", "no:cacheprovider", "-k", "small"]
    found = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all", *tests]
        found[check] = _run(command, limit / 2)
    return found


def profile(limit: float) -> dict[str, Any]:
    """ncu's rates of a perturbation and of a K = 256 rebuild in CUDA C++; what it said if it refuses."""
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    metrics = "sm__inst_executed.avg.per_cycle_active,dram__throughput.avg.pct_of_peak_sustained_elapsed"
    script = (
        "import torch, fedkseed_kernels as fk\n"
        "w = torch.zeros(1 << 26, dtype=torch.bfloat16, device='cuda')\n"
        "fk.perturb_(w, 5, 1e-3)\n"
        "fk.seed_axpy_(w, torch.arange(256, device='cuda'), torch.full((256,), 1e-4, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    command = [
        tool,
        "--csv",
        "--metrics",
        metrics,
        "--kernel-name",
        "regex:fk_",
        sys.executable,
        "-c",
        script,
    ]
    return _run(command, limit)


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = spread(_seconds(lambda: target.copy_(source), 20))["median"]
    return 2 * _COPY_BYTES / float(seconds)


def measure(dtype_name: str, bandwidth: float, rebuild_seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each case and contestant; the contestants of a case take turns."""
    dtype = DTYPES[dtype_name]
    weights = gpu_cases.make_weights(gpu_cases.model_shapes(), dtype)
    num_elements = sum(weight.numel() for weight in weights)
    rows = []
    for case in gpu_cases.cases(weights, rebuild_seeds=rebuild_seeds, num_official_seeds=_OFFICIAL_SEEDS):
        samples: dict[str, list[float]] = {entry.contestant: [] for entry in case.passes}
        for turn in range(5):
            for entry in case.passes:
                taken = samples[entry.contestant]
                if turn and taken[0] > _LONG_SECONDS:
                    continue
                taken += _seconds(entry.run, 1, warm=turn == 0 and not taken)
        for entry in case.passes:
            seconds = spread([value * entry.repeats for value in samples[entry.contestant]])
            num_normals = num_elements * entry.num_terms * entry.repeats
            bytes_moved = num_elements * entry.num_accesses * dtype.itemsize
            rows.append(
                {
                    "case": case.name,
                    "dtype": dtype_name,
                    "contestant": entry.contestant,
                    "seconds": seconds,
                    "samples": len(samples[entry.contestant]),
                    "extrapolated": entry.repeats > 1,
                    "of_copy_bandwidth": bytes_moved / seconds["median"] / bandwidth,
                    "t_normals_per_s": num_normals / seconds["median"] / 1e12,
                }
            )
            print(_line(rows[-1]), flush=True)
    return rows


def _seconds(run: Any, times: int, warm: bool = True) -> list[float]:
    """Seconds of single runs by the GPU's clock, after one to warm up that compiles and allocates."""
    if warm:
        run()
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return found


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['dtype']}  {row['case']:32} {row['contestant']:24} {row['seconds']['median'] * 1e3:12.3f} ms  "
        f"{row['of_copy_bandwidth']:6.1%} of copy  {row['t_normals_per_s']:.4f} T normals/s"
        + ("  (extrapolated)" if row["extrapolated"] else "")
    )


def _run(command: list[str], limit: float) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=environment.REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
        status, output = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = f"over {limit:.0f} s", (error.stdout or b"").decode(errors="replace")
    except OSError as error:
        status, output = "could not start", str(error)
    seconds = round(time.perf_counter() - start, 1)
    return {"passed": status == "0", "status": status, "seconds": seconds, "output": output[-_KEPT_OUTPUT:]}


def _output(command: list[str]) -> str:
    return str(_run(command, 20)["output"]).strip()


def main() -> int:
    """Runs it all; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="the result (benchmarks/results/gpu-<device>.json)")
    parser.add_argument("--no-tests", action="store_true", help="only (d)")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32", help="of the weights (%(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(
            "expected a GPU, got none that torch can use; this benchmark has nothing to say without one"
        )
    document: dict[str, Any] = {"environment": describe()}
    if not options.no_tests:
        document["tests"] = run_tests(150)
        print(document["tests"]["output"], flush=True)
    bandwidth = copy_bandwidth()
    document["copy_bytes_per_s"] = bandwidth
    print(f"copy: {bandwidth / 1e12:.3f} TB/s", flush=True)
    document["rows"] = []
    for name in options.dtypes.split(","):
        seeds = _REBUILD_SEEDS if name == "bf16" else _REBUILD_SEEDS[:-1]
        document["rows"] += measure(name, bandwidth, seeds)
        torch.cuda.empty_cache()
    if not options.no_tests:
        document["sanitizer"] = sanitize(80)
        document["profile"] = profile(40)
    path = (
        options.json
        or RESULTS_FOLDER / f"gpu-{document['environment']['device'].lower().replace(' ', '-')}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    print(f"Written: {path}")
    return 0 if options.no_tests or document["tests"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
