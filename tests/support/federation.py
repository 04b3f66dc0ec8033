"""A small federation that any process can make: five clients fit a line, as a script or as a module.

`python tests/support/federation.py FOLDER --workers N [--resume]` runs it and prints a line a round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkseed import Simulation, SimulationConfig, Task

Batch = tuple[torch.Tensor, torch.Tensor]
Row = tuple[float, float, float]

CONFIG: dict[str, Any] = {
    "num_rounds": 3,
    "clients_per_round": 2,
    "num_local_steps": 4,
    "batch_size": 3,
    "lr": 0.02,
    "eps": 1e-3,
    "num_seeds": 64,
    "seed": 8,
}


def make_model() -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def make_datasets() -> list[list[Row]]:
    generator = np.random.default_rng(2)
    datasets = []
    for size in (5, 8, 2, 13, 7):
        inputs = generator.normal(size=(size, 2))
        datasets.append([(x, y, 2 * x - y + 0.5) for x, y in inputs.tolist()])
    return datasets


def collate(rows: Sequence[Row]) -> Batch:
    table = torch.tensor(rows, dtype=torch.float64)
    return table[:, :2], table[:, 2:]


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def evaluate(model: nn.Module, _: int) -> Mapping[str, float]:
    rows = [row for rows in make_datasets() for row in rows]
    return {"held_out_loss": float(loss(model, collate(rows)).detach())}


def make_task() -> Task[Row, Batch]:
    return Task(make_model(), make_datasets(), collate, loss, evaluate=evaluate)


def run(folder: Path, num_workers: int, resume: bool, **changes: Any) -> None:
    """Runs it to the end in ``folder``."""
    config = SimulationConfig(**{**CONFIG, **changes})
    options: dict[str, Any] = {"make_task": make_task, "num_workers": num_workers}
    with Simulation(make_task(), config, folder=folder, resume=resume, **options) as simulation:
        print("ready", flush=True)
        for result in simulation.rounds():
            print(result.round, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=CONFIG["num_rounds"])
    parser.add_argument("--resume", action="store_true")
    chosen = parser.parse_args()
    run(chosen.folder, chosen.workers, chosen.resume, num_rounds=chosen.rounds, sampling="pro")
    sys.exit(0)
