"""Sums of Rademacher noise (contract section 6.3): CUDA kernels on the host, Triton in its interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cuda_shim
import numpy as np
import pytest
import torch

from fedkseed_kernels.arguments import tensors as tensor_checks
from fedkseed_kernels.conformance.checks import poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import reference
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms

DTYPES = ("float32", "bfloat16", "float64")
STREAM, FIRST = 3, 5
Run = Callable[[Operands, Any], None]

#: Coefficients by number of terms, beside which all that the contract says about them decides something.
CASES: dict[str, Callable[[int], list[float]]] = {
    "tiny beside huge": lambda n: [1e20 if k == n // 2 else 1e-20 * (k + 1) for k in range(n)],
    "exact cancellation": lambda n: [0.5 if k % 2 else -0.5 for k in range(n)],
    "below the smallest": lambda n: [2.0**-97 * (1 + k % 3) for k in range(n)],
    "subnormal beside the smallest": lambda n: [1e-40 if k % 2 else -(2.0**-96) for k in range(n)],
    "near overflow": lambda n: [3e38 * (-1) ** (k % 3) for k in range(n)],
    "ties": lambda n: [(2 * k + 1) * 2.0 ** -(30 - n.bit_length()) for k in range(n)],
    "ordinary": lambda n: [0.01 * np.sin(7 * k + 1) for k in range(n)],
    "none left": lambda n: [0.0, -0.0, 1e-50][:n] + [0.0] * (n - 3),
}


@pytest.fixture(scope="module", params=["cuda", "triton"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    if request.param == "cuda":
        if cuda_shim.COMPILER is None:
            pytest.skip("needs a C++ compiler")
        library = request.getfixturevalue("cuda_shim_library")
        yield lambda operands, terms: cuda_shim.ShimBackend(library).seed_axpy(operands, terms, "auto")
        return
    pytest.importorskip("triton", reason="the Triton backend needs the package triton")
    from interpreted_triton import interpreted

    with interpreted():
        from fedkseed_kernels.backends.triton import launch

        yield launch.seed_axpy


def host_terms(coeffs: list[float], alpha: float) -> Terms:
    seeds = np.arange(1, len(coeffs) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return Terms(seeds, np.array(coeffs), alpha, "rademacher", "nearest", 0)


def expected(stored: Any, terms: Terms, dtype: str, sign: int = 1) -> Any:
    return reference.seed_axpy_array(
        stored,
        FIRST + np.arange(stored.size),
        [int(s) for s in terms.seeds],
        sign * terms.coeffs,
        dtype=dtype,
        stream=STREAM,
        alpha=terms.alpha,
        family="rademacher",
    )


def weights(dtype: str, count: int) -> Any:
    """Zeros of both signs first: a sum of +0 or -0 shows in them."""
    stored = stored_of(cuda_shim.weights(count, dtype))
    stored[:40] = stored_of(torch.tensor([0.0, -0.0] * 20, dtype=getattr(torch, dtype)))
    return stored


def check(run: Run, coeffs: list[float], dtype: str, alpha: float, count: int = 150) -> None:
    """In place, every other element in memory, and both sides; terms of the host and of the device."""
    terms, stored = host_terms(coeffs, alpha), weights(dtype, count)
    with np.errstate(over="ignore"):
        want, minus = expected(stored, terms, dtype), expected(stored, terms, dtype, -1)
    for given in (terms, terms.to(torch.device("cpu"))):
        flat = tensor_of(stored, dtype)
        strided = torch.zeros(2 * count, dtype=flat.dtype)[::2].copy_(flat)
        outs = [poisoned((count,), dtype) for _ in range(2)]
        places = (None, [STREAM], [FIRST], [])
        run(tensor_checks.check_operands([tensor_of(stored, dtype)], [outs[0]], [outs[1]], *places), given)
        for tensor in (flat, strided):
            run(tensor_checks.check_operands([tensor], None, None, *places), given)
            cuda_shim.assert_same(stored_of(tensor), want, dtype)
        cuda_shim.assert_same(stored_of(outs[0]), want, dtype, "plus")
        cuda_shim.assert_same(stored_of(outs[1]), minus, dtype, "minus")


@pytest.mark.few
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_terms", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_coefficients(run: Run, case: str, num_terms: int, dtype: str) -> None:
    check(run, CASES[case](num_terms), dtype, alpha=1.0 if num_terms % 2 else 0.75)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_terms", [32, 64, 65, 300])
def test_numbers_of_terms(run: Run, request: pytest.FixtureRequest, num_terms: int, dtype: str) -> None:
    """Past what the CUDA kernels take at a time: 32, 64 and 256 terms."""
    if "triton" in request.node.name:
        pytest.skip("Triton takes its terms one by one, and in its interpreter slowly")
    check(run, CASES["ordinary"](num_terms), dtype, alpha=1.0, count=40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_integers(run: Run, dtype: str) -> None:
    """All terms the same seed and coefficient: sums of +-2^30 (2^62), the end of what the contract allows."""
    terms = host_terms([1.0] * 16, 1.0)
    for value in (1.0, -1.0):
        terms.seeds[:], terms.coeffs[:] = 7, value
        stored, tensor = weights(dtype, 130), tensor_of(weights(dtype, 130), dtype)
        run(tensor_checks.check_operands([tensor], None, None, None, [STREAM], [FIRST], []), terms)
        cuda_shim.assert_same(stored_of(tensor), expected(stored, terms, dtype), dtype)


@pytest.mark.few
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_terms", [2, 9])
def test_any_order_gives_the_same_bits(run: Run, num_terms: int, dtype: str) -> None:
    coeffs = [0.3 * 1.7**-k * (-1) ** k for k in range(num_terms)]
    results = set()
    for order in (
        range(num_terms),
        range(num_terms - 1, -1, -1),
        np.random.default_rng(4).permutation(num_terms),
    ):
        terms, tensor = host_terms(coeffs, 1.0), cuda_shim.weights(300, dtype)
        terms.seeds, terms.coeffs = terms.seeds[list(order)], terms.coeffs[list(order)]
        run(tensor_checks.check_operands([tensor], None, None, None, [STREAM], [FIRST], []), terms)
        results.add(stored_of(tensor).tobytes())
    assert len(results) == 1


def test_bad_coefficients_on_the_device_are_skipped_and_counted_once(run: Run) -> None:
    coeffs = [np.nan, 0.25, np.inf, 1e-35, -0.125, 1e39, 0.0, -np.inf]
    good = [0.0 if not abs(c) <= 3e38 else c for c in coeffs]
    for num_terms in (1, 2, 8):
        stored, num_skipped = weights("float32", 2100), torch.tensor([5], dtype=torch.int32)
        tensors = [tensor_of(stored, "float32"), torch.zeros(60, 2)[:, 0]]
        terms = host_terms(coeffs[:num_terms], 1.0).to(torch.device("cpu"))
        terms.num_skipped = num_skipped
        run(tensor_checks.check_operands(tensors, None, None, None, [STREAM, 9], [FIRST, 0], []), terms)
        cuda_shim.assert_same(
            stored_of(tensors[0]), expected(stored, host_terms(good[:num_terms], 1.0), "float32"), "float32"
        )
        assert num_skipped.item() == 5 + sum(not abs(c) <= 3e38 for c in coeffs[:num_terms])


def test_more_terms_than_a_matrix_product_may_sum(cuda_shim_library: Any) -> None:
    """Past 2^16 terms the CUDA kernels go element by element: the products' 32 bits would not hold them."""
    num_terms = 2**16 + 1
    stored = weights("float32", 41)
    terms = host_terms([1.0] * 3, 1.0)
    many = DeviceTerms(
        torch.tensor([int(s) for s in terms.seeds.view(np.int64)] + [1] * (num_terms - 3)),
        torch.tensor([1.0] * 3 + [0.0] * (num_terms - 3), dtype=torch.float64),
        1.0,
        "rademacher",
        "nearest",
        0,
    )
    tensor = tensor_of(stored, "float32")
    operands = tensor_checks.check_operands([tensor], None, None, None, [STREAM], [FIRST], [])
    cuda_shim.ShimBackend(cuda_shim_library).seed_axpy(operands, many, "auto")
    cuda_shim.assert_same(stored_of(tensor), expected(stored, terms, "float32"), "float32")
