"""A run killed at random instants and resumed ends with the bytes of one that was never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.federation import run

from fedkseed.simulation.run_folder import LEDGER, METRICS

_NUM_ROUNDS = 150
_SCRIPT = Path(__file__).parent / "support" / "federation.py"
_KEPT = (LEDGER, METRICS, "server.state")
_SECONDS = 120


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(folder, 1, resume=False, num_rounds=_NUM_ROUNDS, sampling="pro")
    return folder


def live(folder: Path, num_workers: int, seconds: float | None) -> bool:
    """One life of the process: killed with all its workers some seconds after it is ready, or let run.

    Returns whether it came to its end.
    """
    command = [sys.executable, str(_SCRIPT), str(folder), "--workers", str(num_workers)]
    command += ["--rounds", str(_NUM_ROUNDS)] + (["--resume"] if (folder / "server.state").exists() else [])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.wait(_SECONDS if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            assert seconds is not None, "the run did not end"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode == 0


@pytest.mark.parametrize(
    ("num_workers", "num_kills"),
    [(1, 2), pytest.param(1, 10, marks=pytest.mark.slow), pytest.param(4, 4, marks=pytest.mark.slow)],
)
def test_killed_at_random_instants(
    num_workers: int, num_kills: int, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    generator = np.random.default_rng(num_workers)
    ended = [live(folder, num_workers, generator.uniform(0.0, 0.5)) for _ in range(num_kills)]
    assert not all(ended), "no life was cut short: the kills came too late"
    assert live(folder, num_workers, None)
    for name in _KEPT:
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert not list(folder.glob(".*.tmp"))
