"""Worker processes with devices of their own, and what they do not survive: silence, a full /dev/shm."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
from support.federation import CONFIG, Batch, Row, loss, make_task

from fedkseed import SeedPool, Simulation, SimulationConfig, Task
from fedkseed.model.packed import SharedTensors
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.simulation import WorkerError
from fedkseed.simulation.run_folder import LEDGER, METRICS
from fedkseed.simulation.worker_pool import SharedWeights, WorkerPool

#: Not the processor, as far as a worker can tell: it keeps w0 and the round's model for itself, as on a GPU.
OWN = torch.device("cpu", 1)


def test_workers_that_rebuild_for_themselves_change_no_bit(tmp_path: Path) -> None:
    config = SimulationConfig(**{**CONFIG, "clients_per_round": 4, "num_rounds": 2})
    options = [{}, {"num_workers": 2, "devices": [OWN, OWN], "make_task": make_task}]
    for number, given in enumerate(options):
        folder = tmp_path / str(number)
        with Simulation(make_task(), config, folder=folder, **given) as simulation:  # type: ignore[arg-type]
            list(simulation.rounds())
    for name in (LEDGER, METRICS, "server.state"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name


def test_the_round_s_model_is_rebuilt_once_a_device_and_copied_for_each_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rebuilt: list[WorkingCopy] = []
    original = WorkingCopy._rebuild

    def counted(working: WorkingCopy, *given: Any) -> None:
        rebuilt.append(working)
        original(working, *given)

    monkeypatch.setattr(WorkingCopy, "_rebuild", counted)
    config = SimulationConfig(**{**CONFIG, "clients_per_round": 4})
    with Simulation(make_task(), config) as simulation:
        list(simulation.rounds())
    assert len(rebuilt) == 1 + config.num_rounds, "at the start and after each round, none for a client"
    rebuilt.clear()
    model = make_task().model
    shared = SharedWeights.of(model, [OWN])
    assert shared.round_model is None
    working = shared.working_copy(model, OWN)
    memory = [{tensor.data_ptr() for tensor in part} for part in (working.w0, shared.w0.tensors())]
    assert not memory[0] & memory[1], "a worker on a GPU reads no shared memory once it has started"
    for coefficient in (0.5, 0.5, 0.25, 0.25):
        working.load(SeedPool(1, 2), np.array([coefficient, 0.0]))
    assert rebuilt == [working, working]


#: Asked when this module is imported: in a worker before any of the worker's own code has run.
IS_DEAF = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def deaf_task() -> Task[Row, Batch]:
    """A task that only a process has that Ctrl-C cannot reach."""
    if not IS_DEAF:
        raise RuntimeError("Ctrl-C reaches this process")
    return make_task()


def test_ctrl_c_never_reaches_a_worker() -> None:
    with Simulation(make_task(), SimulationConfig(**CONFIG), make_task=deaf_task, num_workers=2):
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT}


def stopping_task() -> Task[Row, Batch]:
    """A task whose loss stops its process, as SIGSTOP or a wedged driver does."""

    def stop(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGSTOP)
        return loss(model, batch)

    return dataclasses.replace(make_task(), loss=stop)


def test_a_worker_that_hangs_meets_a_time_limit_and_is_ended() -> None:
    with Simulation(make_task(), SimulationConfig(**CONFIG), make_task=stopping_task, num_workers=2) as run:
        assert isinstance(run._host, WorkerPool)
        run._host._timeout = 0.5  # the start, which takes longer, had the default
        processes = list(run._host._workers.values())
        start = monotonic()
        with pytest.raises(WorkerError, match=r"fedkseed-worker-\d \(process \d+\) to send .* within 0.5 s"):
            list(run.rounds())
        assert monotonic() - start < 60
        assert [process.exitcode for process in processes].count(-signal.SIGKILL) == 1
        for process in processes:
            process.kill()  # or closing waits for the other, which is stopped, too
    assert all(process.exitcode == -signal.SIGKILL for process in processes)
    assert run.server.round == 0


@pytest.mark.parametrize("timeout", [-1, float("inf"), float("nan"), "600", True])
def test_a_time_limit_that_is_none_is_refused(timeout: object) -> None:
    with pytest.raises(ValueError, match="expected a time limit for workers"):
        Simulation(make_task(), SimulationConfig(**CONFIG), worker_timeout=timeout)  # type: ignore[arg-type]


def test_devices_are_as_many_as_workers() -> None:
    with pytest.raises(ValueError, match="expected one device for each of 2 workers, got 1"):
        Simulation(make_task(), SimulationConfig(**CONFIG), num_workers=2, devices=[OWN], make_task=make_task)


def test_workers_on_the_processor_need_the_model_there() -> None:
    with pytest.raises(
        ValueError, match="expected workers on GPUs for a model on meta, got some on the proc"
    ):
        SharedWeights.of(make_task().model.to("meta"), [OWN, torch.device("cpu")])


def test_a_full_shared_memory_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> SharedTensors:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)")

    monkeypatch.setattr(SharedTensors, "empty_like", full)
    with pytest.raises(
        WorkerError, match=r"/dev/shm\) for two copies of 0 MB .*, got: unable .*; use one worker, which"
    ):
        Simulation(make_task(), SimulationConfig(**CONFIG), num_workers=2, make_task=make_task)
