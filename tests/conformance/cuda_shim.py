"""Builds the CUDA sources for the host and runs them as a backend of cpu tensors; what their tests share."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.backends import c_abi, native_cuda
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import tensor_of
from fedkseed_kernels.contract import reference
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
SHIM = ROOT / "tests" / "cuda_shim"
# dtypes with the rounding modes that make a difference to them.
MODES = [("float32", "nearest"), ("float64", "nearest")] + [
    (dtype, rounding) for dtype in ("bfloat16", "float16") for rounding in reference.ROUNDINGS
]
COMPILER = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
)


def build(folder: Path, sources: Path = SOURCES) -> Path:
    """Compile every source of the CUDA library, and the shim, into one library for the host.

    Raises:
        subprocess.CalledProcessError: a source does not compile; its output was printed.
    """
    assert COMPILER is not None
    include = [f"-I{sources / 'include'}", f"-I{SHIM}"]
    files = [*sorted((sources / "cuda").glob("*.cu")), SHIM / "cuda_shim.cpp"]
    objects = [folder / f"{file.stem}.o" for file in files]
    commands = [
        [COMPILER, *FLAGS, *include, "-c", str(file), "-o", str(target)]
        for file, target in zip(files, objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    library = folder / "libfedkseed_cuda_shim.so"
    subprocess.run([COMPILER, "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library


class ShimBackend:
    """The CUDA library's entry with a host's memory as the device's."""

    WRITES_FP32 = native_cuda.WRITES_FP32
    SELF_TEST = None

    def __init__(self, library: Path):
        handle = native_cuda.open_library(library)
        assert not isinstance(handle, str), handle
        self.handle = handle
        handle.fk_shim_num_launches.restype = ctypes.c_uint64
        handle.fk_shim_devices_set.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        handle.fk_shim_only_blocks.argtypes = (ctypes.c_uint32, ctypes.c_uint32)

    def unavailable(self, device: torch.device | None = None) -> None:
        return None

    def seed_axpy(self, operands: Operands, terms: Terms | DeviceTerms, isa: str = "auto") -> None:
        table = c_abi.pointer_table(operands)
        if len(terms.seeds) > native_cuda.MAX_TERMS_BY_VALUE:
            terms = terms.to(operands.outs.tensors[0].device)
        num_source_rows = 0
        if operands.rows is not None and operands.inputs is not None:
            num_source_rows = operands.inputs.tensors[0].shape[0]
        native_cuda.launch(self.handle, table, operands.rows, num_source_rows, terms, 0, 0)

    def devices_set(self) -> list[int]:
        """What was made the current device since the last time."""
        found = (ctypes.c_int32 * 8)()
        count = self.handle.fk_shim_devices_set(found, len(found))
        return list(found)[:count]

    def descending(self, on: bool) -> None:
        """Run the threads of a block in descending order, or in ascending."""
        self.handle.fk_shim_descending(int(on))

    @contextmanager
    def only_blocks(self, first: int, end: int) -> Iterator[None]:
        """Leave out the other blocks of each launch: of a tensor that is too large to be written whole."""
        self.handle.fk_shim_only_blocks(first, end)
        try:
            yield
        finally:
            self.handle.fk_shim_only_blocks(0, 2**32 - 1)

    @property
    def num_launches(self) -> int:
        return int(self.handle.fk_shim_num_launches())


def assert_same(got: NDArray[Any], want: NDArray[Any], dtype: str, label: str = "") -> None:
    assert got.shape == want.shape
    same = golden.same_value(got.reshape(-1), want.reshape(-1), dtype)
    assert same.all(), f"{label}: {(~same).sum()} of {same.size} differ, first {int(np.argmin(same))}"


def weights(count: int, dtype: str, seed: int = 1) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(count) * 0.05
    stored = values if dtype == "float64" else reference.round_to_nearest(values.astype(np.float32), dtype)
    return tensor_of(stored, dtype)


def terms(count: int) -> tuple[list[int], list[float]]:
    """Seeds of both halves, coefficients of both signs, one of five zero."""
    generator = np.random.default_rng(count)
    seeds = [int(s) for s in generator.integers(-(2**63), 2**63, count)]
    coeffs = generator.standard_normal(count) * 0.01
    coeffs[4::5] = 0.0
    return seeds, coeffs.tolist()


def options(rounding: str, family: str, alpha: float = 0.999) -> dict[str, Any]:
    seed = 2**64 - 9 if rounding == "stochastic" else None
    return {"alpha": alpha, "family": family, "rounding": rounding, "rounding_seed": seed}
