"""The federation of `federation` by other methods than FedKSeed, as a script or as a module.

`python tests/support/baseline_rounds.py FOLDER METHOD STEP` kills itself in that local step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkseed import SimulationConfig, Task
from fedkseed.scenarios.baselines.lora import PROJECTIONS
from fedkseed.scenarios.baselines.rounds import BaselineRounds
from fedkseed.scenarios.baselines.settings import BaselineSettings
from fedkseed.simulation.run_folder import RunFolder
from fedkseed.simulation.simulation import RoundResult
from support import federation

#: With which every method learns something in three rounds.
LR = {"fedavg": 0.05, "fedit": 0.02, "fedzo": 0.02, "first-order": 0.02, "zeroth-order": 0.01}


class Projected(nn.Module):
    """A perceptron whose layers have the names of a decoder's projections."""

    def __init__(self) -> None:
        super().__init__()
        sizes = dict.fromkeys(PROJECTIONS, (6, 6)) | {"q_proj": (2, 6), "down_proj": (6, 1)}
        self.layers = nn.ModuleDict({name: nn.Linear(*sizes[name]) for name in PROJECTIONS})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for name in PROJECTIONS:
            inputs = self.layers[name](inputs if name == "q_proj" else torch.tanh(inputs))
        return inputs


def make_task(method: str) -> Task[Any, Any]:
    """Five clients around a model in evaluation mode, as the loaders give it."""
    if method == "fedit":
        torch.manual_seed(6)
        model: nn.Module = Projected().double()
    else:
        model = federation.make_model()
    return Task(
        model.eval(),
        federation.make_datasets(),
        federation.collate,
        federation.loss,
        evaluate=federation.evaluate,
    )


def opened(
    folder: RunFolder,
    method: str,
    *,
    task: Task[Any, Any] | None = None,
    on_step: Callable[[], None] | None = None,
    baseline: dict[str, Any] | None = None,
    gradient_loss: Any = federation.loss,
    **changes: Any,
) -> BaselineRounds:
    """The rounds in a folder; ``changes`` are those of the config."""
    config = SimulationConfig(**{**federation.CONFIG, "lr": LR[method], **changes})
    return BaselineRounds(
        task or make_task(method),
        gradient_loss,
        config,
        BaselineSettings(method=method, **(baseline or {})),  # type: ignore[arg-type]
        folder,
        on_step=on_step,
    )


def run(folder: Path, method: str, **options: Any) -> list[RoundResult]:
    """A run in the folder, or what is left of it."""
    with RunFolder.take(folder) as held, opened(held, method, **options) as rounds:
        return list(rounds.rounds())


def main(folder: str, method: str, last_step: int) -> None:
    steps = 0

    def kill_at_last() -> None:
        nonlocal steps
        steps += 1
        if steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    run(Path(folder), method, on_step=kill_at_last)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
