"""The first part: does the machine code load, and do its bits equal those of the processor?

A case of every kind in some seconds; tests/gpu have them all. What stands behind it is only worth reading if
this passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fedkseed_kernels
from benchmarks.gpu import machine
from benchmarks.gpu.cases import why_not
from benchmarks.gpu.channel import FAILED, Channel, PartEnded
from benchmarks.gpu.plan import BACKENDS, Settings

_SIZES, _TINY_SIZES = (1, 9, 4097, 100_003), (1, 9, 129)
_SEED = 3
_INTEGERS = {2: torch.int16, 4: torch.int32}

#: What a case writes, given its weights on a device.
Call = Callable[[list[Tensor]], Sequence[Tensor]]


def _terms(count: int) -> tuple[list[int], list[float]]:
    return [int(seed) for seed in fedkseed_kernels.candidate_seeds(_SEED, count)], [0.01, -0.02, 0.005] * (
        count // 3
    ) + [0.25] * (count % 3)


def _in_place(count: int, **options: Any) -> Call:
    def call(tensors: list[Tensor]) -> list[Tensor]:
        fedkseed_kernels.seed_axpy_(tensors, *_terms(count), alpha=0.999, **options)
        return tensors

    return call


def _pair(tensors: list[Tensor]) -> list[Tensor]:
    plus, minus = fedkseed_kernels.seed_axpy_pair(tensors, *_terms(1))
    return [*plus, *minus]


def _with_residuals(tensors: list[Tensor]) -> list[Tensor]:
    residuals = [_random_bits(tensor.shape).to(tensor.device) for tensor in tensors]
    fedkseed_kernels.seed_axpy_(tensors, *_terms(1), residuals=residuals)
    return [*tensors, *residuals]


def _strided(tensors: list[Tensor]) -> list[Tensor]:
    turned = _weights((130, 94), torch.bfloat16).to(tensors[0].device).t()
    fedkseed_kernels.seed_axpy_(turned, *_terms(3))
    return [turned]


CASES: dict[str, tuple[torch.dtype, Call]] = {
    "K = 1": (torch.bfloat16, _in_place(1)),
    "K = 1, fp32": (torch.float32, _in_place(1)),
    "K = 2": (torch.bfloat16, _in_place(2)),
    "K = 3": (torch.bfloat16, _in_place(3)),
    "K = 300": (torch.bfloat16, _in_place(300)),
    "pair": (torch.bfloat16, _pair),
    "stochastic": (torch.bfloat16, _in_place(1, rounding="stochastic", rounding_seed=2**63 + 1)),
    "residuals": (torch.bfloat16, _with_residuals),
    "strided": (torch.bfloat16, _strided),
    "rademacher, K = 1": (torch.bfloat16, _in_place(1, family="rademacher")),
    "rademacher, K = 300": (torch.bfloat16, _in_place(300, family="rademacher")),
}


def run(settings: Settings, channel: Channel) -> None:
    """The part: a row for each case and backend."""
    device = settings.device
    channel.row({"case": "context", "seconds": _first_touch(device)})
    channel.facts(**machine.gpu_facts(device))
    # A self-test that fails takes the library out of this process: its cases come first. Triton's come last,
    # as they have to be compiled.
    wrong = _bits("cuda", settings, channel) + _self_test(channel) + _bits("triton", settings, channel)
    if wrong:
        raise PartEnded(FAILED, f"expected the processor's bits, got {'; '.join(wrong)}")


def _bits(label: str, settings: Settings, channel: Channel) -> list[str]:
    """A row for each case of a backend of `BACKENDS`; which are wrong."""
    backend, device = BACKENDS[label], settings.device
    if (reason := why_not(backend, device)) is not None:
        channel.row({"backend": label, "refused": reason}, text=f"{label}: refused: {reason}")
        return [] if settings.is_dry_run else [f"{label}: refused: {reason}"]
    sizes = _TINY_SIZES if settings.is_dry_run else _SIZES
    # On a processor its own C++ is held to NumPy.
    judge = "reference" if settings.is_dry_run else "auto"
    wrong = []
    for name, (dtype, call) in CASES.items():
        channel.check_time()
        row = {"case": name, "backend": label, **_compare(call, dtype, sizes, device, backend, judge)}
        found = "equal" if row["equal"] else row.get("error") or row["differs"]
        channel.row(row, text=f"{label:8} {name:24} {found}, {row['seconds']:.2f} s")
        if not row["equal"]:
            wrong.append(f"{label}, {name}: {found}")
    return wrong


def _self_test(channel: Channel) -> list[str]:
    """A row for each self-test of the native libraries; which fail. Triton's would compile for minutes."""
    failed = []
    for found in fedkseed_kernels.verify():
        text = f"self-test of {found.backend} on {found.device} ({found.isa}): {found.status}"
        text += f": {found.problem}" if found.problem else ""
        channel.row({"case": "self-test", **found._asdict()}, text=text)
        failed += [text] if found.status == "fail" else []
        if found.device.startswith("cuda"):
            break  # the library's, which comes first on a GPU
    return failed


def _first_touch(device: str) -> float:
    """Seconds until the device has done something: driver, context."""
    begin = time.perf_counter()
    torch.zeros(1, device=device).add_(1).item()
    return time.perf_counter() - begin


def _compare(
    call: Call, dtype: torch.dtype, sizes: Sequence[int], device: str, backend: str, judge: str
) -> dict[str, Any]:
    """{"equal", "seconds"} with "differs" or "error"; seconds of the call, compiling and loading included."""
    with fedkseed_kernels.backend(judge):
        wanted = call([_weights((size,), dtype) for size in sizes])
    tensors = [_weights((size,), dtype).to(device) for size in sizes]
    begin = time.perf_counter()
    try:
        with fedkseed_kernels.backend(backend):
            found = [tensor.cpu() for tensor in call(tensors)]
    except Exception as error:
        if device == "cuda":
            torch.cuda.synchronize()  # raises where the error has spoilt the context
        return {
            "equal": False,
            "seconds": time.perf_counter() - begin,
            "error": f"{type(error).__name__}: {error}",
        }
    seconds = time.perf_counter() - begin
    differs = [text for pair in zip(found, wanted, strict=True) if (text := _difference(*pair))]
    return {"equal": not differs, "seconds": seconds} | ({"differs": differs[0]} if differs else {})


def _difference(found: Tensor, wanted: Tensor) -> str:
    """How many elements differ; "" if none. Two NaNs are equal whatever their payloads."""
    integer = _INTEGERS[wanted.element_size()]
    same = found.contiguous().view(integer) == wanted.contiguous().view(integer)
    if wanted.is_floating_point():
        same |= found.isnan() & wanted.isnan()
    wrong = (~same).flatten().nonzero().flatten().tolist()
    return f"{len(wrong)} of {same.numel()} differ, the first at {wrong[0]}" if wrong else ""


def _weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def _random_bits(shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(-(2**15), 2**15, tuple(shape), generator=generator, dtype=torch.int16)
