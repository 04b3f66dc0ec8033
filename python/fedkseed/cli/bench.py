"""`fedkseed bench`: a quick comparison on this machine; the full suites run from a checkout (make bench)."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from tqdm import tqdm

import fedkseed_kernels

_SEED, _SCALE = 1, 1e-3


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "bench",
        parents=parents,
        help="a quick comparison of the kernels on this machine",
        description="Times a perturbation and a rebuild from a few seeds beside the same made with torch's "
        "own generator (MeZO's way: seed it, draw a tensor of normals, add it). Interleaved, medians; half a "
        "minute.",
        epilog="The full suites, beside the official algorithm, run from a checkout: make bench.",
    )
    parser.add_argument("--megaparameters", type=int, default=16, help="millions of weights (%(default)s)")
    parser.add_argument("--num-seeds", type=int, default=16, help="K of the rebuild (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="samples behind each median (%(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Checks the answer, times, prints a table."""
    for name in ("megaparameters", "num_seeds", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"expected --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}"
            )
    size = options.megaparameters * 1_000_000
    seeds = list(range(options.num_seeds))
    coefficients = [_SCALE] * options.num_seeds
    kernels = fedkseed_kernels.info()
    print(
        f"{size:,} weights in bfloat16, {torch.get_num_threads()} threads; kernels: {kernels['cpu_backend']} "
        f"({kernels['cpu_isa']})"
    )
    weights = [
        torch.randn(size // 8, generator=torch.Generator().manual_seed(0)).bfloat16() for _ in range(8)
    ]
    _check_bits(weights[0])
    rows = {
        "perturb": _compare(
            lambda: fedkseed_kernels.perturb_(weights, _SEED, _SCALE),
            lambda: _torch_add(weights, [_SEED], [_SCALE]),
            options.repeats,
        ),
        f"rebuild, K = {options.num_seeds}": _compare(
            lambda: fedkseed_kernels.seed_axpy_(weights, seeds, coefficients),
            lambda: _torch_add(weights, seeds, coefficients),
            options.repeats,
        ),
    }
    print(f"{'':18}{'fedkseed ms':>13}{'torch ms':>11}{'ratio':>8}{'G normals/s':>13}")
    for name, (ours, theirs) in rows.items():
        terms = 1 if name == "perturb" else options.num_seeds
        speed = size * terms / ours / 1e9
        print(f"{name:18}{ours * 1e3:13.1f}{theirs * 1e3:11.1f}{theirs / ours:8.1f}{speed:13.2f}")
    return 0


def _check_bits(weight: torch.Tensor) -> None:
    """The fast kernel against the NumPy reference on a few thousand weights, before anything is timed."""
    piece = weight[:4099].clone()
    with fedkseed_kernels.backend("reference"):
        (expected,) = fedkseed_kernels.seed_axpy([piece], [_SEED], [_SCALE])
    fedkseed_kernels.perturb_([piece], _SEED, _SCALE)
    if not torch.equal(piece, expected):
        raise RuntimeError(
            "expected the kernels to equal the reference bit for bit, got other bits; "
            "run: python -m fedkseed_kernels.conformance"
        )


def _torch_add(weights: list[torch.Tensor], seeds: list[int], coefficients: list[float]) -> None:
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for weight in weights:
            noise = torch.empty_like(weight).normal_(generator=generator)
            weight.add_(noise, alpha=coefficient)


def _compare(ours: Callable[[], None], theirs: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of each, taken in turn after one round to warm up."""
    samples: tuple[list[float], list[float]] = ([], [])
    for repeat in tqdm(range(repeats + 1), leave=False, disable=None):
        for call, times in zip((ours, theirs), samples, strict=True):
            start = perf_counter()
            call()
            if repeat:
                times.append(perf_counter() - start)
    return statistics.median(samples[0]), statistics.median(samples[1])
