"""A whole federation in one process: the round loop over one server, its clients and one working copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar, get_args

import numpy as np
import torch
from torch import nn

from fedkseed._checks import check_count, check_eps, check_learning_rate
from fedkseed.client import BatchT, Client
from fedkseed.optim import Loss
from fedkseed.seeds import MAX_CLIENTS, MAX_ROUNDS, MAX_SEEDS, MAX_STEPS, SeedPool
from fedkseed.server import Server
from fedkseed.server_config import ServerConfig, Weighting
from fedkseed.working_copy import WorkingCopy

ExampleT = TypeVar("ExampleT")


@dataclass(frozen=True)
class SimulationConfig:
    """One run; every random choice in it derives from ``seed``.

    Attributes:
        num_rounds: rounds to run.
        clients_per_round: clients that take part in each.
        num_local_steps: tau, steps of a client in a round.
        batch_size: rows of a step's batch (all rows of a client that has fewer).
        lr: learning rate of the local steps.
        eps: scale of the perturbation.
        num_seeds: K, size of the seed pool.
        seed: base seed of the pool, the schedules, the client samples and the order of the data; taken mod
            2^64.
        weighting: of the clients' sums, "data_size" or "equal".

    Raises:
        TypeError, ValueError: a field of another type or out of range.
    """

    num_rounds: int
    clients_per_round: int
    num_local_steps: int
    batch_size: int
    lr: float
    eps: float
    num_seeds: int = 4096
    seed: int = 0
    weighting: Weighting = "data_size"

    def __post_init__(self) -> None:
        check_count("num_rounds", self.num_rounds, 0, MAX_ROUNDS - 1)
        check_count("clients_per_round", self.clients_per_round, 1, MAX_CLIENTS)
        check_count("num_local_steps", self.num_local_steps, 1, MAX_STEPS - 1)
        check_count("batch_size", self.batch_size, 1, 2**31)
        check_count("num_seeds", self.num_seeds, 1, MAX_SEEDS)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"expected an integer seed, got {self.seed!r}")
        check_learning_rate(self.lr)
        check_eps(self.eps)
        if self.weighting not in get_args(Weighting):
            raise ValueError(
                f"expected a weighting out of {list(get_args(Weighting))}, got {self.weighting!r}"
            )


@dataclass(frozen=True)
class RoundResult:
    """What one round did and cost.

    Attributes:
        round: number of the round, from 0.
        clients: who took part, ascending.
        train_loss: mean over all local steps of (L+ + L-) / 2, those that were skipped left out; None if all
            were.
        held_out_loss: of the model after the round; None if it was not evaluated.
        bytes_down, bytes_up: of all messages of the round.
        num_skipped: local steps whose loss was NaN or infinite.
        seconds_rebuild: rebuilding the model after the round from w0 and the sums.
        seconds_reset: copying the round's model for each client.
        seconds_local: the local steps.
        seconds_evaluation: the evaluation.
    """

    round: int
    clients: tuple[int, ...]
    train_loss: float | None
    held_out_loss: float | None
    bytes_down: int
    bytes_up: int
    num_skipped: int
    seconds_rebuild: float
    seconds_reset: float
    seconds_local: float
    seconds_evaluation: float


class Simulation(Generic[ExampleT, BatchT]):
    """Server and clients of a federation around one model; only the bytes of their messages pass between
    them.

    Memory: the model, w0, and the round's model from which each client starts.

    Args:
        model: tuned in place; its weights as they stand now are w0.
        datasets: the training rows of each client, at least one each.
        config: the run.
        collate: a batch from some rows.
        loss: of the model on a batch, a number or a tensor of one element.
        data_sizes: of each client, its weight if weighting is "data_size"; its number of rows if None.
        evaluate: the held-out loss of the model, called after each round, without gradients; None to leave it
            out.
        on_step: called after each local step of any client.

    Attributes:
        server, clients, working: the parties, and the model they share.

    Raises:
        ValueError: fewer clients than a round needs, a client without data, or not one data size a client.
    """

    def __init__(
        self,
        model: nn.Module,
        datasets: Sequence[Sequence[ExampleT]],
        config: SimulationConfig,
        *,
        collate: Callable[[Sequence[ExampleT]], BatchT],
        loss: Callable[[nn.Module, BatchT], Loss],
        data_sizes: Sequence[int] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        sizes = [len(rows) for rows in datasets] if data_sizes is None else list(data_sizes)
        if len(sizes) != len(datasets):
            raise ValueError(f"expected one data size for each of {len(datasets)} clients, got {len(sizes)}")
        self.config = config
        self._evaluate = evaluate
        for client, rows in enumerate(datasets):
            if len(rows) == 0:
                raise ValueError(f"expected training rows of every client, got none of client {client}")
        pool = SeedPool(config.seed, config.num_seeds)
        self.working = WorkingCopy(model, keeps_round_model=True)
        self.server = Server(
            self.working.identity,
            pool,
            ServerConfig(
                num_clients=len(datasets),
                clients_per_round=config.clients_per_round,
                num_local_steps=config.num_local_steps,
                lr=config.lr,
                eps=config.eps,
                weighting=config.weighting,
            ),
        )
        self.clients = [
            Client(
                client,
                self.working,
                pool,
                loss=loss,
                batches=_LocalBatches(rows, client, config, collate),
                data_size=size,
                on_step=on_step,
            )
            for client, (rows, size) in enumerate(zip(datasets, sizes, strict=True))
        ]

    def rounds(self) -> Iterator[RoundResult]:
        """Runs the rounds that are left of the config, one at each step of the iterator.

        Whenever it yields, the model's weights are those after the round.
        """
        while self.server.round < self.config.num_rounds:
            yield self._run_round()

    def _run_round(self) -> RoundResult:
        server, working = self.server, self.working
        round, members = server.round, server.clients
        rebuild, reset = working.seconds_rebuild, working.seconds_reset
        messages = {client: server.broadcast(client) for client in members}
        replies = [(client, self.clients[client].step(message)) for client, message in messages.items()]
        runs = [run for client in members if (run := self.clients[client].last_run) is not None]
        server.merge(replies)
        working.load(server.pool, server.wire_coefficients)
        start = perf_counter()
        with torch.no_grad():
            held_out_loss = None if self._evaluate is None else self._evaluate(working.model)
        losses = [loss for run in runs for loss in run.losses if math.isfinite(loss)]
        return RoundResult(
            round=round,
            clients=members,
            train_loss=sum(losses) / len(losses) if losses else None,
            held_out_loss=held_out_loss,
            bytes_down=sum(len(message) for message in messages.values()),
            bytes_up=sum(len(reply) for _, reply in replies),
            num_skipped=sum(run.num_skipped for run in runs),
            seconds_rebuild=working.seconds_rebuild - rebuild,
            seconds_reset=working.seconds_reset - reset,
            seconds_local=sum(run.seconds for run in runs),
            seconds_evaluation=perf_counter() - start,
        )


@dataclass(frozen=True)
class _LocalBatches(Generic[ExampleT, BatchT]):
    """A client's batches of a round: its rows, shuffled by (seed, round, client), pass after pass."""

    rows: Sequence[ExampleT]
    client: int
    config: SimulationConfig
    collate: Callable[[Sequence[ExampleT]], BatchT]

    def __call__(self, round: int, num_steps: int) -> Iterator[BatchT]:
        generator = np.random.default_rng([self.config.seed % 2**64, round, self.client])
        size = min(self.config.batch_size, len(self.rows))
        order: list[int] = []
        for _ in range(num_steps):
            if len(order) < size:
                order = generator.permutation(len(self.rows)).tolist()
            yield self.collate([self.rows[index] for index in order[:size]])
            order = order[size:]
