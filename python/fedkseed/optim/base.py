"""What the zeroth-order optimizers share: evaluating both sides alike, skipping, and state that resumes."""

from __future__ import annotations

import itertools
import logging
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from fedkseed._checks import check_count
from fedkseed._means import mean
from fedkseed.model.randomness import GeneratorStates, active_dropout
from fedkseed.optim.gradient import ProjectedGradient
from fedkseed.optim.parameters import Params, tuned_parameters
from fedkseed.storage import Direction, GroupUpdate, Storage, StorageOptions, TunedWeights

logger = logging.getLogger("fedkseed")

#: What a closure returns: the loss of one batch, a number or a tensor of one element.
Loss = torch.Tensor | float


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Common part of `ZOSGD` and `FedKSeedSGD`: they say which seeds a step takes and what is kept of it.

    Attributes:
        eps: as rounded to fp32.
        family: of the noise.
        manifest: of the model given; None if a tensor's stream is its place among those given. The tuned
            weights of the latter kind cannot be described by a ledger.
        num_skipped: how many directions were skipped: a loss or g was not finite, or |L+ - L-| was above
            max_loss_gap.
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        gradient: ProjectedGradient,
        model: nn.Module | None,
        check_options: Callable[[dict[str, Any]], None],
        storage: StorageOptions,
        family: str,
        seed: int,
    ) -> None:
        tuned = tuned_parameters(params, model, check_options)
        self._is_complete = False
        super().__init__(tuned.groups, defaults)
        self._is_complete = True
        self.eps = gradient.eps
        self.manifest = tuned.manifest
        self.num_skipped = 0
        self._num_drawn = 0  # by steps that take the next seeds of the optimizer's own sequence
        self._gradient = gradient
        self._streams = tuned.streams
        tensors: list[list[torch.Tensor]] = [list(group["params"]) for group in self.param_groups]
        whole = params if isinstance(params, nn.Module) else model
        self.family = family
        self._options = storage
        self._storage: Storage = storage.open(
            TunedWeights(tensors, self._streams, self.eps, family, seed, whole)
        )
        # The model draws random numbers where its frozen parameters are, too.
        placed = [*itertools.chain(*tensors), *(whole.parameters() if whole is not None else ())]
        self._devices = {tensor.device for tensor in placed if not tensor.is_meta}
        #: Looked at in the first step, when the caller has chosen between train and eval mode.
        self._model_to_check = whole

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer exists.

        Raises:
            RuntimeError: always, after construction.
        """
        if self._is_complete:
            raise RuntimeError(
                "expected all parameters at construction, got a further group: what noise a tensor gets "
                f"depends on its place among them; make a new {type(self).__name__}"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> NoReturn:
        """Refused: a copy would not know its weights from those of the original.

        Raises:
            TypeError: always.
        """
        name = type(self).__name__
        raise TypeError(f"expected no copy or pickle of {name}; make a new one and load the state_dict")

    def flush(self) -> None:
        """Takes back a perturbation that the storage mode left for the next step; harmless otherwise."""
        self._storage.flush()

    def state_dict(self) -> dict[str, Any]:
        """The base class's state and, as "fedkseed", what the optimizer was made with and how far it got.

        What waits for the next step is flushed first. An optimizer made alike, on a model with the weights of
        that moment, goes on with the same bits once it has loaded this. The state of torch's random number
        generators (dropout) and of a learning rate scheduler is the caller's to save beside it. Holds nothing
        that torch.load refuses with weights_only.
        """
        self.flush()
        state = super().state_dict()
        state["fedkseed"] = {"optimizer": type(self).__name__, **self._identity(), **self._progress()}
        state["fedkseed"]["storage_state"] = self._storage.state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; the weights are the caller's to load.

        Learning rates and weight decays come from the state, as in every torch optimizer; seeds, eps, bounds
        and the parameters' streams must be those of this optimizer.

        Raises:
            ValueError: the state of another optimizer, or damaged; nothing changes.
        """
        name = type(self).__name__
        own = state_dict.get("fedkseed")
        if not isinstance(own, dict) or own.get("optimizer") != name:
            raise ValueError(f"expected a state_dict of {name}, got one of another optimizer")
        for key, wanted in self._identity().items():
            if own.get(key) != wanted:
                raise ValueError(
                    f"expected a state with {key} {wanted}, got {own.get(key)}; "
                    "construct the optimizer with those of the state"
                )
        try:
            progress = self._parsed(own)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected a whole state_dict of {name}, got a damaged one: {error!r}"
            ) from error
        self._storage.load_state(own.get("storage_state", {}))
        super().load_state_dict(state_dict)
        for attribute, value in progress.items():
            setattr(self, attribute, value)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for the steps to go on as they would have."""
        return {
            "eps": self.eps,
            "max_abs_g": self._gradient.max_abs_g,
            "max_loss_gap": self._gradient.max_loss_gap,
            "streams": [list(streams) for streams in self._streams],
            "family": self.family,
            "storage": repr(self._options),
        }

    def _progress(self) -> dict[str, Any]:
        return {"num_drawn": self._num_drawn, "num_skipped": self.num_skipped}

    def _parsed(self, own: dict[str, Any]) -> dict[str, Any]:
        """Attributes and their values out of `_progress`, checked."""
        return {
            "_num_drawn": check_count("num_drawn", own["num_drawn"], 0, 2**63),
            "num_skipped": check_count("num_skipped", own["num_skipped"], 0, 2**63),
        }

    def _make_step(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        closure: Callable[[], Loss],
        record: Callable[[list[float]], None],
        next_seed: int | None,
    ) -> float:
        """Mean loss of the evaluations of one step; ``record`` gets g of each seed, 0 where it was skipped.

        All evaluations start from the same state of torch's random number generators, and the last one leaves
        them where a single evaluation would have.
        """
        self._check_dropout()
        evaluation = _Evaluation(closure, self._devices)

        def note(directions: list[Direction]) -> None:
            self.num_skipped += sum(direction.g is None for direction in directions)
            record([0.0 if direction.g is None else direction.g for direction in directions])

        num_skipped = self.num_skipped
        directions = self._storage.walk(seeds, updates, evaluation, self._gradient, note, next_seed)
        for plus, minus, g in directions:
            if g is None:
                # The first is a warning; a run that diverges would repeat it at every step.
                level = logging.INFO if num_skipped else logging.WARNING
                bound = self._gradient.max_loss_gap
                logger.log(level, "skipped: losses %s and %s, max_loss_gap %s", plus, minus, bound)
                num_skipped += 1
        return mean((plus + minus) / 2 for plus, minus, _ in directions)

    def _check_dropout(self) -> None:
        model, self._model_to_check = self._model_to_check, None
        if model is None:
            return
        found = active_dropout(model)
        if found:
            name, p = found[0]
            warnings.warn(
                f"the model is in train mode with dropout: {name} (p={p}), {len(found)} in all. Both sides "
                "of a step get the same mask, so a step is sound but follows the loss of a thinned model, "
                "with more noise; to measure the model itself call model.eval() first",
                stacklevel=6,  # the caller of step, past what torch wraps around it
            )


class _Evaluation:
    """The closure, called each time with the generators as they stood when the step began."""

    def __init__(self, closure: Callable[[], Any], devices: Iterable[torch.device]) -> None:
        self._closure = closure
        self._generators = GeneratorStates(devices)

    def side(self) -> float:
        self._generators.restore()
        return _loss_value(self._closure())

    def both(self) -> tuple[float, float]:
        self._generators.restore()
        losses = self._closure()
        is_sequence = (
            losses.dim() > 0 if isinstance(losses, torch.Tensor) else isinstance(losses, (list, tuple))
        )
        if not is_sequence or len(losses) != 2:
            raise ValueError(
                f"expected the closure of a paired step to return two losses, (plus, minus), got {losses!r}"
            )
        return _loss_value(losses[0]), _loss_value(losses[1])


def _loss_value(loss: Any) -> float:
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"expected a loss of one element, got shape {tuple(loss.shape)}; reduce it in the closure"
            )
        return float(loss.detach().double())
    if not isinstance(loss, numbers.Real):
        raise TypeError(
            f"expected the closure to return the loss, a tensor or a number, got {type(loss).__name__}"
        )
    return float(loss)
