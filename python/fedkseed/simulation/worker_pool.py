"""Clients in worker processes: each with a working copy, a device and a fixed number of threads.

On the processor w0 and the round's model are shared memory. On a GPU a worker has both there: it copies w0
once, when it starts, and rebuilds the round's model at its first client of the round.

What a client replies depends neither on the number of workers nor on which of them runs it: each starts from
the round's model, with the same number of threads.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import multiprocessing, nn

from fedkseed.federation.messages import Broadcast
from fedkseed.model.manifest import manifest_parameters
from fedkseed.model.modes import Modes, set_buffers
from fedkseed.model.packed import SharedTensors
from fedkseed.model.placement import input_device
from fedkseed.model.waiting import flush_waiting
from fedkseed.model.working_copy import WorkingCopy
from fedkseed.simulation.host import ClientRun, InProcessHost
from fedkseed.simulation.task import Task
from fedkseed.storage import StorageChoice

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    _Pipe: TypeAlias = "Connection[Any, Any]"

_SECONDS_TO_END = 5.0

#: Without a message from a worker at work: a step, or loading the model, takes less by far.
DEFAULT_TIMEOUT = 600.0

#: The longest wait that counts as a worker's silence at once: this process may have been stopped meanwhile.
_SECONDS_AT_ONCE = 1.0

_CPU = torch.device("cpu")


class WorkerError(RuntimeError):
    """A worker process could not start, died or hung; the round it worked on is lost, nothing else."""


@dataclass(frozen=True)
class SharedWeights:
    """What workers start from, in memory that all processes see.

    Attributes:
        w0: the tuned weights in manifest order, read-only.
        round_model: room for the round's model, for workers on the processor; None if all are on GPUs.
    """

    w0: SharedTensors
    round_model: SharedTensors | None

    @classmethod
    def of(cls, model: nn.Module, devices: Sequence[torch.device]) -> SharedWeights:
        """A copy of the model's tuned weights, for workers on these devices.

        Raises:
            WorkerError: there is no room for it.
            ValueError: workers on the processor, whose rounds' models nobody rebuilds, for a model elsewhere.
        """
        if _CPU in devices and (place := input_device(model)).type != "cpu":
            raise ValueError(
                f"expected workers on GPUs for a model on {place}, got some on the processor; move the model"
            )
        weights = [weight for _, weight in manifest_parameters(model) if weight.requires_grad]
        flush_waiting(weights)
        try:
            w0 = SharedTensors.empty_like(weights)
            round_model = SharedTensors.empty_like(weights) if _CPU in devices else None
        except RuntimeError as error:
            num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
            copies = "two copies" if _CPU in devices else "one copy"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise WorkerError(
                f"expected room in shared memory (/dev/shm) for {copies} of {num_bytes / 1e6:,.0f} MB of "
                f"weights, which the workers read, got: {reason}; use one worker, which needs none, or make "
                "it larger (mount -o remount,size=..., docker run --shm-size)"
            ) from error
        with torch.no_grad():
            for to, weight in zip(w0.tensors(), weights, strict=True):
                to.copy_(weight)
        return cls(w0, round_model)

    def working_copy(self, model: nn.Module, device: torch.device) -> WorkingCopy:
        """A working copy on a device: on the processor of the shared tensors, else of its own copies."""
        w0 = self.w0.tensors()
        if device == _CPU:
            shared = None if self.round_model is None else self.round_model.tensors()
            return WorkingCopy(model, w0=w0, round_model=shared)
        return WorkingCopy(model, w0=[tensor.to(device) for tensor in w0], round_model="own")


class WorkerPool:
    """Worker processes that run the clients of a round.

    Each worker makes a task of its own by ``make_task``, which must be picklable (a function at the top level
    of a module, or a functools.partial of one) and give the same rows and functions everywhere. Its model
    becomes the worker's working copy; its tuned weights, buffers and modes are not used.

    Args:
        make_task: makes a worker's task.
        devices: of the workers, one process each.
        num_threads: CPU threads of each.
        shared: the weights; the caller rebuilds the round's model there, if it is shared, before `run`.
        storage: how clients visit both sides of the weights.
        beside: modes and buffers of the caller's model.
        timeout: seconds without a message from a worker that starts or has a client, after which it counts as
            hung and is ended; it sends one after each local step. 0 for no limit.
        host_options: further arguments of each worker's `InProcessHost`.

    Attributes:
        storage: as given; may change between rounds.

    Raises:
        WorkerError: a worker failed to start; says why.
        ValueError: a timeout below 0, or that is no number.
    """

    def __init__(
        self,
        make_task: Callable[[], Task[Any, Any]],
        *,
        devices: Sequence[torch.device],
        num_threads: int,
        shared: SharedWeights,
        storage: StorageChoice,
        beside: tuple[Modes, dict[str, torch.Tensor]],
        host_options: Mapping[str, Any],
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self.storage = storage
        self._timeout = check_timeout(timeout)
        context = multiprocessing.get_context("spawn")
        self._workers: dict[_Pipe, Any] = {}
        try:
            for number, device in enumerate(devices):
                here, there = context.Pipe()
                process = context.Process(
                    target=_work,
                    args=(there, make_task, device, num_threads, shared, beside, dict(host_options)),
                    name=f"fedkseed-worker-{number}",
                    daemon=True,
                )
                with _without_interrupts():
                    process.start()
                there.close()
                self._workers[here] = process
            starting, silence = set(self._workers), dict.fromkeys(self._workers, 0.0)
            while starting:
                for connection in self._heard(starting, silence):
                    self._receive(connection)  # "ready"
                    starting.discard(connection)
        except BaseException:
            self.close()
            raise

    def run(self, messages: Mapping[int, bytes], on_step: Callable[[], None]) -> dict[int, ClientRun]:
        """See `fedkseed.simulation.host.Host.run`.

        Raises:
            WorkerError: a worker died, or hung.
        """
        waiting = list(messages.items())[::-1]
        busy: dict[_Pipe, int] = {}
        silence = dict.fromkeys(self._workers, 0.0)
        runs: dict[int, ClientRun] = {}
        for connection in self._workers:
            if waiting:
                busy[connection] = self._send(connection, waiting.pop())
        while busy:
            for connection in self._heard(busy, silence):
                kind, content = self._receive(connection)
                if kind == "step":
                    on_step()
                    continue
                runs[busy.pop(connection)] = content
                if waiting:
                    busy[connection] = self._send(connection, waiting.pop())
        return {client: runs[client] for client in messages}

    def _heard(self, busy: Iterable[_Pipe], silence: dict[_Pipe, float]) -> list[_Pipe]:
        """Those that have sent something by now; waits for at most a moment.

        Args:
            busy: that are waited for.
            silence: seconds of waiting for each since it sent something; brought up to date.

        Raises:
            WorkerError: one was silent for too long; it is ended.
        """
        at_once = min(_SECONDS_AT_ONCE, self._timeout / 4) if self._timeout else None
        start = monotonic()
        heard = cast("list[_Pipe]", wait(list(busy), at_once))
        if at_once is None:
            return heard
        waited = min(monotonic() - start, at_once)
        for connection in busy:
            silence[connection] = 0.0 if connection in heard else silence[connection] + waited
        for connection in busy:
            if silence[connection] >= self._timeout:
                raise self._hung(connection)
        return heard

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

    def _hung(self, connection: _Pipe) -> WorkerError:
        process = self._workers[connection]
        process.kill()  # it may be stopped, and would not hear a request
        process.join()
        return WorkerError(
            f"expected {process.name} (process {process.pid}) to send something within {self._timeout:g} s, "
            "got nothing: it hung, or one step takes longer; it was ended. Resume; where steps are that "
            "slow, with a longer time limit for workers (0 for none)"
        )

    def _died(self, connection: _Pipe) -> WorkerError:
        process = self._workers[connection]
        process.join(_SECONDS_TO_END)
        return WorkerError(
            f"expected {process.name} to live, got its end with exit status {process.exitcode}; "
            "a negative status is a signal (-9: killed, often out of memory); "
            "use fewer workers, or resume"
        )


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """What starts here is born deaf to Ctrl-C, which reaches the whole group: the parent decides."""
    resource_tracker.ensure_running()  # its own start would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_timeout(timeout: float) -> float:
    """A time limit in seconds; 0 for none.

    Raises:
        ValueError: below 0, infinite, or no number.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise ValueError(f"expected a time limit for workers in seconds, got {timeout!r}")
    if not (math.isfinite(timeout) and timeout >= 0):
        raise ValueError(f"expected a time limit for workers of at least 0 s (0: none), got {timeout}")
    return float(timeout)


def _work(
    connection: _Pipe,
    make_task: Callable[[], Task[Any, Any]],
    device: torch.device,
    num_threads: int,
    shared: SharedWeights,
    beside: tuple[Modes, dict[str, torch.Tensor]],
    host_options: dict[str, Any],
) -> None:
    """A worker's life: set up, then one client after the other until the pipe is closed."""
    torch.set_num_threads(num_threads)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what is made on "cuda", without a number, is made there
        task = make_task()
        modes, buffers = beside
        modes.restore(task.model)
        task.model.to(device)
        set_buffers(task.model, buffers)
        working = shared.working_copy(task.model, device)
        host = InProcessHost(task, working=working, **host_options)
    except Exception as failure:
        connection.send(("error", f"{type(failure).__name__}: {failure}"))
        return
    try:
        connection.send(("ready", None))
        while True:
            client, message, host.storage = connection.recv()
            if device == _CPU:
                broadcast = Broadcast.from_bytes(message)
                working.adopt_round_model(host.pool, broadcast.coefficients, broadcast.family)
            run = host.run_client(client, message, lambda: connection.send(("step", None)))
            connection.send(("done", run))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed the pipe, or is gone
