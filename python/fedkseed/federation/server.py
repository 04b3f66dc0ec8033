"""The server: K sums and a round number. It never holds a client's weights, only seeds and scalars."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.config import ServerConfig
from fedkseed.federation.messages import RUN_ID_BYTES, ProtocolError, Reply, read_scalars
from fedkseed.federation.round import Round
from fedkseed.federation.significance import SeedSignificance
from fedkseed.federation.state import ServerState, StateError, StateFolder
from fedkseed.files import FolderLock
from fedkseed.model.identity import DTYPE_CODES, ModelIdentity
from fedkseed.seeds import MAX_ROUNDS, SeedPool

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

    So the order of arrival does not matter, and a reply that is missing leaves its weight to the others. No
    method changes anything when it raises.

    Args:
        identity: of the model w0.
        pool: the candidate seeds; schedules and client samples derive from its base seed too.
        config: the federation's fixed numbers.

    Attributes:
        identity, pool: as given.
        config: as given, with its run id.
        coefficients: fp64 [K], the sums a before they are rounded for the wire.
        significance: what FedKSeed-Pro draws from; None with uniform sampling.
        notice: says that `resume` took an older state and why; "" if it did not.

    Raises:
        ValueError: a model whose weights have a dtype that no message can name.
    """

    def __init__(self, identity: ModelIdentity, pool: SeedPool, config: ServerConfig) -> None:
        if identity.dtype not in DTYPE_CODES:
            raise ValueError(
                f"expected weights with a dtype out of {list(DTYPE_CODES)}, got {identity.dtype}"
            )
        self.identity = identity
        self.pool = pool
        self.config = config
        self.coefficients: NDArray[np.float64] = np.zeros(pool.num_seeds)
        is_pro = config.sampling == "pro"
        empty = SeedSignificance.empty(pool.num_seeds, config.pro_clip, config.pro_start)
        self.significance = empty if is_pro else None
        self.notice = ""
        self._folder: StateFolder | None = None
        if config.run_id is None:
            run_id = hashlib.sha256(self._state(0).to_bytes()).digest()[:RUN_ID_BYTES]
            self.config = dataclasses.replace(config, run_id=run_id)
        self._open_round(0)

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        identity: ModelIdentity,
        pool: SeedPool,
        config: ServerConfig,
        *,
        lock: FolderLock | None = None,
    ) -> Server:
        """The server whose state was saved in ``folder``, bit for bit; it goes on saving there.

        Replies to broadcasts that were sent before the interruption still count: the open round's messages
        come out the same. If the state saved last is damaged or gone, it is the one before: ``notice``.

        Args:
            lock: of the folder, if the caller holds it; else it is taken as by `save`.

        Raises:
            StateError: no state, a damaged one, or one of another pool or configuration; says in which field.
            IdentityError: the state of another model.
            FolderInUseError: another server has the folder.
            OSError: the file cannot be read.
        """
        server = cls(identity, pool, config)
        opened = StateFolder(folder, lock)
        try:
            state = opened.read()
            state.require(identity, pool, server.config)
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

    def check(self, client: int, message: bytes) -> Reply:
        """The reply of one client, if `merge` would take it: to drop a bad one as it arrives.

        Raises:
            MessageError: the message is damaged, of another format or contract version, or not a reply.
            ProtocolError: a client that is not invited; a reply of another round, client or number of steps,
                or to another broadcast; a scalar that is NaN, infinite or beyond the bound.
        """
        self._open.read(client, message)
        self._open.check_scalars([client], read_scalars([message]))
        return Reply.from_bytes(message)

    def merge(self, replies: Iterable[tuple[int, bytes]]) -> None:
        """Adds the replies of the open round, (client, message) in any order, and opens the next round.

        Either all replies count or nothing changes: `check` each one as it arrives, and leave out the bad.

        Raises:
            MessageError, ProtocolError: as `check`, for any of them; no replies (see `skip_round`), two of
                one client, or sums beyond fp32.
        """
        given: dict[int, bytes] = {}
        for client, message in replies:
            self._open.row(client)
            if client in given:
                raise ProtocolError(f"expected one reply of client {client}, got two")
            given[client] = message
        if not given:
            raise ProtocolError(
                f"expected at least one reply of round {self.round}, got none; skip_round() goes on without"
            )
        self._check_rounds_left()
        sums, significance = self._open.add(given)
        coefficients = self.coefficients - self.config.lr * sums
        if not (np.abs(coefficients) <= _FP32_MAX).all():
            raise ProtocolError("expected sums within fp32, got some beyond it; lr or max_abs_g is too large")
        self.coefficients, self.significance = coefficients, significance
        self._open_round(self.round + 1)

    def skip_round(self) -> None:
        """Opens the next round, with other clients, and leaves the model as it is: no client replied.

        Raises:
            ProtocolError: no further round has a number.
        """
        self._check_rounds_left()
        self._open_round(self.round + 1)

    def _open_round(self, number: int) -> None:
        self._open = Round(
            number, self.identity, self.pool, self.config, self.wire_coefficients, self.significance
        )

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

    def _check_rounds_left(self) -> None:
        if self.round + 1 == MAX_ROUNDS:
            raise ProtocolError(f"expected at most {MAX_ROUNDS - 1} rounds, got one more")
