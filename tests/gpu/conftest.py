"""Tests that need an NVIDIA GPU; without one they are skipped, each saying so."""

from __future__ import annotations

import pytest
import torch

from fedkseed_kernels.backends import native_cuda


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture
def native_library() -> None:
    """The CUDA library: on a machine with a GPU its absence is a failure, not a reason to skip."""
    assert native_cuda.unavailable() is None
