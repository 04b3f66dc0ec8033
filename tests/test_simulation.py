"""The round loop: repeatable, indifferent to what it hosts, and equal to its parts used by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedkseed import Reply, RoundResult, SeedPool, Simulation, SimulationConfig

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
    return (model(batch[0]) - batch[1]).square().mean()


def evaluate(model: nn.Module) -> float:
    return float(loss(model, collate([row for rows in make_datasets() for row in rows])).detach())


def make_simulation(datasets: Any = None, **changes: Any) -> Simulation[Row, Batch]:
    return Simulation(
        make_model(),
        make_datasets() if datasets is None else datasets,
        SimulationConfig(**{**CONFIG, **changes}),
        collate=collate,
        loss=loss,
        evaluate=evaluate,
    )


def outcome(simulation: Simulation[Row, Batch]) -> tuple[Any, ...]:
    """All that must repeat: everything but the timings."""
    results = tuple(
        (r.round, r.clients, r.train_loss, r.held_out_loss, r.bytes_down, r.bytes_up, r.num_skipped)
        for r in simulation.rounds()
    )
    weights = [parameter.detach().numpy().tobytes() for parameter in simulation.working.model.parameters()]
    return (results, simulation.server.coefficients.tobytes(), tuple(weights))


def test_it_tunes_and_reports() -> None:
    simulation = make_simulation(num_rounds=40)
    first = evaluate(simulation.working.model)
    results = list(simulation.rounds())
    assert [result.round for result in results] == list(range(40))
    last = results[-1]
    assert last.held_out_loss is not None
    assert last.held_out_loss < 0.3 * first
    assert results[-1].train_loss < 0.5 * results[0].train_loss
    assert last.held_out_loss == evaluate(simulation.working.model)
    assert last.bytes_down == 2 * (132 + 4 * 64 + 2 * 4)
    assert last.bytes_up == 2 * (60 + 4 * 4)
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
        server.merge([(client, parts.clients[client].step(message)) for client, message in messages])
    assert parts.server.coefficients.tobytes() == expected[1]


def test_weights_follow_the_number_of_rows() -> None:
    simulation = make_simulation(num_rounds=1, clients_per_round=5)
    replies = {}
    for client in simulation.server.clients:
        reply = simulation.clients[client].step(simulation.server.broadcast(client))
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
        simulation = Simulation(
            make_model(), make_datasets(), config, collate=collate, loss=loss, data_sizes=data_sizes
        )
        list(simulation.rounds())
        sums.append(simulation.server.coefficients)
    assert np.array_equal(sums[0], sums[1])
    assert np.array_equal(sums[0], sums[3])
    assert not np.array_equal(sums[0], sums[2])
    equal = make_simulation(num_rounds=1, clients_per_round=5, weighting="equal")
    list(equal.rounds())
    assert np.array_equal(sums[2], equal.server.coefficients)
    with pytest.raises(ValueError, match="one data size for each of 5 clients, got 4"):
        Simulation(make_model(), make_datasets(), config, collate=collate, loss=loss, data_sizes=[1] * 4)


def test_batches_cover_the_rows_before_any_comes_again() -> None:
    seen: list[list[Row]] = []

    def keep(rows: Sequence[Row]) -> Batch:
        seen.append(list(rows))
        return collate(rows)

    datasets = make_datasets()[3:4]
    config = SimulationConfig(**{**CONFIG, "clients_per_round": 1, "num_rounds": 2, "batch_size": 4})
    simulation = Simulation(make_model(), datasets, config, collate=keep, loss=loss)
    results = list(simulation.rounds())
    assert [len(rows) for rows in seen] == [4] * 8
    for first in (0, 4):
        assert len({row for rows in seen[first : first + 3] for row in rows}) == 12
    assert seen[:4] != seen[4:]
    assert results[0].held_out_loss is None


def test_the_order_of_the_rows_derives_from_the_seed() -> None:
    orders = []
    for seed in (8, 8 + 2**64, 9):
        seen: list[Row] = []

        def keep(rows: Sequence[Row], seen: list[Row] = seen) -> Batch:
            seen.extend(rows)
            return collate(rows)

        config = SimulationConfig(**{**CONFIG, "clients_per_round": 1, "num_rounds": 1, "seed": seed})
        list(Simulation(make_model(), make_datasets()[3:4], config, collate=keep, loss=loss).rounds())
        orders.append(seen)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_a_client_with_fewer_rows_than_a_batch_uses_all_of_them() -> None:
    sizes = []

    def keep(rows: Sequence[Row]) -> Batch:
        sizes.append(len(set(rows)))
        return collate(rows)

    config = SimulationConfig(**{**CONFIG, "clients_per_round": 1, "num_rounds": 1})
    list(Simulation(make_model(), make_datasets()[2:3], config, collate=keep, loss=loss).rounds())
    assert sizes == [2] * 4


def test_steps_that_are_not_finite_are_counted_and_left_out_of_the_mean() -> None:
    values = iter([1.0, 3.0, math.nan, 1.0] * 4)
    config = SimulationConfig(**{**CONFIG, "num_rounds": 1})
    simulation = Simulation(
        make_model(), make_datasets(), config, collate=collate, loss=lambda model, batch: next(values)
    )
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
        make_simulation(datasets)
