"""A step of the optimizers against two references: plain float64 arithmetic, and the contract bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.carried_decay import CarriedDecay

import fedkseed_kernels
from fedkseed import ZOSGD, FedKSeedSGD, SeedPool
from fedkseed_kernels.contract import derived, reference

Array = NDArray[Any]
SHAPES = ((7, 3), (11,), (2, 2, 5))
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def start_values() -> list[Array]:
    generator = np.random.default_rng(5)
    return [generator.normal(size=shape) for shape in SHAPES]


def loss_of(weights: Sequence[Array]) -> float:
    """Smooth, bounded, not symmetric around any point; the same bits for the same values."""
    return float(sum(float((np.sin(3 * w) + 0.3 * w).sum()) for w in weights))


def noise(seed: int, stream: int) -> Array:
    shape = SHAPES[stream]
    elements = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    return reference.gaussian(seed, stream, elements).astype(np.float64)


def seeds_of(seed: int, first: int, count: int) -> list[int]:
    return [int(s) for s in derived.candidate_seeds(seed, first + count)[first:]]


def doubles(tensors: Sequence[torch.Tensor]) -> list[Array]:
    return [tensor.detach().double().numpy().copy() for tensor in tensors]


class Mezo:
    """The algorithm as MeZO writes it, in float64, with one pass for each thing that happens."""

    def __init__(
        self,
        rates: Sequence[float],
        decays: Sequence[float],
        eps: float,
        max_abs_g: float = math.inf,
        max_loss_gap: float = math.inf,
    ) -> None:
        self.weights = start_values()
        self.mean_loss = math.nan
        self.rates, self.decays, self.eps = rates, decays, eps
        self.max_abs_g, self.max_loss_gap = max_abs_g, max_loss_gap

    def perturbed(self, seed: int, scaling_factor: float) -> list[Array]:
        return [w + scaling_factor * self.eps * noise(seed, i) for i, w in enumerate(self.weights)]

    def step(self, seeds: Sequence[int], loss: Callable[[Sequence[Array]], float] = loss_of) -> list[float]:
        gradients, num_skipped = [], 0
        losses = []
        for seed in seeds:
            loss1, loss2 = loss(self.perturbed(seed, 1)), loss(self.perturbed(seed, -1))
            losses += [loss1, loss2]
            projected_grad = (loss1 - loss2) / (2 * self.eps)
            if not math.isfinite(projected_grad) or abs(loss1 - loss2) > self.max_loss_gap:
                projected_grad = 0.0
                num_skipped += 1
            gradients.append(float(np.clip(projected_grad, -self.max_abs_g, self.max_abs_g)))
        self.mean_loss = sum(losses) / len(losses)
        if num_skipped < len(seeds):
            for i, w in enumerate(self.weights):
                mean = sum(g * noise(seed, i) for g, seed in zip(gradients, seeds, strict=True)) / len(seeds)
                self.weights[i] = w - self.rates[i] * (mean + self.decays[i] * w)
        return gradients


def assert_close(tensors: Sequence[torch.Tensor], expected: Sequence[Array], tolerance: float) -> None:
    for found, wanted in zip(doubles(tensors), expected, strict=True):
        assert np.abs(found - wanted).max() <= tolerance


@pytest.mark.parametrize("num_directions", [1, 2, 5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
@pytest.mark.parametrize("grouped", [False, True])
def test_zosgd_walks_as_mezo_does(num_directions: int, weight_decay: float, grouped: bool) -> None:
    tensors = [torch.from_numpy(values) for values in start_values()]
    lr, eps = 0.01, 0.5**10
    params: Any = tensors
    rates, decays = [lr] * 3, [weight_decay] * 3
    if grouped:
        params = [{"params": tensors[:1], "lr": 0.03}, {"params": tensors[1:], "weight_decay": 0.5}]
        rates, decays = [0.03, lr, lr], [weight_decay, 0.5, 0.5]
    optimizer = ZOSGD(
        params, lr, eps, seed=77, weight_decay=weight_decay, num_directions=num_directions, max_abs_g=1e4
    )
    mezo = Mezo(rates, decays, eps)
    for step in range(3):
        seeds = seeds_of(77, step * num_directions, num_directions)
        expected = mezo.step(seeds)
        loss = optimizer.step(lambda: loss_of(doubles(tensors)))
        np.testing.assert_allclose(optimizer.projected_grads, expected, rtol=1e-5)
        # alpha and g are rounded to fp32, and nothing else is.
        assert_close(tensors, mezo.weights, 3e-7)
        assert loss == pytest.approx(mezo.mean_loss, rel=1e-5)
    assert optimizer.num_skipped == 0
    moved = max(np.abs(a - b).max() for a, b in zip(start_values(), mezo.weights, strict=True))
    assert moved > 1e-2


def test_fedkseed_walks_as_mezo_does() -> None:
    pool = SeedPool(4, 16)
    tensors = [torch.from_numpy(values) for values in start_values()]
    optimizer = FedKSeedSGD(tensors, 0.01, 0.5**10, pool)
    mezo = Mezo([0.01] * 3, [0.0] * 3, 0.5**10)
    for index in (3, 15, 3):
        (expected,) = mezo.step([int(pool.seeds[index])])
        optimizer.step(lambda: loss_of(doubles(tensors)), seed_index=index)
        assert optimizer.history[-1] == (index, pytest.approx(expected, rel=1e-5))
        assert_close(tensors, mezo.weights, 3e-7)


@pytest.mark.parametrize("max_abs_g", [0.7, 3.0])
def test_g_is_clipped_by_value(max_abs_g: float) -> None:
    tensors = [torch.from_numpy(values) for values in start_values()]
    optimizer = ZOSGD(tensors, 0.01, 1e-3, seed=8, num_directions=3, max_abs_g=max_abs_g)
    eps = float(np.float32(1e-3))
    mezo = Mezo([0.01] * 3, [0.0] * 3, eps, max_abs_g=max_abs_g)
    clipped = 0
    for step in range(4):
        expected = mezo.step(seeds_of(8, 3 * step, 3))
        optimizer.step(lambda: loss_of(doubles(tensors)))
        np.testing.assert_allclose(optimizer.projected_grads, expected, rtol=1e-5)
        assert all(abs(g) <= max_abs_g for g in optimizer.projected_grads)
        clipped += sum(abs(g) == max_abs_g for g in expected)
        assert_close(tensors, mezo.weights, 1e-6)
    assert 0 < clipped <= 12
    assert optimizer.num_skipped == 0


def test_a_step_with_too_large_a_gap_is_skipped() -> None:
    eps = 0.5**10
    probe = Mezo([0.01] * 3, [0.2] * 3, eps)
    seeds = seeds_of(8, 0, 12)
    gaps = [2 * eps * abs(g) for g in probe.step(seeds)]
    bound = float(np.median(gaps))
    tensors = [torch.from_numpy(values) for values in start_values()]
    optimizer = ZOSGD(tensors, 0.01, eps, seed=8, weight_decay=0.2, max_loss_gap=bound)
    mezo = Mezo([0.01] * 3, [0.2] * 3, eps, max_loss_gap=bound)
    num_zero = 0
    for seed in seeds:
        (expected,) = mezo.step([seed])
        before = doubles(tensors)
        optimizer.step(lambda: loss_of(doubles(tensors)))
        np.testing.assert_allclose(optimizer.projected_grads, [expected], rtol=1e-5)
        assert_close(tensors, mezo.weights, 1e-6)
        if expected == 0:
            num_zero += 1
            assert_close(tensors, before, 1e-15)  # no weight decay either
    assert optimizer.num_skipped == num_zero
    assert 2 <= num_zero <= 10


def test_a_skipped_direction_leaves_the_others_with_the_mean_over_all() -> None:
    tensors = [torch.from_numpy(values) for values in start_values()]
    optimizer = ZOSGD(tensors, 0.01, 0.5**10, seed=3, weight_decay=0.1, num_directions=3)
    mezo = Mezo([0.01] * 3, [0.1] * 3, 0.5**10)
    calls = iter(range(100))

    def broken(weights: Sequence[Array]) -> float:
        return math.nan if next(calls) % 6 in (3, 4) else loss_of(weights)  # either side, of two directions

    expected = mezo.step(seeds_of(3, 0, 3), broken)
    returned = optimizer.step(lambda: broken(doubles(tensors)))
    assert math.isnan(returned)
    assert [g == 0 for g in optimizer.projected_grads] == [False, True, True]
    np.testing.assert_allclose(optimizer.projected_grads, expected, rtol=1e-5)
    assert optimizer.num_skipped == 2
    assert_close(tensors, mezo.weights, 3e-7)


class Contract:
    """The passes of a step in the reference backend: what is stored after each, bit for bit."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.stored = [stored_form(torch.from_numpy(v).to(DTYPES[dtype])) for v in start_values()]

    def apply(self, streams: Sequence[int], seeds: Sequence[int], coeffs: Any, alpha: float = 1.0) -> None:
        for stream in streams:
            weights = self.stored[stream]
            elements = np.arange(weights.size, dtype=np.uint64).reshape(weights.shape)
            self.stored[stream] = reference.seed_axpy_array(
                weights, elements, seeds, coeffs, dtype=self.dtype, stream=stream, alpha=alpha
            )

    def values(self) -> list[Array]:
        return doubles([torch.from_numpy(w.copy()).view(DTYPES[self.dtype]) for w in self.stored])


def stored_form(tensor: torch.Tensor) -> Array:
    array: Array = (
        tensor.view(torch.uint16).numpy() if tensor.dtype.itemsize == 2 else tensor.numpy()
    ).copy()
    return array


def assert_same_bits(tensors: Sequence[torch.Tensor], stored: Sequence[Array]) -> None:
    for tensor, expected in zip(tensors, stored, strict=True):
        np.testing.assert_array_equal(stored_form(tensor).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_stored_bits_are_those_of_the_stated_passes(
    dtype: str, num_directions: int, grouped: bool
) -> None:
    n, lr, decay, eps = num_directions, 0.013, 0.37, float(np.float32(3e-2))
    tensors = [torch.from_numpy(values).to(DTYPES[dtype]) for values in start_values()]
    params: Any = [{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.5 * lr}] if grouped else tensors
    optimizer = ZOSGD(params, lr, 3e-2, seed=-5, weight_decay=decay, num_directions=n, max_abs_g=20.0)
    contract = Contract(dtype)
    everything = range(3)
    rates = (([0, 1], lr), ([2], 0.5 * lr if grouped else lr))
    decays = [CarriedDecay(rate * decay) for _, rate in rates]
    for step in range(2):
        seeds = seeds_of(-5, n * step, n)
        seen: list[list[Array]] = []

        def closure(seen: list[list[Array]] = seen) -> float:
            seen.append([stored_form(tensor) for tensor in tensors])
            return loss_of(doubles(tensors))

        optimizer.step(closure)
        gradients = []
        for i, seed in enumerate(seeds):
            if i == 0:
                contract.apply(everything, [seed], [eps])
            else:
                contract.apply(everything, [seeds[i - 1], seed], [eps, eps])
            assert_same_bits([torch.from_numpy(w) for w in seen[2 * i]], contract.stored)
            plus = loss_of(contract.values())
            contract.apply(everything, [seed], [-2 * eps])
            assert_same_bits([torch.from_numpy(w) for w in seen[2 * i + 1]], contract.stored)
            g = float(np.float32((plus - loss_of(contract.values())) / (2 * eps)))
            gradients.append(min(max(g, -20.0), 20.0))
        for (streams, rate), carried in zip(rates, decays, strict=True):
            coeffs = [-(rate * g) / n for g in gradients]
            coeffs[-1] += carried.alpha * eps
            contract.apply(streams, seeds, coeffs, carried.alpha)
            carried.advance()
        assert_same_bits(tensors, contract.stored)
        assert optimizer.projected_grads == tuple(gradients)
        assert any(gradients)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_backends_store_the_same_bits(backend: str) -> None:
    tensors = [torch.from_numpy(values).bfloat16() for values in start_values()]
    with fedkseed_kernels.dispatch.backend(backend):
        optimizer = ZOSGD(tensors, 0.01, 1e-2, weight_decay=0.1, num_directions=2)
        optimizer.step(lambda: loss_of(doubles(tensors)))
    with fedkseed_kernels.dispatch.backend("reference"):
        others = [torch.from_numpy(values).bfloat16() for values in start_values()]
        ZOSGD(others, 0.01, 1e-2, weight_decay=0.1, num_directions=2).step(lambda: loss_of(doubles(others)))
    assert_same_bits(tensors, [stored_form(other) for other in others])
