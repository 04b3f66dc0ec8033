"""What the GPU benchmark times: the weights, each contestant's passes, and what a pass costs in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fedkseed_kernels
from benchmarks import baselines, official
from fedkseed_kernels import dispatch

LR, EPS, G = 1e-6, 1e-3, 0.7


def model_shapes() -> list[tuple[int, ...]]:
    """292 parameter shapes, 1,414,647,808 elements: a GPT-NeoX of 24 blocks, width 2048, 50,304 tokens."""
    width, tokens = 2048, 50_304
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block += [(width,)] * 4
    return [(tokens, width), *block * 24, (width,), (width,), (tokens, width)]


def make_weights(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Zeros on the GPU: no pass depends on the values in time."""
    return [
        torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda"), requires_grad=False)
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
    """

    contestant: str
    run: Callable[[], object]
    num_terms: int = 1
    num_accesses: int = 2
    repeats: int = 1


@dataclass(frozen=True)
class Case:
    """An operation and who does it."""

    name: str
    passes: list[Pass]


def ours(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call served by "native" (CUDA C++) or "triton"."""

    def run() -> None:
        with dispatch.backend(backend):
            call()

    return run


def cases(
    weights: list[torch.nn.Parameter], *, rebuild_seeds: tuple[int, ...], num_official_seeds: int
) -> Iterator[Case]:
    """The cases over these weights, one after the other: a pair's outputs live only while its case runs."""
    named = [(f"{position}.weight", weight) for position, weight in enumerate(weights)]
    tensors = [weight.data for weight in weights]
    prepared = {}
    for backend in ("native", "triton"):
        with dispatch.backend(backend):
            prepared[backend] = fedkseed_kernels.prepare(tensors)

    def both(call: Callable[[str], object], num_terms: int = 1, num_accesses: int = 2) -> list[Pass]:
        return [
            Pass(label, ours(backend, lambda b=backend: call(b)), num_terms, num_accesses)  # type: ignore[misc]
            for label, backend in (("cuda", "native"), ("triton", "triton"))
        ]

    yield Case(
        "perturb",
        [
            *both(lambda b: prepared[b].perturb_(5, EPS)),
            Pass("official", lambda: official.perturb_(named, 5, 1, EPS)),
            Pass("tl.randn", lambda: triton_randn_add_(tensors, 5, EPS)),
            Pass("randn_like + add_", lambda: baselines.axpy_(weights, 5, EPS)),
        ],
    )

    def official_merged() -> None:
        official.perturb_(named, 5, 1, EPS)
        official.update_(named, 5, G, LR)

    merged = EPS - LR * G
    yield Case(
        "restore and update",
        [*both(lambda b: prepared[b].perturb_(5, merged)), Pass("official", official_merged, 2)],
    )
    chained = ([5, 6], [merged, EPS])
    yield Case("chained", both(lambda b: prepared[b].seed_axpy_(*chained), 2))
    outs = {name: [torch.empty_like(tensor) for tensor in tensors] for name in ("out_plus", "out_minus")}
    yield Case(
        "pair",
        both(
            lambda b: fedkseed_kernels.seed_axpy_pair(tensors, [5], [EPS], **outs),
            1,
            3,
        ),
    )
    outs.clear()
    for family in ("gaussian", "rademacher"):
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


def _rebuild_of_ours(tensors: list[torch.Tensor], num_seeds: int, family: str) -> list[Pass]:
    seeds = torch.arange(1, num_seeds + 1, device="cuda")
    coeffs = torch.full((num_seeds,), 1e-4, device="cuda", dtype=torch.float64)

    def call() -> None:
        fedkseed_kernels.seed_axpy_(tensors, seeds, coeffs, family=family)

    return [
        Pass(label, ours(backend, call), num_seeds)
        for label, backend in (("cuda", "native"), ("triton", "triton"))
    ]


def _rebuild_of_theirs(
    named: list[tuple[str, torch.nn.Parameter]],
    weights: list[torch.nn.Parameter],
    num_seeds: int,
    num_official_seeds: int,
) -> list[Pass]:
    """A few seeds timed, the rest extrapolated: they go seed by seed."""
    timed = min(num_seeds, num_official_seeds)
    pool = {seed: G for seed in range(1, timed + 1)}
    repeats = num_seeds // timed

    def without_decay() -> None:
        official.rebuild_(named, pool, LR, decay_terms=False)

    def simple() -> None:
        for seed in pool:
            baselines.axpy_(weights, seed, LR)

    return [
        Pass("official", lambda: official.rebuild_(named, pool, LR), timed, repeats=repeats),
        Pass("official without decay", without_decay, timed, repeats=repeats),
        Pass("randn_like + add_", simple, timed, repeats=repeats),
    ]


def triton_randn_add_(tensors: list[torch.Tensor], seed: int, scale: float) -> None:
    """w <- w + scale tl.randn(seed, element), one fused kernel a tensor: what a Triton user writes first."""
    from benchmarks.gpu_randn import randn_add

    for tensor in tensors:
        grid = ((tensor.numel() + 1023) // 1024,)
        randn_add[grid](tensor, tensor.numel(), seed, scale, block=1024)
