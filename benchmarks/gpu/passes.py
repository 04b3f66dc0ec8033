"""The parts that time passes over the weights of a model, beside the copy bandwidth of the same process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common.constants import DTYPES
from benchmarks.common.measure import Contestant, spread
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import machine, turns
from benchmarks.gpu.channel import SKIPPED, Channel, PartEnded
from benchmarks.gpu.plan import BACKENDS, Settings

_COPY_SAMPLES = 20


@dataclass(frozen=True)
class Sizes:
    """What is timed over.

    Attributes:
        shapes: of the weights.
        rebuild_seeds: values of K, ascending; the last one with the first dtype alone.
        num_official_seeds: passes timed where a contestant rebuilds seed by seed.
        copy_bytes: of the buffer whose copy measures the bandwidth.
    """

    shapes: tuple[tuple[int, ...], ...]
    rebuild_seeds: tuple[int, ...]
    num_official_seeds: int
    copy_bytes: int


FULL = Sizes(tuple(gpu_cases.model_shapes()), (1, 16, 256, 4096), 16, 4 << 30)
TINY = Sizes(((40, 16), (16,)), (1, 4, 256), 2, 1 << 20)


def first_dtype(settings: Settings, channel: Channel) -> None:
    """The part of the first dtype, with the largest K."""
    sizes = TINY if settings.is_dry_run else FULL
    _time(settings, channel, sizes, {settings.dtypes[0]: sizes.rebuild_seeds})


def other_dtypes(settings: Settings, channel: Channel) -> None:
    """The part of the other dtypes."""
    sizes = TINY if settings.is_dry_run else FULL
    if len(settings.dtypes) == 1:
        raise PartEnded(SKIPPED, "--dtypes names no other")
    _time(settings, channel, sizes, dict.fromkeys(settings.dtypes[1:], sizes.rebuild_seeds[:-1]))


def copy_seconds(device: str, num_bytes: int, clock: Any) -> list[float]:
    """Seconds of copies of random bytes on the device."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return [clock(lambda: target.copy_(source)).seconds for _ in range(_COPY_SAMPLES)]


def _time(settings: Settings, channel: Channel, sizes: Sizes, dtypes: dict[str, tuple[int, ...]]) -> None:
    """Rows of all cases, each renewed with every sample; the part fails if a contestant does."""
    channel.facts(**machine.gpu_facts(settings.device))
    clock = turns.on_processor if settings.is_dry_run else turns.on_gpu
    seconds = spread(copy_seconds(settings.device, sizes.copy_bytes, clock))
    bandwidth = 2 * sizes.copy_bytes / seconds["median"]
    channel.note(nvidia_smi_after_copy=machine.smi())
    row = {"case": "copy", "clock": "device", "seconds": seconds, "samples": _COPY_SAMPLES}
    row |= {"bytes_per_s": bandwidth}
    channel.row(row, text=f"copy: {bandwidth / 1e12:.3f} TB/s, read and written")
    for name, backend in BACKENDS.items():
        if (reason := gpu_cases.why_not(backend, settings.device)) is not None:
            channel.say(f"{name}: refused: {reason}")
    failed = []
    for dtype, rebuild_seeds in dtypes.items():
        weights = gpu_cases.make_weights(list(sizes.shapes), DTYPES[dtype], settings.device)
        num_elements = sum(weight.numel() for weight in weights)
        cases = gpu_cases.cases(
            weights, rebuild_seeds=rebuild_seeds, num_official_seeds=sizes.num_official_seeds
        )
        for case in cases:
            failed += _time_case(channel, case, dtype, num_elements, bandwidth, clock)
    if failed:
        raise RuntimeError(f"expected all contestants to run, got errors of {', '.join(failed)}")


def _time_case(
    channel: Channel, case: gpu_cases.Case, dtype: str, num_elements: int, bandwidth: float, clock: Any
) -> list[str]:
    """Names of the contestants that failed."""
    start = {"case": case.name, "dtype": dtype}
    for name, reason in case.refused.items():
        channel.row(start | {"contestant": name, "refused": reason})
    taken = turns.Turns(case.contestants, clock, channel.check_time)
    last: dict[str, list[dict[str, Any]]] = {}
    for contestant in taken:
        last[contestant.name] = list(rows(case, dtype, contestant, taken, num_elements, bandwidth))
        for row in last[contestant.name]:
            channel.row(row, key=_key(row))
    for found in last.values():
        channel.row(found[0], key=_key(found[0]), text=line(*found))
    return [f"{name} ({case.name}, {dtype})" for name in taken.errors]


def rows(
    case: gpu_cases.Case,
    dtype: str,
    contestant: Contestant,
    taken: turns.Turns,
    num_elements: int,
    bandwidth: float,
) -> Iterator[dict[str, Any]]:
    """A contestant's rows: by the device's clock and by the host's, or what it raised.

    By the device: "seconds" (median, p20, p80) of the whole operation, the number of "samples", whether they
    are "extrapolated", "of_copy_bandwidth", "t_normals_per_s" in 10^12, and "queued": whether the figure
    surely holds no time of the host. By the host: until the call returned.
    """
    start = {"case": case.name, "dtype": dtype, "contestant": contestant.name}
    if contestant.name in taken.errors:
        yield start | {"clock": "device", "error": taken.errors[contestant.name]}
        return
    samples = taken.samples[contestant.name]
    seconds = spread([sample.seconds * contestant.repeats for sample in samples])
    common = {"samples": len(samples), "extrapolated": contestant.repeats > 1}
    yield start | {
        "clock": "device",
        "seconds": seconds,
        **common,
        "of_copy_bandwidth": num_elements * case.num_bytes / seconds["median"] / bandwidth,
        "t_normals_per_s": num_elements * case.num_terms / seconds["median"] / 1e12,
        "queued": all(sample.is_queued for sample in samples),
    }
    host = spread([sample.host_seconds * contestant.repeats for sample in samples])
    yield start | {"clock": "host", "seconds": host, **common}


def line(row: dict[str, Any], host: dict[str, Any] | None = None) -> str:
    """A contestant's rows as text."""
    start = f"{row['dtype']}  {row['case']:28} {row['contestant']:20} "
    if "error" in row:
        return f"{start}error: {row['error']}"
    marks = ["extrapolated"] * row["extrapolated"] + ["perhaps with time of the host"] * (not row["queued"])
    return (
        f"{start}{row['seconds']['median'] * 1e3:11.3f} ms {row['of_copy_bandwidth']:7.1%} of copy "
        f"{row['t_normals_per_s']:.4f} T normals/s"
        + ("" if host is None else f", host {host['seconds']['median'] * 1e3:.3f} ms")
        + (f" ({', '.join(marks)})" if marks else "")
    )


def _key(row: dict[str, Any]) -> str:
    return ", ".join((row["case"], row["dtype"], row["contestant"], row["clock"]))
