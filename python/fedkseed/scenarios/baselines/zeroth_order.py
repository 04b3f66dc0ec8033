"""Local steps by two evaluations along new noise, with `fedkseed.ZOSGD`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from fedkseed.optim.evaluation import Losses
from fedkseed.optim.zosgd import ZOSGD
from fedkseed.scenarios.baselines.trainer import Step
from fedkseed.simulation.config import SimulationConfig
from fedkseed.storage import StorageOptions


class ZerothOrder:
    """See `Trainer`.

    Args:
        model: all its parameters that ask for a gradient are tuned.
        parameters: those, by name.
        loss: of the model on a batch; with a paired storage mode both sides'.
        config: lr, eps, the bound of g, the noise and the storage mode are taken.
        num_directions: of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[nn.Module, Any], Losses],
        config: SimulationConfig,
        num_directions: int,
    ) -> None:
        self.parameters = parameters
        self._model, self._loss, self._config = model, loss, config
        self._num_directions = num_directions
        self._choice = config.storage
        self.begin()

    @property
    def storage(self) -> StorageOptions:
        """How both sides of the weights are visited."""
        return self._optimizer.storage

    def begin(self, *entropy: int) -> None:
        """See `Trainer.begin`; without numbers its seeds are the candidate seeds of the run's."""
        config, seed = self._config, self._config.seed % 2**64
        if entropy:
            seed = int(np.random.SeedSequence((seed, *entropy)).generate_state(1, np.uint64)[0])
        self._optimizer = ZOSGD(
            self._model,
            config.lr,
            config.eps,
            seed=seed,
            num_directions=self._num_directions,
            max_abs_g=config.max_abs_g,
            max_loss_gap=config.max_loss_gap or None,
            storage=self._choice,
            family=config.family,
            reduce=False,
        )

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """See `Trainer.at_work`."""
        try:
            yield
        finally:
            self._optimizer.flush()
        self._choice = self._optimizer.storage  # what "auto" has turned out to be holds for all that follow

    def step(self, batch: Any) -> Step:
        """See `Trainer.step`."""
        loss = self._optimizer.step(lambda: self._loss(self._model, batch))
        last = self._optimizer.last
        return Step(loss, last is not None and all(last.skipped))

    def state_dict(self) -> dict[str, Any]:
        """See `Trainer.state_dict`."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Trainer.load_state_dict`."""
        self._optimizer.load_state_dict(state)
