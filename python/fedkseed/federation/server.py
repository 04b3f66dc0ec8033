"""The server: K sums and a round number. It never holds a client's weights, only seeds and scalars."""

from __future__ import annotations

import dataclasses
import numbers
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedkseed._checks import check_count, check_kind
from fedkseed.federation.bounds import Bounds
from fedkseed.federation.config import ServerConfig, check_server_config
from fedkseed.federation.evaluation_round import EvaluationRound
from fedkseed.federation.merging import merged
from fedkseed.federation.messages import RUN_ID_BYTES, MessageBytes, ProtocolError, Reply
from fedkseed.federation.round import Round
from fedkseed.federation.round_messages import RoundMessages
from fedkseed.federation.significance import SeedSignificance
from fedkseed.federation.state import ServerState, StateError, StateFolder, require_dtype_code
from fedkseed.federation.summary import RoundSummary
from fedkseed.federation.telling import tell
from fedkseed.files import FolderLock
from fedkseed.ledger.ledger import Ledger
from fedkseed.model.identity import ModelIdentity
from fedkseed.model.manifest import ModelParameters
from fedkseed.seeds import MAX_CLIENTS, MAX_ROUNDS, SeedPool

_FP32_MAX = float(np.finfo(np.float32).max)


class Server:
    """Draws who takes part and with which seeds, and merges the scalars that come back.

    The state between rounds is ``round``, ``coefficients`` and, for FedKSeed-Pro, ``significance``: O(K)
    whatever the number of clients. The model of a round is w0 + sum_k c_k z(seed_k) with c the coefficients
    rounded once to fp32, as they travel. While a round is open, the schedules of its clients and its replies
    come on top.

    A round's merge is, in fp64, with replies i in ascending order of client, steps t in order, g_it the
    scalars and j_it the schedule, n_i the data sizes or all 1:

        w_i = n_i / (sum of all n);    b = 0;    b[j_it] += w_i g_it  one after the other;    a <- a - lr b

    with |g| clipped and w capped first where the config asks for it (`fedkseed.federation.bounds`). So the
    order of arrival does not matter, and a reply that is missing leaves its weight to the others. No method
    changes anything when it raises. What is refused, clipped or capped, and a reply that outweighs all others
    are told as warnings of the logger "fedkseed".

    Args:
        identity: of the model w0.
        pool: the candidate seeds; schedules and client samples derive from its base seed too.
        config: the federation's fixed numbers.
        frozen: manifest indices of the parameters that are not tuned (`frozen_indices`), for `ledger`.

    Attributes:
        identity, pool: as given.
        config: as given, with its run id.
        coefficients: fp64 [K], the sums a before they are rounded for the wire.
        significance: what FedKSeed-Pro draws from; None with uniform sampling.
        notice: says that `resume` took an older state and why; "" if it did not.

    Raises:
        TypeError: an argument of another class, as a `fedkseed.SimulationConfig`.
        ValueError: a model whose weights have a dtype that no message can name.
    """

    def __init__(
        self, identity: ModelIdentity, pool: SeedPool, config: ServerConfig, *, frozen: Sequence[int] = ()
    ) -> None:
        _check_kinds(identity, pool, config)
        require_dtype_code(identity)
        self.identity = identity
        self.pool = pool
        self.config = config
        if config.run_id is None:
            self.config = dataclasses.replace(config, run_id=secrets.token_bytes(RUN_ID_BYTES))
        self._frozen = tuple(frozen)
        self.coefficients: NDArray[np.float64] = np.zeros(pool.num_seeds)
        is_pro = config.sampling == "pro"
        empty = SeedSignificance.empty(pool.num_seeds, config.pro_clip, config.pro_start)
        self.significance = empty if is_pro else None
        self.notice = ""
        self._folder: StateFolder | None = None
        self._open = self._round(0)

    @classmethod
    def of(cls, model: nn.Module, pool: SeedPool, config: ServerConfig) -> Server:
        """A server of a model whose weights are w0 as they stand now; the model is not kept.

        Raises:
            TypeError, ValueError: as `ModelIdentity.of` and the constructor.
        """
        check_server_config(config)  # before every byte of the model is read
        known = ModelParameters.of(model)
        return cls(ModelIdentity.of_parameters(known), pool, config, frozen=known.frozen)

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        identity: ModelIdentity,
        pool: SeedPool,
        config: ServerConfig,
        *,
        frozen: Sequence[int] = (),
        lock: FolderLock | None = None,
    ) -> Server:
        """The server whose state was saved in ``folder``, bit for bit; it goes on saving there.

        Replies to broadcasts that were sent before the interruption still count: the open round's messages
        come out the same, unless more clients are registered by now, from which they are drawn. If the state
        saved last is damaged or gone, it is the one before: ``notice``.

        Args:
            config: that of the run, but that more clients may be registered; its run id is the run's if None.
            frozen: as of the constructor.
            lock: of the folder, if the caller holds it; else it is taken as by `save`.

        Raises:
            StateError: no state, a damaged one, or one of another pool or configuration; says in which field.
            IdentityError: the state of another model.
            FolderInUseError: another server has the folder.
            TypeError: an argument of another class, as a `fedkseed.SimulationConfig`.
            OSError: the file cannot be read.
        """
        _check_kinds(identity, pool, config)
        opened = StateFolder(folder, lock)
        try:
            state = opened.read()
            state.require(identity, pool, config)
            resumed = dataclasses.replace(config, run_id=state.config.run_id)
            server = cls(identity, pool, resumed, frozen=frozen)
        except BaseException:
            opened.close()
            raise
        server.notice = opened.notice
        server.coefficients = state.coefficients
        server.significance = state.significance
        server._folder = opened
        server._open_round(state.round)
        return server

    def save(self, folder: str | os.PathLike[str], *, lock: FolderLock | None = None) -> None:
        """Saves the state atomically; between rounds is the time for it. The state before it is kept too.

        The first call takes the folder for this server alone, until `close` or the end of the process.

        Args:
            lock: of the folder, if the caller holds it: then it is not taken, and `close` leaves it.

        Raises:
            FolderInUseError: another server has the folder, or may have: its lock file was deleted.
            StateError: the folder holds the state of a run that this server was not resumed from.
            OSError: no space, no permission; the state saved before stays.
        """
        if self._folder is None or self._folder.path != Path(folder).resolve():
            self._take(folder, lock)
        assert self._folder is not None, "a folder was taken"
        self._folder.write(self._state(self.round))

    def close(self) -> None:
        """Gives the folder of the saved state back; the server itself stays usable."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def round(self) -> int:
        """Number of the round that is open, from 0."""
        return self._open.number

    @property
    def clients(self) -> tuple[int, ...]:
        """Who is invited to the open round, ascending."""
        return self._open.clients

    @property
    def wire_coefficients(self) -> NDArray[np.float32]:
        """The sums rounded once to fp32: the round's model, fp32 [K]."""
        return self.coefficients.astype(np.float32)

    def probabilities(self) -> NDArray[np.float64]:
        """What the open round's schedules are drawn from, fp64 [K]."""
        if self.significance is None:
            return np.full(self.pool.num_seeds, 1.0 / self.pool.num_seeds)
        return self.significance.probabilities()

    def open(self, available: Iterable[int] | None = None) -> Round:
        """The open round as an object: its messages go out, replies come in, `Round.close` merges them.

        Args:
            available: clients that can be reached, from which those of the round are drawn, as many as
                ``clients_per_round`` or all of them; if None, and no others were named for this round before,
                from all that are registered. Naming them begins the round anew: replies that were added to it
                are dropped, and its object before is over.

        Raises:
            ProtocolError: none available, or one that is not registered.
        """
        if available is not None:
            clients = self._drawn(self.round, available, self.config.clients_per_round)
            self._open_round(self.round, clients)
        return self._open

    def put_bounds(self, bounds: Bounds) -> None:
        """Puts both bounds where the config has 0 for them; messages, which do not say them, stay."""
        self.config = self.config.with_bounds(bounds)

    def open_evaluation(
        self, available: Iterable[int] | None = None, num_clients: int | None = None
    ) -> EvaluationRound:
        """An evaluation of the open round's model by clients: messages go out, scores come in.

        Nothing of the server changes by it.

        Args:
            available: clients that can be reached; all that are registered if None.
            num_clients: how many of them are asked, drawn as a round's clients are; all if None.

        Raises:
            ProtocolError: none available, or one that is not registered.
            TypeError, ValueError: ``num_clients`` is no positive number.
        """
        known = self.config.num_clients
        count = check_count("num_clients", known if num_clients is None else num_clients, 1, MAX_CLIENTS)
        if available is None:
            clients = self.pool.sample_clients(self.round, known, min(count, known))
        else:
            clients = self._drawn(self.round, available, count)
        return EvaluationRound(self._sent(self.round, clients, 0, None), self.config.share_cap)

    def schedule(self, client: int) -> NDArray[np.uint16]:
        """The indices into the pool that a client's steps of the open round use, uint16 [tau].

        Raises:
            ProtocolError: the client is not invited to this round.
        """
        return self._open.schedule(client)

    def broadcast(self, client: int) -> bytes:
        """The open round's message to one of its clients; the same bytes at every call.

        Raises:
            ProtocolError: the client is not invited to this round.
        """
        return self._open.message(client)

    def check(self, client: int, message: MessageBytes) -> Reply:
        """The reply of one client, if `merge` would take it: to drop a bad one as it arrives.

        Raises:
            MessageError: the message is damaged, of another format or contract version, or not a reply.
            ProtocolError: a client that is not invited; a reply of another round, client or number of steps,
                or to another broadcast; a scalar that is NaN, infinite or beyond the bound.
        """
        return Reply.from_bytes(self._open.check(client, message))

    def merge(self, replies: Iterable[tuple[int, MessageBytes]]) -> RoundSummary:
        """Adds the replies of the open round, (client, message) in any order, and opens the next round.

        `open`, `Round.add_all` and `Round.close` in one call: either all replies count or nothing changes.
        `check` each one as it arrives, and leave out the bad. Replies that were added to the open round do
        not count.

        Raises:
            MessageError, ProtocolError: as `Round.add_all`, for any of them; no replies (see `skip_round`),
                or sums beyond fp32.
        """
        trial = self._open.anew()
        trial.add_all(replies)
        if not trial.replied:
            raise ProtocolError(
                f"expected at least one reply of round {self.round}, got none; skip_round() goes on without"
            )
        return trial.close()

    def skip_round(self) -> RoundSummary:
        """Opens the next round, with other clients, and leaves the model as it is: no client replied.

        Raises:
            ProtocolError: no further round has a number.
        """
        return self._open.anew().close(min_replies=0)

    def ledger(self, notes: Mapping[str, str] | None = None) -> Ledger:
        """The model after the rounds that are complete, as a ledger; their number is among its notes."""
        return Ledger(
            self.pool.base_seed,
            self.wire_coefficients,
            self.identity,
            frozen=self._frozen,
            notes={**(notes or {}), "num_rounds": str(self.round)},
            family=self.config.family,
        )

    def _open_round(self, number: int, clients: Sequence[int] | None = None) -> None:
        self._open = self._round(number, clients)

    def _round(self, number: int, clients: Sequence[int] | None = None) -> Round:
        if clients is None:
            config = self.config
            clients = self.pool.sample_clients(number, config.num_clients, config.clients_per_round)
        sent = self._sent(number, clients, self.config.num_local_steps, self.significance)
        return Round(sent, self.config, self._is_open, self._close_round)

    def _is_open(self, sent: RoundMessages) -> bool:
        return self._open.messages is sent

    def _sent(
        self, number: int, clients: Sequence[int], num_steps: int, significance: SeedSignificance | None
    ) -> RoundMessages:
        return RoundMessages(
            number,
            clients,
            self.identity,
            self.pool,
            self.config,
            self.wire_coefficients,
            num_steps,
            significance,
        )

    def _drawn(self, number: int, available: Iterable[int], count: int) -> tuple[int, ...]:
        """So many of those available, or all of them: places in their ascending order are drawn."""
        named = list(available)
        registered = range(self.config.num_clients)
        strange = [n for n in named if not isinstance(n, numbers.Integral) or n not in registered]
        if strange or not named:
            raise ProtocolError(
                f"expected available clients out of 0 .. {registered[-1]}, at least one, got "
                f"{repr(strange[0])[:99] if strange else 'none'}"
            )
        found = sorted(set(map(int, named)))
        places = self.pool.sample_clients(number, len(found), min(count, len(found)))
        return tuple(found[place] for place in places)

    def _close_round(self, round: Round) -> RoundSummary:
        """The server's part of `Round.close`."""
        if self.round + 1 == MAX_ROUNDS:
            raise ProtocolError(f"expected at most {MAX_ROUNDS - 1} rounds, got one more")
        found = merged(round, self.pool.num_seeds, self.config, self.significance)
        coefficients = self.coefficients - self.config.lr * found.sums
        if not (np.abs(coefficients) <= _FP32_MAX).all():
            raise ProtocolError("expected sums within fp32, got some beyond it; lr or max_abs_g is too large")
        self.coefficients, self.significance = coefficients, found.significance
        self._open_round(self.round + 1)
        tell(found.summary, self.config)
        return found.summary

    def _state(self, round: int) -> ServerState:
        return ServerState(
            self.identity,
            self.pool.base_seed,
            self.pool.num_seeds,
            self.config,
            round,
            self.coefficients,
            self.significance,
        )

    def _take(self, folder: str | os.PathLike[str], lock: FolderLock | None) -> None:
        opened = StateFolder(folder, lock)
        if opened.holds_state:
            opened.close()
            raise StateError(
                f"expected a folder without a saved state, got {opened.path}; resume that run, or choose "
                "another folder"
            )
        self.close()
        self._folder = opened


def _check_kinds(identity: object, pool: object, config: object) -> None:
    check_kind("identity", identity, ModelIdentity, "ModelIdentity.of(model) makes it, and so does Server.of")
    check_kind("pool", pool, SeedPool, "SeedPool(base_seed, num_seeds) makes it")
    check_server_config(config)


def check_made_server(made: object) -> Server:
    """What a ``make_server`` returned, if it is a server.

    Raises:
        TypeError: it is not, as None.
    """
    return check_kind("what make_server returns", made, Server, "end it with return task.server(config)")
