"""What the GPU benchmark runs in processes of their own: the tests, compute-sanitizer, ncu, nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import Any

from benchmarks.common.environment import REPOSITORY

_KEPT_OUTPUT = 4000
_TESTS = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
# Tests that reach every kernel with few elements: a sanitizer slows a kernel down some fifty times.
_SANITIZED = "pair_rows_views or nan_coefficients or philox_words or both_sides_and_rows"
_FOUND_ERRORS = 9  # not a status of pytest
_METRICS = "sm__inst_executed.avg.per_cycle_active,dram__throughput.avg.pct_of_peak_sustained_elapsed"
_PROFILED = (
    "import torch, fedkseed_kernels as fk\n"
    "w = torch.zeros(1 << 26, dtype=torch.bfloat16, device='cuda')\n"
    "fk.perturb_(w, 5, 1e-3)\n"
    "fk.seed_axpy_(w, torch.arange(256, device='cuda'), torch.full((256,), 1e-4, device='cuda'))\n"
    "torch.cuda.synchronize()\n"
)


def run(command: list[str], limit: float) -> dict[str, Any]:
    """{"passed", "status", "seconds", "output"}: the exit status, or why there is none; the output's end.

    Args:
        limit: seconds after which the process is killed.
    """
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
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


def run_tests(limit: float) -> dict[str, Any]:
    """tests/gpu."""
    return run(_TESTS, limit)


def sanitize(limit: float) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck over some tests, or what it said when it refused."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--error-exitcode", str(_FOUND_ERRORS), "--target-processes", "all"]
    return {
        check: run([tool, "--tool", check, *options, *_TESTS, "-x", "-k", _SANITIZED], limit / 2)
        for check in ("memcheck", "racecheck")
    }


def has_found_errors(result: dict[str, Any]) -> bool:
    """Whether a check of `sanitize` ran and found errors, rather than refuse or run out of time."""
    return bool(result["status"] == str(_FOUND_ERRORS))


def profile(limit: float) -> dict[str, Any]:
    """ncu's rates of a perturbation and of a K = 256 rebuild in CUDA C++; what it said if it refuses."""
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    options = ["--csv", "--metrics", _METRICS, "--kernel-name", "regex:fk_"]
    return run([tool, *options, sys.executable, "-c", _PROFILED], limit)


def driver() -> str:
    """The driver's version and the clocks, now and at most."""
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm"
    return str(run(["nvidia-smi", query, "--format=csv,noheader"], 20)["output"]).strip()
