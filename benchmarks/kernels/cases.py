"""The measured operations, and for each the contestants that do it over the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.baselines import official, torch_ways
from benchmarks.common.constants import LEARNING_RATE, ZO_EPS
from benchmarks.common.measure import Contestant
from benchmarks.kernels.answers import Terms, own_variants
from benchmarks.kernels.settings import Settings, num_own_samples
from benchmarks.kernels.weights import Weights
from fedkseed_kernels import derived

BASE_SEED = 20260

AS_WRITTEN = "official, as written"
WITHOUT_DECAY = "official, without decay terms"
RANDN_LIKE = "randn_like + add_"
BERNOULLI = "bernoulli_ + add_"
NOISE_ALONE = "randn_like alone"
COPY = "copy"


@dataclass(frozen=True)
class Case:
    """One operation: its id, what it does in words, the noise family, and K."""

    id: str
    title: str
    operation: str  # perturb, update or rebuild
    family: str
    num_seeds: int

    def contestant_names(self) -> list[str]:
        """Names in the order in which `contestants` gives them."""
        names = [own_name(variant) for variant in own_variants()]
        if self.operation == "perturb":
            names.append(AS_WRITTEN)
        else:
            names += [AS_WRITTEN, WITHOUT_DECAY]
        names.append(BERNOULLI if self.family == "rademacher" else RANDN_LIKE)
        return [*names, NOISE_ALONE, COPY]


def own_name(variant: str) -> str:
    return f"ours ({variant})"


def cases(settings: Settings) -> list[Case]:
    """Every case of a run, in the order of the report."""
    listed = [
        Case("perturb", "Perturb: w + eps z, K = 1", "perturb", "gaussian", 1),
        Case("update", "Restore and update: w + (eps - lr g) z, K = 1", "update", "gaussian", 1),
    ]
    listed += [
        Case(f"rebuild-{k}", f"Rebuild, K = {k}", "rebuild", "gaussian", k) for k in settings.rebuild_seeds
    ]
    k = settings.rademacher_seeds
    return [
        *listed,
        Case("rademacher-perturb", "Perturb with Rademacher noise, K = 1", "perturb", "rademacher", 1),
        Case(
            f"rademacher-rebuild-{k}", f"Rebuild with Rademacher noise, K = {k}", "rebuild", "rademacher", k
        ),
    ]


class CopyBuffers:
    """Two buffers far larger than the caches; copying one into the other shows what the memory can move."""

    def __init__(self, num_bytes: int) -> None:
        self.source = torch.ones(num_bytes, dtype=torch.uint8)
        self.target = torch.zeros(num_bytes, dtype=torch.uint8)

    @property
    def num_bytes_moved(self) -> int:
        """Bytes read plus bytes written by one copy."""
        return 2 * self.source.numel()

    def copy_(self) -> None:
        self.target.copy_(self.source)


def contestants(case: Case, weights: Weights, buffers: CopyBuffers, settings: Settings) -> list[Contestant]:
    """Everyone who does the case's operation, in the order of `Case.contestant_names`.

    Contestants that rebuild seed by seed are timed for `num_official_seeds` seeds and stand for K times that.
    """
    num_passes = settings.num_official_seeds if case.operation == "rebuild" else settings.num_rounds
    repeats = case.num_seeds if case.operation == "rebuild" else 1
    seeds = [int(seed) for seed in derived.candidate_seeds(BASE_SEED, max(case.num_seeds, num_passes))]
    grads = np.random.default_rng(0).standard_normal(len(seeds)).tolist()
    coeffs = [_coefficient(case, grad) for grad in grads]
    terms = Terms(weights, seeds[: case.num_seeds], coeffs[: case.num_seeds], case.family)
    axpy_ = torch_ways.rademacher_axpy_ if case.family == "rademacher" else torch_ways.axpy_

    def simplest(index: int) -> None:
        axpy_(weights.parameters, seeds[index], coeffs[index])

    passes: dict[str, tuple[str, Callable[[int], None]]] = {
        AS_WRITTEN: ("official", _official_passes(case, weights, seeds, grads, True)),
        WITHOUT_DECAY: ("official", _official_passes(case, weights, seeds, grads, False)),
        RANDN_LIKE: ("torch", simplest),
        BERNOULLI: ("torch", simplest),
        NOISE_ALONE: ("noise", lambda index: torch_ways.noise(weights.parameters, seeds[index])),
    }
    num_own = num_own_samples(case.num_seeds, settings.num_rounds)
    everyone = {own_name(variant): _own(terms, variant, num_own) for variant in own_variants()}
    for name, (kind, run) in passes.items():
        everyone[name] = Contestant(name, kind, run, num_passes, repeats=repeats, warm_up=partial(run, 0))
    everyone[COPY] = Contestant(COPY, "copy", lambda _: buffers.copy_(), num_passes, warm_up=buffers.copy_)
    return [everyone[name] for name in case.contestant_names()]


def _coefficient(case: Case, grad: float) -> float:
    """What z is multiplied by when the whole operation is one addition."""
    restored = 0.0 if case.operation == "rebuild" else ZO_EPS
    return restored if case.operation == "perturb" else restored - LEARNING_RATE * grad


def _own(terms: Terms, variant: str, num_samples: int) -> Contestant:
    return Contestant(
        own_name(variant),
        "ours",
        lambda _: terms.apply_(variant),
        num_samples,
        isa=variant,
        warm_up=lambda: terms.apply_(variant, num_terms=1),
        check_before=lambda: terms.check_slices(variant),
        check_after=lambda: terms.check_weights(variant),
    )


def _official_passes(
    case: Case, weights: Weights, seeds: Sequence[int], grads: Sequence[float], decay_terms: bool
) -> Callable[[int], None]:
    """What the official code does for one sample of the case, always with Gaussian noise: it has no other."""
    named = weights.named

    def run(index: int) -> None:
        seed, grad = seeds[index], grads[index]
        if case.operation in ("perturb", "update"):
            official.perturb_(named, seed, 1, ZO_EPS)
        if case.operation in ("update", "rebuild"):
            official.update_(named, seed, grad, LEARNING_RATE, decay_terms=decay_terms)

    return run
