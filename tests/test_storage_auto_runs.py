"""storage="auto" of a client and a simulation: resolved once, kept in the folder, alike for all workers."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.messages import make_broadcast
from support.streamed_models import LanguageModel, build, loss_of, make_ids
from support.unstreamable import ReadsHead, ReadsOutside, make_task
from torch import nn

from fedkseed import (
    Client,
    Inplace,
    ModelIdentity,
    Reply,
    Simulation,
    SimulationConfig,
    Streamed,
    WorkingCopy,
)
from fedkseed.federation.state import StateError
from fedkseed.scenarios.settings import RunSettings
from fedkseed.simulation.host import InProcessHost
from fedkseed.simulation.run_folder import CLIENTS, LEDGER, METRICS, RunFolderError
from fedkseed.storage import StorageChoice

IN_FP32 = Streamed(compute_dtype=torch.float32)
CONFIG: dict[str, Any] = {
    "num_rounds": 3,
    "clients_per_round": 3,
    "num_local_steps": 2,
    "batch_size": 2,
    "lr": 0.01,
    "eps": 1e-2,
    "num_seeds": 16,
    "seed": 4,
    "family": "rademacher",
}


@pytest.fixture(autouse=True)
def _every_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedkseed")


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """What came from the logger, by level, up to the first colon."""
    return [(record.levelno, record.getMessage().partition(":")[0]) for record in caplog.records]


def client_of(
    kind: type[LanguageModel], storage: StorageChoice = "auto", seen: list[int] | None = None
) -> Client[torch.Tensor]:
    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.append(1)
        return loss_of(model, ids)

    def batches(round: int, num_steps: int) -> list[torch.Tensor]:
        torch.manual_seed(round)
        return [make_ids(number) for number in range(num_steps)]

    working = WorkingCopy(build(kind, torch.bfloat16))
    return Client(3, working, loss=loss, batches=batches, data_size=1, storage=storage)


def message(kind: type[LanguageModel], number: int) -> bytes:
    fields = {"identity": ModelIdentity.of(build(kind, torch.bfloat16)), "base_seed": 8, "round": number}
    coefficients = np.zeros(64, dtype=np.float32)
    return make_broadcast(eps=1e-2, lr=0.01, max_abs_g=1e3, coefficients=coefficients, **fields).to_bytes()


def test_a_client_remembers_that_it_fell(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []
    client, inplace = client_of(ReadsOutside, seen=seen), client_of(ReadsOutside, Inplace())
    counts, refusals = [], []
    for number in range(3):
        model = client.working.model
        with torch.no_grad():
            model.calls.zero_()
            inplace.working.model.calls.zero_()
        reply = client.step(message(ReadsOutside, number))
        assert reply == inplace.step(message(ReadsOutside, number))
        assert client.last_run is not None
        assert client.last_run.storage == Inplace()
        counts.append(len(seen))
        refusals.append(client.last_run.refusal)
    num_steps = len(Reply.from_bytes(reply).scalars)
    assert counts == [2 * num_steps + 1, 4 * num_steps + 1, 6 * num_steps + 1]
    assert "head.weight" in str(refusals[0])
    assert refusals[1:] == [None, None]
    assert said(caplog) == [
        (logging.INFO, f'storage="auto" is {IN_FP32!r}'),
        (logging.WARNING, f'storage="auto" falls to {Inplace()!r}'),
    ]


def test_a_client_says_its_mode_once(caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(LanguageModel)
    for number in range(2):
        client.step(message(LanguageModel, number))
        assert client.last_run is not None
        assert (client.last_run.storage, client.last_run.refusal) == (IN_FP32, None)
    assert said(caplog) == [(logging.INFO, f'storage="auto" is {IN_FP32!r}')]


def test_a_client_whose_first_round_fails_may_still_fall() -> None:
    client = client_of(ReadsOutside)
    batches = client._batches
    client._batches = lambda round, num_steps: iter([])
    with pytest.raises(ValueError, match="batches"):
        client.step(message(ReadsOutside, 0))
    client._batches = batches
    client.step(message(ReadsOutside, 0))
    assert client.last_run is not None
    assert client.last_run.storage == Inplace()


@pytest.mark.parametrize("make", [client_of, functools.partial(SimulationConfig, **CONFIG)])
def test_what_is_no_mode_is_refused_at_once(make: Callable[..., Any]) -> None:
    arguments = {"kind": LanguageModel} if make is client_of else {}
    with pytest.raises(TypeError, match="expected storage='auto', or a mode such as"):
        make(**arguments, storage="streamed")


def run(folder: Path | None, kind: type[LanguageModel], num_rounds: int = 3, **changes: Any) -> Any:
    make = functools.partial(make_task, kind)
    options = {name: changes.pop(name) for name in ("num_workers", "resume") if name in changes}
    config = SimulationConfig(**{**CONFIG, "num_rounds": num_rounds, **changes})
    with Simulation(make(), config, make_task=make, folder=folder, **options) as simulation:
        results = list(simulation.rounds())
        assert not any(result.failed for result in results)
        return simulation.storage


@pytest.mark.parametrize(("kind", "mode"), [(LanguageModel, IN_FP32), (ReadsHead, Inplace())])
def test_any_number_of_workers_a_resume_and_an_explicit_mode_give_the_same_bytes(
    kind: type[LanguageModel], mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, cut, explicit = (tmp_path / name for name in ("one", "two", "cut", "explicit"))
    lines = [(logging.INFO, f'storage="auto" is {IN_FP32!r}')]
    if mode != IN_FP32:
        lines.append((logging.WARNING, f'storage="auto" falls to {mode!r}'))
    for folder, num_workers in ((one, 1), (two, 2)):
        caplog.clear()
        assert run(folder, kind, num_workers=num_workers) == mode
        assert said(caplog) == lines
        assert json.loads((folder / CLIENTS).read_text())["storage"] == repr(mode)
    assert run(cut, kind, num_rounds=1) == mode
    caplog.clear()
    assert run(cut, kind, resume=True) == mode
    assert said(caplog) == [(logging.INFO, f'storage="auto" goes on in {mode!r}, that of the run in {cut}')]
    assert run(explicit, kind, storage=mode) == mode
    for other in (two, cut, explicit):
        for name in (CLIENTS, LEDGER, METRICS, "server.state"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), (other.name, name)


def test_a_fallback_is_found_in_the_first_round_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    run_client = InProcessHost.run_client

    def watched(self: Any, *arguments: Any) -> Any:
        told.append(self.storage)
        return run_client(self, *arguments)

    monkeypatch.setattr(InProcessHost, "run_client", watched)
    run(None, ReadsHead)
    assert told[:3] == [told[0]] * 3
    assert told[0] != Inplace()
    assert told[3:] == [Inplace()] * 6


def test_a_run_goes_on_in_the_mode_that_its_folder_holds(tmp_path: Path) -> None:
    """Whatever "auto" would be; an explicit mode must be that one."""
    kind = LanguageModel
    run(tmp_path, kind, num_rounds=1, storage=Inplace(chained=True))
    assert run(tmp_path, kind, num_rounds=2, resume=True) == Inplace(chained=True)
    with pytest.raises(StateError, match=r"expected clients with storage Inplace\(chained=True"):
        run(tmp_path, kind, resume=True, storage=Inplace())
    (tmp_path / CLIENTS).write_text('{"storage": "Outside()", "batch_size": 2}')
    with pytest.raises(RunFolderError, match="storage mode in"):
        run(tmp_path, kind, resume=True)
    (tmp_path / CLIENTS).unlink()  # begun before folders kept it, in place
    assert run(tmp_path, kind, resume=True) == Inplace()


def test_a_run_that_stopped_before_its_first_round_may_still_fall(tmp_path: Path) -> None:
    assert run(tmp_path, ReadsHead, num_rounds=0) == IN_FP32
    assert run(tmp_path, ReadsHead, resume=True) == Inplace()
    assert json.loads((tmp_path / CLIENTS).read_text())["storage"] == repr(Inplace())


def test_settings_without_and_with_a_mode() -> None:
    assert RunSettings.of({}, num_clients=16).federation.storage == "auto"
    assert RunSettings.of({}, num_clients=16).values()["storage"] == "auto"
    settings = RunSettings.of({"storage": "inplace"}, num_clients=16)
    assert settings.federation.storage == Inplace()
    assert settings.values()["storage"] == "inplace"
