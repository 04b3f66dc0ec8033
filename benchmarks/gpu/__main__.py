"""All that only a GPU can show, in one command of at most ten minutes: `python -m benchmarks.gpu`.

Its parts: tests/gpu, the bits of every kernel beside the CPU's, all 2^32 words among them; copy bandwidth;
times of every pass over 1.4 G weights, beside the official algorithm and torch; whole steps of a model of
1.2 G parameters in every storage mode (`step.GPU_1B`); compute-sanitizer over some of the tests; ncu's rates
of the two hottest kernels. `results/gpu-<device>.json` is written after each part. One that fails is named
there with its error, the others go on, and the exit status is 1. What a tool refuses is no failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.common.constants import RESULTS_FOLDER
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import tools as gpu_tools
from benchmarks.step import __main__ as step
from fedkseed._extras import require_extra
from fedkseed.files import write_atomically

Parts = Mapping[str, Callable[[], None]]


@dataclass(frozen=True)
class GpuSettings:
    """What a run measures.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        shapes: of the weights that the passes are timed over.
        dtypes: of these weights, keys of `constants.DTYPES`.
        rebuild_seeds: values of K, ascending; the last one with the first dtype alone.
        num_official_seeds: passes timed where a contestant rebuilds seed by seed.
        copy_bytes: of the buffer whose copy measures the bandwidth.
        step: of the whole steps.
        has_tools: whether the parts that are processes of their own run: tests, sanitizer, profile.
        seconds: a part that would begin after as many is not run, and processes are cut short there.
    """

    device: str = "cuda"
    shapes: tuple[tuple[int, ...], ...] = tuple(gpu_cases.model_shapes())
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    rebuild_seeds: tuple[int, ...] = (1, 16, 256, 4096)
    num_official_seeds: int = 16
    copy_bytes: int = 4 << 30
    step: step.StepSettings = step.GPU_1B
    has_tools: bool = True
    seconds: float = 570.0


#: Seconds on any machine, without a GPU: whether the parts run. Its figures mean nothing.
DRY_RUN = GpuSettings(
    device="cpu",
    shapes=((40, 16), (16,)),
    rebuild_seeds=(1, 4),
    num_official_seeds=2,
    copy_bytes=1 << 20,
    step=dataclasses.replace(step.QUICK, batch_sizes=(1, 2), num_samples=1, measures_memory=False),
    has_tools=False,
)


class Run:
    """One run: its parts put what they find into ``document`` as they go.

    Args:
        settings: of the run.
        path: where the document is kept after each part; None keeps nothing.
    """

    def __init__(self, settings: GpuSettings, path: Path | None) -> None:
        self.document: dict[str, Any] = {"environment": _describe(settings.device)}
        self.document |= {"seconds": {}, "failed": {}}
        self._settings = settings
        self._path = path
        self._begin = time.perf_counter()

    def parts(self) -> dict[str, Callable[[], None]]:
        """What there is to do by its name: what matters most comes first."""
        settings = self._settings
        weights = {f"weights, {name}": partial(self._time_weights, name) for name in settings.dtypes}
        first = dict(list(weights.items())[:1])
        steps = {f"steps, batch {n}": partial(self._time_steps, n) for n in settings.step.batch_sizes}
        times = {"copy": self._time_copy, **first, **steps, **weights}
        if not settings.has_tools:
            return times
        return {"tests": self._run_tests, **times, "sanitizer": self._sanitize, "profile": self._profile}

    def do(self, parts: Parts) -> None:
        """Each part; the document is kept after each, with its seconds and, if it failed, its error."""
        for name, part in parts.items():
            start = time.perf_counter()
            try:
                if self._left() <= 0:
                    raise TimeoutError(f"not begun: {self._settings.seconds:.0f} s were over")
                part()
            except Exception as error:  # the other parts' results count all the same
                self.document["failed"][name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            self.document["seconds"][name] = round(time.perf_counter() - start, 1)
            gc.collect()  # models and what steps them hold each other
            if self._settings.device == "cuda":
                torch.cuda.empty_cache()
            self._keep()

    def _left(self) -> float:
        return self._settings.seconds - (time.perf_counter() - self._begin)

    def _keep(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, (json.dumps(self.document, indent=1) + "\n").encode())

    def _run_tests(self) -> None:
        found = self.document["tests"] = gpu_tools.run_tests(min(150, self._left()))
        print(found["output"], flush=True)
        if not found["passed"]:
            raise RuntimeError(f"expected tests/gpu to pass, got status {found['status']}")

    def _time_copy(self) -> None:
        bandwidth = gpu_rows.copy_bandwidth(self._settings.device, self._settings.copy_bytes)
        self.document["copy_bytes_per_s"] = bandwidth
        print(f"copy: {bandwidth / 1e12:.3f} TB/s", flush=True)

    def _time_weights(self, dtype: str) -> None:
        settings, rows = self._settings, self.document.setdefault("rows", [])
        seeds = settings.rebuild_seeds
        failed = []
        for row in gpu_rows.measure(
            list(settings.shapes),
            dtype,
            self.document["copy_bytes_per_s"],
            device=settings.device,
            rebuild_seeds=seeds if dtype == settings.dtypes[0] else seeds[:-1],
            num_official_seeds=settings.num_official_seeds,
        ):
            rows.append(row)
            print(gpu_rows.line(row), flush=True)
            if "error" in row:
                failed.append(f"{row['contestant']} ({row['case']})")
        if failed:
            raise RuntimeError(f"expected all contestants to run, got errors of {', '.join(failed)}")

    def _time_steps(self, batch_size: int) -> None:
        settings = dataclasses.replace(self._settings.step, batch_sizes=(batch_size,))
        found = step.measure(settings, torch.get_num_threads())
        kept = self.document.setdefault(
            "steps", {"settings": dataclasses.asdict(self._settings.step), "rows": []}
        )
        kept["rows"] += found["rows"]
        print(step.table(found), flush=True)

    def _sanitize(self) -> None:
        found = self.document["sanitizer"] = gpu_tools.sanitize(min(80, self._left()))
        bad = [check for check, result in found.items() if gpu_tools.has_found_errors(result)]
        if bad:
            raise RuntimeError(f"expected no errors, got some of {' and '.join(bad)}")

    def _profile(self) -> None:
        self.document["profile"] = gpu_tools.profile(min(40, self._left()))


def _describe(device: str) -> dict[str, Any]:
    """Device, driver, versions, commit, date."""
    found = environment.describe(torch.get_num_threads())
    if device == "cpu":
        return found
    require_extra("bench", "triton")
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "device": properties.name,
        "num_multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": gpu_tools.driver(),
        "triton": triton.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it all; 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", type=Path, help="the result (benchmarks/results/gpu-<device>.json)")
    parser.add_argument(
        "--no-tests", action="store_true", help="no tests, sanitizer and profile: times alone"
    )
    parser.add_argument("--dtypes", default="bf16,fp16,fp32", help="of the weights (%(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the processor: a smoke test without a GPU"
    )
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error(
            "expected a GPU, got none that torch can use; this benchmark has nothing to say without one "
            "(--dry-run tries its parts)"
        )
    settings = DRY_RUN if options.dry_run else GpuSettings(has_tools=not options.no_tests)
    settings = dataclasses.replace(settings, dtypes=tuple(options.dtypes.split(",")))
    path = options.json
    if path is None and not options.dry_run:
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        path = RESULTS_FOLDER / f"gpu-{name}.json"
    run = Run(settings, path)
    run.do(run.parts())
    if path is not None:
        print(f"Written: {path}")
    for name, error in run.document["failed"].items():
        print(f"Failed: {name}: {error}")
    return 1 if run.document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
