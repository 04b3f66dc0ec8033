"""Which device a text names, and which device a worker gets; GPUs are stand-ins."""

from __future__ import annotations

import logging

import pytest
import torch

import fedkseed_kernels
from fedkseed.simulation.devices import DeviceError, choose_device, device_name, worker_devices

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports two GPUs, of which cuda:0 is current, and the kernels serve both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(fedkseed_kernels, "unavailable", lambda name, device: None)


def no_gpu(monkeypatch: pytest.MonkeyPatch, version: str | None, error: Exception | None = None) -> None:
    def init() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", version)


def test_a_build_of_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch, None)
    with pytest.raises(DeviceError, match=r"for cuda:1, got none: torch .* built without CUDA; use cpu"):
        choose_device("cuda:1")


def test_a_missing_driver_is_told_in_torch_s_words_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch, "13.0", RuntimeError("Found no NVIDIA driver on your system.\nPlease install one"))
    with pytest.raises(DeviceError) as caught:
        choose_device("cuda")
    assert str(caught.value) == (
        "expected a GPU for cuda, got none: torch reports: Found no NVIDIA driver on your system; use cpu"
    )
    no_gpu(monkeypatch, "13.0")
    with pytest.raises(DeviceError, match="torch sees no GPU"):
        choose_device("cuda")


@pytest.mark.usefixtures("two_gpus")
def test_a_number_beyond_those_that_torch_sees_is_refused() -> None:
    assert [choose_device(text) for text in ("cpu", "cuda", "cuda:1")] == [CPU, GPU, torch.device("cuda", 1)]
    with pytest.raises(
        DeviceError, match=r"for cuda:3, got 2 \(cuda:0, cuda:1\); CUDA_VISIBLE_DEVICES decides"
    ):
        choose_device("cuda:3")


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "mps", "cpu:0", "CUDA"])
def test_other_texts_say_which_there_are(text: str) -> None:
    with pytest.raises(DeviceError, match="expected a device, auto, cpu, cuda or cuda:N, got"):
        choose_device(text)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_the_kernels_do_not_serve_is_refused_and_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fedkseed_kernels, "unavailable", lambda name, device: f"{name} is not built")
    with pytest.raises(DeviceError, match="kernels that serve cuda:1, got none: native: native is not built"):
        choose_device("cuda:1")
    with caplog.at_level(logging.INFO, "fedkseed"):
        assert choose_device("auto") == CPU
    (record,) = caplog.records
    assert "is cpu and not cuda:0" in record.getMessage()
    assert record.levelno == logging.WARNING


@pytest.mark.parametrize("has_gpu", [True, False])
def test_auto_says_its_choice_in_one_line(
    has_gpu: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if has_gpu:
        request.getfixturevalue("two_gpus")
    else:
        no_gpu(monkeypatch, None)
    with caplog.at_level(logging.INFO, "fedkseed"):
        assert choose_device("auto") == (GPU if has_gpu else CPU)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        'device="auto" is cuda:0 (A GPU)' if has_gpu else 'device="auto" is cpu: torch '
    )


@pytest.mark.usefixtures("two_gpus")
def test_each_worker_has_a_gpu_of_its_own() -> None:
    second = torch.device("cuda", 1)
    assert worker_devices(GPU, 2) == [GPU, second]
    assert worker_devices(second, 2) == [second, GPU]
    assert worker_devices(second, 1) == [second]
    assert worker_devices(torch.device("cuda"), 1) == [GPU]
    with pytest.raises(DeviceError, match="at most 2 workers, one for each GPU that torch sees, got 3"):
        worker_devices(GPU, 3)


def test_workers_share_the_processor() -> None:
    assert worker_devices(CPU, 3) == [CPU] * 3
    with pytest.raises(ValueError, match="num_workers"):
        worker_devices(CPU, 0)


@pytest.mark.usefixtures("two_gpus")
def test_a_device_has_a_name_for_people() -> None:
    assert device_name(GPU) == "cuda:0 (A GPU)"
    assert device_name(CPU) == "cpu"
