"""Storage modes by name, in a client, a simulation with and without workers, and on a command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.federation import CONFIG, Batch, loss, make_model, make_task
from support.messages import make_broadcast
from torch import nn

import fedkseed_kernels
from fedkseed import Client, ModelIdentity, Reply, SeedPool, Simulation, SimulationConfig, WorkingCopy, load
from fedkseed.scenarios.settings import RunSettings, SettingsError, given_values
from fedkseed.simulation.run_folder import LEDGER, METRICS
from fedkseed.storage import STORAGE_MODES, storage_mode

POOL = SeedPool(8, 64)
COEFFICIENTS = np.random.default_rng(1).normal(scale=0.01, size=64).astype(np.float32)
BATCH = (torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))


def client_of(working: WorkingCopy, name: str, **changes: Any) -> Client[Batch]:
    options: dict[str, Any] = {"loss": loss, "batches": lambda round, num_steps: [BATCH] * num_steps}
    return Client(3, working, data_size=1, storage=storage_mode(name), **{**options, **changes})


def message() -> bytes:
    fields = {"identity": ModelIdentity.of(make_model()), "base_seed": 8, "coefficients": COEFFICIENTS}
    return make_broadcast(eps=1e-3, lr=0.01, max_abs_g=100.0, **fields).to_bytes()


@pytest.mark.parametrize("name", STORAGE_MODES)
def test_a_client_walks_the_same_way_in_every_mode(name: str) -> None:
    expected = Reply.from_bytes(client_of(WorkingCopy(make_model()), "inplace").step(message()))
    client = client_of(WorkingCopy(make_model()), name)
    reply = Reply.from_bytes(client.step(message()))
    assert reply.scalars == pytest.approx(expected.scalars, rel=1e-5)
    assert 0 not in reply.scalars
    # Nothing is left of it: the working weights are where the scalars lead, and the next round is this one.
    model = make_model()
    moved = COEFFICIENTS.astype(np.float64)
    for index, g in zip((1, 0, 1), reply.scalars.tolist(), strict=True):
        moved[index] -= 0.01 * g
    with torch.no_grad():
        fedkseed_kernels.seed_axpy_(list(model.parameters()), POOL.seeds, moved)
    for ours, theirs in zip(model.parameters(), client.working.model.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) < 1e-12
    assert client.step(message()) == reply.to_bytes()


@pytest.mark.parametrize("name", STORAGE_MODES)
@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_client_that_fails_leaves_clean_weights(name: str, stop_at: int) -> None:
    working = WorkingCopy(make_model())
    calls = []

    def on_step() -> None:
        calls.append(1)
        if len(calls) == stop_at:
            raise OSError("the line is gone")

    with pytest.raises(OSError, match="gone") as caught:
        client_of(working, name, on_step=on_step).step(message())
    # The next load is not disturbed by the end of the optimizer that failed, which the exception keeps alive.
    working.load(POOL, COEFFICIENTS)
    del caught
    model = WorkingCopy(make_model())
    model.load(POOL, COEFFICIENTS)
    for ours, theirs in zip(model.model.parameters(), working.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", STORAGE_MODES)
def test_a_simulation_in_every_mode_and_its_resume(name: str, tmp_path: Path) -> None:
    config = SimulationConfig(**CONFIG, storage=storage_mode(name))
    plain = SimulationConfig(**CONFIG)
    with Simulation(make_task(), plain) as simulation:
        expected = [result.train_loss for result in simulation.rounds()]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    with Simulation(make_task(), config, folder=straight) as simulation:
        results = list(simulation.rounds())
    assert [result.train_loss for result in results] == pytest.approx(expected, rel=1e-6)
    assert not any(result.failed for result in results)
    with Simulation(make_task(), config, folder=cut) as simulation:
        next(simulation.rounds())
    with Simulation(make_task(), config, folder=cut, resume=True) as simulation:
        list(simulation.rounds())
    for file in (LEDGER, METRICS, "server.state"):
        assert (straight / file).read_bytes() == (cut / file).read_bytes(), file


def loss_in_own_dtype(model: nn.Module, batch: Batch) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return ((model(batch[0].to(dtype)).double() - batch[1]) ** 2).mean()


@pytest.mark.parametrize("name", STORAGE_MODES)
def test_a_simulation_of_16_bit_weights_in_every_mode(name: str) -> None:
    task = dataclasses.replace(
        make_task(), model=make_model().bfloat16(), loss=loss_in_own_dtype, evaluate=None
    )
    config = SimulationConfig(**{**CONFIG, "eps": 1e-2}, storage=storage_mode(name))
    with Simulation(task, config) as simulation:
        losses = [result.train_loss for result in simulation.rounds() if not result.failed]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    tuned = load(simulation.ledger(), make_model().bfloat16())
    assert ModelIdentity.of(tuned).content == ModelIdentity.of(simulation.working.model).content


def test_workers_change_no_bit_of_signs_on_streamed_weights(tmp_path: Path) -> None:
    changes = {"num_rounds": 2, "family": "rademacher", "storage": storage_mode("streamed-fp32")}
    config = SimulationConfig(**{**CONFIG, **changes})
    folders = [tmp_path / str(num_workers) for num_workers in (1, 2)]
    for num_workers, folder in zip((1, 2), folders, strict=True):
        options: dict[str, Any] = {"make_task": make_task, "num_workers": num_workers, "folder": folder}
        with Simulation(make_task(), config, **options) as simulation:
            assert not any(result.failed for result in simulation.rounds())
    for file in (LEDGER, METRICS, "server.state"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


def test_the_setting_reaches_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.toml"
    path.write_text('storage = "chained"\n')
    settings = RunSettings.of(given_values({}, quick=True, toml=path), num_clients=16)
    assert settings.federation.storage == storage_mode("chained")
    assert given_values({"storage": "inplace"}, quick=True, toml=path)["storage"] == "inplace"
    used = []
    original = Client.__init__

    def watched(self: Client[Any], *arguments: Any, **options: Any) -> None:
        used.append(options["storage"])
        original(self, *arguments, **options)

    monkeypatch.setattr(Client, "__init__", watched)
    config = SimulationConfig(**{**CONFIG, "num_rounds": 1}, storage=storage_mode("chained"))
    with Simulation(make_task(), config) as simulation:
        list(simulation.rounds())
    assert used == [storage_mode("chained")] * 2


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"storage mode out of \['auto', 'inplace'.*got 'outside'"):
        storage_mode("outside")
    with pytest.raises(SettingsError, match="storage mode out of"):
        RunSettings.of({"storage": "outside"}, num_clients=16)
