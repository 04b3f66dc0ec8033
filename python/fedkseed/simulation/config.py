"""The numbers of a federation on one machine: those of its rounds, and what its clients have beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedkseed._checks import check_bound, check_count, check_kind, check_real
from fedkseed.federation.config import RoundConfig, ServerConfig
from fedkseed.seeds import MAX_ROUNDS, MAX_SEEDS
from fedkseed.storage import (
    DEFAULT_STORAGE,
    PAIRED_STORAGE_MODES,
    STORAGE_MODES,
    StorageChoice,
    check_choice,
)


@dataclass(frozen=True)
class SimulationConfig(RoundConfig):
    """One run; every random choice in it derives from ``seed``.

    Two runs of one config on one machine give the same bytes, however many workers they have. The numbers of
    a round are the fields of `RoundConfig`, given by name.

    Attributes:
        num_rounds: rounds to run.
        batch_size: rows of a step's batch (all rows of a client that has fewer).
        num_seeds: K, size of the seed pool.
        seed: base seed of the pool, the schedules, the client samples and the order of the data; taken mod
            2^64.
        num_threads: CPU threads of each worker and of the evaluation; they change the bits of a loss.
        storage: how a step visits both sides of the weights (`fedkseed.storage`); it changes the bits of a
            loss too. "auto": as suits their dtype and device, see `FedKSeedSGD`.
        max_loss_gap: of the clients: a step with |L+ - L-| above it is skipped; 0 for no bound.

    Raises:
        TypeError, ValueError: a field of another type or out of range.
    """

    num_rounds: int
    batch_size: int
    num_seeds: int = 4096
    seed: int = 0
    num_threads: int = 1
    storage: StorageChoice = field(
        default=DEFAULT_STORAGE, metadata={"choices": (*STORAGE_MODES, *PAIRED_STORAGE_MODES)}
    )
    max_loss_gap: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_rounds", self.num_rounds, 0, MAX_ROUNDS - 1)
        check_count("batch_size", self.batch_size, 1, 2**31)
        check_count("num_seeds", self.num_seeds, 1, MAX_SEEDS)
        check_count("num_threads", self.num_threads, 1, 2**15)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"expected an integer seed, got {self.seed!r}")
        check_choice(self.storage)
        gap = check_real("max_loss_gap", self.max_loss_gap)
        object.__setattr__(self, "max_loss_gap", check_bound("max_loss_gap", gap) if gap else gap)

    def server_config(self, num_clients: int) -> ServerConfig:
        """The server's part, for this many registered clients.

        Raises:
            ValueError: fewer clients than a round invites.
        """
        return ServerConfig(num_clients=num_clients, **self.round_numbers())


def check_simulation_config(config: object) -> SimulationConfig:
    """The config, if it is a simulation's.

    Raises:
        TypeError: another's, as a server's, which does not say what clients compute with.
    """
    return check_kind(
        "config",
        config,
        SimulationConfig,
        "one config is for clients and server; Server.of and Server.resume take a ServerConfig",
    )
