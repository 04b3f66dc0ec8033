"""What the GPU benchmark times: the weights, each contestant's passes, and what a pass costs in bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fedkseed_kernels
from benchmarks.baselines import official, torch_ways
from benchmarks.common.constants import LEARNING_RATE, ZO_EPS

PROJECTED_GRADIENT = 0.7  # like LEARNING_RATE and ZO_EPS it changes no timing


def model_shapes() -> list[tuple[int, ...]]:
    """292 parameter shapes, 1,414,647,808 elements: a GPT-NeoX of 24 blocks, width 2048, 50,304 tokens."""
    width, tokens = 2048, 50_304
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block += [(width,)] * 4
    return [(tokens, width), *block * 24, (width,), (width,), (tokens, width)]


def make_weights(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """Zeros: no pass depends on the values in time."""
    return [
        torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
        for shape in shapes
    ]


@dataclass(frozen=True)
class Pass:
    """One contestant's way to do a case.

    Attributes:
        contestant: "cuda", "triton", "official", "official without decay", "tl.randn", "randn_like + add_" or
            "copy".
        run: does it once.
        num_terms: normals for each element.
        num_accesses: bytes moved a pass, in elements: 2 for a pass in place.
        repeats: how many of it the whole operation is (over 1: extrapolated).
        refusal: why its backend does not serve the case; None if it does.
    """

    contestant: str
    run: Callable[[], object]
    num_terms: int = 1
    num_accesses: int = 2
    repeats: int = 1
    refusal: str | None = None


@dataclass(frozen=True)
class Case:
    """An operation and who does it."""

    name: str
    passes: list[Pass]


def ours(
    call: Callable[[], object],
    device_type: str,
    num_terms: int = 1,
    num_accesses: int = 2,
) -> list[Pass]:
    """The call served by "cuda" (CUDA C++) and by "triton", if they serve tensors of the device."""

    def run(backend: str) -> None:
        with fedkseed_kernels.backend(backend):
            call()

    return [
        Pass(
            label,
            functools.partial(run, backend),
            num_terms,
            num_accesses,
            refusal=fedkseed_kernels.unavailable(backend, device_type),
        )
        for label, backend in (("cuda", "native"), ("triton", "triton"))
    ]


def cases(
    weights: list[torch.nn.Parameter], *, rebuild_seeds: tuple[int, ...], num_official_seeds: int
) -> Iterator[Case]:
    """The cases over these weights, one after the other: a pair's outputs live only while its case runs."""
    named = [(f"{position}.weight", weight) for position, weight in enumerate(weights)]
    tensors = [weight.data for weight in weights]
    prepared = fedkseed_kernels.prepare(tensors)
    device_type = tensors[0].device.type
    yield Case(
        "perturb",
        [
            *ours(lambda: prepared.perturb_(5, ZO_EPS), device_type),
            Pass("official", lambda: official.perturb_(named, 5, 1, ZO_EPS)),
            Pass(
                "tl.randn",
                lambda: triton_randn_add_(tensors, 5, ZO_EPS),
                refusal=fedkseed_kernels.unavailable("triton", device_type),
            ),
            Pass("randn_like + add_", lambda: torch_ways.axpy_(weights, 5, ZO_EPS)),
        ],
    )

    def official_merged() -> None:
        official.perturb_(named, 5, 1, ZO_EPS)
        official.update_(named, 5, PROJECTED_GRADIENT, LEARNING_RATE)

    merged = ZO_EPS - LEARNING_RATE * PROJECTED_GRADIENT
    yield Case(
        "restore and update",
        [*ours(lambda: prepared.perturb_(5, merged), device_type), Pass("official", official_merged, 2)],
    )
    chained = ([5, 6], [merged, ZO_EPS])
    yield Case("chained", ours(lambda: prepared.seed_axpy_(*chained), device_type, 2))
    outs = {name: [torch.empty_like(tensor) for tensor in tensors] for name in ("out_plus", "out_minus")}
    yield Case(
        "pair",
        ours(lambda: fedkseed_kernels.seed_axpy_pair(tensors, [5], [ZO_EPS], **outs), device_type, 1, 3),
    )
    outs.clear()
    if tensors[0].dtype.itemsize == 2:
        yield from _compensated_cases(tensors)
    for family in fedkseed_kernels.FAMILIES:
        for num_seeds in rebuild_seeds:
            yield Case(
                f"rebuild, K = {num_seeds}, {family}",
                [
                    *_rebuild_of_ours(tensors, num_seeds, family),
                    *(
                        _rebuild_of_theirs(named, weights, num_seeds, num_official_seeds)
                        if family == "gaussian"
                        else []
                    ),
                ],
            )


def _compensated_cases(tensors: list[torch.Tensor]) -> Iterator[Case]:
    """16-bit weights with residuals: a perturbed copy reads both, an update reads and writes both."""
    device_type = tensors[0].device.type
    residuals = [torch.zeros_like(tensor, dtype=torch.int16) for tensor in tensors]
    out = [torch.empty_like(tensor) for tensor in tensors]

    def perturb() -> None:
        fedkseed_kernels.seed_axpy(tensors, [5], [ZO_EPS], residuals=residuals, out=out)

    yield Case("perturb, compensated", ours(perturb, device_type, 1, 3))
    out.clear()
    prepared = fedkseed_kernels.prepare(tensors, residuals=residuals)
    update = ours(lambda: prepared.perturb_(5, -LEARNING_RATE * PROJECTED_GRADIENT), device_type, 1, 4)
    yield Case("update, compensated", update)


def _rebuild_of_ours(tensors: list[torch.Tensor], num_seeds: int, family: str) -> list[Pass]:
    device = tensors[0].device
    seeds = torch.arange(1, num_seeds + 1, device=device)
    coeffs = torch.full((num_seeds,), 1e-4, device=device, dtype=torch.float64)

    def call() -> None:
        fedkseed_kernels.seed_axpy_(tensors, seeds, coeffs, family=family)

    return ours(call, device.type, num_seeds)


def _rebuild_of_theirs(
    named: list[tuple[str, torch.nn.Parameter]],
    weights: list[torch.nn.Parameter],
    num_seeds: int,
    num_official_seeds: int,
) -> list[Pass]:
    """A few seeds timed, the rest extrapolated: they go seed by seed."""
    timed = min(num_seeds, num_official_seeds)
    pool = {seed: PROJECTED_GRADIENT for seed in range(1, timed + 1)}
    repeats = num_seeds // timed

    def without_decay() -> None:
        official.rebuild_(named, pool, LEARNING_RATE, decay_terms=False)

    def simple() -> None:
        for seed in pool:
            torch_ways.axpy_(weights, seed, LEARNING_RATE)

    return [
        Pass("official", lambda: official.rebuild_(named, pool, LEARNING_RATE), timed, repeats=repeats),
        Pass("official without decay", without_decay, timed, repeats=repeats),
        Pass("randn_like + add_", simple, timed, repeats=repeats),
    ]


def triton_randn_add_(tensors: list[torch.Tensor], seed: int, scale: float) -> None:
    """w <- w + scale tl.randn(seed, element), one fused kernel a tensor: what a Triton user writes first."""
    from benchmarks.baselines.triton_randn import randn_add

    for tensor in tensors:
        grid = ((tensor.numel() + 1023) // 1024,)
        randn_add[grid](tensor, tensor.numel(), seed, scale, block=1024)
