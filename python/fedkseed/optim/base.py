"""What the zeroth-order optimizers share: the step in two halves, skipping, and state that resumes."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import nn

from fedkseed._checks import check_count
from fedkseed._means import mean
from fedkseed.model.held import HeldParameters
from fedkseed.optim.evaluation import Evaluation, Losses, Surroundings
from fedkseed.optim.gradient import ProjectedGradient
from fedkseed.optim.measurement import LastStep, Measurement, Plan, Reduce, check_weight, reduced
from fedkseed.optim.notices import Notices
from fedkseed.optim.parameters import Params, tuned_parameters
from fedkseed.storage import (
    AutoStorage,
    GroupUpdate,
    Storage,
    StorageChoice,
    StorageOptions,
    TunedWeights,
    check_choice,
    mode_of_text,
)
from fedkseed.storage.updates import interrupts_held


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Common part of `ZOSGD` and `FedKSeedSGD`: they say which seeds a step takes and what is kept of it.

    A step has two halves. `measure` evaluates a closure on both sides of the weights; it may be called again,
    for the next batch of the same step. `step` decides on what was measured, updates the weights and notes
    what it did; given a closure it does both. `docs/optimizer.md` is the contract.

    Attributes:
        eps: as rounded to fp32.
        family: of the noise.
        manifest: of the model given; None if a tensor's stream is its place among those given. The tuned
            weights of the latter kind cannot be described by a ledger.
        num_skipped: how many directions were skipped: a loss or g was not finite, or |L+ - L-| was above
            max_loss_gap.
        storage: the storage mode at work: the one given, or what "auto" has resolved to. The latter may still
            change: to `Inplace()` in the first measurement, to the mode of a state that is loaded.
        storage_refusal: why "auto" could not stream the model, one line; None if it could, or need not.
        last: what came out of the last step of this object; None before the first.
    """

    #: Whether the result of a run is the model that its ledger defines, and not the weights as walked.
    _LEDGER_COUNTS: ClassVar[bool] = False

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        gradient: ProjectedGradient,
        model: nn.Module | None,
        check_options: Callable[[dict[str, Any]], None],
        storage: StorageChoice,
        family: str,
        seed: int,
        reduce: Reduce | None,
    ) -> None:
        if not (reduce is None or reduce is False or callable(reduce)):
            raise TypeError(f"expected reduce as a function of the losses, False or None, got {reduce!r}")
        check_choice(storage)
        tuned = tuned_parameters(params, model, check_options)
        self._is_complete = False
        super().__init__(tuned.groups, defaults)
        self._is_complete = True
        self.eps = gradient.eps
        self.manifest = tuned.manifest
        self.num_skipped = 0
        self.last: LastStep | None = None
        self._num_drawn = 0  # by steps that take the next seeds of the optimizer's own sequence
        self._gradient = gradient
        self._reduce = reduce
        self._streams = tuned.streams
        tensors: list[list[torch.Tensor]] = [list(group["params"]) for group in self.param_groups]
        whole = params if isinstance(params, nn.Module) else model
        self.family = family
        weights = TunedWeights(tensors, self._streams, self.eps, family, seed, whole, tuned.names)
        self._storage: Storage
        if isinstance(storage, str):
            self._storage = AutoStorage(weights, self._LEDGER_COUNTS)
        else:
            self._options = storage
            self._storage = storage.open(weights)
        self._auto = self._storage if isinstance(self._storage, AutoStorage) else None
        self._measurement: Measurement | None = None
        self._is_evaluating = False
        self._tensors = list(itertools.chain(*tensors))
        self._notices = Notices(self.eps, gradient.max_loss_gap)
        named = list(zip(itertools.chain(*tuned.names), self._tensors, strict=True))
        self._surroundings = Surroundings(whole, named, self._notices.of_written)
        #: Parameters that asked for gradients when they were given; until it is said that one no longer does.
        self._asking = [pair for pair in named if pair[1].requires_grad]
        self._held = None if whole is None else HeldParameters(whole, named)
        self._model = whole

    @property
    def storage(self) -> StorageOptions:
        """See the class's attributes."""
        return self._options if self._auto is None else self._auto.options

    @property
    def storage_refusal(self) -> str | None:
        """See the class's attributes."""
        return None if self._auto is None else self._auto.refusal

    @torch.no_grad()
    def measure(
        self, closure: Callable[[], Losses], weight: float = 1.0, seed_index: int | None = None
    ) -> float:
        """Evaluates both sides of the step's directions on one batch; `step` makes use of it.

        May be called again before the step, for more batches along the same seeds: the step's losses are the
        means over its calls, weighted. Afterwards the model's readers see w; in place that costs one pass
        more than ``step(closure)``. Nothing is consumed but the rounding seeds of passes in place. The
        closure is called as by `step`.

        Args:
            closure: evaluates the loss.
            weight: of this call among those of the step: a number of rows or tokens, above 0.
            seed_index: index into the pool, for `FedKSeedSGD`; the schedule's next entry if None.

        Returns:
            The mean loss of this call in fp64, of both sides of all directions; NaN or infinite if one was.

        Raises:
            RuntimeError: several ranks without ``reduce``; a parameter of the model was exchanged for another
                one; weights were written since they were measured; the closure calls backward().
            ValueError, TypeError: a loss, a weight or an index that is none.
            Whatever the closure raises; what was measured is discarded then, and the weights are w.
        """
        self._check_itself("measure")
        self._check_idle()
        return self._measure(closure, check_weight(weight), self._begun(closure, seed_index), is_apart=True)

    def discard(self) -> None:
        """Drops what was measured since the last step; the weights, generators and buffers are as they were.

        Harmless if there is nothing.

        Raises:
            RuntimeError: called by a closure, or on a wrapper of the optimizer.
        """
        self._check_itself("discard")
        self._check_idle()
        if self._measurement is not None:
            self._abandon()

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
        """Takes back a perturbation that the storage mode left standing; what was measured stays.

        Harmless if there is none, and while a closure runs.
        """
        if not self._is_evaluating:
            self._storage.restore()

    def state_dict(self) -> dict[str, Any]:
        """The base class's state and, as "fedkseed", what the optimizer was made with and how far it got.

        What waits for the next step is flushed first; what is measured is no part of it. An optimizer made
        alike, on a model with the weights of that moment, goes on with the same bits once it has loaded this.
        The state of random number generators (dropout) and of a learning rate scheduler is the caller's to
        save beside it. Holds nothing that torch.load refuses with weights_only.
        """
        self.flush()
        state = super().state_dict()
        state["fedkseed"] = {"optimizer": type(self).__name__, **self._identity(), **self._progress()}
        state["fedkseed"]["storage_state"] = self._storage.state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; the weights are the caller's to load. Drops what is measured.

        Learning rates and weight decays come from the state, as in every torch optimizer; seeds, eps, bounds
        and the parameters' streams must be those of this optimizer. So must the storage mode, but for an
        optimizer made with "auto", which goes on in the state's.

        Raises:
            ValueError: the state of another optimizer, or damaged; nothing changes.
            RuntimeError: called by a closure.
        """
        self._check_idle()
        name = type(self).__name__
        own = state_dict.get("fedkseed")
        if not isinstance(own, dict) or own.get("optimizer") != name:
            raise ValueError(f"expected a state_dict of {name}, got one of another optimizer")
        for key, wanted in self._identity().items():
            if own.get(key) != wanted and not (key == "storage" and self._auto is not None):
                raise ValueError(
                    f"expected a state with {key} {wanted}, got {own.get(key)}; "
                    "construct the optimizer with those of the state"
                )
        try:
            progress = self._parsed(own)
            sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected a whole state_dict of {name}, got a damaged one: {error!r}"
            ) from error
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != own_sizes:
            raise ValueError(f"expected a state with groups of {own_sizes} parameters, got those of {sizes}")
        storage_state = own.get("storage_state", {})
        if self._auto is None:
            self._storage.load_state(storage_state)
        else:
            has_stepped = bool(progress["_num_drawn"] or progress.get("history"))
            self._auto.adopt(mode_of_text(own.get("storage")), storage_state, has_stepped)
        self._measurement = None
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
            "storage": repr(self.storage),
        }

    def _progress(self) -> dict[str, Any]:
        return {"num_drawn": self._num_drawn, "num_skipped": self.num_skipped}

    def _parsed(self, own: dict[str, Any]) -> dict[str, Any]:
        """Attributes and their values out of `_progress`, checked."""
        return {
            "_num_drawn": check_count("num_drawn", own["num_drawn"], 0, 2**63),
            "num_skipped": check_count("num_skipped", own["num_skipped"], 0, 2**63),
        }

    @abstractmethod
    def _plan(self, seed_index: int | None) -> Plan:
        """The seeds of the coming step; nothing is consumed."""

    @abstractmethod
    def _updates(self) -> list[GroupUpdate]:
        """What the coming step does to each group, by the options that it has now.

        Raises:
            TypeError, ValueError: an option out of range.
        """

    @abstractmethod
    def _note(self, plan: Plan, projected_grads: list[float], updates: list[GroupUpdate] | None) -> None:
        """Notes that a step was made; ``updates`` is None if all of its directions were skipped."""

    def _step(self, closure: Callable[[], Losses] | None, seed_index: int | None = None) -> float:
        """The whole step, or its second half; see `step`. Calls no method that a hook or a user may wrap."""
        self._check_idle()
        plan = None
        if closure is not None:
            self._updates()  # options that are refused are, before anything is evaluated
            plan = self._begun(closure, seed_index)
        try:
            if closure is not None and plan is not None:
                self._measure(closure, 1.0, plan, is_apart=False)
            return self._apply(is_apart=closure is None)
        except BaseException:
            self._abandon()
            raise

    def _begun(self, closure: object, seed_index: int | None) -> Plan:
        """Along which noise the step goes that a measurement is of; checks what it can be measured with."""
        if not callable(closure):
            raise TypeError(f"expected a closure that returns the loss, got {type(closure).__name__}")
        if self._measurement is None:
            self._check_ranks()
            self._notices.of_mode(self._model)
            return self._plan(seed_index)
        plan = self._measurement.plan
        if seed_index not in (None, plan.index):
            raise ValueError(
                f"expected seed_index {plan.index}, along which this step is measured already, got "
                f"{seed_index}; call step() first, or discard()"
            )
        return plan

    def _measure(self, closure: Callable[[], Losses], weight: float, plan: Plan, is_apart: bool) -> float:
        try:
            if self._measurement is not None:
                self._storage.check_unwritten()
            has_moved = self._prepare()
            evaluation = Evaluation(closure, self._surroundings, self._notices.of_loss)
            if self._measurement is None:
                self._measurement = Measurement(plan, evaluation.start)
            else:
                self._measurement.has_moved |= has_moved
            self._measurement.is_apart = False
            gradients = self._notices.gradients(self._tensors)
            try:
                self._is_evaluating = True
                losses = self._storage.measure(plan.seeds, evaluation, is_apart)
            finally:
                self._is_evaluating = False
            if not evaluation.has_same_draws():
                self._notices.of_draws()
            self._notices.of_backward(gradients, self._tensors)
            if is_apart:
                torch.clear_autocast_cache()  # it may hold casts of a side
            self._measurement.add(losses, weight)
            self._measurement.is_apart = is_apart
            return mean((plus + minus) / 2 for plus, minus in losses)
        except BaseException:
            self._abandon()
            raise

    def _apply(self, is_apart: bool) -> float:
        measurement = self._measurement
        if measurement is None:
            raise RuntimeError(
                "expected a closure, or a measurement before, got neither: a zeroth-order step evaluates the "
                "loss itself and uses no gradient; call optimizer.step(lambda: loss_of(model, batch)), or "
                "optimizer.measure(closure) for each batch and then optimizer.step(), in place of backward() "
                "and step(); in place of transformers' Trainer take fedkseed.adapters.transformers.ZOTrainer"
            )
        if is_apart:
            self._storage.check_unwritten()
            measurement.has_moved |= self._prepare()
        plan = measurement.plan
        losses, loss = reduced(measurement.losses(), self._reduce)
        gs = [self._gradient(plus, minus) for plus, minus in losses]
        updates = self._updates()
        is_skipped = all(g is None for g in gs)
        projected_grads = [0.0 if g is None else g for g in gs]
        with interrupts_held():
            self._storage.update(plan.seeds, updates, gs, plan.next_seed)
            self._note(plan, projected_grads, None if is_skipped else updates)
            skipped = tuple(g is None for g in gs)
            self.last = LastStep(loss, tuple(losses), tuple(projected_grads), skipped)
            self.num_skipped += sum(skipped)
            self._measurement = None
            if is_skipped:
                self._surroundings.restore(measurement.start, buffers=not measurement.has_moved)
        torch.clear_autocast_cache()  # it may hold casts of a side, or of the weights before
        self._notices.of_skipped(losses, gs)
        if not is_skipped:
            self._notices.of_equal_losses(losses)
        return loss

    def _abandon(self) -> None:
        """Weights, generators and buffers as when the step began; nothing is measured."""
        with interrupts_held():
            measurement, self._measurement = self._measurement, None
            # Whoever wrote or moved the weights since, a checkpoint's load, did so to the buffers too.
            if measurement is not None and measurement.is_apart:
                measurement.has_moved |= self._is_touched()
            self._storage.restore()
            if measurement is not None:
                self._surroundings.restore(measurement.start, buffers=not measurement.has_moved)

    @torch.no_grad()
    def _is_touched(self) -> bool:
        """Whether weights were written, moved or converted since they were measured apart."""
        try:
            self._storage.check_unwritten()
            return self._storage.prepare()
        except (RuntimeError, TypeError, ValueError):
            return True

    def _check_itself(self, method: str) -> None:
        """Refuses a wrapper that borrows this class, as Lightning's does: it would keep what is measured.

        Raises:
            RuntimeError: ``self`` is none of the objects that were constructed.
        """
        if "_measurement" not in vars(self):
            raise RuntimeError(
                f"expected {method} to be called on the optimizer itself, got a wrapper around it, "
                f"{type(self).__name__}, whose step would not know of it; call .optimizer.{method}()"
            )

    def _check_idle(self) -> None:
        """Refuses a closure that comes back to the optimizer that evaluates it.

        Raises:
            RuntimeError: a closure runs.
        """
        if self._is_evaluating:
            raise RuntimeError(
                "expected a closure that computes the loss, got one that calls its own optimizer, or a call "
                "from another thread during a step; an optimizer makes one step at a time"
            )

    def _check_ranks(self) -> None:
        """Refuses several ranks that would part in silence.

        Raises:
            RuntimeError: there are, and nothing says how their losses become one.
        """
        distributed = torch.distributed
        if self._reduce is None and distributed.is_available() and distributed.is_initialized():
            num_ranks = distributed.get_world_size()
            if num_ranks > 1:
                raise RuntimeError(
                    f"expected reduce= at construction, got none, with {num_ranks} ranks in the process "
                    "group: each would measure its own g, and their weights would part. Give reduce a "
                    "function that averages the losses over the ranks, in place (docs/optimizer.md), or "
                    "reduce=False if the closure does so or each rank tunes a model of its own"
                )

    def _prepare(self) -> bool:
        """What is tuned is what the model holds now, and where it is now; whether it was moved.

        Raises:
            RuntimeError: as `HeldParameters.check`.
            RuntimeError, TypeError, ValueError: as `Storage.prepare`.
        """
        has_changed = self._held is not None and not self._held.check()
        if not all([tensor.requires_grad for _, tensor in self._asking]):
            self._notices.of_frozen(next(name for name, tensor in self._asking if not tensor.requires_grad))
            self._asking = []
        has_moved = self._storage.prepare()
        if has_moved or has_changed:
            self._surroundings.find()
        return has_moved
