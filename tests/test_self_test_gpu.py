"""Self-tests on a GPU, as far as there need be none: verdicts of each, what defers one, what verify says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.self_tests import first_process

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import native_cuda, reference
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms
from fedkseed_kernels.self_test import gate, remembered
from fedkseed_kernels.self_test.arena import Arena

CPU = torch.device("cpu")
NUM_CASES = sum(
    ", wide, " not in name for name in json.loads(Path(remembered.DIGESTS_PATH).read_bytes())["gpu"]
)


@pytest.fixture(autouse=True)
def _no_verdicts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that knows of no self-test, with an empty cache folder."""
    first_process(monkeypatch)


class Gpu:
    """A backend of a GPU whose memory is the processor's, by the reference."""

    WRITES_FP32 = False
    SELF_TEST = gate.SelfTest("gpu", lambda device, isa: None)

    def __init__(self) -> None:
        self.num_calls, self.kinds_of_terms = 0, set[type]()

    def unavailable(self, device: torch.device | None = None) -> None:
        return None

    def seed_axpy(self, operands: Operands, terms: Terms | DeviceTerms) -> None:
        self.num_calls += 1
        self.kinds_of_terms.add(type(terms))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setitem(dispatch.TABLE["cuda"], "native", made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    original = Arena.__init__

    def on_cpu(self: Arena, *arguments: Any) -> None:
        original(self, *arguments[:-1], CPU)

    monkeypatch.setattr(Arena, "__init__", on_cpu)
    return made


def test_a_gpu_has_a_verdict_of_its_own(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.TABLE["cuda"]["triton"], "unavailable", lambda device=None: None)
    assert dispatch.select("cuda").name == "native"  # no tensor is there yet
    assert gpu.num_calls == 0
    assert dispatch.select("cuda:1").name == "triton"
    assert gpu.num_calls > 0
    assert gpu.kinds_of_terms == {Terms, DeviceTerms}
    with (
        fk.backend("native"),
        pytest.raises(RuntimeError, match="it fails its self-test on cuda:1: the case"),
    ):
        dispatch.select("cuda:1")
    assert [key[1:] for key in gate.failures] == [(torch.device("cuda:1"), "auto")]


@pytest.mark.parametrize("obstacle", ["capture", "memory"])
def test_it_is_deferred_aloud_where_it_cannot_run(
    obstacle: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch.TABLE["cuda"]["triton"], "unavailable", lambda device=None: None)
    with monkeypatch.context() as patch, fk.backend("native"):
        if obstacle == "capture":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            words = "a CUDA graph is being captured"
        else:
            patch.setattr(Arena, "__init__", _out_of_memory)
            words = "the device has no memory left for it"
        for _ in range(2):
            assert dispatch.select("cuda:0").name == "native"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"the self-test on cuda:0 is deferred to the next call: {words}")
    ]
    assert gpu.num_calls == 0
    assert dispatch.select("cuda:0").name == "triton"


def _out_of_memory(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def only_this_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A machine of one GPU, which is the current one, with a backend of two names and no other."""
    triton = Gpu()
    monkeypatch.setattr(triton, "SELF_TEST", None)
    monkeypatch.setitem(dispatch.TABLE, "cuda", {"native": gpu, "triton": triton})
    monkeypatch.setitem(dispatch.TABLE, "cpu", {"reference": reference})
    for name, value in {"device_count": 1, "is_initialized": True, "current_device": 0, "init": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    return gpu


def _no_memory(device: torch.device | None = None) -> None:
    raise native_cuda.CudaError("the native CUDA library failed: out of memory (CUDA error 2)", 2)


def test_verify_goes_on_where_kernels_do_not_load(
    only_this_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(only_this_gpu, "unavailable", _no_memory)
    results = {result.backend: result for result in fk.verify()}
    assert list(results) == ["native", "triton"]
    assert (results["native"].status, results["native"].num_cases) == ("fail", 0)
    reason = "the native CUDA library failed: out of memory (CUDA error 2)"
    assert results["native"].problem == fk.unavailable("native", "cuda:0") == reason
    with pytest.raises(native_cuda.CudaError):
        dispatch.select("cuda:0")


def test_verify_goes_on_where_kernels_do_not_compile(
    only_this_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CompilationError(Exception):
        """Like Triton's, no RuntimeError."""

    def not_compiled(operands: Operands, terms: Terms) -> None:
        raise CompilationError("ptxas")

    monkeypatch.setattr(only_this_gpu, "seed_axpy", not_compiled)
    found = [(result.backend, result.status, result.num_cases) for result in fk.verify()]
    assert found == [("native", "fail", 0), ("triton", "fail", NUM_CASES)]
    assert next(fk.verify()).problem == "CompilationError: ptxas"


def test_what_fails_to_verify_is_not_used(only_this_gpu: Gpu) -> None:
    for result in fk.verify():
        assert (result.status, result.num_cases) == ("fail", NUM_CASES)
        for device in ("cuda:0", "cuda"):
            assert fk.unavailable(result.backend, device) == result.problem
        with fk.backend(result.backend), pytest.raises(RuntimeError, match="its self-test on cuda:0"):
            dispatch.select("cuda:0")
    with pytest.raises(RuntimeError, match="no backend can serve cuda:0 tensors: native: it .*; triton: it "):
        dispatch.select("cuda:0")
