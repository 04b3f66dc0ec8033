"""`Task.client`: a loop over such clients and a server is the simulation, to the last bit of its ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from support.small_client import batches, loss, make_broadcast, make_client, make_model
from torch import nn

from fedkseed import (
    Client,
    EvaluationReply,
    Reply,
    SeedPool,
    Server,
    Simulation,
    SimulationConfig,
    Task,
    WorkingCopy,
)
from fedkseed.storage import Inplace, Streamed

Row = tuple[list[float], int]
Batch = tuple[torch.Tensor, torch.Tensor]
SIZES = (9, 4, 6, 2)
FP32, BF16 = torch.float32, torch.bfloat16
Kinds = tuple[torch.dtype, torch.dtype]


def make_datasets() -> list[list[Row]]:
    generator = np.random.default_rng(2)
    return [
        [(inputs.tolist(), int(inputs[:3].argmax())) for inputs in generator.normal(size=(size, 8))]
        for size in SIZES
    ]


class Noisy(nn.Module):
    """Adds numbers of NumPy's and torch's generators of the process, as dropout of one's own would."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + 0.1 * (torch.rand(()) + np.random.rand()) if self.training else values


def make_task(kinds: Kinds = (FP32, FP32)) -> Task[Row, Batch]:
    """The task with weights and inputs in these dtypes; "auto" streams BF16 weights where inputs are FP32."""
    dtype, inputs = kinds
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), Noisy(), nn.Tanh(), nn.Linear(16, 3)
    ).to(dtype)
    model[1].running_mean, model[1].running_var = torch.zeros(16, dtype=inputs), torch.ones(16, dtype=inputs)

    def collate(rows: Sequence[Row]) -> Batch:
        return torch.tensor([row[0] for row in rows], dtype=inputs), torch.tensor([row[1] for row in rows])

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    def evaluate(model: nn.Module, round: int) -> Mapping[str, float]:
        model.eval()
        return {"sum": sum(float(weight.double().sum()) for weight in model.parameters()), "round": round}

    return Task(model, make_datasets(), collate, loss, evaluate=evaluate)


def make_config(**changes: Any) -> SimulationConfig:
    numbers = {"num_rounds": 3, "clients_per_round": 4, "num_local_steps": 3, "batch_size": 2}
    return SimulationConfig(**{**numbers, "lr": 0.02, "eps": 1e-2, "num_seeds": 64, "seed": -5, **changes})


def simulated(config: SimulationConfig, kinds: Kinds) -> bytes:
    with Simulation(make_task(kinds), config) as simulation:
        for _ in simulation.rounds():
            pass
        return simulation.ledger().to_bytes()


def looped(config: SimulationConfig, kinds: Kinds, clients: Mapping[int, Client[Batch]]) -> bytes:
    """The ledger of rounds over clients that were made before; draws random numbers between them."""
    server = server_of(config, make_task(kinds))
    for _ in range(config.num_rounds):
        opened = server.open()
        for client, message in sorted(opened.messages.items(), reverse=True):
            torch.rand(3)
            np.random.rand()
            opened.add(client, clients[client].handle(message))
        opened.close()
    return server.ledger().to_bytes()


def server_of(config: SimulationConfig, task: Task[Row, Batch]) -> Server:
    pool = SeedPool(config.seed, config.num_seeds)
    return Server.of(task.model, pool, config.server_config(len(SIZES)))


CASES: dict[str, tuple[dict[str, Any], Kinds, type]] = {
    "one client a round": ({"clients_per_round": 1}, (FP32, FP32), Inplace),
    "four": ({}, (FP32, FP32), Inplace),
    "four, pro": ({"sampling": "pro", "family": "rademacher"}, (FP32, FP32), Inplace),
    "auto streams": ({}, (BF16, FP32), Streamed),
    "auto falls": ({}, (BF16, BF16), Inplace),
    "streamed": ({"storage": Streamed()}, (FP32, FP32), Streamed),
    "a bound of the gap": ({"max_loss_gap": 0.05}, (FP32, FP32), Inplace),
}


@pytest.mark.parametrize(("changes", "kinds", "mode"), CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.filterwarnings("ignore:the model is in train mode with dropout")
def test_a_loop_over_its_clients_ends_with_the_simulation_s_ledger(
    changes: dict[str, Any], kinds: Kinds, mode: type, shared: bool
) -> None:
    """On one working copy, and with a model for each client, as parties have."""
    config = make_config(**changes)
    one = WorkingCopy(make_task(kinds).model, round_model="own")
    clients = {}
    for number in range(len(SIZES)):
        task = make_task(kinds)
        clients[number] = task.client(number, one if shared else WorkingCopy(task.model), config)
    assert looped(config, kinds, clients) == simulated(config, kinds)
    assert {type(each.last_run.storage) for each in clients.values() if each.last_run is not None} == {mode}


@pytest.mark.filterwarnings("ignore:the model is in train mode with dropout")
def test_its_scores_are_the_task_s_of_the_round_that_is_asked_for() -> None:
    config, task = make_config(), make_task()
    server = server_of(config, task)
    client = task.client(1, WorkingCopy(task.model), config)
    for round in range(2):
        asked = server.open_evaluation([1])
        asked.add(1, client.handle(asked.message(1)))
        found = EvaluationReply.from_bytes(client.handle(asked.message(1)))
        assert found.scores["round"] == round
        assert found.num_examples == SIZES[1]
        client.load(asked.message(1))
        assert task.evaluate is not None
        with torch.no_grad():
            assert found.scores == task.evaluate(client.working.model, round)
        client.working.model.train()
        server.skip_round()


def test_a_client_without_a_number_answers_as_whoever_is_addressed() -> None:
    working = WorkingCopy(make_model())
    options: dict[str, Any] = {"loss": loss, "batches": batches, "data_size": 9}
    anyone = Client(None, working, **options)
    assert anyone.client is None
    for number in (0, 4, 2**24 - 1):
        message = make_broadcast(client=number)
        reply = anyone.step(message)
        assert Reply.from_bytes(reply).client == number
        assert Client(number, working, **options).step(message) == reply


def test_threads_are_those_that_it_is_told_while_it_works() -> None:
    before, seen = torch.get_num_threads(), []

    def look(*_: object) -> dict[str, float]:
        seen.append(torch.get_num_threads())
        return {}

    client = make_client(WorkingCopy(make_model()), num_threads=before + 1, on_step=look, evaluate=look)
    client.step(make_broadcast(schedule=np.zeros(1, np.uint16)))
    client.evaluate(make_broadcast(schedule=np.zeros(0, np.uint16)))
    assert seen == [before + 1, before + 1]
    assert torch.get_num_threads() == before


def test_batches_may_have_no_end_and_none_is_made_in_vain() -> None:
    made: list[int] = []

    def endless(round: int, num_steps: int) -> Iterator[torch.Tensor]:
        for number in count():
            made.append(number)
            yield torch.full((4, 3), float(number), dtype=torch.float64)

    client = make_client(WorkingCopy(make_model()), batches=endless)
    reply = client.step(make_broadcast())
    assert made == [0, 1, 2, 3]
    assert client.step(make_broadcast()) == reply
    assert client.last_run is not None
    found = client.last_run.metrics()
    assert list(found) == ["train_loss", "num_steps", "num_skipped", "seconds"]
    assert all(type(value) is float for value in found.values())
    assert (found["num_steps"], found["num_skipped"]) == (4.0, 0.0)
    assert found["train_loss"] == pytest.approx(sum(client.last_run.losses) / 4)


def test_metrics_of_a_round_that_was_skipped_whole_have_no_loss() -> None:
    client = make_client(WorkingCopy(make_model()), loss=lambda *_: float("nan"))
    client.step(make_broadcast())
    assert client.last_run is not None
    assert list(client.last_run.metrics()) == ["num_steps", "num_skipped", "seconds"]
    assert client.last_run.metrics()["num_skipped"] == 4.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": 1.5}, TypeError),
        ({"seed": True}, TypeError),
        ({"num_threads": 0}, ValueError),
        ({"num_examples": 0}, ValueError),
        ({"num_examples": 2**32}, ValueError),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        make_client(WorkingCopy(make_model()), **options)
