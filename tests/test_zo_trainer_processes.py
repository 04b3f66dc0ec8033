"""A zeroth-order Trainer in two processes, each with half of the rows, as launchers start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import trainer_process
from support.ports import free_port
from support.running import SECONDS

from fedkseed.adapters.transformers.optimizer import mean_over_processes

#: accelerate's launcher for notebooks starts functions; its processes fork, so it gets a process of its own.
_NOTEBOOK = """
import sys
from pathlib import Path
from accelerate import debug_launcher
from support import trainer_process
debug_launcher(trainer_process.main, (Path(sys.argv[1]),), num_processes=2)
"""
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"],
    "notebook": ["-c", _NOTEBOOK],
}


def ran(arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    result = subprocess.run(
        [sys.executable, *arguments, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process with all rows."""
    (found,) = ran(["-m", "support.trainer_process"], tmp_path_factory.mktemp("alone"))
    assert found["processes"] == 1
    return found


def test_losses_are_reduced_to_their_mean_where_there_are_several_processes() -> None:
    class Accelerator:
        device = torch.device("cpu")

        def __init__(self, num_processes: int) -> None:
            self.num_processes = num_processes

        def reduce(self, losses: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "mean"
            return losses + 1

    assert mean_over_processes(Accelerator(1)) is None
    reduce = mean_over_processes(Accelerator(2))
    assert reduce is not None
    losses = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(reduce(losses), losses + 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_walk_as_one_with_all_rows(
    launcher: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    arguments = list(LAUNCHERS[launcher])
    if launcher == "torchrun":
        arguments += ["--master-port", str(free_port()), "-m", "support.trainer_process"]
    first, second = ran(arguments, tmp_path)
    assert first["processes"] == second["processes"] == 2
    assert first["model"] == "DistributedDataParallel"
    assert first["digest"] == second["digest"]
    assert first["steps"] == second["steps"]
    steps = torch.tensor(first["steps"])
    assert steps.shape == (trainer_process.NUM_STEPS, 2)
    torch.testing.assert_close(steps, torch.tensor(alone["steps"]), rtol=1e-3, atol=1e-3)
    assert steps[:, 1].abs().max() > 0.1
    torch.testing.assert_close(
        torch.tensor(first["logged"]), torch.tensor(alone["logged"]), rtol=1e-5, atol=0.0
    )
