"""How far the peak memory of a step lies above that of forward passes on the stored weights alone.

On a processor in a process of its own (Linux), by the counter of `benchmarks.common.memory`; on a GPU by
torch's allocator. What the optimizer keeps counts: the step is made by an optimizer that did not exist when
inference was measured.

`python -m benchmarks.step` has it for real models; with `benchmarks.models.bare` it is what the mode takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import memory
from benchmarks.common.constants import DTYPES
from benchmarks.common.places import REPOSITORY
from benchmarks.models import workloads
from benchmarks.step import contestants as step_contestants

_NUM_STEPS = 2  # a chained step finds what the one before has left


def beyond_inference(
    name: str,
    *,
    model: str,
    dtype: str,
    device: str,
    batch_size: int,
    num_tokens: int,
    family: str,
    num_threads: int,
) -> int | None:
    """Bytes; negative within the counter's granularity of some pages. None where the system has no counter.

    Raises:
        RuntimeError: the process failed; its output is in the message.
    """
    arguments: dict[str, Any] = {
        "name": name,
        "model": model,
        "dtype": dtype,
        "device": device,
        "batch_size": batch_size,
        "num_tokens": num_tokens,
        "family": family,
    }
    if device.startswith("cuda"):
        return _growth(**arguments)
    if not memory.can_measure():
        return None
    command = [sys.executable, "-m", "benchmarks.step.memory", json.dumps(arguments), str(num_threads)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"expected the memory of {name} to be measured, got: {done.stderr.strip()}")
    return int(json.loads(done.stdout)["bytes"])


def _growth(
    *, name: str, model: str, dtype: str, device: str, batch_size: int, num_tokens: int, family: str
) -> int:
    weights = DTYPES[dtype]
    tiny = workloads.load(workloads.tiny(model), weights, num_rows=1, num_tokens=8, device=device)
    step_contestants.open_step(name, tiny.model, tiny.train, family)()  # loads all code
    work = workloads.load(model, weights, num_rows=batch_size, num_tokens=num_tokens, device=device)
    forwards = step_contestants.open_step(step_contestants.FORWARDS, work.model, work.train, family)
    forwards()
    inference = _peak(forwards, device)
    step = step_contestants.open_step(name, work.model, work.train, family)
    return _peak(step, device) - inference


def _peak(step: Callable[[], None], device: str) -> int:
    """The highest number of bytes in use during some steps: resident, or allocated on the GPU."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        memory.reset_peak()
    for _ in range(_NUM_STEPS):
        step()
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return memory.peak()


def main() -> None:
    """Prints {"bytes"} of what the parent process asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arguments", type=json.loads, help="of `beyond_inference`, as JSON")
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    # The counters of some kernels are exact only to some pages for each CPU that the process ran on.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    print(json.dumps({"bytes": _growth(**options.arguments)}))


if __name__ == "__main__":
    main()
