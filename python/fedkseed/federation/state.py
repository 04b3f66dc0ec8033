"""A server's state as one file, and the folder that only one server at a time may keep it in."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.config import Sampling, ServerConfig, Weighting
from fedkseed.federation.messages import RUN_ID_BYTES
from fedkseed.federation.significance import DEFAULT_CLIP, DEFAULT_START, SeedSignificance
from fedkseed.files import FileTooLargeError, FolderLock, read_bounded, remove_leftovers, write_atomically
from fedkseed.model.identity import DTYPE_CODES, DTYPES_BY_CODE, ModelIdentity
from fedkseed.seeds import MAX_ROUNDS, MAX_SEEDS, SeedPool
from fedkseed_kernels import CONTRACT_VERSION, FAMILIES

logger = logging.getLogger("fedkseed")

#: Versions of the bytes of a server's state. 2 is that of a run whose clip or start of FedKSeed-Pro is not
#: the default, 3 that of one with a bound (median_clip, share_cap): they say these numbers after the header.
STATE_FORMAT, STATE_FORMAT_PRO, STATE_FORMAT_BOUNDS = 1, 2, 3

_MAGIC = b"FKSS"
_WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
_SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)
#: Magic, format version, contract version, family, dtype, weighting, sampling, K, round, clients, clients per
#: round, tau, base seed, lr, eps, bound of |g|, run id, structure hash, content hash; the sums follow.
_HEADER = struct.Struct("<4sHHBBBBIIIIIQdff16s32s32s")
#: After the header, by format: nothing; clip and start of FedKSeed-Pro; these, median_clip and share_cap.
_EXTRAS = {
    STATE_FORMAT: struct.Struct("<"),
    STATE_FORMAT_PRO: struct.Struct("<dd"),
    STATE_FORMAT_BOUNDS: struct.Struct("<dddd"),
}
_F64_BYTES = 8
_PRO_DEFAULTS = (DEFAULT_CLIP, DEFAULT_START)
_NO_BOUNDS = (0.0, 0.0)
_DIGEST_BYTES = 32
_MAX_BYTES = _HEADER.size + _EXTRAS[STATE_FORMAT_BOUNDS].size + 3 * 8 * MAX_SEEDS + _DIGEST_BYTES
_FP32_MAX = float(np.finfo(np.float32).max)
#: Observations of a seed: as far as fp64 counts, which leaves all rounds room to add to it.
_MAX_COUNT = 2**53


class StateError(ValueError):
    """A file that is not a server's state, or the state of another run than the one configured."""


@dataclass(frozen=True, eq=False)
class ServerState:
    """All that a server needs to go on, and all that a ledger of its model needs.

    Attributes:
        identity: of w0.
        base_seed, num_seeds: of the seed pool.
        config: with its run id.
        round: the round that is open.
        coefficients: fp64 [K].
        significance: None unless the sampling is "pro".
    """

    identity: ModelIdentity
    base_seed: int
    num_seeds: int
    config: ServerConfig
    round: int
    coefficients: NDArray[np.float64]
    significance: SeedSignificance | None

    def to_bytes(self) -> bytes:
        """The file: docs/protocol.md shows every byte."""
        config = self.config
        extras = _extras_of(config)
        version = _format_of(extras)
        header = _HEADER.pack(
            _MAGIC,
            version,
            CONTRACT_VERSION,
            FAMILIES.index(config.family),
            DTYPE_CODES[self.identity.dtype],
            _WEIGHTINGS.index(config.weighting),
            _SAMPLINGS.index(config.sampling),
            self.num_seeds,
            self.round,
            config.num_clients,
            config.clients_per_round,
            config.num_local_steps,
            self.base_seed,
            config.lr,
            config.eps,
            config.max_abs_g,
            config.run_id or b"",
            self.identity.structure,
            self.identity.content,
        )
        header += _EXTRAS[version].pack(*extras[: _EXTRAS[version].size // _F64_BYTES])
        body = header + self.coefficients.astype("<f8").tobytes()
        if self.significance is not None:
            body += self.significance.sums.astype("<f8").tobytes()
            body += self.significance.counts.astype("<i8").tobytes()
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> ServerState:
        """The state that `to_bytes` wrote.

        Raises:
            StateError: truncated, damaged, of another format or contract version, or a field out of range.
        """
        if not _HEADER.size + _DIGEST_BYTES <= len(data) <= _MAX_BYTES:
            raise StateError(
                f"expected {_HEADER.size + _DIGEST_BYTES} to {_MAX_BYTES} bytes, got {len(data)}"
            )
        found, version, contract, family, dtype, weighting, sampling, *rest = _HEADER.unpack_from(data)
        _require(found == _MAGIC, f"a file that begins with {_MAGIC!r}", found)
        _require(version in _EXTRAS, f"format version {', '.join(map(str, _EXTRAS))}", version)
        _require(contract == CONTRACT_VERSION, f"contract version {CONTRACT_VERSION}", contract)
        body = data[:-_DIGEST_BYTES]
        _require(hashlib.sha256(body).digest() == data[-_DIGEST_BYTES:], "the checksum stated", "another one")
        _require(family < len(FAMILIES), f"a noise family below {len(FAMILIES)}", family)
        _require(dtype in DTYPES_BY_CODE, f"a dtype code out of {sorted(DTYPES_BY_CODE)}", dtype)
        _require(weighting < len(_WEIGHTINGS), f"a weighting below {len(_WEIGHTINGS)}", weighting)
        _require(sampling < len(_SAMPLINGS), f"a sampling below {len(_SAMPLINGS)}", sampling)
        start = _HEADER.size + _EXTRAS[version].size
        _require(len(body) >= start, f"at least {start} bytes before the checksum", len(body))
        told = _EXTRAS[version].unpack_from(data, _HEADER.size)
        extras = (*told, *(*_PRO_DEFAULTS, *_NO_BOUNDS)[len(told) :])
        _require(_format_of(extras) == version, f"the numbers that format {version} is for", extras)
        num_seeds, round, clients, invited, steps, base_seed, lr, eps, max_abs_g, run_id = rest[:-2]
        _require(1 <= num_seeds <= MAX_SEEDS, f"a number of seeds in [1, {MAX_SEEDS}]", num_seeds)
        _require(round < MAX_ROUNDS, f"a round below {MAX_ROUNDS}", round)
        try:
            config = ServerConfig(
                num_clients=clients,
                clients_per_round=invited,
                num_local_steps=steps,
                lr=lr,
                eps=eps,
                max_abs_g=max_abs_g,
                weighting=_WEIGHTINGS[weighting],
                sampling=_SAMPLINGS[sampling],
                family=FAMILIES[family],
                run_id=run_id,
                pro_clip=extras[0],
                pro_start=extras[1],
                median_clip=extras[2],
                share_cap=extras[3],
            )
        except ValueError as error:
            raise StateError(f"expected a configuration in range, got one that says: {error}") from error
        identity = ModelIdentity(rest[-2], rest[-1], DTYPES_BY_CODE[dtype])
        arrays = _read_arrays(body, start, num_seeds, config)
        return cls(identity, base_seed, num_seeds, config, round, *arrays)

    def require(self, identity: ModelIdentity, pool: SeedPool, config: ServerConfig) -> None:
        """Raises unless this is a state of that model, pool and configuration.

        More clients may be registered than in the state; a run id of None is any.

        Raises:
            IdentityError: of another model.
            StateError: of another pool or configuration; says in which fields, and what to do.
        """
        self.identity.require(identity)
        wanted = {"base_seed": pool.base_seed, "num_seeds": pool.num_seeds, **vars(config)}
        found = {"base_seed": self.base_seed, "num_seeds": self.num_seeds, **vars(self.config)}
        if config.run_id is None:
            del wanted["run_id"]
        if wanted.pop("num_clients") < self.config.num_clients:
            raise StateError(
                f"expected num_clients of at least {self.config.num_clients}, which are registered in the "
                f"saved run, got {config.num_clients}; clients may be added at a resume, not taken away"
            )
        other = [name for name, value in wanted.items() if found[name] != value]
        if other:
            asked = " and ".join(f"{name} {wanted[name]}" for name in other)
            raise StateError(
                f"expected the state of a run with {asked}, got one with "
                f"{' and '.join(str(found[name]) for name in other)}; " + _advice(other, self.config)
            )


def _advice(other: list[str], saved: ServerConfig) -> str:
    """How to resume, where these fields are not those of the saved run."""
    bounds = (saved.median_clip, saved.share_cap)
    if not set(other) <= {"median_clip", "share_cap"}:
        return "resume with the configuration that the run began with"
    if bounds == _NO_BOUNDS:
        return (
            "the run was saved without bounds: resume with both 0, then server.put_bounds(...) adds them, "
            "as adapters do by themselves"
        )
    return (
        f"resume with the bounds of the run, as numbers of the config or by with_bounds(Bounds{bounds}) of a "
        "server's that has none"
    )


def require_dtype_code(identity: ModelIdentity) -> None:
    """Raises unless messages and states can name the dtype of the weights.

    Raises:
        ValueError: they cannot.
    """
    if identity.dtype not in DTYPE_CODES:
        raise ValueError(f"expected weights with a dtype out of {list(DTYPE_CODES)}, got {identity.dtype}")


def derived_run_id(identity: ModelIdentity, pool: SeedPool, config: ServerConfig) -> bytes:
    """A run id, 16 bytes, that equal runs of one model, pool and configuration share: a hash of them.

    For runs in which nobody sends replies from elsewhere, a simulation: whoever has recorded the replies of
    an equal run could send them again.

    Raises:
        ValueError: as `require_dtype_code`.
    """
    require_dtype_code(identity)
    empty = SeedSignificance.empty(pool.num_seeds, config.pro_clip, config.pro_start)
    state = ServerState(
        identity,
        pool.base_seed,
        pool.num_seeds,
        replace(config, run_id=None),
        0,
        np.zeros(pool.num_seeds),
        empty if config.sampling == "pro" else None,
    )
    return hashlib.sha256(state.to_bytes()).digest()[:RUN_ID_BYTES]


def _extras_of(config: ServerConfig) -> tuple[float, ...]:
    return (config.pro_clip, config.pro_start, config.median_clip, config.share_cap)


def _format_of(extras: tuple[float, ...]) -> int:
    """The oldest format that can say these."""
    if extras[2:] != _NO_BOUNDS:
        return STATE_FORMAT_BOUNDS
    return STATE_FORMAT if extras[:2] == _PRO_DEFAULTS else STATE_FORMAT_PRO


def _read_arrays(
    body: bytes, start: int, num_seeds: int, config: ServerConfig
) -> tuple[NDArray[np.float64], SeedSignificance | None]:
    num_arrays = 3 if config.sampling == "pro" else 1
    _require(
        len(body) == start + 8 * num_arrays * num_seeds,
        f"{num_arrays} arrays of {num_seeds} numbers",
        f"{len(body) - start} bytes",
    )
    size = 8 * num_seeds
    coefficients, *tracked = (
        np.frombuffer(body, dtype, num_seeds, start + size * position)
        for position, dtype in enumerate(("<f8", "<f8", "<i8")[:num_arrays])
    )
    coefficients = coefficients.astype(np.float64)
    _require(bool((np.abs(coefficients) <= _FP32_MAX).all()), "coefficients within fp32", "others")
    if not tracked:
        return coefficients, None
    sums, counts = tracked[0].astype(np.float64), tracked[1].astype(np.int64)
    significance = SeedSignificance(sums, counts, config.pro_clip, config.pro_start)
    in_range = (significance.sums >= 0) & (significance.sums < math.inf)
    in_range &= (significance.counts >= 0) & (significance.counts <= _MAX_COUNT)
    _require(bool(in_range.all()), "finite sums and counts of at least 0 (counts up to 2^53)", "others")
    return coefficients, significance


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise StateError(f"expected {expected}, got {got}")


class StateFolder:
    """A folder with one server's state, locked for this owner until `close` or the end of the process.

    The state before the last one is kept too: `read` takes it when the last one is damaged or gone.

    Args:
        folder: made if it is not there.
        lock: of the folder, held by the caller, who releases it; None: this takes it and releases it.

    Attributes:
        path: of the folder.
        notice: one line that says that `read` had to take the older state, and why; "" if it had not.

    Raises:
        FolderInUseError: another server has it, in this process or in another.
        OSError: it cannot be made or written.
    """

    FILE, OLDER = "server.state", "server.state.1"

    def __init__(self, folder: str | os.PathLike[str], lock: FolderLock | None = None) -> None:
        self.path = Path(folder).resolve()
        self.notice = ""
        self._current: bytes | None = None
        self._exit = ExitStack()
        if lock is not None:
            lock.check()
            self._lock = lock
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._lock = stack.enter_context(FolderLock(self.path))
            remove_leftovers(self.path)
            self._exit = stack.pop_all()

    @classmethod
    def holds_state_at(cls, folder: Path) -> bool:
        """Whether a state was saved in the folder before, the last or the one before it."""
        return (folder / cls.FILE).exists() or (folder / cls.OLDER).exists()

    @property
    def holds_state(self) -> bool:
        """Whether a state was saved here before."""
        return self.holds_state_at(self.path)

    def write(self, state: ServerState) -> None:
        """Replaces the state; after a crash at any instant there is the old one or the new one.

        Raises:
            LockLostError: the folder is not this owner's alone any more; nothing is written.
            OSError: no space, no permission; the old state stays.
        """
        self._lock.check()
        data = state.to_bytes()
        if self._current is not None and data != self._current:
            write_atomically(self.path / self.OLDER, self._current)
        write_atomically(self.path / self.FILE, data)
        self._current = data

    def read(self) -> ServerState:
        """The state saved last, or the one before it if that is damaged or gone: `notice` says so.

        Raises:
            StateError: there is none, or both are damaged or of another format.
            OSError: it cannot be read.
        """
        if not self.holds_state:
            raise StateError(f"expected a saved state in {self.path}, got none; start a new run there")
        try:
            return self._read(self.FILE)
        except StateError as error:
            if self._is_of_another_format():
                raise
            try:
                state = self._read(self.OLDER)
            except (StateError, OSError):
                raise error from None
            self.notice = (
                f"{error}; going on with {self.OLDER}, the state after {state.round} rounds: what came later "
                "is lost"
            )
            logger.warning("%s", self.notice)
            return state

    def close(self) -> None:
        """Ends the ownership, if it was taken here."""
        self._exit.close()

    def _read(self, name: str) -> ServerState:
        path = self.path / name
        try:
            data = read_bounded(path, _MAX_BYTES)
            state = ServerState.from_bytes(data)
        except (StateError, FileTooLargeError, FileNotFoundError) as error:
            raise StateError(f"{path}: {error}") from error
        self._current = data
        return state

    def _is_of_another_format(self) -> bool:
        """Whether the last state is whole, as its checksum says: then an older one is not what is wanted."""
        try:
            data = read_bounded(self.path / self.FILE, _MAX_BYTES)
        except (FileTooLargeError, FileNotFoundError):
            return False
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        return hashlib.sha256(body).digest() == digest
