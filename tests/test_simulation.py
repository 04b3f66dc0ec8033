"""The round loop: repeatable, indifferent to what it hosts, and equal to its parts used by hand."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import federation
from support.federation import CONFIG, Batch, Row, collate, loss, make_datasets, make_model, make_task

from fedkseed import (
    Client,
    IdentityError,
    Inplace,
    Ledger,
    Reply,
    RoundResult,
    SeedPool,
    Simulation,
    SimulationConfig,
    Streamed,
)
from fedkseed.federation.messages import BROADCAST_OVERHEAD, REPLY_OVERHEAD
from fedkseed.federation.state import StateError
from fedkseed.files import FolderInUseError
from fedkseed.simulation.batches import LocalBatches
from fedkseed.simulation.best_ledger import OLDER_BEST
from fedkseed.simulation.run_folder import BEST, CLIENTS, LEDGER, METRICS, TIMINGS, RunFolderError
from fedkseed.simulation.simulation import RoundFailedError
from fedkseed.simulation.task import Task
from fedkseed.simulation.worker_pool import WorkerError


def make_simulation(task: Task[Row, Batch] | None = None, **changes: Any) -> Simulation[Row, Batch]:
    return Simulation(task or make_task(), SimulationConfig(**{**CONFIG, **changes}))


def held_out(model: torch.nn.Module) -> float:
    return federation.evaluate(model, 0)["held_out_loss"]


def outcome(simulation: Simulation[Row, Batch]) -> tuple[Any, ...]:
    """All that must repeat: everything but the timings."""
    results = tuple(tuple(result.metrics.items()) for result in simulation.rounds())
    weights = [parameter.detach().numpy().tobytes() for parameter in simulation.working.model.parameters()]
    return (str(results), simulation.server.coefficients.tobytes(), tuple(weights))


def hosted_client(simulation: Simulation[Row, Batch], client: int) -> Client[Batch]:
    """The client as the simulation's host makes it."""
    config = simulation.config
    rows = make_datasets()[client]
    return Client(
        client,
        simulation.working,
        simulation.server.pool,
        loss=loss,
        batches=LocalBatches(rows, client, config.seed, config.batch_size, collate),
        data_size=len(rows),
    )


def test_it_tunes_and_reports() -> None:
    simulation = make_simulation(num_rounds=40)
    first = held_out(simulation.working.model)
    results = list(simulation.rounds())
    assert [result.round for result in results] == list(range(40))
    last = results[-1]
    loss_after = last.evaluation["held_out_loss"]
    assert loss_after is not None
    assert loss_after < 0.3 * first
    assert results[-1].train_loss < 0.5 * results[0].train_loss
    assert loss_after == held_out(simulation.working.model)
    assert last.bytes_down == 2 * (BROADCAST_OVERHEAD + 4 * 64 + 2 * 4)
    assert last.bytes_up == 2 * (REPLY_OVERHEAD + 4 * 4)
    assert last.num_skipped == 0
    seconds = (last.seconds_rebuild, last.seconds_reset, last.seconds_local, last.seconds_evaluation)
    assert all(value > 0 for value in seconds)
    assert list(simulation.rounds()) == []


def test_one_seed_repeats_every_bit_and_another_does_not() -> None:
    expected = outcome(make_simulation())
    torch.manual_seed(99)
    np.random.seed(99)
    assert outcome(make_simulation()) == expected
    assert outcome(make_simulation(seed=9))[1] != expected[1]
    assert outcome(make_simulation(seed=8 + 2**64)) == expected


def test_the_model_is_w0_and_the_coefficients_at_every_yield() -> None:
    simulation = make_simulation()
    for _ in simulation.rounds():
        other = make_simulation()
        other.working.load(simulation.server.pool, simulation.server.wire_coefficients)
        for ours, theirs in zip(
            simulation.working.model.parameters(), other.working.model.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_it_equals_the_parts_used_by_hand() -> None:
    expected = outcome(make_simulation())
    parts = make_simulation()
    for _ in range(3):
        server = parts.server
        messages = [(client, server.broadcast(client)) for client in reversed(server.clients)]
        server.merge([(client, hosted_client(parts, client).step(message)) for client, message in messages])
    assert parts.server.coefficients.tobytes() == expected[1]


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bound_of_the_loss_gap_skips_steps_wherever_the_clients_run(num_workers: int) -> None:
    workers = {"make_task": make_task, "num_workers": num_workers}
    with make_simulation() as simulation:
        free = list(simulation.rounds())
    with Simulation(make_task(), SimulationConfig(**CONFIG, max_loss_gap=5e-3), **workers) as simulation:
        bounded = list(simulation.rounds())
    assert sum(result.num_skipped for result in free) == 0
    assert 0 < bounded[0].num_skipped < 8, "else the bound shows nothing"
    # No message says it, so none has another length.
    assert [result.bytes_down for result in free] == [result.bytes_down for result in bounded]


def test_a_bound_of_the_loss_gap_is_kept_for_the_run_s_resumption(tmp_path: Path) -> None:
    def simulate(folder: str, num_rounds: int, **changes: Any) -> None:
        config = SimulationConfig(**{**CONFIG, "num_rounds": num_rounds, **changes})
        with Simulation(make_task(), config, folder=tmp_path / folder, resume=num_rounds > 1) as run:
            list(run.rounds())

    simulate("free", 1)
    assert "max_loss_gap" not in (tmp_path / "free" / CLIENTS).read_text("utf-8")
    with pytest.raises(StateError, match=r"clients with max_loss_gap 0\.0, .*got 0\.001"):
        simulate("free", 2, max_loss_gap=1e-3)
    simulate("bounded", 1, max_loss_gap=1e-3)
    with pytest.raises(StateError, match=r"clients with max_loss_gap 0\.001, .*got 0\.0"):
        simulate("bounded", 2)
    simulate("bounded", 2, max_loss_gap=1e-3)
    for wrong in (-1.0, math.inf, math.nan, 1e-39):
        with pytest.raises(ValueError, match="finite max_loss_gap"):
            SimulationConfig(**CONFIG, max_loss_gap=wrong)


def test_weights_follow_the_number_of_rows() -> None:
    simulation = make_simulation(num_rounds=1, clients_per_round=5)
    replies = {}
    for client in simulation.server.clients:
        reply = hosted_client(simulation, client).step(simulation.server.broadcast(client))
        replies[client] = Reply.from_bytes(reply)
    assert [reply.data_size for reply in replies.values()] == [5, 8, 2, 13, 7]
    list(simulation.rounds())
    expected = np.zeros(64)
    for client, reply in replies.items():
        schedule = SeedPool(8, 64).schedule(0, client, 4)
        np.add.at(expected, schedule, -0.02 * reply.data_size / 35 * reply.scalars.astype(np.float64))
    assert np.abs(simulation.server.coefficients - expected).max() < 1e-15 * np.abs(expected).max()


def test_given_data_sizes_take_the_place_of_the_number_of_rows() -> None:
    config = SimulationConfig(**{**CONFIG, "num_rounds": 1, "clients_per_round": 5})
    sums = []
    for data_sizes in (None, [5, 8, 2, 13, 7], [1, 1, 1, 1, 1], [50, 80, 20, 130, 70]):
        simulation = Simulation(Task(make_model(), make_datasets(), collate, loss, data_sizes), config)
        list(simulation.rounds())
        sums.append(simulation.server.coefficients)
    assert np.array_equal(sums[0], sums[1])
    assert np.array_equal(sums[0], sums[3])
    assert not np.array_equal(sums[0], sums[2])
    equal = make_simulation(num_rounds=1, clients_per_round=5, weighting="equal")
    list(equal.rounds())
    assert np.array_equal(sums[2], equal.server.coefficients)
    with pytest.raises(ValueError, match="one data size for each of 5 clients, got 4"):
        Task(make_model(), make_datasets(), collate, loss, [1] * 4)


def test_batches_cover_the_rows_before_any_comes_again() -> None:
    seen: list[list[Row]] = []

    def keep(rows: Sequence[Row]) -> Batch:
        seen.append(list(rows))
        return collate(rows)

    datasets = make_datasets()[3:4]
    config = SimulationConfig(**{**CONFIG, "clients_per_round": 1, "num_rounds": 2, "batch_size": 4})
    simulation = Simulation(Task(make_model(), datasets, keep, loss), config)
    results = list(simulation.rounds())
    assert [len(rows) for rows in seen] == [4] * 8
    for first in (0, 4):
        assert len({row for rows in seen[first : first + 3] for row in rows}) == 12
    assert seen[:4] != seen[4:]
    assert results[0].evaluation == {}


def test_the_order_of_the_rows_derives_from_the_seed() -> None:
    orders = []
    for seed in (8, 8 + 2**64, 9):
        seen: list[Row] = []

        def keep(rows: Sequence[Row], seen: list[Row] = seen) -> Batch:
            seen.extend(rows)
            return collate(rows)

        config = SimulationConfig(**{**CONFIG, "clients_per_round": 1, "num_rounds": 1, "seed": seed})
        list(Simulation(Task(make_model(), make_datasets()[3:4], keep, loss), config).rounds())
        orders.append(seen)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_a_client_with_fewer_rows_than_a_batch_uses_all_of_them() -> None:
    sizes = []

    def keep(rows: Sequence[Row]) -> Batch:
        sizes.append(len(set(rows)))
        return collate(rows)

    config = SimulationConfig(**{**CONFIG, "clients_per_round": 1, "num_rounds": 1})
    list(Simulation(Task(make_model(), make_datasets()[2:3], keep, loss), config).rounds())
    assert sizes == [2] * 4


def test_steps_that_are_not_finite_are_counted_and_left_out_of_the_mean() -> None:
    values = iter([1.0, 3.0, math.nan, 1.0] * 4)
    config = SimulationConfig(**{**CONFIG, "num_rounds": 1})
    task = Task(make_model(), make_datasets(), collate, lambda model, batch: next(values))
    simulation = Simulation(task, config)
    (result,) = simulation.rounds()
    assert isinstance(result, RoundResult)
    assert result.num_skipped == 4
    assert result.train_loss == 2.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_rounds": -1}, ValueError, "num_rounds"),
        ({"clients_per_round": 0}, ValueError, "clients_per_round"),
        ({"clients_per_round": 6}, ValueError, r"clients_per_round in \[1, 5\], got 6"),
        ({"num_local_steps": 0}, ValueError, "num_local_steps"),
        ({"num_local_steps": 1.5}, TypeError, "integer num_local_steps, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"eps": 0}, ValueError, "eps"),
        ({"num_seeds": 65537}, ValueError, "num_seeds"),
        ({"seed": 0.5}, TypeError, "integer seed, got 0.5"),
        ({"weighting": "none"}, ValueError, "weighting out of"),
        ({"sampling": "none"}, ValueError, "sampling out of"),
        ({"num_threads": 0}, ValueError, "num_threads"),
    ],
)
def test_bad_configs_fail_at_construction(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_simulation(**changes)


def test_a_client_without_data_is_named() -> None:
    datasets = make_datasets()
    datasets[3] = []
    with pytest.raises(ValueError, match="got none of client 3"):
        Task(make_model(), datasets, collate, loss)


def test_the_config_decides_the_threads_and_leaves_torch_as_it_was() -> None:
    seen = []

    def look(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return loss(model, batch)

    before = torch.get_num_threads()
    task = dataclasses.replace(make_task(), loss=look)
    list(make_simulation(task, num_rounds=1, num_threads=before + 1).rounds())
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def failing_for(*clients: int) -> Task[Row, Batch]:
    """A task whose loss raises on the rows of some clients."""
    bad = {row for client in clients for row in make_datasets()[client]}

    def keep(rows: Sequence[Row]) -> Batch:
        if set(rows) & bad:
            raise OSError("disk on fire")
        return collate(rows)

    return dataclasses.replace(make_task(), collate=keep)


def test_a_client_that_fails_is_left_out_and_named() -> None:
    (result,) = make_simulation(failing_for(3), num_rounds=1, clients_per_round=5).rounds()
    assert result.failed == (3,)
    assert result.clients == (0, 1, 2, 3, 4)
    without = make_simulation(num_rounds=1, clients_per_round=5)
    server = without.server
    server.merge(
        [(client, hosted_client(without, client).step(server.broadcast(client))) for client in (0, 1, 2, 4)]
    )
    again = make_simulation(failing_for(3), num_rounds=1, clients_per_round=5)
    list(again.rounds())
    assert np.array_equal(again.server.coefficients, server.coefficients)


def test_a_round_in_which_all_clients_fail_changes_nothing(tmp_path: Path) -> None:
    config = SimulationConfig(**CONFIG)
    with (
        Simulation(failing_for(*range(5)), config, folder=tmp_path) as simulation,
        pytest.raises(RoundFailedError, match="none of 2 clients.*disk on fire"),
    ):
        list(simulation.rounds())
    assert not (tmp_path / METRICS).exists()
    with Simulation(make_task(), config, folder=tmp_path, resume=True) as resumed:
        assert resumed.server.round == 0
        found = outcome(resumed)
    assert found == outcome(make_simulation())


def test_a_folder_keeps_state_ledger_metrics_and_timings(tmp_path: Path) -> None:
    with Simulation(make_task(), SimulationConfig(**CONFIG), folder=tmp_path) as simulation:
        results = list(simulation.rounds())
        assert simulation.past_metrics == [
            {**result.metrics, "clients": result.clients} for result in results
        ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == sorted(
        [BEST, OLDER_BEST, CLIENTS, LEDGER, METRICS, TIMINGS, "server.state", "server.state.1"]
    )
    model = make_model()
    ledger = Ledger.load(tmp_path / LEDGER)
    ledger.apply_(model)
    for ours, theirs in zip(model.parameters(), simulation.working.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert ledger.notes["num_rounds"] == "3"


@pytest.mark.slow
def test_workers_change_no_bit(tmp_path: Path) -> None:
    config = SimulationConfig(**{**CONFIG, "clients_per_round": 4, "sampling": "pro"})
    steps = []
    folders = [tmp_path / str(num_workers) for num_workers in (1, 2)]
    for num_workers, folder in zip((1, 2), folders, strict=True):
        options: dict[str, Any] = {"make_task": make_task, "num_workers": num_workers, "folder": folder}
        with Simulation(make_task(), config, on_step=lambda: steps.append(None), **options) as simulation:
            results = list(simulation.rounds())
        assert all(result.seconds_reset > 0 for result in results)
    assert len(steps) == 2 * 3 * 4 * 4
    for name in (LEDGER, METRICS, "server.state"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def dying_task() -> Task[Row, Batch]:
    """A task whose loss kills its process."""

    def die(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch)

    return dataclasses.replace(make_task(), loss=die)


def broken_task() -> Task[Row, Batch]:
    raise OSError("no data here")


def test_a_worker_that_dies_or_cannot_start_is_an_error_that_says_so() -> None:
    config = SimulationConfig(**CONFIG)
    with (
        Simulation(make_task(), config, make_task=dying_task, num_workers=2) as simulation,
        pytest.raises(WorkerError, match=r"fedkseed-worker-\d to live.*exit status -9"),
    ):
        list(simulation.rounds())
    assert simulation.server.round == 0
    with pytest.raises(WorkerError, match="OSError: no data here"):
        Simulation(make_task(), config, make_task=broken_task, num_workers=2)
    with pytest.raises(ValueError, match="expected make_task for 2 workers"):
        Simulation(make_task(), config, num_workers=2)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    config = SimulationConfig(**CONFIG)
    with Simulation(make_task(), config, folder=tmp_path) as simulation:
        next(simulation.rounds())
        with pytest.raises(FolderInUseError):
            Simulation(make_task(), config, folder=tmp_path, resume=True)
    before = (tmp_path / "server.state").read_bytes()
    with pytest.raises(StateError, match="without a saved state"):
        Simulation(make_task(), config, folder=tmp_path)
    with pytest.raises(StateError, match="lr"):
        Simulation(make_task(), SimulationConfig(**{**CONFIG, "lr": 1.0}), folder=tmp_path, resume=True)
    other = make_task()
    with torch.no_grad():
        other.model[0].weight[0, 0] += 1
    with pytest.raises(IdentityError, match="content"):
        Simulation(other, config, folder=tmp_path, resume=True)
    assert (tmp_path / "server.state").read_bytes() == before
    with pytest.raises(StateError, match="got none"):
        Simulation(make_task(), config, folder=tmp_path / "empty", resume=True)
    (tmp_path / METRICS).write_text("{}\n")
    with pytest.raises(RunFolderError, match="a line a round"):
        Simulation(make_task(), config, folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"storage": Streamed(compensated=True)},
            r"with storage Inplace\(chained=False, .*, got Streamed\(paired=False, compensated=True",
        ),
        ({"storage": Inplace(chained=True)}, r"storage Inplace\(chained=False.*got Inplace\(chained=True"),
        ({"batch_size": 2}, "with batch_size 3, .*, got 2"),
    ],
)
def test_a_resume_with_other_clients_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Their g would be others than those of the run that is resumed."""
    with Simulation(make_task(), SimulationConfig(**CONFIG), folder=tmp_path) as simulation:
        next(simulation.rounds())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StateError, match=message):
        Simulation(make_task(), SimulationConfig(**{**CONFIG, **changes}), folder=tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    more = SimulationConfig(**{**CONFIG, "num_rounds": 4, "num_threads": 2})
    with Simulation(make_task(), more, folder=tmp_path, resume=True) as simulation:
        assert len(list(simulation.rounds())) == 3


def test_a_folder_from_before_the_clients_settings_were_kept(tmp_path: Path) -> None:
    config = SimulationConfig(**CONFIG, storage=Streamed())
    with Simulation(make_task(), config, folder=tmp_path) as simulation:
        next(simulation.rounds())
    (tmp_path / CLIENTS).unlink()
    with Simulation(make_task(), config, folder=tmp_path, resume=True):
        pass
    with pytest.raises(StateError, match="storage"):
        explicit = SimulationConfig(**CONFIG, storage=Inplace())
        Simulation(make_task(), explicit, folder=tmp_path, resume=True)
    for damaged in ("{", "[]", '{"storage": "Inplace()"}'):
        (tmp_path / CLIENTS).write_text(damaged)
        with pytest.raises(RunFolderError, match=CLIENTS):
            Simulation(make_task(), config, folder=tmp_path, resume=True)
