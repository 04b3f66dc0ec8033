"""What the GPU benchmark times: the weights, and each contestant's passes over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import fedkseed_kernels
from benchmarks.baselines import official, torch_ways
from benchmarks.common.constants import LEARNING_RATE, ZO_EPS
from benchmarks.common.measure import Contestant
from benchmarks.gpu.plan import BACKENDS

PROJECTED_GRADIENT = 0.7  # like LEARNING_RATE and ZO_EPS it changes no timing
#: Of our passes, of rebuilds from many seeds, of the other contestants' passes.
_OUR_SAMPLES, _LONG_SAMPLES, _THEIR_SAMPLES = 9, 3, 3
_MANY_TERMS, _WARM_UP_TERMS = 256, 16  # a rebuild of so many is warmed up with few of them
_STANDARD_DEVIATION = 0.02
_SEED = 11

Named = list[tuple[str, torch.nn.Parameter]]


def model_shapes() -> list[tuple[int, ...]]:
    """292 parameter shapes, 1,414,647,808 elements: a GPT-NeoX of 24 blocks, width 2048, 50,304 tokens."""
    width, tokens = 2048, 50_304
    block = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block += [(width,)] * 4
    return [(tokens, width), *block * 24, (width,), (width,), (tokens, width)]


def make_weights(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """Weights as a model has them, N(0, 0.02).

    Their bits are random: zeros draw less power, and a GPU then runs at higher clocks. All are finite.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    return [
        torch.nn.Parameter(
            torch.empty(shape, dtype=dtype, device=device).normal_(
                0, _STANDARD_DEVIATION, generator=generator
            ),
            requires_grad=False,
        )
        for shape in shapes
    ]


def make_residuals(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Residuals of any bits, as steps leave them."""
    generator = torch.Generator(tensors[0].device).manual_seed(_SEED)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.int16}
    return [torch.randint(-(2**15), 2**15, t.shape, device=t.device, **options) for t in tensors]


@dataclass(frozen=True)
class Case:
    """An operation and who does it.

    Attributes:
        num_terms: normals that each element needs.
        num_bytes: bytes that have to be moved for each element.
        contestants: "cuda", "triton", "official", "official without decay", "tl.randn", "randn_like + add_".
        refused: contestants whose backend does not serve the case, with the reason.
    """

    name: str
    num_terms: int
    num_bytes: int
    contestants: list[Contestant]
    refused: dict[str, str] = field(default_factory=dict)

    def with_others(self, *others: Contestant) -> Case:
        """The same with further contestants."""
        return Case(self.name, self.num_terms, self.num_bytes, [*self.contestants, *others], self.refused)


def why_not(backend: str, device_type: str) -> str | None:
    """Why a backend serves no tensors of a device here; None if it does.

    An error on the way to the answer is one too: the other backend's figures count all the same.
    """
    try:
        return fedkseed_kernels.unavailable(backend, device_type)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def _theirs(name: str, kind: str, call: Callable[[], object], repeats: int = 1) -> Contestant:
    return Contestant(name, kind, lambda _: _ignore(call()), _THEIR_SAMPLES, repeats)


def _ignore(_: object) -> None:
    """A pass returns nothing that is wanted here."""


def _ours(
    name: str,
    call: Callable[[], object],
    device_type: str,
    *,
    num_bytes: int,
    num_terms: int = 1,
    warm_up: Callable[[], object] | None = None,
) -> Case:
    """A case of the call served by "cuda" (CUDA C++) and by "triton", if they serve tensors of the device."""

    def served(backend: str, what: Callable[[], object], _: int = 0) -> None:
        with fedkseed_kernels.backend(backend):
            what()

    contestants, refused = [], {}
    for label, backend in BACKENDS.items():
        reason = why_not(backend, device_type)
        if reason is not None:
            refused[label] = reason
            continue
        warm = None if warm_up is None else functools.partial(served, backend, warm_up)
        samples = _OUR_SAMPLES if num_terms < _MANY_TERMS else _LONG_SAMPLES
        run = functools.partial(served, backend, call)
        contestants.append(Contestant(label, "ours", run, samples, warm_up=warm))
    return Case(name, num_terms, num_bytes, contestants, refused)


def cases(
    weights: list[torch.nn.Parameter], *, rebuild_seeds: tuple[int, ...], num_official_seeds: int
) -> Iterator[Case]:
    """The cases over these weights, one after the other: a case's outputs live only while it runs.

    Ours run on prepared handles, as a step's passes do.
    """
    named = [(f"{position}.weight", weight) for position, weight in enumerate(weights)]
    tensors = [weight.data for weight in weights]
    yield from _in_place(named, tensors)
    yield from _out_of_place(tensors)
    if tensors[0].dtype.itemsize == 2:
        yield from _of_16_bits(tensors)
        yield from _in_fp32(tensors)
    for family in fedkseed_kernels.FAMILIES:
        for num_seeds in rebuild_seeds:
            rebuild = _rebuild(tensors, num_seeds, family)
            theirs = _rebuilds_of_theirs(named, num_seeds, num_official_seeds)
            yield rebuild.with_others(*theirs) if family == "gaussian" else rebuild


def _in_place(named: Named, tensors: list[torch.Tensor]) -> Iterator[Case]:
    weights = [weight for _, weight in named]
    prepared = fedkseed_kernels.prepare(tensors)
    device_type, num_bytes = tensors[0].device.type, 2 * tensors[0].dtype.itemsize
    ours = functools.partial(_ours, device_type=device_type, num_bytes=num_bytes)
    perturb = ours("perturb", lambda: prepared.perturb_(5, ZO_EPS)).with_others(
        _theirs("official", "official", lambda: official.perturb_(named, 5, 1, ZO_EPS)),
        _theirs("randn_like + add_", "torch", lambda: torch_ways.axpy_(weights, 5, ZO_EPS)),
    )
    reason = why_not("triton", device_type)
    if reason is None:
        randn = _theirs("tl.randn", "triton", lambda: triton_randn_add_(tensors, 5, ZO_EPS))
        yield perturb.with_others(randn)
    else:
        perturb.refused["tl.randn"] = reason
        yield perturb

    def official_merged() -> None:
        official.perturb_(named, 5, 1, ZO_EPS)
        official.update_(named, 5, PROJECTED_GRADIENT, LEARNING_RATE)

    merged = ZO_EPS - LEARNING_RATE * PROJECTED_GRADIENT
    restore = ours("restore and update", lambda: prepared.perturb_(5, merged))
    yield restore.with_others(_theirs("official", "official", official_merged))
    yield ours("chained", lambda: prepared.seed_axpy_([5, 6], [merged, ZO_EPS]), num_terms=2)
    rademacher = fedkseed_kernels.prepare(tensors, family="rademacher")
    yield ours("perturb, rademacher", lambda: rademacher.perturb_(5, ZO_EPS))


def _out_of_place(tensors: list[torch.Tensor]) -> Iterator[Case]:
    """What streamed steps do to a unit at a time: a perturbed copy, and both sides at once."""
    size, device_type = tensors[0].dtype.itemsize, tensors[0].device.type
    plus = [torch.empty_like(tensor) for tensor in tensors]
    copied = fedkseed_kernels.prepare_out(tensors, plus)
    yield _ours("perturbed copy", lambda: copied.seed_axpy([5], [ZO_EPS]), device_type, num_bytes=2 * size)
    minus = [torch.empty_like(tensor) for tensor in tensors]
    both = fedkseed_kernels.prepare_pair(tensors, plus, minus)
    yield _ours("pair", lambda: both.seed_axpy_pair([5], [ZO_EPS]), device_type, num_bytes=3 * size)


def _of_16_bits(tensors: list[torch.Tensor]) -> Iterator[Case]:
    """Stochastic rounding; residuals, which a perturbed copy reads and an update also writes."""
    size, device_type = tensors[0].dtype.itemsize, tensors[0].device.type
    prepared = fedkseed_kernels.prepare(tensors)
    rounding: dict[str, Any] = {"rounding": "stochastic", "rounding_seed": 7}
    yield _ours(
        "perturb, stochastic",
        lambda: prepared.perturb_(5, ZO_EPS, **rounding),
        device_type,
        num_bytes=2 * size,
    )
    residuals = make_residuals(tensors)
    out = [torch.empty_like(tensor) for tensor in tensors]
    copied = fedkseed_kernels.prepare_out(tensors, out, residuals=residuals)
    yield _ours(
        "perturbed copy, compensated",
        lambda: copied.seed_axpy([5], [ZO_EPS]),
        device_type,
        num_bytes=3 * size,
    )
    updated = fedkseed_kernels.prepare(tensors, residuals=residuals)
    coeff = -LEARNING_RATE * PROJECTED_GRADIENT
    yield _ours("update, compensated", lambda: updated.perturb_(5, coeff), device_type, num_bytes=4 * size)


def _in_fp32(tensors: list[torch.Tensor]) -> Iterator[Case]:
    """A perturbed copy of 16-bit weights that is not rounded: what a step with fp32 forward passes reads."""
    device, num_bytes = tensors[0].device, tensors[0].dtype.itemsize + torch.float32.itemsize
    wide = [torch.empty(tensor.shape, dtype=torch.float32, device=device) for tensor in tensors]
    copied = fedkseed_kernels.prepare_out(tensors, wide)
    yield _ours(
        "perturbed copy in fp32",
        lambda: copied.seed_axpy([5], [ZO_EPS]),
        device.type,
        num_bytes=num_bytes,
    )


def _rebuild(tensors: list[torch.Tensor], num_seeds: int, family: str) -> Case:
    """A rebuild from seeds and coefficients on the device."""
    device = tensors[0].device
    seeds = torch.arange(1, num_seeds + 1, device=device)
    coeffs = torch.full((num_seeds,), 1e-4, device=device, dtype=torch.float64)
    prepared = fedkseed_kernels.prepare(tensors, family=family)

    def warm_up() -> None:
        prepared.seed_axpy_(seeds[:_WARM_UP_TERMS], coeffs[:_WARM_UP_TERMS])

    return _ours(
        f"rebuild, K = {num_seeds}, {family}",
        lambda: prepared.seed_axpy_(seeds, coeffs),
        device.type,
        num_bytes=2 * tensors[0].dtype.itemsize,
        num_terms=num_seeds,
        # On the very handle: its tables are made and copied at its first call.
        warm_up=None if num_seeds < _MANY_TERMS else warm_up,
    )


def _rebuilds_of_theirs(named: Named, num_seeds: int, num_official_seeds: int) -> list[Contestant]:
    """A few seeds timed, the rest extrapolated: they go seed by seed."""
    timed = min(num_seeds, num_official_seeds)
    pool = {seed: PROJECTED_GRADIENT for seed in range(1, timed + 1)}
    repeats = num_seeds // timed

    def simple() -> None:
        for seed in pool:
            torch_ways.axpy_([weight for _, weight in named], seed, LEARNING_RATE)

    rebuild = functools.partial(official.rebuild_, named, pool, LEARNING_RATE)
    without = functools.partial(rebuild, decay_terms=False)
    return [
        _theirs("official", "official", rebuild, repeats),
        _theirs("official without decay", "official", without, repeats),
        _theirs("randn_like + add_", "torch", simple, repeats),
    ]


def triton_randn_add_(tensors: list[torch.Tensor], seed: int, scale: float) -> None:
    """w <- w + scale tl.randn(seed, element), one fused kernel a tensor: what a Triton user writes first."""
    from benchmarks.baselines.triton_randn import randn_add

    for tensor in tensors:
        grid = ((tensor.numel() + 1023) // 1024,)
        randn_add[grid](tensor, tensor.numel(), seed, scale, block=1024)
