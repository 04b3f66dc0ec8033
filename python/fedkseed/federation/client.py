"""A client: bytes in, local steps, bytes out. Its data, weights and losses stay where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedkseed._checks import check_bound, check_count, check_kind, check_seed
from fedkseed._means import mean
from fedkseed.federation.evaluation_messages import EvaluationReply
from fedkseed.federation.limits import ClientLimits
from fedkseed.federation.messages import (
    Broadcast,
    MessageBytes,
    MessageError,
    ProtocolError,
    Reply,
    broadcast_as_bytes,
    broadcast_digest,
)
from fedkseed.federation.scoring import Evaluate, scores_of
from fedkseed.model.randomness import seeded
from fedkseed.model.threads import threads
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.optim.evaluation import Losses
from fedkseed.optim.fedkseed_sgd import FedKSeedSGD
from fedkseed.seeds import MAX_CLIENTS, SeedPool
from fedkseed.storage import DEFAULT_STORAGE, StorageChoice, StorageOptions, check_choice

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class LocalRun:
    """What a client saw in its last round; none of it travels.

    Attributes:
        losses: (L+ + L-) / 2 of each step.
        num_skipped: steps whose loss was NaN or infinite, or whose losses lay too far apart.
        seconds: time of the steps, without rebuilding the model.
        storage: the storage mode of the steps; where the client was made with "auto", what that resolved to.
        refusal: why "auto" could not stream the model, one line; None if it could, or nothing asked it to.
    """

    losses: tuple[float, ...]
    num_skipped: int
    seconds: float
    storage: StorageOptions
    refusal: str | None

    def metrics(self) -> dict[str, float]:
        """Numbers by name, for a framework's records; the loss is left out if every step was skipped."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        loss = {"train_loss": mean(finite)} if finite else {}
        counts = {"num_steps": float(len(self.losses)), "num_skipped": float(self.num_skipped)}
        return {**loss, **counts, "seconds": self.seconds}


class Client(Generic[BatchT]):
    """Rebuilds the round's model from w0 and coefficients, runs the schedule it is sent, returns scalars.

    Between rounds it keeps nothing but the storage mode that "auto" resolved to: the working copy may be
    shared with other clients of the same machine, in other threads too, where one waits for the other
    (`WorkingCopy.exclusive`).

    Args:
        client: its number at the server; None: it answers as whoever is addressed.
        working: the model that the local steps tune.
        pool: the candidate seeds; if None, those of each broadcast.
        loss: of a model on a batch, a number or a tensor of one element. With a paired storage mode
            (``Streamed(paired=True)``) it runs the batch twice in one forward pass and returns both losses,
            (plus, minus), as `fedkseed.paired_losses` does.
        batches: the batches of a round, one for each local step, from (round, number of steps); what comes
            after them is not asked for, so they may be endless.
        data_size: of the training data, in rows or whatever all clients count: the weight of the reply.
        run_id: 16 bytes; if given, broadcasts of another run are refused.
        on_step: called after each local step.
        storage: how both sides of the weights are visited; what the server sees of it are the roundings in
            g. "auto", which is never paired, is resolved, and said, in the first round, as `FedKSeedSGD`
            does, and stays.
        max_loss_gap: a step with |L+ - L-| above it is skipped; None for no bound. The client's own: no
            message says it, and the server sees a skipped step.
        seed: if given, what a step draws (dropout) is drawn from (seed, round, client), and the generators of
            the process are put back afterwards.
        num_threads: of torch during a step or an evaluation; None: as the process has it. They change the
            bits of a loss.
        limits: what is done at most, whatever a message asks for.
        evaluate: named scores of the model, from (model, round), for evaluation messages; called without
            gradients. Those that are not finite are left out.
        num_examples: behind the scores, their weight in a mean over clients; ``data_size`` if None.

    Attributes:
        last_run: of the last round, None before the first.

    Raises:
        TypeError, ValueError: a number out of range; a client without data has no place in a federation.
    """

    def __init__(
        self,
        client: int | None,
        working: WorkingCopy,
        pool: SeedPool | None = None,
        *,
        loss: Callable[[nn.Module, BatchT], Losses],
        batches: Callable[[int, int], Iterable[BatchT]],
        data_size: int,
        run_id: bytes | None = None,
        on_step: Callable[[], None] | None = None,
        storage: StorageChoice = DEFAULT_STORAGE,
        max_loss_gap: float | None = None,
        seed: int | None = None,
        num_threads: int | None = None,
        limits: ClientLimits | None = None,
        evaluate: Evaluate | None = None,
        num_examples: int | None = None,
    ) -> None:
        self.client = None if client is None else check_count("client", client, 0, MAX_CLIENTS - 1)
        self.data_size = check_count("data_size", data_size, 1, 2**32 - 1)
        self.working = check_kind("working", working, WorkingCopy, "WorkingCopy(model) makes it")
        self.run_id = run_id
        self._pool = pool
        self.last_run: LocalRun | None = None
        self._loss = loss
        self._batches = batches
        self._on_step = on_step
        check_choice(storage)
        self._storage = storage
        self._max_loss_gap = None if max_loss_gap is None else check_bound("max_loss_gap", max_loss_gap)
        self._seed = None if seed is None else check_seed(seed)
        self._num_threads = None if num_threads is None else check_count("num_threads", num_threads, 1, 2**15)
        self._limits = ClientLimits()
        if limits is not None:
            self._limits = check_kind(
                "limits", limits, ClientLimits, "ClientLimits(num_seeds=...) makes them"
            )
        self._evaluate = evaluate
        examples = data_size if num_examples is None else num_examples
        self._num_examples = check_count("num_examples", examples, 1, 2**32 - 1)

    def handle(self, message: MessageBytes) -> bytes:
        """The answer to any message of the server: `step` or `evaluate`, as it asks for.

        Raises:
            MessageError, ProtocolError, IdentityError, TypeError, ValueError: as they do.
        """
        raw = broadcast_as_bytes(message)
        return self.step(raw) if Broadcast.peek(raw).kind == "train" else self.evaluate(raw)

    def step(self, message: MessageBytes) -> bytes:
        """One round: the reply to a broadcast.

        A step whose loss is NaN or infinite, or whose losses lie further apart than ``max_loss_gap``, is
        skipped and travels as g = 0. Nothing has changed when one of the first three errors is raised.

        Raises:
            MessageError: the message is damaged, of another format or contract version, of an unknown noise
                family, or not a broadcast.
            ProtocolError: it is for another client, pool or run, or beyond this client's limits.
            IdentityError: it is for another w0: other structure, dtype or weights.
            ValueError: fewer batches than local steps.
        """
        raw, broadcast, pool = self._read(message, "train")
        with self._at_work(broadcast):
            self.working.load(pool, broadcast.coefficients, broadcast.family)
            scalars = self._walk(broadcast, pool)
        reply = Reply(broadcast.round, broadcast.client, self.data_size, broadcast_digest(raw), scalars)
        return reply.to_bytes()

    def evaluate(self, message: MessageBytes) -> bytes:
        """The scores of a round's model: the answer to an evaluation message.

        Nothing has changed when one of the first three errors is raised. The modules' modes (train, eval) are
        put back afterwards.

        Raises:
            MessageError: the message is damaged, or not an evaluation message, see `step`; or scores that no
                message can carry.
            ProtocolError: it is for another client, pool or run, or this client has nothing to evaluate with.
            IdentityError: it is for another w0.
            TypeError: ``evaluate`` returned no numbers by name.
        """
        raw, broadcast, pool = self._read(message, "evaluate")
        if self._evaluate is None:
            raise ProtocolError(
                f"expected client {broadcast.client} to have an evaluation, got none; make it with one"
            )
        with self._at_work(broadcast):
            self.working.load(pool, broadcast.coefficients, broadcast.family)
            found = scores_of(self._evaluate, self.working.model, broadcast.round)
        finite = {name: value for name, value in found.items() if value is not None}
        digest = broadcast_digest(raw)
        return EvaluationReply(
            broadcast.round, broadcast.client, self._num_examples, digest, finite
        ).to_bytes()

    def load(self, message: MessageBytes) -> None:
        """Sets the working model to that of a message's round, to look at it or to save it.

        Raises:
            MessageError, ProtocolError, IdentityError: as `step`; nothing has changed then.
        """
        _, broadcast, pool = self._read(message, None)
        with self._at_work(broadcast):
            self.working.load(pool, broadcast.coefficients, broadcast.family)

    @contextmanager
    def _at_work(self, broadcast: Broadcast) -> Iterator[None]:
        """The model for this client alone, with its threads and its random numbers."""
        with ExitStack() as stack:
            stack.enter_context(self.working.exclusive())
            if self._num_threads is not None:
                stack.enter_context(threads(self._num_threads))
            if self._seed is not None:
                numbers = (self._seed, broadcast.round, broadcast.client)
                stack.enter_context(seeded(self.working.model, *numbers))
            yield

    def _read(
        self, message: MessageBytes, kind: Literal["train", "evaluate"] | None
    ) -> tuple[bytes, Broadcast, SeedPool]:
        """A message that is meant for this client, and the seeds that it is of."""
        raw = broadcast_as_bytes(message)  # once: a transport may write into its buffer again
        broadcast = Broadcast.from_bytes(raw)
        if kind not in (None, broadcast.kind):
            what = {"train": "a broadcast with local steps", "evaluate": "an evaluation message"}
            raise MessageError(f"expected {what[kind]}, got {what[broadcast.kind]}; handle() takes both")
        self._limits.require(broadcast)
        return raw, broadcast, self._pool_for(broadcast)

    def _walk(self, broadcast: Broadcast, pool: SeedPool) -> NDArray[np.float32]:
        """g of each step of the schedule, from the round's model on."""
        start = perf_counter()
        optimizer = FedKSeedSGD(
            self.working.model,
            lr=broadcast.lr,
            eps=broadcast.eps,
            seed_pool=pool,
            schedule=broadcast.schedule,
            max_abs_g=broadcast.max_abs_g,
            max_loss_gap=self._max_loss_gap,
            family=broadcast.family,
            storage=self._storage,
            reduce=False,  # a client is one rank, whatever process group carries its messages
        )
        resolved = optimizer.storage
        num_steps = len(broadcast.schedule)
        losses = []
        try:
            for batch in islice(self._batches(broadcast.round, num_steps), num_steps):
                losses.append(optimizer.step(lambda batch=batch: self._loss(self.working.model, batch)))  # type: ignore[misc]
                if self._on_step is not None:
                    self._on_step()
        finally:
            optimizer.flush()
            if losses or optimizer.storage != resolved:
                self._storage = optimizer.storage  # for good: the next round tries no other
        if len(losses) != num_steps:
            raise ValueError(f"expected {num_steps} batches, one for each local step, got {len(losses)}")
        seconds = perf_counter() - start
        self.last_run = LocalRun(
            tuple(losses), optimizer.num_skipped, seconds, optimizer.storage, optimizer.storage_refusal
        )
        return np.array([g for _, g in optimizer.history], dtype=np.float32)

    def _pool_for(self, broadcast: Broadcast) -> SeedPool:
        """The seeds of a broadcast that is meant for this client and its model."""
        if self.client not in (None, broadcast.client):
            raise ProtocolError(
                f"expected a broadcast for client {self.client}, got one for {broadcast.client}"
            )
        if self.run_id not in (None, broadcast.run_id):
            raise ProtocolError(
                f"expected a broadcast of run {self.run_id!r}, got one of {broadcast.run_id!r}; "
                "make a client for that run"
            )
        found = (broadcast.base_seed, len(broadcast.coefficients))
        wanted = found if self._pool is None else (self._pool.base_seed, self._pool.num_seeds)
        if found != wanted:
            raise ProtocolError(
                f"expected a broadcast for (base seed, number of seeds) {wanted}, got one for {found}"
            )
        broadcast.identity.require(self.working.identity)
        return SeedPool(*found) if self._pool is None else self._pool


HandlerT = TypeVar("HandlerT")


def check_made_client(made: HandlerT) -> HandlerT:
    """What a ``make_client`` returned, if it answers messages.

    Raises:
        TypeError: it has no ``handle``, as None.
    """
    if not callable(getattr(made, "handle", None)):
        raise TypeError(
            f"expected make_client to return a client, got a {type(made).__name__}; end it with "
            "return task.client(...), or with an object whose handle(message) answers in bytes"
        )
    return made
