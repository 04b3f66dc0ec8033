"""The clock of the GPU benchmark, held to a GPU that is simulated, and how contestants take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.measure import Contestant
from benchmarks.gpu import turns
from benchmarks.gpu.channel import Channel, PartEnded


class FakeGpu:
    """A stream, a host and their clocks, in seconds: work is queued at once and done in order."""

    def __init__(self) -> None:
        self.host = self.stream = 100.0

    def launch(self, host_seconds: float, seconds: float) -> None:
        self.host += host_seconds
        self.stream = max(self.stream, self.host) + seconds

    def synchronize(self) -> None:
        self.host = self.stream = max(self.host, self.stream)

    def event(self, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            at = 0.0

            def record(self) -> None:
                gpu.stream = self.at = max(gpu.stream, gpu.host)

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1e3

        return Event()


class TestClock:
    @pytest.fixture
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        fake = FakeGpu()
        monkeypatch.setattr(torch.cuda, "Event", fake.event)
        monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
        monkeypatch.setattr(
            torch.cuda, "_sleep", lambda cycles: fake.launch(1e-5, cycles / 2e9), raising=False
        )
        monkeypatch.setattr(turns.time, "perf_counter", lambda: fake.host)
        return fake

    def test_the_gpu_is_not_charged_for_the_host(self, fake: FakeGpu) -> None:
        found = turns.on_gpu(lambda: [fake.launch(0.0003, 0.0002) for _ in range(3)])
        assert found.seconds == pytest.approx(3 * 0.0002)
        assert found.host_seconds == pytest.approx(3 * 0.0003)
        assert found.is_queued

    def test_a_call_that_outlasts_the_sleep_says_so(self, fake: FakeGpu) -> None:
        found = turns.on_gpu(lambda: fake.launch(0.02, 0.001))
        assert not found.is_queued
        assert found.seconds > 0.001

    def test_a_call_that_waits_for_the_gpu_says_so(self, fake: FakeGpu) -> None:
        def call() -> None:
            fake.synchronize()
            fake.launch(0.0003, 0.0002)

        found = turns.on_gpu(call)
        assert not found.is_queued
        assert found.seconds == pytest.approx(0.0003 + 0.0002)

    def test_a_whole_step_is_wall_clock_time(self, fake: FakeGpu) -> None:
        found = turns.whole_on_gpu(lambda: fake.launch(0.01, 0.03))
        assert found.seconds == pytest.approx(0.04)
        assert found.host_seconds == pytest.approx(0.01)


class TestTurns:
    def take(self, *contestants: Contestant, seconds: float = 0.0) -> tuple[turns.Turns, list[str]]:
        def clock(run: turns.Call) -> turns.Sample:
            run()
            return turns.Sample(seconds, seconds, True)

        taken = turns.Turns(contestants, clock, lambda: None)
        return taken, [contestant.name for contestant in taken]

    def test_each_is_warmed_up_once_and_takes_its_turn(self) -> None:
        calls: list[Any] = []
        one = Contestant("one", "ours", calls.append, 2, warm_up=lambda: calls.append("warm"))
        two = Contestant("two", "ours", lambda index: calls.append(f"two {index}"), 1)
        taken, order = self.take(one, two)
        assert order == ["one", "two", "one"]
        assert calls == ["warm", 0, "two 0", "two 0", 1]
        assert {name: len(found) for name, found in taken.samples.items()} == {"one": 2, "two": 1}

    def test_what_takes_long_is_timed_once(self) -> None:
        taken, _ = self.take(Contestant("slow", "ours", lambda _: None, 5), seconds=0.6)
        assert len(taken.samples["slow"]) == 1

    def test_one_that_raises_costs_its_own_figures_alone(self) -> None:
        def fail(_: int) -> None:
            raise RuntimeError("out of memory")

        good = Contestant("good", "ours", lambda _: None, 2)
        taken, order = self.take(Contestant("bad", "ours", fail, 2), good)
        assert order == ["bad", "good", "good"]
        assert taken.errors == {"bad": "RuntimeError: out of memory"}
        assert list(taken.samples) == ["good"]

    def test_it_stops_between_two_turns_when_the_time_is_over(self, tmp_path: Path) -> None:
        late = Channel(tmp_path / "lines", -1.0)
        done: list[int] = []
        taken = turns.Turns([Contestant("a", "ours", done.append, 3)], turns.on_processor, late.check_time)
        with pytest.raises(PartEnded, match="over time: its time was over between two measurements"):
            list(taken)
        assert done == []
