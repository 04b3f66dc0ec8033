"""The CUDA kernels as a backend of the host's memory, for the tests of csrc/cuda."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cuda_shim
import pytest


@pytest.fixture(scope="session")
def cuda_shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_shim.build(tmp_path_factory.mktemp("cuda_shim"))


@pytest.fixture(params=["ascending", "descending"])
def shim(request: pytest.FixtureRequest, cuda_shim_library: Path) -> Iterator[cuda_shim.ShimBackend]:
    """The kernels, with the threads of each block run in one order and in the other."""
    backend = cuda_shim.ShimBackend(cuda_shim_library)
    backend.descending(request.param == "descending")
    yield backend
    backend.descending(False)
