"""How far the peak of resident memory rises during one call, measured in a fresh process (Linux).

By itself: `python -m benchmarks.common.memory --operation rebuild --num-elements 67108864 --num-seeds 16`.

The process makes one tensor, writes every page of it, warms the call up on a tiny one, resets the kernel's
peak counter (writing 5 to /proc/self/clear_refs), makes the call and prints by how many bytes VmHWM then
exceeds what was resident before. The counter sees every page that was resident at any moment of the call,
whichever allocator it came from.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import fedkseed_kernels
from benchmarks.baselines import torch_ways
from benchmarks.common.constants import DTYPES, LEARNING_RATE, ZO_EPS
from benchmarks.common.places import REPOSITORY
from fedkseed_kernels import derived

#: `randn_like` is the control: it must show a temporary of the tensor's size, or nothing is measured.
OPERATIONS = ("perturb", "rebuild", "randn_like")

#: The promise: a perturbation or a rebuild of any size needs less than this.
LIMIT_BYTES = 1_000_000

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def can_measure() -> bool:
    """Whether this system has the counter and lets a process reset its own."""
    return _STATUS.exists() and os.access(_CLEAR_REFS, os.W_OK)


def measure(
    operation: str, num_elements: int, *, num_seeds: int = 1, dtype: str = "bf16", num_threads: int = 2
) -> int:
    """Growth of peak resident memory, in bytes, of one call in a process of its own.

    Args:
        operation: one of OPERATIONS. num_seeds is the rebuild's K.
        num_elements: size of the one tensor; dtype is a key of `constants.DTYPES`.
    Raises:
        RuntimeError: the process failed; its output is in the message.
    """
    command = [sys.executable, "-m", "benchmarks.common.memory", "--operation", operation]
    command += ["--num-elements", str(num_elements), "--num-seeds", str(num_seeds)]
    command += ["--dtype", dtype, "--threads", str(num_threads)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"expected the measurement of {operation} to succeed, got: {done.stderr.strip()}")
    return int(json.loads(done.stdout)["growth_bytes"])


def _call(operation: str, tensor: torch.Tensor, num_seeds: int) -> None:
    if operation == "perturb":
        fedkseed_kernels.perturb_([tensor], 1, ZO_EPS)
    elif operation == "rebuild":
        seeds = derived.candidate_seeds(0, num_seeds)
        fedkseed_kernels.seed_axpy_([tensor], [int(seed) for seed in seeds], [LEARNING_RATE] * num_seeds)
    else:
        torch_ways.axpy_([torch.nn.Parameter(tensor, requires_grad=False)], 1, ZO_EPS)


def reset_peak() -> None:
    """Sets the peak of this process's resident memory back to what is resident now."""
    _CLEAR_REFS.write_text(_RESET_PEAK)


def peak() -> int:
    """The highest number of bytes resident since `reset_peak`."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"expected {field} in {_STATUS}, got none")


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the peak of resident memory, within the call, exceeds what was resident before it."""
    gc.collect()
    reset_peak()
    before = peak()
    call()
    return peak() - before


def _growth(operation: str, num_elements: int, num_seeds: int, dtype: torch.dtype) -> int:
    tensor = torch.empty(num_elements, dtype=dtype).fill_(0.5)
    _call(operation, torch.ones(64, dtype=dtype), num_seeds)
    return peak_growth(lambda: _call(operation, tensor, num_seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operation", choices=OPERATIONS, required=True)
    parser.add_argument("--num-elements", type=int, default=1 << 26)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not can_measure():
        parser.error(
            f"expected a Linux whose {_CLEAR_REFS} can be written, got none; measure on another machine"
        )
    # The counters of some kernels are exact only to some pages for each CPU that the process ran on.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    growth = _growth(
        arguments.operation, arguments.num_elements, arguments.num_seeds, DTYPES[arguments.dtype]
    )
    print(json.dumps({**vars(arguments), "growth_bytes": growth}))


if __name__ == "__main__":
    main()
