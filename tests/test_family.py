"""The noise's family through a federation: model, steps, messages, state and ledger are of one family."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.federation import CONFIG, Batch, Row, make_model, make_task
from support.federation import loss as loss_in_fp64
from support.messages import make_broadcast, patched
from torch import nn

import fedkseed_kernels
from fedkseed import (
    Broadcast,
    Client,
    FedKSeedSGD,
    Ledger,
    LedgerError,
    MessageError,
    ModelIdentity,
    SeedPool,
    ServerConfig,
    Simulation,
    SimulationConfig,
    StateError,
    Task,
    WorkingCopy,
    load,
)
from fedkseed.scenarios.settings import RunSettings, values_of_file
from fedkseed.simulation.run_folder import LEDGER, METRICS

POOL = SeedPool(8, 64)
COEFFICIENTS = np.random.default_rng(1).normal(scale=0.01, size=64).astype(np.float32)


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return ((model(batch[0].to(dtype)).double() - batch[1]) ** 2).mean()


def task_in(dtype: torch.dtype) -> Task[Row, Batch]:
    return dataclasses.replace(make_task(), model=make_model().to(dtype), loss=loss, evaluate=None)


def config(**changes: Any) -> SimulationConfig:
    return SimulationConfig(**{**CONFIG, "family": "rademacher", **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_federation_of_signs_and_its_ledger(dtype: torch.dtype, tmp_path: Path) -> None:
    with Simulation(task_in(dtype), config(eps=1e-2), folder=tmp_path) as simulation:
        results = list(simulation.rounds())
        broadcast = Broadcast.from_bytes(simulation.server.broadcast(simulation.server.clients[0]))
    assert results[-1].train_loss is not None
    assert results[0].train_loss is not None
    assert results[-1].train_loss < results[0].train_loss
    assert broadcast.family == "rademacher"
    ledger = Ledger.load(tmp_path / LEDGER)
    assert ledger.family == "rademacher"
    tuned = load(ledger, make_model().to(dtype))
    assert ModelIdentity.of(tuned).content == ModelIdentity.of(simulation.working.model).content
    # The family is not a name alone: gaussian noise gives another model.
    other = load(dataclasses.replace(ledger, family="gaussian"), make_model().to(dtype))
    assert ModelIdentity.of(other).content != ModelIdentity.of(tuned).content


def test_messages_and_files_have_the_size_of_the_other_family(tmp_path: Path) -> None:
    sizes = []
    for family in ("gaussian", "rademacher"):
        folder = tmp_path / family
        with Simulation(make_task(), config(family=family), folder=folder) as simulation:
            result = next(simulation.rounds())
        state = (folder / "server.state").stat().st_size
        sizes.append((result.bytes_down, result.bytes_up, state))
    assert sizes[0] == sizes[1]


def test_a_resumed_run_is_the_run_and_one_of_another_family_is_refused(tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    with Simulation(make_task(), config(sampling="pro"), folder=straight) as simulation:
        list(simulation.rounds())
    with Simulation(make_task(), config(sampling="pro"), folder=cut) as simulation:
        next(simulation.rounds())
    with pytest.raises(StateError, match="a run with family gaussian, got one with rademacher"):
        Simulation(make_task(), config(sampling="pro", family="gaussian"), folder=cut, resume=True)
    with Simulation(make_task(), config(sampling="pro"), folder=cut, resume=True) as simulation:
        assert len(list(simulation.rounds())) == 2
    for name in (LEDGER, METRICS, "server.state"):
        assert (straight / name).read_bytes() == (cut / name).read_bytes(), name


def client_of(working: WorkingCopy) -> Client[Batch]:
    def batches(round: int, num_steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(round)
        rows = [torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(num_steps)]
        return [(row[:, :2], row[:, 2:]) for row in rows]

    return Client(3, working, loss=loss_in_fp64, batches=batches, data_size=1)


def message(family: str) -> bytes:
    fields = {"identity": ModelIdentity.of(make_model()), "base_seed": 8, "coefficients": COEFFICIENTS}
    return make_broadcast(family=family, eps=1e-3, **fields).to_bytes()


def test_a_client_walks_along_the_noise_it_is_told() -> None:
    client = client_of(WorkingCopy(make_model(), round_model="own"))
    replies = {family: client.step(message(family)) for family in ("gaussian", "rademacher")}
    assert replies["gaussian"] != replies["rademacher"]
    walked = [parameter.detach().clone() for parameter in client.working.model.parameters()]
    model = make_model()
    with torch.no_grad():
        fedkseed_kernels.seed_axpy_(list(model.parameters()), POOL.seeds, COEFFICIENTS, family="rademacher")
    optimizer = FedKSeedSGD(model, 0.1, 1e-3, POOL, max_abs_g=8.0, family="rademacher")
    for index, batch in zip((1, 0, 1), client._batches(258, 3), strict=True):
        optimizer.step(lambda batch=batch: loss_in_fp64(model, batch), seed_index=index)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(walked, model.parameters(), strict=True))
    # What the working copy keeps of one family is not taken for the other's.
    assert client.step(message("gaussian")) == replies["gaussian"]


def test_a_client_that_is_asked_for_an_unknown_family_refuses_and_stays() -> None:
    working = WorkingCopy(make_model())
    client = client_of(working)
    with pytest.raises(MessageError, match="noise family below 2, got 2"):
        client.step(patched(message("gaussian"), 8, b"\2"))
    for ours, theirs in zip(make_model().parameters(), working.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="expected family"):
        working.load(POOL, COEFFICIENTS, "hadamard")
    for make in (
        lambda: config(family="hadamard"),
        lambda: ServerConfig(
            num_clients=5, clients_per_round=2, num_local_steps=4, lr=0.1, eps=1e-3, family="hadamard"
        ),
        lambda: RunSettings.of({"family": "hadamard"}, num_clients=16),
    ):
        with pytest.raises(ValueError, match=r"family out of \['gaussian', 'rademacher'\], got 'hadamard'"):
            make()


def test_a_ledger_made_of_an_optimizer_says_its_family() -> None:
    model = make_model()
    optimizer = FedKSeedSGD(model, 0.1, 1e-3, POOL, family="rademacher")
    batch = (torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))
    for _ in range(5):
        optimizer.step(lambda: loss_in_fp64(model, batch))
    ledger = Ledger.of(make_model(), POOL, optimizer.coefficients, family=optimizer.family)
    tuned = load(ledger, make_model())
    for ours, theirs in zip(tuned.parameters(), model.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) < 1e-6
    with pytest.raises(LedgerError, match="family"):
        Ledger.of(make_model(), POOL, optimizer.coefficients, family="hadamard")


def test_the_setting_reaches_the_simulation(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('family = "rademacher"\n')
    settings = RunSettings.of(values_of_file(path), num_clients=16)
    assert settings.federation.family == "rademacher"
    assert settings.federation.server_config(16).family == "rademacher"
    assert RunSettings.of({}, num_clients=16).federation.family == "gaussian"
