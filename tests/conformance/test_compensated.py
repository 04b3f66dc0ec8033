"""Compensated weights (contract section 6.5): the split, its inverse, and the primitive on both."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from interpreted_triton import with_interpreted_triton
from numpy.typing import NDArray
from rationals import FP16

import fedkseed_kernels as fk
from fedkseed_kernels.conformance import __main__ as conformance
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import Target, poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import arithmetic, reference

FOUND, _ = conformance.find_targets()
NATIVE = [target for target in FOUND if target.isa]
TARGETS = with_interpreted_triton(FOUND)
# Triton's interpreter takes seconds for a thousand elements.
SIZED = [(t, n) for t in TARGETS for n in (1, 7, 127, 128, 1025, 4999) if n < 200 or t.backend != "triton"]
all_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
native_targets = pytest.mark.parametrize("target", NATIVE, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", reference.COMPENSATED_DTYPES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)
SEEDS, COEFFS = [1, -2, 2**63, 77, 5], [1e-2, -3e-3, 0.0, 0.25, 1e-4]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def every_kind_of_fp32() -> NDArray[np.float32]:
    """Random patterns, every exponent with the edges of its lower half, infinities, zeros, NaN."""
    random = np.random.default_rng(50)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    upper = np.arange(0, 2**16, 8, dtype=np.uint32) << np.uint32(16)
    patterns = (upper[:, None] | lower).reshape(-1)
    return np.concatenate((patterns, random.integers(0, 2**32, 100_000, dtype=np.uint32))).view(np.float32)


def test_bf16_holds_every_fp32() -> None:
    y = every_kind_of_fp32()
    stored, residuals = arithmetic.split_to_bf16(y)
    value = arithmetic.value_of_bf16(stored, residuals)
    is_nan = np.isnan(y)
    assert (value.view(np.uint32) == y.view(np.uint32))[~is_nan].all()
    assert np.isnan(value[is_nan]).all()
    assert not residuals[is_nan].any()
    # The weight is the nearest bf16, ties away from zero: torch's, but for ties.
    nearest = torch.from_numpy(y).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    tie = (y.view(np.uint32) & 0xFFFF) == 0x8000
    assert (stored == nearest)[~is_nan & ~tie].all()
    assert (stored == (y.view(np.uint32) >> 16) + 1)[~is_nan & tie].all()


def test_fp16_by_rationals() -> None:
    random = np.random.default_rng(51)
    y = (random.standard_normal(3000) * 2.0 ** random.uniform(-45, 15, 3000)).astype(np.float32)
    edges = [2.0**-14, 2.0**-14 - 2.0**-38, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 65519.996, 2047.5, 2048.5]
    y = np.concatenate((y, edges, np.negative(edges))).astype(np.float32)
    stored, residuals = arithmetic.split_to_fp16(y)
    weights, value = arithmetic.widen_fp16(stored), arithmetic.value_of_fp16(stored, residuals)
    for v, w, r, back in zip(y.tolist(), weights.tolist(), residuals.tolist(), value.tolist(), strict=True):
        assert w == FP16.nearest(Fraction(v))
        exponent = -14
        while Fraction(2) ** (exponent + 1) <= abs(Fraction(w)):
            exponent += 1
        assert r == round((Fraction(v) - Fraction(w)) * Fraction(2) ** (25 - exponent))
        assert abs(Fraction(back) - Fraction(v)) <= (0 if abs(v) >= 2.0**-14 else Fraction(1, 2**40))


def test_fp16_specials() -> None:
    y = np.array([65520, -1e9, np.inf, -np.inf, np.nan, -0.0, 0.0, 1e-45], dtype=np.float32)
    stored, residuals = arithmetic.split_to_fp16(y)
    assert not residuals.any()
    assert stored[[0, 1, 2, 3, 5, 6, 7]].tolist() == [0x7C00, 0xFC00, 0x7C00, 0xFC00, 0x8000, 0, 0]
    value = arithmetic.value_of_fp16(stored, residuals)
    np.testing.assert_array_equal(value[:5], [np.inf, -np.inf, np.inf, -np.inf, np.nan])
    assert value[5:].tobytes() == np.zeros(3, np.float32).tobytes()


@all_dtypes
def test_weights_without_history_are_their_own_value(dtype: str) -> None:
    stored = np.arange(2**16, dtype=np.uint16)
    value = arithmetic.value(stored, np.zeros(2**16, np.int16), dtype)
    own = arithmetic.value(stored, None, dtype)
    np.testing.assert_array_equal(value, own)  # -0 reads as +0 in fp16


def inputs(shape: Any, dtype: str, seed: int = 52) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Weights of ordinary size, infinities, NaN and subnormals among them, with residuals of any kind."""
    random = np.random.default_rng(seed)
    weights = reference.round_to_nearest((random.standard_normal(shape) * 0.05).astype(np.float32), dtype)
    anything = random.integers(0, 2**16, shape, dtype=np.uint16)
    weights = np.where(random.random(shape) < 0.2, anything, weights).astype(np.uint16)
    return weights, random.integers(-(2**15), 2**15, shape).astype(np.int16)


def like(residuals: NDArray[np.int16], tensor: torch.Tensor) -> torch.Tensor:
    """The residuals with the strides of the tensor."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int16)
    return made.copy_(torch.from_numpy(residuals))


def assert_weights(got: torch.Tensor, want: NDArray[Any], dtype: str) -> None:
    same = golden.same_value(stored_of(got).reshape(-1), np.ascontiguousarray(want).reshape(-1), dtype)
    assert same.all(), f"{(~same).sum()} of {same.size} differ, first {int(np.argmin(same))}"


@pytest.mark.few
@all_families
@all_dtypes
@pytest.mark.parametrize(("target", "count"), SIZED, ids=str)
@pytest.mark.parametrize(("seeds", "coeffs", "alpha"), [(SEEDS, COEFFS, 0.999), ([9], [1e-3], 1.0)])
def test_sizes(
    target: Target, dtype: str, family: str, count: int, seeds: list[int], coeffs: list[float], alpha: float
) -> None:
    """In place, out of place and both sides; from an element inside a group on."""
    first = 2**35 - 1003
    weights, residuals = inputs(count, dtype)
    elements = np.uint64(first) + np.arange(count, dtype=np.uint64)
    options: dict[str, Any] = {"alpha": alpha, "family": family}
    want, want_residuals = reference.seed_axpy_compensated_array(
        weights, residuals, elements, seeds, coeffs, dtype=dtype, stream=3, **options
    )
    sides = reference.seed_axpy_pair_array(
        weights, elements, seeds, coeffs, dtype=dtype, stream=3, residuals=residuals, **options
    )
    in_place, read = tensor_of(weights, dtype), tensor_of(weights, dtype)
    residual, residuals_read = torch.from_numpy(residuals.copy()), torch.from_numpy(residuals.copy())
    outs = [poisoned((count,), dtype) for _ in range(3)]
    options |= {"streams": [3], "offsets": [first]}
    with target.forced():
        fk.seed_axpy_([in_place], seeds, coeffs, residuals=residual, **options)
        fk.seed_axpy([read], seeds, coeffs, out=outs[:1], residuals=[residuals_read], **options)
        fk.seed_axpy_pair(
            [read],
            seeds,
            coeffs,
            out_plus=outs[1:2],
            out_minus=outs[2:],
            residuals=[residuals_read],
            **options,
        )
    assert_weights(in_place, want, dtype)
    np.testing.assert_array_equal(residual.numpy(), want_residuals)
    for out, side in zip(outs, (sides[0], *sides), strict=True):
        assert_weights(out, side, dtype)
    assert stored_of(read).tobytes() == weights.tobytes()
    assert residuals_read.numpy().tobytes() == residuals.tobytes()


@all_families
@all_targets
def test_ties_go_away_from_zero(target: Target, family: str) -> None:
    """Updates that no fp32 shows: each pair is split again, at the middle between two bf16 numbers."""
    weights = reference.round_to_nearest(np.linspace(0.01, 2, 1025, dtype=np.float32), "bfloat16")
    weights[::3] |= 0x8000
    tensor = tensor_of(weights, "bfloat16")
    residuals = torch.full((1025,), -0x8000, dtype=torch.int16)
    with target.forced():
        fk.perturb_(tensor, 3, 1e-20, family=family, residuals=residuals)
    assert stored_of(tensor).tobytes() == weights.tobytes()
    assert bool((residuals == -0x8000).all())


@pytest.mark.few
@all_dtypes
@all_targets
@pytest.mark.parametrize("memory", ["transposed", "every other"])
def test_strides_views_and_stochastic_rounding_out_of_place(target: Target, dtype: str, memory: str) -> None:
    weights, residuals = inputs((13, 29), dtype)
    elements = reference.view_elements((13, 29), (50, 40), (7, 5))
    tensor = tensor_of(weights, dtype, memory)
    residual = like(residuals, tensor)
    out = poisoned((13, 29), dtype, memory)
    options: dict[str, Any] = {"streams": [3], "views": [((50, 40), (7, 5))]}
    random: dict[str, Any] = {"rounding": "stochastic", "rounding_seed": 4}
    want = reference.seed_axpy_array(
        weights, elements, SEEDS, COEFFS, dtype=dtype, stream=3, residuals=residuals, **random
    )
    after, residuals_after = reference.seed_axpy_compensated_array(
        weights, residuals, elements, SEEDS, COEFFS, dtype=dtype, stream=3
    )
    with target.forced():
        fk.seed_axpy([tensor], SEEDS, COEFFS, out=[out], residuals=[residual], **options, **random)
        fk.seed_axpy_([tensor], SEEDS, COEFFS, residuals=[residual], **options)
    assert_weights(out, want, dtype)
    assert_weights(tensor, after, dtype)
    np.testing.assert_array_equal(residual.numpy(), residuals_after)


@all_dtypes
@all_targets
def test_rows(target: Target, dtype: str) -> None:
    weights, residuals = inputs((40, 33), dtype)
    whole = reference.seed_axpy_pair_array(
        weights,
        np.arange(weights.size).reshape(weights.shape),
        SEEDS,
        COEFFS,
        dtype=dtype,
        residuals=residuals,
    )
    rows = [39, 0, 7, 7, 21]
    outs = [poisoned((5, 33), dtype) for _ in range(2)]
    with target.forced():
        fk.seed_axpy_pair(
            [tensor_of(weights, dtype)],
            SEEDS,
            COEFFS,
            rows=torch.tensor(rows),
            out_plus=outs[:1],
            out_minus=outs[1:],
            residuals=[torch.from_numpy(residuals)],
        )
    for out, side in zip(outs, whole, strict=True):
        assert_weights(out, side[rows], dtype)


@all_families
@native_targets
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads_and_mixed_lists(target: Target, family: str, num_threads: int) -> None:
    """Tensors with and without residuals, of every dtype, in one list shared between threads."""
    torch.set_num_threads(num_threads)
    kinds = ["bfloat16", "float32", "float16", "bfloat16", "float64", "float16"]
    sizes = [70_001, 9, 50_003, 33, 3, 0]
    stored: list[NDArray[Any]] = []
    all_residuals: list[NDArray[np.int16] | None] = []
    for position, (dtype, size) in enumerate(zip(kinds, sizes, strict=True)):
        if dtype in reference.COMPENSATED_DTYPES:
            weights, residuals = inputs(size, dtype, position)
            stored.append(weights)
            all_residuals.append(None if position == 3 else residuals)
        else:
            stored.append(np.linspace(-1, 1, size).astype(dtype))
            all_residuals.append(None)
    tensors = [tensor_of(w, dtype) for w, dtype in zip(stored, kinds, strict=True)]
    residual_tensors = [
        None if residual is None else torch.from_numpy(residual.copy()) for residual in all_residuals
    ]
    with target.forced():
        fk.seed_axpy_(tensors, SEEDS, COEFFS, family=family, residuals=residual_tensors)
    for stream, (dtype, w, residual) in enumerate(zip(kinds, stored, all_residuals, strict=True)):
        options: dict[str, Any] = {"dtype": dtype, "stream": stream, "family": family}
        residual_tensor = residual_tensors[stream]
        if residual is None or residual_tensor is None:
            want = reference.seed_axpy_array(w, np.arange(w.size), SEEDS, COEFFS, **options)
        else:
            want, want_residuals = reference.seed_axpy_compensated_array(
                w, residual, np.arange(w.size), SEEDS, COEFFS, **options
            )
            np.testing.assert_array_equal(residual_tensor.numpy(), want_residuals)
        assert_weights(tensors[stream], want, dtype)


@all_dtypes
@all_targets
def test_nothing_to_do_keeps_bytes(target: Target, dtype: str) -> None:
    weights, residuals = inputs(300, dtype)
    tensor, residual, out = (
        tensor_of(weights, dtype),
        torch.from_numpy(residuals.copy()),
        poisoned((300,), dtype),
    )
    with target.forced():
        fk.seed_axpy_([tensor], [1, 2], [0.0, -0.0], residuals=[residual])
        fk.seed_axpy([tensor], [1], [0.0], residuals=[residual], out=[out])
    assert stored_of(tensor).tobytes() == stored_of(out).tobytes() == weights.tobytes()
    assert residual.numpy().tobytes() == residuals.tobytes()


@all_dtypes
def test_updates_below_half_a_place_add_up(dtype: str) -> None:
    """200 updates, each too small to move most weights: lost without residuals, kept with them."""
    w0 = (0.05 * torch.randn(4096, generator=torch.Generator().manual_seed(6))).to(getattr(torch, dtype))
    coeff = 1e-5 if dtype == "bfloat16" else 2e-6
    exact = w0.double()
    for seed in range(200):
        exact += coeff * fk.normal(4096, seed, dtype=torch.float64)
    plain, kept, residual = w0.clone(), w0.clone(), torch.zeros(4096, dtype=torch.int16)
    for seed in range(200):
        fk.perturb_(plain, seed, coeff)
        fk.perturb_(kept, seed, coeff, residuals=residual)
    as_fp32 = torch.from_numpy(arithmetic.value(stored_of(kept), residual.numpy(), dtype))
    moved = (exact - w0.double()).norm()
    assert (as_fp32.double() - exact).norm() < 0.01 * moved
    assert (plain.double() - exact).norm() > 0.5 * moved
    # What a model sees is the value rounded: nearer to the exact weights than 16 bits usually are.
    assert (kept.double() - exact).norm() < 1.01 * (exact.to(w0.dtype).double() - exact).norm()
