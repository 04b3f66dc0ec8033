"""Who ran before whom changes no byte of a federation: buffers, generators and modes between clients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.federation import CONFIG, Batch, Row, evaluate, loss, make_task
from support.moving_models import drawing, moving
from torch import nn

from fedkseed import Simulation, SimulationConfig
from fedkseed.simulation.run_folder import LEDGER, METRICS
from fedkseed.simulation.task import Task

KINDS = {**drawing(), **moving()}
BUFFERS = ("batch norm", "exchanged", "written by .data", "registered in the forward")
GENERATORS = ("dropout", "torch.Generator", "NumPy", "Python", "random.Random")
WIDTH = 6


def running_loss(model: nn.Sequential, batch: Batch) -> torch.Tensor:
    """In train mode; then that of the running statistics, if there are any, as an evaluation has it."""
    found = loss(model, batch)
    model.eval()
    found += loss(model, batch)
    model.train()
    return found


def moving_task(*kinds: str) -> Task[Row, Batch]:
    torch.manual_seed(6)
    middle = [KINDS[kind]() for kind in kinds]
    model = nn.Sequential(nn.Linear(2, WIDTH), *middle, nn.Tanh(), nn.Linear(WIDTH, 1)).double()
    return dataclasses.replace(make_task(), model=model, loss=running_loss, evaluate=score_in_train_mode)


def score_in_train_mode(model: nn.Module, round: int) -> Mapping[str, float]:
    """Moves what it evaluates."""
    return evaluate(model, round)


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (LEDGER, "server.state", METRICS)]


def run(
    folder: Path, make: Callable[[], Task[Row, Batch]], task: Task[Row, Batch] | None = None, **options: Any
) -> list[bytes]:
    """Runs what is left of three rounds, or ``rounds`` of them."""
    num_rounds = options.pop("rounds", 3)
    config = SimulationConfig(**{**CONFIG, "clients_per_round": 4, "num_local_steps": 3})
    options["make_task"] = make
    with Simulation(task or make(), config, folder=folder, **options) as simulation:
        for result in simulation.rounds():
            assert not result.failed
            if result.round + 1 == num_rounds:
                break
    return files(folder)


@pytest.mark.filterwarnings("ignore:the model is in train mode with dropout")
@pytest.mark.parametrize("kinds", [BUFFERS, GENERATORS])
def test_workers_and_a_resume_change_no_bit(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Random numbers derive from the seed, the round and the client, but for those of the evaluation."""
    make = functools.partial(moving_task, *kinds)
    torch.manual_seed(1)
    expected = run(tmp_path / "1", make)
    assert run(tmp_path / "2", make, num_workers=2)[:2] == expected[:2]
    torch.manual_seed(2)
    run(tmp_path / "cut", make, rounds=1)
    assert run(tmp_path / "cut", make, resume=True)[:2] == expected[:2]


def test_random_numbers_of_the_process_go_on_after_a_round(tmp_path: Path) -> None:
    task = dataclasses.replace(moving_task("torch"), evaluate=None)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run(tmp_path, make_task, task)
    assert torch.equal(torch.rand(3), expected)


def score_in_eval_mode(model: nn.Module, round: int) -> Mapping[str, float]:
    return evaluate(model.eval(), round)


def evaluated_task() -> Task[Row, Batch]:
    task = moving_task("batch norm")
    return dataclasses.replace(task, evaluate=score_in_eval_mode, loss=loss)


def test_an_evaluation_that_leaves_eval_mode_behind(tmp_path: Path) -> None:
    expected = run(tmp_path / "1", evaluated_task)
    assert run(tmp_path / "2", evaluated_task, num_workers=2) == expected
    without = run(tmp_path / "none", lambda: dataclasses.replace(evaluated_task(), evaluate=None))
    assert without[0] == expected[0]


def test_workers_take_buffers_and_modes_from_the_task_that_is_given(tmp_path: Path) -> None:
    """Not those that their own task begins with, as with the weights."""
    folders = [tmp_path / str(num_workers) for num_workers in (1, 2)]
    found = []
    for folder, num_workers in zip(folders, (1, 2), strict=True):
        task = evaluated_task()
        score_in_train_mode(task.model, 0)
        task.model.eval()
        found.append(run(folder, evaluated_task, task, num_workers=num_workers))
    assert found[0] == found[1]
    assert found[0][0] != run(tmp_path / "3", evaluated_task)[0]
