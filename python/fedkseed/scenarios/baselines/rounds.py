"""The rounds of a method beside FedKSeed, with its clients, its rows and its scores."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fedkseed._means import mean
from fedkseed.files import folder_for_a_while
from fedkseed.model.identity import ModelIdentity
from fedkseed.model.manifest import manifest_parameters
from fedkseed.model.placement import input_device
from fedkseed.model.randomness import seeded
from fedkseed.model.threads import threads
from fedkseed.scenarios.baselines.first_order import FirstOrder
from fedkseed.scenarios.baselines.kept import KeptBaseline
from fedkseed.scenarios.baselines.lora import add_adapters
from fedkseed.scenarios.baselines.settings import FEDERATED, FIRST_ORDER, BaselineSettings
from fedkseed.scenarios.baselines.tensor_files import average_into, read_into, write_tensors
from fedkseed.scenarios.baselines.trainer import Trainer
from fedkseed.scenarios.baselines.zeroth_order import ZerothOrder
from fedkseed.seeds import SeedPool
from fedkseed.simulation.batches import LocalBatches
from fedkseed.simulation.config import SimulationConfig
from fedkseed.simulation.run_folder import RunFolder
from fedkseed.simulation.simulation import RoundFailedError, RoundResult
from fedkseed.simulation.task import Task
from fedkseed.storage import StorageOptions

logger = logging.getLogger("fedkseed")

_MESSAGES = "messages"
#: Numbers of a federation that none of these methods looks at.
_UNUSED = ("num_rounds", "num_threads", "sampling")


@dataclass
class _Work:
    """What the clients of one round did."""

    losses: list[float] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    num_skipped: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    seconds_rebuild: float = 0.0
    seconds_reset: float = 0.0
    seconds_local: float = 0.0


class BaselineRounds:
    """One run, for whoever runs a `Simulation`: the same clients in the same rounds, on the same batches.

    In a federation (fedavg, fedit, fedzo) what is tuned travels: the server writes it into a file, each
    client reads that, makes its local steps and writes its own, and the server reads these and takes their
    mean, weighted as the config says. The files lie in the run's folder until the round ends, and the bytes
    of a round are their sizes. Otherwise (first-order, zeroth-order) one model walks along the batches of all
    of a round's clients, client after client, with one optimizer from round to round, and nothing travels.

    All of it happens in this process. A context manager, as `Simulation`.

    Args:
        task: what is trained; its model is tuned in place, and its weights as they stand now are w0.
        gradient_loss: the task's loss, for a backward pass.
        config: the run.
        baseline: the method.
        folder: of the run; goes on with the run in it.
        task_settings: by name, ready for JSON: what the task computes with.
        on_step: called after each local step of any client.

    Raises:
        ModelError: a model that has no place for adapters.
        MissingExtraError: a package of an extra is not installed.
        StateError: the folder's state is damaged, or of another method, model or configuration.
        RunFolderError, OSError: as `KeptBaseline`.
        ValueError: fewer clients than a round needs.
    """

    #: No weights are kept but those of the last round.
    best_round = None

    def __init__(
        self,
        task: Task[Any, Any],
        gradient_loss: Callable[[nn.Module, Any], torch.Tensor],
        config: SimulationConfig,
        baseline: BaselineSettings,
        folder: RunFolder,
        *,
        task_settings: Mapping[str, Any] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        config.server_config(len(task.datasets))
        self.config, self.task = config, task
        self._baseline, self._folder = baseline, folder
        self._on_step = on_step or (lambda: None)
        self._is_federated = baseline.method in FEDERATED
        self._pool = SeedPool(config.seed, config.num_seeds)
        content = ModelIdentity.of(task.model).content.hex()
        with threads(config.num_threads):
            self._trainer = _trainer(task, gradient_loss, config, baseline)
        self._kept = KeptBaseline(
            folder, self._trainer.parameters, _settings(config, baseline, content), task_settings or {}
        )
        if self._kept.optimizer_state is not None:
            self._trainer.load_state_dict(self._kept.optimizer_state)
        self._kept.open(self._optimizer_state())

    def __enter__(self) -> BaselineRounds:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    @property
    def storage(self) -> StorageOptions | None:
        """How a step visits both sides of the weights; None where it takes gradients."""
        return self._trainer.storage

    @property
    def num_complete(self) -> int:
        """How many rounds are complete."""
        return self._kept.num_complete

    @property
    def past_metrics(self) -> list[dict[str, Any]]:
        """The metrics of all rounds so far, also of those before a resume."""
        return self._kept.past_metrics()

    def rounds(self) -> Iterator[RoundResult]:
        """Runs the rounds that are left of the config, one at each step of the iterator.

        Whenever it yields, the model's weights are those after the round, and the folder holds them.

        Raises:
            RoundFailedError: no client came through with finite weights.
            LockLostError, OSError: as `KeptBaseline.add`.
        """
        while self.num_complete < self.config.num_rounds:
            with threads(self.config.num_threads):
                result = self._run_round(self.num_complete)
            yield result

    def _run_round(self, round: int) -> RoundResult:
        start = perf_counter()
        members = self._pool.sample_clients(round, len(self.task.datasets), self.config.clients_per_round)
        work = _Work()
        (self._exchange if self._is_federated else self._walk)(round, members, work)
        begin = perf_counter()
        evaluation = self.task.scores(round)
        end = perf_counter()
        losses = [loss for loss in work.losses if math.isfinite(loss)]
        result = RoundResult(
            round=round,
            clients=members,
            failed=tuple(work.failed),
            train_loss=mean(losses) if losses else None,
            evaluation=evaluation,
            bytes_down=work.bytes_down,
            bytes_up=work.bytes_up,
            num_skipped=work.num_skipped,
            seconds_rebuild=work.seconds_rebuild,
            seconds_reset=work.seconds_reset,
            seconds_local=work.seconds_local,
            seconds_evaluation=end - begin,
            seconds=end - start,
        )
        self._kept.add(result.metrics, result.timings, self._optimizer_state())
        return result

    def _exchange(self, round: int, members: Sequence[int], work: _Work) -> None:
        """A round of a federation."""
        parameters = self._trainer.parameters
        replies: dict[int, Path] = {}
        with folder_for_a_while(self._folder.path / _MESSAGES) as messages:
            broadcast = messages / "broadcast.safetensors"
            size = write_tensors(broadcast, parameters, {"round": str(round)})
            for client in members:
                begin = perf_counter()
                read_into(broadcast, parameters)
                work.seconds_reset += perf_counter() - begin
                work.bytes_down += size
                self._trainer.begin(round, client)
                self._train(round, client, work)
                if not self._is_finite():
                    work.failed.append(client)
                    continue
                replies[client] = messages / f"reply-{client}.safetensors"
                said = {"round": str(round), "client": str(client)}
                work.bytes_up += write_tensors(replies[client], parameters, said)
            if not replies:
                raise _diverged(round)
            if work.failed:
                logger.warning(
                    "round %d: the weights of clients %s are not finite and are left out", round, work.failed
                )
            begin = perf_counter()
            is_weighted = self.config.weighting == "data_size"
            shares = [self.task.data_size(client) if is_weighted else 1 for client in replies]
            average_into(parameters, list(replies.values()), shares)
            work.seconds_rebuild += perf_counter() - begin

    def _walk(self, round: int, members: Sequence[int], work: _Work) -> None:
        """The same batches without a federation."""
        for client in members:
            self._train(round, client, work)
        if not self._is_finite():
            raise _diverged(round)

    def _train(self, round: int, client: int, work: _Work) -> None:
        """One client's local steps."""
        config, task = self.config, self.task
        batches = LocalBatches(
            task.datasets[client],
            client,
            config.seed,
            config.batch_size,
            task.collate,
            input_device(task.model),
            task.to_device,
        )
        epochs = self._baseline.local_epochs
        drawn = batches.epochs(round, epochs) if epochs else batches(round, config.num_local_steps)
        begin = perf_counter()
        with seeded(task.model, config.seed % 2**64, round, client), self._trainer.at_work():
            for batch in drawn:
                step = self._trainer.step(batch)
                work.losses.append(step.loss)
                work.num_skipped += step.is_skipped
                self._on_step()
        work.seconds_local += perf_counter() - begin

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self._trainer.parameters.values())

    def _optimizer_state(self) -> dict[str, Any] | None:
        """What goes on from round to round: clients of a federation begin anew."""
        return None if self._is_federated else self._trainer.state_dict()


def _trainer(
    task: Task[Any, Any],
    gradient_loss: Callable[[nn.Module, Any], torch.Tensor],
    config: SimulationConfig,
    baseline: BaselineSettings,
) -> Trainer:
    model = task.model
    if baseline.method == "fedit":
        adapters = add_adapters(model, baseline, config.seed)
        parameters, dropouts = adapters.parameters, adapters.dropouts
    else:
        dropouts = ()
        parameters = {name: value for name, value in manifest_parameters(model) if value.requires_grad}
    if baseline.method in FIRST_ORDER:
        return FirstOrder(
            model,
            parameters,
            gradient_loss,
            optimizer=baseline.first_order_optimizer,
            lr=config.lr,
            dropouts=dropouts,
        )
    return ZerothOrder(model, parameters, task.loss, config, baseline.directions)


def _settings(config: SimulationConfig, baseline: BaselineSettings, content: str) -> dict[str, Any]:
    """What a resumed run must have as it began with it, by name."""
    numbers = {
        entry.name: getattr(config, entry.name)
        for entry in dataclasses.fields(config)
        if entry.name not in _UNUSED
    }
    return {**dataclasses.asdict(baseline), **numbers, "storage": repr(config.storage), "w0": content}


def _diverged(round: int) -> RoundFailedError:
    return RoundFailedError(
        f"expected finite weights after round {round}, got NaN or infinity from every client; the round was "
        "not kept. Lower the learning rate in a new run"
    )
