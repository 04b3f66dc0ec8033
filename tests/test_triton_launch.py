"""What the Triton launcher does about streams and warps, with stand-ins for a GPU's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from benchmarks.machine_code import triton_kernels
from fedkseed_kernels.arguments.tensors import check_operands
from fedkseed_kernels.backends.triton import launch

GPU = torch.device("cuda", 0)


class Stream:
    """A stream of a GPU: what it waits for, and which memory it is known to use."""

    def __init__(self) -> None:
        self.waited_for: list[Any] = []
        self.uses: list[Any] = []

    def record_event(self) -> tuple[str, Stream]:
        return "event of", self

    def wait_event(self, event: Any) -> None:
        self.waited_for.append(event)


class Copy:
    """A table in the memory of a GPU."""

    def record_stream(self, stream: Stream) -> None:
        stream.uses.append(self)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(stream=Stream(), capturing=False)
    monkeypatch.setattr(launch, "upload", lambda *_: Copy())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_tables_are_known_to_each_stream_that_reads_them(gpu: SimpleNamespace) -> None:
    """Else their memory could be given away when a list is dropped, before another stream has read it."""
    tensors = [torch.zeros(20), torch.zeros(24, dtype=torch.bfloat16)]
    operands = check_operands(tensors, None, None, None, [0, 0], [0, 0], [])
    first, second = gpu.stream, Stream()
    tables = launch._tables_of(operands, GPU)
    copies = set(tables.copies.values())
    assert len(copies) == 3, "whole octets of either dtype, and a tail"
    assert first.waited_for == first.uses == []
    gpu.stream = second
    assert launch._tables_of(operands, GPU) is tables
    assert second.waited_for == [("event of", first)]
    assert set(second.uses) == copies
    gpu.stream = first
    launch._tables_of(operands, GPU)
    assert first.waited_for == first.uses == []
    gpu.stream, gpu.capturing = Stream(), True
    launch._tables_of(operands, GPU)
    assert gpu.stream.waited_for == gpu.stream.uses == []


def test_a_warp_is_as_large_as_the_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (32, 64):
        target = SimpleNamespace(warp_size=size)
        active = SimpleNamespace(get_current_target=lambda target=target: target)
        monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
        assert launch.warp_size.__wrapped__(GPU) == size


@pytest.mark.parametrize("warp_size", [32, 64])
def test_no_lane_is_computed_twice(warp_size: int) -> None:
    for variant in triton_kernels.VARIANTS:
        config = triton_kernels.config_of(variant)
        num_threads = config.num_warps(warp_size) * warp_size
        assert num_threads == config.num_threads <= config.block, variant.name
