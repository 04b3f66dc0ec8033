"""Time and peak memory of a local step in every storage mode, beside its forward passes and two torch steps.

`python -m benchmarks.step --help`. SmolLM2-135M-Instruct on real text, or random Llamas on random tokens. The
official step is `official.py`'s, the other torch step `mezo.py`'s; both make the same two forward passes. All
take turns in one process, so ratios are of one run; memory is measured apart (`memory.py`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fedkseed_kernels
from benchmarks.common import environment
from benchmarks.common.constants import DTYPES
from benchmarks.common.measure import Contestant, interleave, spread
from benchmarks.models import workloads
from benchmarks.step import contestants as step_contestants
from benchmarks.step import memory as step_memory
from fedkseed.files import write_atomically


@dataclass(frozen=True)
class StepSettings:
    """What a run measures.

    Attributes:
        model: of `workloads.MODELS`.
        dtype: key of `constants.DTYPES`, of the weights.
        device: "cpu" or "cuda".
        batch_sizes, num_tokens: rows of a batch, tokens of a row.
        families: of the noise; the torch steps are timed beside "gaussian".
        num_samples: steps timed of each contestant, after one that is not.
        only: contestants to measure beside the forward passes; all if empty.
        measures_memory: whether peak memory is measured as well.
    """

    model: str = "smollm2"
    dtype: str = "bf16"
    device: str = "cpu"
    batch_sizes: tuple[int, ...] = (1,)
    num_tokens: int = 128
    families: tuple[str, ...] = fedkseed_kernels.FAMILIES
    num_samples: int = 5
    only: tuple[str, ...] = ()
    measures_memory: bool = True

    def contestants(self, family: str) -> list[str]:
        """Names of those to measure.

        Raises:
            ValueError: one that is asked for is not there in any family.
        """
        dtype = DTYPES[self.dtype]
        known = step_contestants.names(dtype, family)
        unknown = set(self.only) - set(known) - set(step_contestants.names(dtype, "gaussian"))
        if unknown:
            raise ValueError(
                f"expected contestants out of {', '.join(known)}, got {', '.join(sorted(unknown))}"
            )
        return [
            name
            for name in known
            if not self.only or name in self.only or name in step_contestants.baselines(dtype)
        ]


#: Seconds on any machine: a smoke test whose figures mean nothing.
QUICK = StepSettings(model="random-tiny", num_tokens=16, num_samples=2)


def measure(settings: StepSettings, num_threads: int) -> dict[str, Any]:
    """{"settings", "rows"} of a run, for a result file.

    A row is one contestant with one batch size and family: its seconds (median, p20, p80 and the samples),
    the name of the forward passes that it makes, and how many bytes its peak memory lies above that of two
    forward passes on the stored weights (None if not measured). With device "cuda" the clock is read after a
    synchronisation and memory is what torch's allocator gave out; on a processor it is a process's own.

    Args:
        num_threads: of the processes that measure memory; this one's are the caller's to set.

    Raises:
        ValueError: an unknown contestant or model.
    """
    rows = []
    for batch_size in settings.batch_sizes:
        for family in settings.families:
            timed = _time(settings, batch_size, family)
            for name, samples in timed.items():
                memory = None
                if settings.measures_memory and name not in step_contestants.baselines(
                    DTYPES[settings.dtype]
                ):
                    memory = step_memory.beyond_inference(
                        name,
                        model=settings.model,
                        dtype=settings.dtype,
                        device=settings.device,
                        batch_size=batch_size,
                        num_tokens=settings.num_tokens,
                        family=family,
                        num_threads=num_threads,
                    )
                rows.append(
                    {
                        "batch_size": batch_size,
                        "family": family,
                        "contestant": name,
                        "baseline": step_contestants.baseline_of(name, DTYPES[settings.dtype]),
                        "seconds": spread(samples),
                        "samples": samples,
                        "bytes_beyond_inference": memory,
                    }
                )
    return {"settings": dataclasses.asdict(settings), "rows": rows}


def _time(settings: StepSettings, batch_size: int, family: str) -> dict[str, list[float]]:
    """Seconds of every sample by contestant, taken in turn."""
    gc.collect()  # the models of an earlier call: they and their optimizers hold each other
    work = workloads.load(
        settings.model,
        DTYPES[settings.dtype],
        num_rows=batch_size,
        num_tokens=settings.num_tokens,
        device=settings.device,
    )
    contestants = []
    for name in settings.contestants(family):
        step = step_contestants.open_step(name, copy.deepcopy(work.model), work.train, family)
        contestants.append(Contestant(name, "step", _without_index(step), settings.num_samples, warm_up=step))
    return interleave(contestants, lambda: None, clock(settings.device))


def _without_index(step: Callable[[], None]) -> Callable[[int], None]:
    return lambda _: step()


def clock(device: str) -> Callable[[], float]:
    """Seconds; with a GPU, once all that was launched on it has run."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def table(document: dict[str, Any]) -> str:
    """One row a contestant, with its ratios to the official step and to the forward passes that it makes."""
    rows = document["rows"]
    medians = {_key(row, row["contestant"]): row["seconds"]["median"] for row in rows}
    lines = [
        "| batch | noise | step | seconds [20th, 80th percentile] | official step takes "
        "| of its two forwards | MB beyond inference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        median, memory = row["seconds"]["median"], row["bytes_beyond_inference"]
        official = medians.get((row["batch_size"], "gaussian", step_contestants.OFFICIAL))
        cells = [
            row["batch_size"],
            row["family"],
            row["contestant"],
            f"{median:.3g} [{row['seconds']['p20']:.3g}, {row['seconds']['p80']:.3g}]",
            "" if official is None else f"{official / median:.1f}x",
            f"{median / medians[_key(row, row['baseline'])]:.2f}x",
            "" if memory is None else f"{memory / 1e6:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _key(row: dict[str, Any], contestant: str) -> tuple[int, str, str]:
    return row["batch_size"], row["family"], contestant


def main() -> None:
    """Runs it, prints the table, writes JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0]
    )
    default = StepSettings()
    parser.add_argument("--quick", action="store_true", help="a tiny random model, seconds: a smoke test")
    parser.add_argument("--model", choices=workloads.MODELS, help=f"({default.model})")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help=f"of the weights ({default.dtype})")
    parser.add_argument("--device", choices=("cpu", "cuda"), help=f"({default.device})")
    parser.add_argument("--batch-sizes", type=_integers, metavar="N,...", help="rows of a batch (1)")
    parser.add_argument("--num-tokens", type=int, help=f"tokens of a row ({default.num_tokens})")
    parser.add_argument(
        "--families", type=_texts, metavar="NAME,...", help=f"({','.join(fedkseed_kernels.FAMILIES)})"
    )
    parser.add_argument("--num-samples", type=int, help=f"of each contestant ({default.num_samples})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants beside the forwards (all)")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--threads", type=int, default=2, help="of every contestant (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    names = {field.name for field in dataclasses.fields(StepSettings)}
    given: dict[str, Any] = {
        name: value for name, value in vars(options).items() if name in names and value is not None
    }
    if "only" in given:
        given["only"] = tuple(given["only"])
    settings = dataclasses.replace(
        QUICK if options.quick else default, **given, measures_memory=not options.no_memory
    )
    torch.set_num_threads(options.threads)
    described = environment.describe(options.threads)
    if settings.device == "cuda":
        described["device"] = torch.cuda.get_device_name()
    document = measure(settings, options.threads)
    document = {"environment": {**described, "load_average_after": environment.load_average()}, **document}
    print(table(document))
    if options.json is not None:
        write_atomically(options.json, (json.dumps(document, indent=1) + "\n").encode())


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _texts(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
