"""The parts that time whole local steps in every storage mode, and weigh them."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fedkseed_kernels
from benchmarks.common import environment
from benchmarks.common.measure import Contestant, spread
from benchmarks.gpu import machine, turns
from benchmarks.gpu.channel import Channel
from benchmarks.gpu.plan import Settings
from benchmarks.models import modes, workloads
from benchmarks.step import contestants as step_contestants
from benchmarks.step import memory as step_memory

_DTYPE_NAME, _DTYPE = "bf16", torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """What steps are timed on; the models are of `workloads.MODELS`.

    On the GPU the 1B model in every mode takes at most 66 GB of memory: 40 for 14 models in bf16 and one in
    fp32, 5 for the residuals of two, 8 for scratch (the tied head, in bf16 or fp32, once or twice a streamed
    model), 13 for three times the fp32 logits of a doubled batch of 8.
    """

    model: str
    without_transformers: str
    large_batch: int
    num_tokens: int
    num_samples: int


FULL = Sizes("random-1b", "bare", 8, 512, 9)
TINY = Sizes("random-tiny", "bare-tiny", 3, 16, 1)


def batch_1(settings: Settings, channel: Channel) -> None:
    """The part of one row, all modes."""
    sizes = _sizes(settings, channel)
    _time(settings, channel, sizes, 1, lambda _: True)


def batch_8(settings: Settings, channel: Channel) -> None:
    """The part of the large batch; without modes that compute in fp32, which would take most of the time."""
    sizes = _sizes(settings, channel)
    _time(settings, channel, sizes, sizes.large_batch, lambda name: not _is_in_fp32(name))


def memory(settings: Settings, channel: Channel) -> None:
    """The part of peak memory: bytes beyond inference for each mode, batch and family."""
    sizes = _sizes(settings, channel)
    for batch_size in (1, sizes.large_batch):
        for family in fedkseed_kernels.FAMILIES:
            names = step_contestants.names(_DTYPE, family)
            weighed = [name for name in names if name not in step_contestants.baselines(_DTYPE)]
            # On a processor each of them is weighed in a process of its own, which takes seconds.
            for name in weighed[:1] if settings.is_dry_run else weighed:
                channel.check_time()
                row = {"batch_size": batch_size, "family": family, "contestant": name, "model": sizes.model}
                taken = step_memory.beyond_inference(
                    name,
                    model=sizes.model,
                    dtype=_DTYPE_NAME,
                    device=settings.device,
                    batch_size=batch_size,
                    num_tokens=sizes.num_tokens,
                    family=family,
                    num_threads=torch.get_num_threads(),
                )
                text = "unknown" if taken is None else f"{taken / 1e6:.1f} MB beyond inference"
                channel.row(row | {"bytes_beyond_inference": taken}, text=f"{_start(row)} {text}")


def _is_in_fp32(name: str) -> bool:
    return modes.computes_in_fp32(name) or name == step_contestants.FORWARDS_FP32


def _sizes(settings: Settings, channel: Channel) -> Sizes:
    """The sizes; a model whose forward passes cost nothing where the package of the others is missing."""
    channel.facts(**machine.gpu_facts(settings.device))
    sizes = TINY if settings.is_dry_run else FULL
    if importlib.util.find_spec("transformers") is not None:
        return sizes
    channel.note(
        model=f"{sizes.without_transformers}: transformers is not installed, so steps run on a small model "
        "whose forward passes cost nothing; ratios to them say nothing"
    )
    return dataclasses.replace(sizes, model=sizes.without_transformers)


def _time(
    settings: Settings,
    channel: Channel,
    sizes: Sizes,
    batch_size: int,
    is_wanted: Callable[[str], bool],
) -> None:
    """Rows of all contestants, each renewed with every sample; the part fails if one does."""
    clock = turns.on_processor if settings.is_dry_run else turns.whole_on_gpu
    failed = []
    for family in fedkseed_kernels.FAMILIES:
        gc.collect()  # the models of the last family: they and their optimizers hold each other
        work = _load(sizes, batch_size, settings.device)
        contestants = []
        for name in filter(is_wanted, step_contestants.names(_DTYPE, family)):
            channel.check_time()
            contestants.append(_contestant(name, work, family, sizes.num_samples))
        start = {"batch_size": batch_size, "family": family, "model": sizes.model, "dtype": _DTYPE_NAME}
        failed += _take_turns(channel, contestants, start, clock)
    if failed:
        raise RuntimeError(f"expected all steps to run, got errors of {', '.join(failed)}")


def _load(sizes: Sizes, batch_size: int, device: str) -> workloads.Workload:
    try:
        return workloads.load(
            sizes.model, _DTYPE, num_rows=batch_size, num_tokens=sizes.num_tokens, device=device
        )
    except Exception as error:
        version = environment.version_of("transformers")
        raise RuntimeError(
            f"expected the model {sizes.model}, got an error with transformers {version}: {error}"
        ) from error


def _contestant(name: str, work: workloads.Workload, family: str, num_samples: int) -> Contestant:
    """A step that opens on a model of its own at its first turn: one that cannot costs its own row alone."""
    opened: list[step_contestants.Step] = []

    def step(_: int) -> None:
        if not opened:
            model = copy.deepcopy(work.model)
            opened.append(step_contestants.open_step(name, model, work.train, family))
        opened[0]()

    return Contestant(name, "step", step, num_samples)


def _take_turns(
    channel: Channel, contestants: list[Contestant], start: dict[str, Any], clock: Any
) -> list[str]:
    """Names of the contestants that failed."""
    taken = turns.Turns(contestants, clock, channel.check_time)
    rows = {}
    for contestant in taken:
        name = contestant.name
        row = start | {"contestant": name, "baseline": step_contestants.baseline_of(name, _DTYPE)}
        if name in taken.errors:
            row |= {"error": taken.errors[name]}
        else:
            samples = [sample.seconds for sample in taken.samples[name]]
            row |= {"seconds": spread(samples), "samples": samples}
        rows[name] = row
        channel.row(row, key=_start(row))
    for row in rows.values():
        channel.row(row, key=_start(row), text=f"{_start(row)} {_result(row, rows)}")
    return [f"{name} (batch {start['batch_size']}, {start['family']})" for name in taken.errors]


def _result(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    if "error" in row:
        return f"error: {row['error']}"
    median = row["seconds"]["median"]
    forwards = rows.get(row["baseline"], {}).get("seconds")
    return f"{median * 1e3:10.2f} ms" + (
        f", {median / forwards['median']:.2f}x of its forwards" if forwards else ""
    )


def _start(row: dict[str, Any]) -> str:
    return f"batch {row['batch_size']}, {row['family']:10} {row['contestant']:44}"
