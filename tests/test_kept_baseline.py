"""What methods beside FedKSeed keep: another run does not go on from it, nor one that is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import federation
from support.baseline_rounds import make_task, opened, run

from fedkseed.federation.state import StateError
from fedkseed.simulation.run_folder import BASELINE, CLIENTS, RunFolder, RunFolderError


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run(tmp_path / "run", "fedavg", num_rounds=1)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("fedavg", {"lr": 0.2}, "with lr 0.05, which"),
        ("fedavg", {"baseline": {"local_epochs": 1}}, "with local_epochs 0, which"),
        ("first-order", {}, "with method fedavg, which"),
        ("fedavg", {"task": make_task("fedit")}, "with w0 "),
    ],
)
def test_another_run_does_not_go_on(method: str, changes: dict[str, Any], said: str, finished: Path) -> None:
    held = (finished / BASELINE).read_bytes()
    with pytest.raises(StateError) as error:
        run(finished, method, **changes)
    assert said in str(error.value)
    (finished / CLIENTS).unlink()  # then its digest is in the state
    with pytest.raises(StateError, match="expected the state of a run with these settings"):
        run(finished, method, **changes)
    assert (finished / BASELINE).read_bytes() == held


@pytest.mark.parametrize("place", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("method", ["fedavg", "zeroth-order"])
def test_a_damaged_state_is_refused(method: str, place: float, tmp_path: Path) -> None:
    run(tmp_path / "run", method, num_rounds=1)
    path = tmp_path / "run" / BASELINE
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateError, match=BASELINE):
        run(tmp_path / "run", method)
    path.write_bytes(data[:-1])
    with pytest.raises(StateError, match="expected a whole safetensors file.*to begin it anew"):
        run(tmp_path / "run", method)
    path.unlink()
    with pytest.raises(RunFolderError, match="cannot go on, and they are not overwritten"):
        run(tmp_path / "run", method)


def test_methods_do_not_go_on_in_each_others_folders(tmp_path: Path) -> None:
    federation.run(tmp_path / "fedkseed", 1, resume=False)
    with (
        RunFolder.take(tmp_path / "fedkseed") as folder,
        pytest.raises(StateError, match="got the state of another method"),
    ):
        opened(folder, "fedavg")
    run(tmp_path / "fedavg", "fedavg", num_rounds=1)
    with pytest.raises(StateError):
        federation.run(tmp_path / "fedavg", 1, resume=True)
