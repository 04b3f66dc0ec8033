"""Clients in worker processes: one shared, read-only w0, one working copy and a fixed number of threads each.

What a client replies depends neither on the number of workers nor on which of them runs it: each starts from
the round's model, with the same number of threads.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import multiprocessing

from fedkseed.federation.messages import Broadcast
from fedkseed.model.packed import SharedTensors
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.simulation.host import ClientRun, InProcessHost
from fedkseed.simulation.modes import Modes, set_buffers
from fedkseed.simulation.task import Task
from fedkseed.storage import StorageChoice

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    _Pipe: TypeAlias = "Connection[Any, Any]"

_SECONDS_TO_END = 5.0


class WorkerError(RuntimeError):
    """A worker process could not start or died; the round it worked on is lost, nothing else."""


class WorkerPool:
    """Worker processes that run the clients of a round.

    Each worker makes a task of its own by ``make_task``, which must be picklable (a function at the top level
    of a module, or a functools.partial of one) and give the same rows and functions everywhere. Its model
    becomes the worker's working copy; its tuned weights, buffers and modes are not used.

    Args:
        make_task: makes a worker's task.
        num_workers: processes, at least 1.
        num_threads: CPU threads of each.
        w0, round_model: shared weights; the caller rebuilds the round's model there before `run`.
        storage: how clients visit both sides of the weights.
        beside: modes and buffers of the caller's model.
        host_options: further arguments of each worker's `InProcessHost`.

    Attributes:
        storage: as given; may change between rounds.

    Raises:
        WorkerError: a worker failed to start; says why.
    """

    def __init__(
        self,
        make_task: Callable[[], Task[Any, Any]],
        *,
        num_workers: int,
        num_threads: int,
        w0: SharedTensors,
        round_model: SharedTensors,
        storage: StorageChoice,
        beside: tuple[Modes, dict[str, torch.Tensor]],
        host_options: Mapping[str, Any],
    ) -> None:
        self.storage = storage
        context = multiprocessing.get_context("spawn")
        self._workers: dict[_Pipe, Any] = {}
        try:
            for number in range(num_workers):
                here, there = context.Pipe()
                process = context.Process(
                    target=_work,
                    args=(there, make_task, num_threads, w0, round_model, beside, dict(host_options)),
                    name=f"fedkseed-worker-{number}",
                    daemon=True,
                )
                process.start()
                there.close()
                self._workers[here] = process
            for connection in self._workers:
                self._receive(connection)  # "ready"
        except BaseException:
            self.close()
            raise

    def run(self, messages: Mapping[int, bytes], on_step: Callable[[], None]) -> dict[int, ClientRun]:
        """See `fedkseed.simulation.host.Host.run`.

        Raises:
            WorkerError: a worker died.
        """
        waiting = list(messages.items())[::-1]
        busy: dict[_Pipe, int] = {}
        runs: dict[int, ClientRun] = {}
        for connection in self._workers:
            if waiting:
                busy[connection] = self._send(connection, waiting.pop())
        while busy:
            for connection in cast("list[_Pipe]", wait(list(busy))):
                kind, content = self._receive(connection)
                if kind == "step":
                    on_step()
                    continue
                runs[busy.pop(connection)] = content
                if waiting:
                    busy[connection] = self._send(connection, waiting.pop())
        return {client: runs[client] for client in messages}

    def close(self) -> None:
        """Ends the workers: asked to first, killed if that takes too long."""
        for connection in self._workers:
            connection.close()  # a worker that waits for work sees the end of it and leaves
        for process in self._workers.values():
            process.join(_SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = {}

    def _send(self, connection: _Pipe, job: tuple[int, bytes]) -> int:
        try:
            connection.send((*job, self.storage))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(connection) from None
        return job[0]

    def _receive(self, connection: _Pipe) -> tuple[str, Any]:
        try:
            kind, content = connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died(connection) from None
        if kind == "error":
            raise WorkerError(f"expected a worker to start, got {content}")
        return kind, content

    def _died(self, connection: _Pipe) -> WorkerError:
        process = self._workers[connection]
        process.join(_SECONDS_TO_END)
        return WorkerError(
            f"expected {process.name} to live, got its end with exit status {process.exitcode}; "
            "a negative status is a signal (-9: killed, often out of memory); "
            "use fewer workers, or resume"
        )


def _work(
    connection: _Pipe,
    make_task: Callable[[], Task[Any, Any]],
    num_threads: int,
    w0: SharedTensors,
    round_model: SharedTensors,
    beside: tuple[Modes, dict[str, torch.Tensor]],
    host_options: dict[str, Any],
) -> None:
    """A worker's life: set up, then one client after the other until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(num_threads)
    try:
        task = make_task()
        modes, buffers = beside
        modes.restore(task.model)
        set_buffers(task.model, buffers)
        working = WorkingCopy(task.model, w0=w0.tensors(), round_model=round_model.tensors())
        host = InProcessHost(task, working=working, **host_options)
    except Exception as failure:
        connection.send(("error", f"{type(failure).__name__}: {failure}"))
        return
    try:
        connection.send(("ready", None))
        while True:
            client, message, host.storage = connection.recv()
            broadcast = Broadcast.from_bytes(message)
            working.adopt_round_model(host.pool, broadcast.coefficients, broadcast.family)
            run = host.run_client(client, message, lambda: connection.send(("step", None)))
            connection.send(("done", run))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed the pipe, or is gone
