"""What a method's rounds cost, by counting: local steps and forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedkseed.scenarios.baselines.settings import FIRST_ORDER
from fedkseed.scenarios.settings import RunSettings
from fedkseed.seeds import SeedPool

#: What `forward_passes` counts, in words, for whoever shows its numbers.
CONVENTION = (
    "forward passes of a batch: a zeroth-order step has 2 a direction; a first-order step counts as 3, its "
    "backward pass as two forward passes"
)
_OF_A_GRADIENT = 3


def local_steps(settings: RunSettings, num_rows: Sequence[int], clients: Iterable[int]) -> int:
    """Steps that these clients make in one round, all together.

    Args:
        settings: of the run.
        num_rows: training rows of every client.
        clients: those that take part.
    """
    config, epochs = settings.federation, settings.baseline.local_epochs
    if not epochs:
        return config.num_local_steps * len(list(clients))
    return sum(epochs * -(-num_rows[client] // config.batch_size) for client in clients)


def steps_left(settings: RunSettings, num_rows: Sequence[int], num_complete: int) -> int:
    """Steps of the rounds that are to come, of all clients."""
    config = settings.federation
    pool = SeedPool(config.seed, config.num_seeds)
    return sum(
        local_steps(settings, num_rows, pool.sample_clients(round, len(num_rows), config.clients_per_round))
        for round in range(num_complete, config.num_rounds)
    )


def forward_passes(
    settings: RunSettings, num_rows: Sequence[int], rounds: Iterable[Mapping[str, Any]]
) -> list[int]:
    """Forward passes of each round, as `CONVENTION` says.

    Args:
        settings: of the run.
        num_rows: training rows of every client.
        rounds: the metrics of each.
    """
    baseline = settings.baseline
    if baseline.method in FIRST_ORDER:
        of_a_step = _OF_A_GRADIENT
    else:
        of_a_step = 2 * (1 if baseline.method == "fedkseed" else baseline.directions)
    return [of_a_step * local_steps(settings, num_rows, row["clients"]) for row in rounds]
