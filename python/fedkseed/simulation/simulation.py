"""A whole federation on one machine: the round loop over one server and the clients it hosts."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Generic

import torch

from fedkseed._checks import check_count
from fedkseed._means import mean
from fedkseed.federation.client import BatchT
from fedkseed.federation.server import Server
from fedkseed.federation.state import StateError, derived_run_id
from fedkseed.ledger.ledger import Ledger
from fedkseed.model.identity import frozen_indices
from fedkseed.model.modes import Modes, buffers_by_name
from fedkseed.model.placement import input_device
from fedkseed.model.threads import threads
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.optim.fedkseed_sgd import FedKSeedSGD
from fedkseed.seeds import SeedPool
from fedkseed.simulation.batches import ExampleT
from fedkseed.simulation.config import SimulationConfig, check_simulation_config
from fedkseed.simulation.devices import worker_devices
from fedkseed.simulation.host import ClientRun, Host, InProcessHost
from fedkseed.simulation.kept_run import KeptRun
from fedkseed.simulation.run_folder import CLIENTS, RunFolder, check_task_settings, kept_storage
from fedkseed.simulation.task import Task
from fedkseed.simulation.worker_pool import DEFAULT_TIMEOUT, SharedWeights, WorkerPool, check_timeout
from fedkseed.storage import (
    Inplace,
    StorageChoice,
    StorageOptions,
    Tentative,
)

logger = logging.getLogger("fedkseed")


class RoundFailedError(RuntimeError):
    """No client of a round came through; the round is not merged, and resuming tries it again."""


@dataclass(frozen=True)
class RoundResult:
    """What one round did and cost.

    Attributes:
        round: number of the round, from 0.
        clients: who took part, ascending.
        failed: those of them that did not reply.
        train_loss: mean over all local steps of (L+ + L-) / 2, those that were skipped left out; None if all
            were.
        evaluation: what the task's ``evaluate`` found after the round; None for values that are not finite.
        bytes_down, bytes_up: of all messages of the round.
        num_skipped: local steps whose loss was NaN or infinite, or whose losses lay too far apart.
        seconds_rebuild: rebuilding the model after the round from w0 and the sums.
        seconds_reset: setting working copies to the round's model, all clients together.
        seconds_local: the local steps, all clients together.
        seconds_evaluation: the evaluation.
        seconds: the whole round, wall-clock time.
    """

    round: int
    clients: tuple[int, ...]
    failed: tuple[int, ...]
    train_loss: float | None
    evaluation: dict[str, float | None]
    bytes_down: int
    bytes_up: int
    num_skipped: int
    seconds_rebuild: float
    seconds_reset: float
    seconds_local: float
    seconds_evaluation: float
    seconds: float

    @property
    def metrics(self) -> dict[str, Any]:
        """What is the same in every run of one config."""
        return {name: value for name, value in self._items() if not name.startswith("seconds")}

    @property
    def timings(self) -> dict[str, Any]:
        """The rest, with the round's number."""
        timed = {name: value for name, value in self._items() if name.startswith("seconds")}
        return {"round": self.round, **timed}

    def _items(self) -> list[tuple[str, Any]]:
        return [(entry.name, getattr(self, entry.name)) for entry in fields(self)]


class Simulation(Generic[ExampleT, BatchT]):
    """Server and clients of a federation around one model; only the bytes of their messages pass between
    them.

    A context manager: leaving it ends the workers and releases the folder.

    Memory: w0, the round's model from which each client starts, and one working copy a process; on GPUs each
    worker has all three, and this process w0 and the model that it evaluates (`memory_plan`).

    Args:
        task: what is trained; its model is tuned in place, on the device where it is; its weights as they
            stand now are w0.
        config: the run.
        make_task: makes the same task in a worker process; needed, and picklable, for more than one worker.
        num_workers: processes that run clients side by side; with 1 it is this process.
        devices: of the workers, of the type of the model's; if None, `worker_devices` of the model's.
        worker_timeout: seconds of silence after which a worker counts as hung and is ended; 0 for no limit.
        folder: keeps server state, ledgers and metrics after each round (`run_folder`); None keeps nothing. A
            `RunFolder` stays the caller's to close.
        resume: go on with the run in the folder instead of starting one; None: as a `RunFolder` says of
            itself, and not in a folder given as a path.
        task_settings: by name, ready for JSON: what the task computes with (model, prompt, a digest of the
            data); kept in the folder, and the same in a run that is resumed.
        notes: of the ledgers, beside their number of rounds.
        on_step: called after each local step of any client.

    Attributes:
        server, working: the server, and the model of this process.
        storage: the clients' storage mode; where the config says "auto", what that has resolved to, which the
            folder keeps. A model that turns out in the first round not to be streamable changes it once.

    Raises:
        DeviceError: more workers than GPUs.
        ValueError: fewer clients than a round needs, workers without ``make_task``, or a folder that holds a
            run already (without ``resume``) or none (with it).
        FolderInUseError, RunFolderError, WorkerError: as they say.
        StateError: the folder's state is damaged, or of another pool or config, the clients' storage mode and
            batch size among it; ``num_rounds`` and ``num_threads`` may change.
        IdentityError: the folder's state is of another model.
    """

    def __init__(
        self,
        task: Task[ExampleT, BatchT],
        config: SimulationConfig,
        *,
        make_task: Callable[[], Task[ExampleT, BatchT]] | None = None,
        num_workers: int = 1,
        devices: Sequence[torch.device] | None = None,
        worker_timeout: float = DEFAULT_TIMEOUT,
        folder: Path | RunFolder | None = None,
        resume: bool | None = None,
        task_settings: Mapping[str, Any] | None = None,
        notes: Mapping[str, str] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        check_simulation_config(config)
        check_count("num_workers", num_workers, 1, 2**15)
        if num_workers > 1 and make_task is None:
            raise ValueError(f"expected make_task for {num_workers} workers, got None")
        if devices is not None and len(devices) != num_workers:
            raise ValueError(f"expected one device for each of {num_workers} workers, got {len(devices)}")
        check_timeout(worker_timeout)
        self.config = config
        self.task = task
        self._on_step = on_step or (lambda: None)
        self._notes = dict(notes or {})
        self._task_settings = dict(task_settings or {})
        check_task_settings(self._task_settings)
        self._folder: RunFolder | None = None
        self._kept: KeptRun | None = None
        self._exit = contextlib.ExitStack()
        try:
            resumes = self._take(folder, resume)
            self._set_up(make_task, num_workers, devices, worker_timeout, resumes)
        except BaseException:
            self._exit.close()
            raise

    def _set_up(
        self,
        make_task: Callable[[], Task[ExampleT, BatchT]] | None,
        num_workers: int,
        devices: Sequence[torch.device] | None,
        timeout: float,
        resume: bool,
    ) -> None:
        task, config = self.task, self.config
        pool = SeedPool(config.seed, config.num_seeds)
        shared: SharedWeights | None = None
        device = input_device(task.model)
        devices = list(devices or worker_devices(device, num_workers))
        if num_workers == 1:
            self.working = WorkingCopy(task.model, round_model="own")
        else:
            shared = SharedWeights.of(task.model, devices)
            # Workers on GPUs rebuild the rounds' models for themselves, and this process its own.
            is_shared = device.type == "cpu"
            self.working = shared.working_copy(task.model, device) if is_shared else WorkingCopy(task.model)
        self._open_server(pool, resume)
        host_options: dict[str, Any] = {"pool": pool, "config": config}
        self._host: Host
        if shared is None:
            self._host = InProcessHost(task, working=self.working, storage=self._choice, **host_options)
        else:
            assert make_task is not None, "checked by the constructor"
            self._host = WorkerPool(
                make_task,
                devices=devices,
                num_threads=config.num_threads,
                shared=shared,
                timeout=timeout,
                storage=self._choice,
                beside=(Modes(task.model), buffers_by_name(task.model)),
                host_options=host_options,
            )
        self._exit.callback(self._host.close)
        with threads(self.config.num_threads):
            self.working.load(pool, self.server.wire_coefficients, config.family)

    def _take(self, folder: Path | RunFolder | None, resume: bool | None) -> bool:
        """Takes the folder, and says whether the run in it goes on."""
        if isinstance(folder, RunFolder):
            self._folder = folder
            return folder.resumes if resume is None else resume
        if folder is not None:
            if resume and not folder.exists():
                raise StateError(f"expected a saved state in {folder}, got none: no such folder")
            self._folder = self._exit.enter_context(RunFolder.take(folder))
        return bool(resume)

    def _open_server(self, pool: SeedPool, resume: bool) -> None:
        server_config = self.config.server_config(len(self.task.datasets))
        identity, folder = self.working.identity, self._folder
        frozen = frozen_indices(self.task.model)
        if resume and folder is not None:
            self.server = Server.resume(
                folder.path, identity, pool, server_config, frozen=frozen, lock=folder.lock
            )
        else:
            run_id = derived_run_id(identity, pool, server_config)
            self.server = Server(identity, pool, replace(server_config, run_id=run_id), frozen=frozen)
        self._exit.callback(self.server.close)
        self._choice = self._resolved(resume)
        if folder is not None:
            settings = self._client_settings, self._task_settings
            self._kept = KeptRun(folder, self.server, *settings, self.ledger, resumes=resume)

    def _resolved(self, resume: bool) -> StorageChoice:
        """What the clients are told, and `storage`: "auto" goes on with what the run in the folder has."""
        config, is_begun = self.config, self.server.round > 0
        if config.storage != "auto":
            self.storage: StorageOptions = config.storage
            return config.storage
        kept = kept_storage(self._folder.path / CLIENTS) if resume and self._folder is not None else None
        if kept is None and is_begun:
            kept = Inplace()  # of the time before folders kept it
        if kept is None:
            with threads(self.config.num_threads):
                self.storage = FedKSeedSGD(
                    self.task.model,
                    lr=config.lr,
                    eps=config.eps,
                    seed_pool=self.server.pool,
                    family=config.family,
                    reduce=False,
                ).storage
        else:
            self.storage = kept
            logger.info(
                'storage="auto" goes on in %r, that of the run in %s',
                kept,
                self._folder and self._folder.path,
            )
        return self.storage if is_begun else Tentative(self.storage)

    def _settle(self, runs: Mapping[int, ClientRun]) -> None:
        """Makes the storage mode of a round that came through that of all to come.

        Each client of the first round found out by itself, so that it does not matter which process ran it.
        """
        if not isinstance(self._choice, Tentative):
            return
        found = [run.local for run in runs.values() if run.local is not None and run.local.refusal]
        if found:
            self.storage = found[0].storage
            logger.warning('storage="auto" falls to %r: %s', self.storage, found[0].refusal)
            self._keep_client_settings()
        self._choice = self._host.storage = self.storage

    @property
    def _client_settings(self) -> dict[str, Any]:
        """What g depends on beside the server's part; ready for JSON."""
        config = self.config
        gap = {"max_loss_gap": config.max_loss_gap} if config.max_loss_gap else {}
        return {"storage": repr(self.storage), "batch_size": config.batch_size, **gap}

    def _keep_client_settings(self) -> None:
        if self._kept is not None:
            self._kept.write_clients(self._client_settings)

    def __enter__(self) -> Simulation[ExampleT, BatchT]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and releases the folder; the model keeps its weights."""
        self._exit.close()

    def ledger(self) -> Ledger:
        """The model after the last round that is complete, as a ledger."""
        return self.server.ledger(self._notes)

    @property
    def num_complete(self) -> int:
        """How many rounds are complete."""
        return self.server.round

    @property
    def past_metrics(self) -> list[dict[str, Any]]:
        """The metrics of all rounds so far, also of those before a resume; empty without a folder."""
        return self._kept.past_metrics() if self._kept is not None else []

    @property
    def best_round(self) -> int | None:
        """The round, from 0, with the lowest held-out loss so far, if the folder holds its ledger."""
        best = self._kept.best if self._kept is not None else None
        return best.round if best is not None and best.is_kept else None

    def rounds(self) -> Iterator[RoundResult]:
        """Runs the rounds that are left of the config, one at each step of the iterator.

        Whenever it yields, the model's weights are those after the round, and the folder holds them.

        Raises:
            RoundFailedError: no client of a round replied.
            WorkerError: a worker process died, or hung.
            LockLostError: the folder's lock file was deleted; the folder stays as after the round before.
            OSError: the folder cannot be written; it stays as after the round before.
        """
        while self.server.round < self.config.num_rounds:
            with threads(self.config.num_threads):
                result = self._run_round()
            yield result

    def _run_round(self) -> RoundResult:
        start = perf_counter()
        server, working = self.server, self.working
        opened = server.open()
        round, members = opened.number, opened.clients
        rebuild, reset = working.seconds_rebuild, working.seconds_reset
        messages = dict(opened.messages)
        runs = self._host.run(messages, self._on_step)
        replies = [(client, run.reply) for client, run in runs.items() if run.reply is not None]
        if not replies:
            reasons = sorted({f"client {client}: {run.error}" for client, run in runs.items()})
            raise RoundFailedError(
                f"expected at least one reply in round {round}, got none of {len(members)} clients "
                f"({reasons[0]}); the round was not merged, resuming tries it again"
            )
        self._settle(runs)
        opened.add_all(replies)
        opened.close()
        with working.exclusive():
            working.load(server.pool, server.wire_coefficients, server.config.family)
            begin = perf_counter()
            evaluation = self.task.scores(round)
            end = perf_counter()
        local = [run.local for run in runs.values() if run.local is not None]
        losses = [loss for seen in local for loss in seen.losses if math.isfinite(loss)]
        result = RoundResult(
            round=round,
            clients=members,
            failed=tuple(client for client in members if runs[client].reply is None),
            train_loss=mean(losses) if losses else None,
            evaluation=evaluation,
            bytes_down=sum(len(message) for message in messages.values()),
            bytes_up=sum(len(reply) for _, reply in replies),
            num_skipped=sum(seen.num_skipped for seen in local),
            seconds_rebuild=working.seconds_rebuild - rebuild,
            seconds_reset=working.seconds_reset - reset + self._seconds_reset_elsewhere(runs),
            seconds_local=sum(seen.seconds for seen in local),
            seconds_evaluation=end - begin,
            seconds=end - start,
        )
        if self._kept is not None:
            self._kept.add(result.metrics, result.timings)
        return result

    def _seconds_reset_elsewhere(self, runs: dict[int, ClientRun]) -> float:
        """What the workers' own working copies took; the host in this process shares ours."""
        if isinstance(self._host, InProcessHost):
            return 0.0
        return sum(run.seconds_reset for run in runs.values())
