"""Times of the passes over the weights of a model: a row for each case, dtype and contestant."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.common.constants import DTYPES
from benchmarks.common.measure import spread
from benchmarks.gpu import cases as gpu_cases

_NUM_TURNS = 5
_LONG_SECONDS = 0.5  # a pass above this is timed once


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes a second of a copy on the device, read and written."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = spread(_seconds(lambda: target.copy_(source), 20, device))["median"]
    return 2 * num_bytes / float(seconds)


def measure(
    shapes: list[tuple[int, ...]],
    dtype_name: str,
    bandwidth: float,
    *,
    device: str,
    rebuild_seeds: tuple[int, ...],
    num_official_seeds: int,
) -> Iterator[dict[str, Any]]:
    """A row for each case and contestant, each as soon as its case is measured.

    A row has "case", "dtype", "contestant", and one of: "refused", why its backend does not serve the case;
    "error", what it raised; or its figures: "seconds" (median, p20, p80) of the whole operation, the number
    of "samples", whether they are "extrapolated", "of_copy_bandwidth", and "t_normals_per_s" in 10^12.

    Args:
        shapes: of the weights.
        bandwidth: bytes a second, from `copy_bandwidth`.
        rebuild_seeds, num_official_seeds: of `gpu_cases.cases`.
    """
    dtype = DTYPES[dtype_name]
    weights = gpu_cases.make_weights(shapes, dtype, device)
    num_elements = sum(weight.numel() for weight in weights)
    cases = gpu_cases.cases(weights, rebuild_seeds=rebuild_seeds, num_official_seeds=num_official_seeds)
    for case in cases:
        samples, errors = _take_turns(case, device)
        for entry in case.passes:
            row = {"case": case.name, "dtype": dtype_name, "contestant": entry.contestant}
            if entry.refusal is not None:
                yield row | {"refused": entry.refusal}
            elif entry.contestant in errors:
                yield row | {"error": errors[entry.contestant]}
            else:
                taken = samples[entry.contestant]
                seconds = spread([value * entry.repeats for value in taken])
                bytes_moved = num_elements * entry.num_accesses * dtype.itemsize
                num_normals = num_elements * entry.num_terms * entry.repeats
                yield row | {
                    "seconds": seconds,
                    "samples": len(taken),
                    "extrapolated": entry.repeats > 1,
                    "of_copy_bandwidth": bytes_moved / seconds["median"] / bandwidth,
                    "t_normals_per_s": num_normals / seconds["median"] / 1e12,
                }


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    start = f"{row['dtype']}  {row['case']:32} {row['contestant']:24} "
    if "seconds" not in row:
        return start + (f"refused: {row['refused']}" if "refused" in row else f"error: {row['error']}")
    return (
        f"{start}{row['seconds']['median'] * 1e3:12.3f} ms  "
        f"{row['of_copy_bandwidth']:6.1%} of copy  {row['t_normals_per_s']:.4f} T normals/s"
        + ("  (extrapolated)" if row["extrapolated"] else "")
    )


def _take_turns(case: gpu_cases.Case, device: str) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each contestant's samples; what those that failed raised, which ends their turns."""
    samples: dict[str, list[float]] = {entry.contestant: [] for entry in case.passes if entry.refusal is None}
    errors: dict[str, str] = {}
    for turn in range(_NUM_TURNS):
        for entry in case.passes:
            name = entry.contestant
            if name not in samples or name in errors or (turn and samples[name][0] > _LONG_SECONDS):
                continue
            try:
                samples[name] += _seconds(entry.run, 1, device, warm=turn == 0)
            except Exception as error:  # the other contestants' figures count all the same
                errors[name] = f"{type(error).__name__}: {error}"
    return samples, errors


def _seconds(run: Callable[[], object], times: int, device: str, warm: bool = True) -> list[float]:
    """Seconds of single runs, by the GPU's clock on one, after one to warm up that compiles and allocates."""
    if warm:
        run()
    return [_of_gpu(run) if device.startswith("cuda") else _of_processor(run) for _ in range(times)]


def _of_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _of_processor(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
