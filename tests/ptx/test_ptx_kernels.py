"""The kernels' PTX on the emulator: each kernel runs and equals the reference, and damage to it is seen.

These are the cases of a few minutes; `make ptx` runs all of them (CONTRIBUTING.md).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch

import fedkseed_kernels as fk
from fedkseed_kernels.backends import c_abi, native_cuda
from fedkseed_kernels.operands import Operands, TensorList, Terms
from ptx import cuda_build, damages, entries, jobs
from ptx.calls import DTYPES, Case, run_case
from ptx.cases import EDGES, FAMILIES, SMALL, STRIDED_EDGES, all_cases
from ptx.cuda_driver import CudaDriver
from ptx.memory import OpenMemory
from ptx.parser import FaultError

needs_triton = pytest.mark.skipif(util.find_spec("triton") is None, reason="needs the package triton")
# Two front ends of nvcc make the text: of 80 and 90 it is the same, of 100 and 120 too.
ARCHITECTURES = (90, 100)


def cuda_driver(architecture: int) -> CudaDriver:
    """The driver; skips the test where there is no nvcc, unless all is required."""
    try:
        cuda_build.find_nvcc()
    except cuda_build.BuildError as error:
        if os.environ.get("CI") == "true" or os.environ.get("FEDKSEED_REQUIRE_CUDA") == "1":
            pytest.fail(f"required here, but {error}")
        pytest.skip(str(error))
    return _cuda_driver(architecture)


@functools.cache
def _cuda_driver(architecture: int) -> CudaDriver:
    return CudaDriver(architecture)


def cases_of(dtype: str, family: str) -> Iterator[Case]:
    """A call of each kernel of a dtype and family, and of each way in which it reads and writes."""
    edges = Case("edges", dtype, family, 1, EDGES[::3])
    strided = Case("strided edges", dtype, family, 2, STRIDED_EDGES)
    small = Case("small", dtype, family, 5, SMALL)
    yield small
    yield replace(small, k=33, device="all", alpha=0.75)
    # Sums that are zero: the minus side of Gaussian noise is then summed anew.
    yield replace(edges, k=2, form="pair", coeffs="smallest" if family == "gaussian" else "cancel")
    yield replace(edges, k=1, device="half")
    yield replace(strided, form="pair", coeffs="dyadic")
    yield replace(strided, k=0, alpha=0.75)
    if dtype in ("bf16", "fp16"):
        yield replace(small, k=1, residuals=True)
        yield replace(edges, k=2, form="out", rounding="stochastic", residuals=True)
        yield replace(edges, k=5, form="pair", rounding="stochastic")


def kernels_of(dtype: str, family: str) -> set[str]:
    """The CUDA kernels that `cases_of` runs."""
    storage, name = dtype.capitalize(), family.capitalize()
    few = {f"few_terms<{storage}, {name}, {terms}, 0>" for terms in (1, 2)} if dtype != "fp64" else set()
    compensated = {f"few_terms<{storage}, {name}, 1, 1>"} if dtype in ("bf16", "fp16") else set()
    return {f"many_{family}<{storage}>", f"strided<{storage}, {name}>", *few, *compensated}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_cuda_kernel_equals_the_reference(architecture: int, dtype: str, family: str) -> None:
    driver = cuda_driver(architecture)
    first = len(driver.launches)
    found = {str(case): run_case(driver, case) for case in cases_of(dtype, family)}
    assert not {name: verdict for name, verdict in found.items() if verdict.word != "equal"}
    assert {name for name, _, _ in driver.launches[first:]} == kernels_of(dtype, family)
    notes = {name: dict(kernel.notes) for name, kernel in driver.kernels().items() if kernel.notes}
    assert not notes, "arithmetic that a compiler may contract, or barriers that exited threads missed"


@pytest.mark.slow
def test_the_cuda_kernels_are_these() -> None:
    """So that a new kernel is not left out above."""
    run = set().union(*(kernels_of(*pair) for pair in itertools.product(DTYPES, FAMILIES)))
    assert set(cuda_driver(ARCHITECTURES[0]).sources) == run | set(entries.CUDA)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_entries_that_only_tests_call_equal_the_reference(architecture: int) -> None:
    driver = cuda_driver(architecture)
    for name, test in entries.CUDA.items():
        assert test(driver).word == "equal", name


@pytest.mark.slow
@pytest.mark.parametrize("damage", damages.CUDA, ids=lambda damage: damage.name)
def test_damage_to_a_cuda_kernel_is_seen(damage: damages.Damage) -> None:
    verdict = damages.run_damage(cuda_driver(90), damage)
    assert verdict.word == "seen", verdict.detail


@pytest.mark.slow
def test_the_handle_stands_in_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors may lie anywhere. Another constant in a kernel gives other bits, a missing barrier fails."""
    driver = cuda_driver(90)
    monkeypatch.setattr(driver, "memory", OpenMemory(1 << 16))
    terms = Terms(np.arange(5, dtype=np.uint64), np.full(5, 0.5), 1.0, "gaussian", "nearest", 0)

    def run() -> torch.Tensor:
        made = torch.zeros(3000)
        both = TensorList([made])
        operands = Operands(both, both, None, None, [3], [0], [None])
        native_cuda.launch(driver.handle, c_abi.pointer_table(operands), None, 0, terms, 0, 0)
        return made

    expected = torch.zeros(3000)
    fk.seed_axpy_([expected], [0, 1, 2, 3, 4], [0.5] * 5, streams=[3])
    assert torch.equal(run(), expected)
    with driver.damaged("many_gaussian<Fp32>", lambda body: body.replace("0f3FB504F3", "0f3FB504F4")):
        assert not torch.equal(run(), expected)
    with driver.damaged("many_gaussian<Fp32>", lambda body: re.sub(r"bar\.sync\s+0;", "", body)):
        with pytest.raises(RuntimeError, match="a fault on the emulated GPU"):
            run()
        with pytest.raises(RuntimeError, match="CUDA error 719"):  # nothing runs until somebody has looked
            run()
        with pytest.raises(FaultError, match="shared race"):
            driver.checked(0)
    assert torch.equal(run(), expected)


# --- Triton

TRITON_CASES = (
    Case("small", "bf16", "gaussian", 5, SMALL),
    Case("small", "bf16", "gaussian", 1, SMALL, residuals=True),
    Case("small", "fp32", "gaussian", 2, SMALL, form="pair", device="all"),
    # Sums of either zero, whose minus side has the other one: Triton 3.6 negates by 0 - x.
    Case("small", "fp32", "gaussian", 1, SMALL, form="pair", coeffs="smallest"),
    Case("small", "fp32", "rademacher", 5, SMALL, form="out"),
    Case("strided edges", "fp16", "rademacher", 2, STRIDED_EDGES, rounding="stochastic"),
    Case("strided edges", "fp64", "gaussian", 5, STRIDED_EDGES, form="pair", coeffs="dyadic"),
)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "architecture"),
    # Packed fp32 instructions are there from 100 on.
    [*((case, 90) for case in TRITON_CASES), (TRITON_CASES[0], 100)],
    ids=str,
)
def test_triton_kernels_equal_the_reference(case: Case, architecture: int) -> None:
    from ptx.triton_driver import driving

    with driving(architecture) as driver:
        assert run_case(driver, case).word == "equal"
        functions = {name.split()[0] for name, _, _ in driver.launches}
        assert "runs_kernel" in functions
        assert ("segments_kernel" in functions) == (case.name == "small")


@needs_triton
@pytest.mark.slow
def test_the_triton_entries_that_only_tests_call_equal_the_reference() -> None:
    from ptx.triton_driver import driving

    with driving(90) as driver:
        for name, test in entries.TRITON.items():
            assert test(driver).word == "equal", name
        functions = {name.split()[0] for name, _, _ in driver.launches}
    assert functions == {"_philox_kernel", "_normals_kernel", "_digest_kernel"}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("damage", damages.TRITON, ids=lambda damage: damage.name)
def test_damage_to_a_triton_kernel_is_seen(damage: damages.Damage) -> None:
    from ptx.triton_driver import driving

    with driving(90) as driver:
        verdict = damages.run_damage(driver, damage)
    assert verdict.word == "seen", verdict.detail


@needs_triton
def test_the_triton_driver_leaves_nothing_behind(tmp_path: Path) -> None:
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver as active

    from fedkseed_kernels.backends.triton import launch
    from ptx.triton_driver import driving

    def state() -> tuple[object, ...]:
        places = active._active, CompiledKernel._init_handles, launch.on_device
        return *places, os.environ.get("TRITON_CACHE_DIR")

    before = state()
    with driving(90, tmp_path):
        assert all(old is not new for old, new in zip(before, state(), strict=True))
    assert state() == before


# --- what there is to run


def test_the_names_of_cases_say_all() -> None:
    """Records are kept by name: two cases of one name would share one."""
    cases = all_cases()
    assert len({str(case) for case in cases}) == len(cases)
    for names in ("damage-cuda", "cuda"):
        listed = jobs.jobs_of(jobs.Part(names, 90))
        assert len({job.definition for job in listed.values()}) == len(listed)


def test_there_are_twenty_kinds_of_damage_in_cuda_and_some_in_triton() -> None:
    assert len({damage.name for damage in damages.CUDA}) == len(damages.CUDA) >= 20
    assert {damage.kernel for damage in damages.TRITON} == {"segments_kernel", "runs_kernel"}
