"""The self-test of the GPU kernels through their PTX: one constant changed is caught at the first call.

As on a GPU, golden cases go to the CUDA library before a call and to Triton's launcher before a launch; both
run in the emulator.
"""

from __future__ import annotations

import shutil
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.arguments.tensors import check_operands
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms
from fedkseed_kernels.self_test import gate, run
from fedkseed_kernels.self_test.arena import Arena
from fedkseed_kernels.self_test.cases import Call, Case, calls
from ptx import machine
from ptx.cuda_driver import CudaDriver
from ptx.memory import Memory
from ptx.test_ptx_kernels import cuda_driver

if util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from fedkseed_kernels.backends.triton import launch
from fedkseed_kernels.backends.triton import self_test as triton_self_test
from ptx.triton_driver import driving

CPU = torch.device("cpu")
TEST_ENTRIES = {"philox_words", "normal_from_words", "normal_digest"}
# Changes of a constant: of the square root of 2 by one unit in the last place, of a multiplier of Philox.
SQUARE_ROOT, MULTIPLIER = ("0f3FB504F3", "0f3FB504F4"), ("-766435501;", "-766435503;")
Golden = tuple[Call, Case]


class Gpu:
    """The CUDA library on the emulator as a backend of cpu tensors, with the self-test of a GPU."""

    WRITES_FP32 = CudaDriver.WRITES_FP32
    SELF_TEST = gate.SelfTest("gpu", lambda device, isa: None)

    def __init__(self, driver: CudaDriver):
        self.driver, self._memory = driver, Memory(1 << 22)

    def unavailable(self, device: torch.device | None = None) -> None:
        return None

    def seed_axpy(self, operands: Operands, terms: Terms | DeviceTerms, isa: str = "auto") -> None:
        tensors = [*operands.outs.tensors, *([] if operands.rows is None else [operands.rows])]
        with mock.patch.object(self.driver, "memory", self._memory), self._memory.admitted(*tensors):
            self.driver.seed_axpy(operands, terms)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu(cuda_driver(90))


@pytest.fixture(scope="module")
def golden(gpu: Gpu) -> dict[str, list[Golden]]:
    """The golden cases that launch each kernel."""
    found: dict[str, list[Golden]] = {}
    with mock.patch.object(machine, "launch", return_value=0):
        for call in calls():
            for case in call.cases("gpu") if call.form != "wide" or gpu.WRITES_FP32 else ():
                gpu.driver.launches.clear()
                Arena(call, [case], "gpu", CPU).run(gpu.seed_axpy)
                for name in {name for name, _, _ in gpu.driver.launches}:
                    found.setdefault(name, []).append((call, case))
    return found


@pytest.fixture(autouse=True)
def _no_verdicts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("verdicts", "failures"):
        monkeypatch.setattr(gate, name, {})
    for name in ("_logged", "_settled"):
        monkeypatch.setattr(dispatch, name, set())
    monkeypatch.delenv(gate.SELF_TEST_VARIABLE, raising=False)


def first_call(gpu: Gpu, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a first call does before anything else, of all golden cases with one alone."""
    call, case = golden
    for name in ("verdicts", "failures"):
        monkeypatch.setattr(gate, name, {})
    monkeypatch.setattr(dispatch, "_settled", set())
    monkeypatch.setattr(run, "calls", lambda: [call])
    monkeypatch.setattr(Call, "cases", lambda self, kind: (case,))
    monkeypatch.setitem(dispatch.TABLE["cpu"], "native", gpu)
    with fk.backend("native"):
        dispatch.select("cpu")


@pytest.mark.slow
def test_golden_cases_launch_every_kernel_that_users_reach(gpu: Gpu, golden: dict[str, list[Golden]]) -> None:
    assert golden.keys() == gpu.driver.sources.keys() - TEST_ENTRIES


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["Fp32", "Bf16", "Fp16", "Fp64"])
def test_a_cuda_kernel_with_one_constant_changed_is_caught(
    dtype: str, gpu: Gpu, golden: dict[str, list[Golden]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in golden if f"<{dtype}" in name]
    assert len(names) >= 4
    for name in names:
        # The first that runs fast and shows the last place of the noise in 16 bits too.
        fit = [
            found for found in golden[name] if found[0].form == "in place" and "small" not in found[0].terms
        ]
        chosen = min(fit, key=lambda found: (found[0].terms, found[1]))
        right, wrong = SQUARE_ROOT if "Gaussian" in name or "gaussian" in name else MULTIPLIER
        first_call(gpu, chosen, monkeypatch)
        assert right in gpu.driver.body(name)
        with (
            gpu.driver.damaged(name, lambda body, right=right, wrong=wrong: body.replace(right, wrong)),
            pytest.raises(
                RuntimeError, match="asks for native, which cannot be used: it fails its self-test"
            ),
        ):
            first_call(gpu, chosen, monkeypatch)


# --- Triton

TRITON_CALLS: dict[str, tuple[str, int, torch.dtype]] = {
    "segments, one term": ("gaussian", 1, torch.float32),
    "segments, a loop": ("rademacher", 5, torch.float32),
    "segments, two terms of 16 bits": ("gaussian", 2, torch.bfloat16),
}


@pytest.fixture
def _first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has launched no Triton kernel, on a GPU that is not there."""
    monkeypatch.setattr(triton_self_test, "_may_run", set())
    monkeypatch.setattr(triton_self_test, "gpu_identity", lambda device: "emulated")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("_first_process")
@pytest.mark.few(1)
@pytest.mark.parametrize("name", TRITON_CALLS)
def test_a_triton_kernel_with_one_constant_changed_is_caught(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, num_terms, dtype = TRITON_CALLS[name]
    right, wrong = SQUARE_ROOT if family == "gaussian" else MULTIPLIER
    weights = torch.zeros(64, dtype=dtype)
    operands = check_operands([weights], None, None, None, [1], [0], [])
    seeds, coeffs = np.arange(num_terms, dtype=np.uint64), np.full(num_terms, 0.5)
    terms = Terms(seeds, coeffs, 1.0, family, "nearest", 0)
    whole_run = Arena.run
    with driving(90) as driver:

        def admitted(arena: Arena, seed_axpy: Any) -> dict[str, str]:
            with driver.memory.admitted(*arena.operands.outs.tensors):
                return whole_run(arena, seed_axpy)

        monkeypatch.setattr(Arena, "run", admitted)

        def first_call() -> None:
            with driver.memory.admitted(weights):
                launch.seed_axpy(operands, terms, before=triton_self_test.ensure)

        first_call()
        assert len(driver.launches) == 3  # the golden case, twice, before the call
        assert weights.all()
        before = weights.clone()
        triton_self_test._may_run.clear()
        shutil.rmtree(cache / "self-tests")
        assert right in driver.body("segments_kernel")
        with (
            driver.damaged("segments_kernel", lambda body: body.replace(right, wrong)),
            pytest.raises(triton_self_test.SelfTestError, match="it fails its self-test on cpu: the case"),
        ):
            first_call()
        assert torch.equal(weights, before)
