"""The federation that every transport runs: four clients of unequal sizes, three rounds, K = 64.

Any process can make it, those of a framework too: `environment()` gives them the path. Its module draws
random numbers (dropout), its loss has a sum over so many numbers that the bits depend on the number of
threads, and one client's weight is above the cap: a transport that changes one of them ends with another
ledger.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedkseed import (
    RECOMMENDED_BOUNDS,
    Client,
    Server,
    Simulation,
    SimulationConfig,
    Task,
)

Batch = tuple[torch.Tensor, torch.Tensor]
Row = tuple[list[float], int]

TESTS = Path(__file__).parent.parent
#: With the bounds that adapters put in, so that they change nothing.
CONFIG = SimulationConfig(
    num_rounds=3,
    clients_per_round=3,
    num_local_steps=4,
    batch_size=3,
    lr=0.003,
    eps=1e-3,
    num_seeds=64,
    seed=16,
    median_clip=RECOMMENDED_BOUNDS.median_clip,
    share_cap=RECOMMENDED_BOUNDS.share_cap,
)
SIZES = (58, 3, 5, 2)


def make_model() -> nn.Sequential:
    middle = nn.Linear(256, 256, bias=False)
    model = nn.Sequential(nn.Linear(4, 256), nn.Dropout(0.25), middle, nn.Tanh(), nn.Linear(256, 3))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1, generator=generator)
    return model


def make_datasets() -> list[list[Row]]:
    generator = np.random.default_rng(2)
    inputs = generator.normal(size=(sum(SIZES), 4))
    rows = [(row.tolist(), int(row[:3].argmax())) for row in inputs]
    ends = np.cumsum(SIZES)
    return [rows[end - size : end] for end, size in zip(ends, SIZES, strict=True)]


def collate(rows: Sequence[Row]) -> Batch:
    return torch.tensor([inputs for inputs, _ in rows]), torch.tensor([label for _, label in rows])


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy, and a penalty of the 65,536 weights in the middle."""
    penalty = 1e-3 * model.get_parameter("2.weight").square().sum()
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + penalty


def evaluate(model: nn.Module, round: int) -> Mapping[str, float]:
    """The loss on the rows of all clients, without dropout."""
    model.eval()
    return {
        "held_out_loss": float(
            loss(model, collate([row for rows in make_datasets() for row in rows])).detach()
        )
    }


def make_task() -> Task[Row, Batch]:
    return Task(make_model(), make_datasets(), collate, loss, evaluate=evaluate)


def make_server() -> Server:
    return make_task().server(CONFIG)


def make_client(number: int) -> Client[Batch]:
    """A client with a model of its own."""
    return make_task().client(number, None, CONFIG)


def simulated_ledger(num_workers: int = 1) -> bytes:
    """The ledger of the plain simulation."""
    options = {"make_task": make_task, "num_workers": num_workers}
    with Simulation(make_task(), CONFIG, **options) as simulation:  # type: ignore[arg-type]
        for _ in simulation.rounds():
            pass
        return simulation.ledger().to_bytes()


@cache
def reference_ledger() -> bytes:
    """`simulated_ledger` in this process: what every transport has to end with."""
    return simulated_ledger()


def ledger_without(number: int) -> bytes:
    """The ledger of the rounds without one client's replies: its weight goes to the others."""
    server = make_server()
    clients = [make_client(other) for other in range(len(SIZES))]
    for _ in range(CONFIG.num_rounds):
        opened = server.open()
        for client, message in opened.messages.items():
            if client != number:
                opened.add(client, clients[client].handle(message))
        opened.close()
    return server.ledger().to_bytes()


def environment() -> dict[str, str]:
    """Variables of a process that imports ``support.embedding``: two threads, where a client takes one."""
    root = TESTS.parent
    paths = [str(path) for path in (TESTS, root, root / "python")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "2"}
