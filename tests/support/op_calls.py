"""Support for tests of the public functions: every backend that works here, tensors, equality of bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fedkseed_kernels import dispatch
from fedkseed_kernels.operands import DTYPE_CODES

DTYPES = tuple(DTYPE_CODES)
SEEDS = [3, -1, 2**64 - 2, 0, 12345678901234567890]
COEFFS = [0.25, -0.5, 0.0, 1e-3, 2.0]


@pytest.fixture(params=["native", "reference"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test once for each backend of cpu tensors."""
    if (reason := dispatch.TABLE["cpu"][request.param].unavailable()) is not None:
        pytest.skip(reason)  # tests/test_native.py fails when the library ought to be there
    with dispatch.backend(request.param):
        yield


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def poisoned(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan"))


def bits(tensor: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(bits(got), bits(expected))
