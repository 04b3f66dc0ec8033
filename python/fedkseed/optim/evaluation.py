"""The closure of a step, evaluated on both sides of the weights in the same world."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from fedkseed.model.buffers import Buffers, KeptBuffers
from fedkseed.model.randomness import Generators, OwnGenerators

#: What a closure returns: the loss of one batch, a number or a tensor of one element.
Loss = torch.Tensor | float

#: What it returns with a paired storage mode too: the losses of both sides, (plus, minus).
Losses = Loss | Sequence[Loss]

_NO_LOSS = (
    "; end it with return loss (models of transformers compute one if they are given labels). Lightning's "
    "step() passes a closure that returns nothing where none is given: give it that of the last batch "
    "(docs/optimizer.md)"
)
_BACKWARD = "does not require grad and does not have a grad_fn"


class World(NamedTuple):
    """What a forward pass may move beside the weights, as it was at a time."""

    generators: Generators
    states: list[Any]
    buffers: KeptBuffers | None


class Surroundings:
    """What a forward pass reads beside the weights and may move: generators, buffers, the autocast cache.

    Args:
        model: None if the optimizer was given tensors alone; then of generators those of the process count.
        tuned: (name, tensor) of each that is tuned.
        note_written: called with the name of a tuned one that the closure writes.
    """

    def __init__(
        self,
        model: nn.Module | None,
        tuned: Sequence[tuple[str, torch.Tensor]],
        note_written: Callable[[str], None],
    ) -> None:
        self._model = model
        self._tuned = tuned
        self._note_written = note_written
        self.find()

    def find(self) -> None:
        """Looks for generators and buffers in the model's modules, and for devices."""
        model = self._model
        # Random numbers are drawn where frozen parameters are, too.
        placed = [*(tensor for _, tensor in self._tuned), *(model.parameters() if model is not None else ())]
        devices = {tensor.device for tensor in placed if not tensor.is_meta}
        self._owned = None if model is None else OwnGenerators(model)
        self._own = [] if self._owned is None else self._owned.now()
        self._generators = Generators(devices, self._own)
        self._buffers = None if model is None else Buffers(model.named_modules())
        self._last: KeptBuffers | None = None
        tuned = {id(tensor) for _, tensor in self._tuned}
        rest = [] if model is None else model.named_parameters()
        frozen = [(name, parameter, True) for name, parameter in rest if id(parameter) not in tuned]
        #: (name, parameter, whether it is frozen) of what has not been watched yet.
        self._unwatched = [
            row
            for row in (*frozen, *((name, tensor, False) for name, tensor in self._tuned))
            if not row[1].is_inference()
        ]

    def now(self) -> World:
        """The world as it is now."""
        if self._owned is not None and self._owned.now() is not self._own:
            self.find()
        if self._buffers is not None:
            self._last = self._buffers.keep(self._last)
        return World(self._generators, self._generators.states(), self._last)

    def restore(self, world: World, buffers: bool = True) -> list[Any] | None:
        """Puts back what has moved since; the states that generators were in, None if none has moved.

        Args:
            buffers: whether they are put back, too.

        Raises:
            RuntimeError: as `KeptBuffers.restore`.
        """
        left = world.generators.restore(world.states)
        if buffers and world.buffers is not None:
            world.buffers.restore()
        torch.clear_autocast_cache()
        return left

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a side: the first time since `find` it is watched whether it writes parameters.

        Raises:
            RuntimeError: frozen ones; names the first.
        """
        versions = [parameter._version for _, parameter, _ in self._unwatched]
        yield
        for (name, parameter, is_frozen), version in zip(self._unwatched, versions, strict=True):
            if parameter._version == version:
                continue
            if not is_frozen:
                self._note_written(name)
            else:
                raise RuntimeError(
                    f"expected the closure to leave frozen parameters alone, got {name} written: both sides "
                    "of a step have to meet the same values; make it a buffer, which is put back before each "
                    "side, or write it between steps"
                )
        self._unwatched = []


class Evaluation:
    """A closure, called each time in the world as it is at construction.

    Args:
        closure: what the user gave.
        surroundings: of the model.
        note: called with each loss that is a tensor.

    Attributes:
        start: the world at construction.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        surroundings: Surroundings,
        note: Callable[[torch.Tensor], None],
    ) -> None:
        self._closure = closure
        self._surroundings = surroundings
        self._note = note
        self.start = surroundings.now()
        self._is_first = True
        #: The states in which the first call that ended well left the generators, if it moved any.
        self._left: list[Any] | None = None
        self._has_ended_well = False

    def has_same_draws(self) -> bool:
        """Whether the last call has left the generators as the first did."""
        return self._left is None or not self.start.generators.have_changed(self._left)

    def side(self) -> float:
        """See `fedkseed.storage.Evaluation`."""
        return self._value(self._evaluate())

    def both(self) -> tuple[float, float]:
        """See `fedkseed.storage.Evaluation`."""
        losses = self._evaluate()
        is_sequence = (
            losses.dim() > 0 if isinstance(losses, torch.Tensor) else isinstance(losses, (list, tuple))
        )
        if not is_sequence or len(losses) != 2:
            raise ValueError(
                "expected the closure of a paired step to return two losses, (plus, minus), got "
                f"{_named(losses)}; return one for each half of the doubled batch, as "
                "fedkseed.paired_losses(model, batch) does for models of transformers"
            )
        return self._value(losses[0]), self._value(losses[1])

    def _evaluate(self) -> Any:
        is_first, self._is_first = self._is_first, False
        if is_first:
            # Casts made of other weights; nothing else has moved yet.
            torch.clear_autocast_cache()
        else:
            left = self._surroundings.restore(self.start)
            if self._has_ended_well:
                self._left = self._left or left
        try:
            # What the first call of a module prepares (a layer that packs its weight) is not watched.
            with nullcontext() if is_first else self._surroundings.watched():
                found = self._closure()
        except RuntimeError as error:
            if _BACKWARD in str(error):
                raise RuntimeError(
                    "expected a closure that computes the loss and returns it, got one that calls "
                    "backward(): a zeroth-order step takes no gradients; leave backward() and zero_grad() out"
                ) from error
            raise
        self._has_ended_well = True
        return found

    def _value(self, loss: Any) -> float:
        if isinstance(loss, torch.Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"expected a loss of one element, got shape {tuple(loss.shape)}; reduce it in the closure"
                )
            if loss.is_complex():
                raise TypeError(
                    f"expected a real loss, got {loss.dtype}: a complex one has no order to descend; return "
                    "its .abs() or .real"
                )
            self._note(loss)
            return float(loss.detach().double())
        if isinstance(loss, Mapping) or hasattr(loss, "loss"):
            raise TypeError(
                f"expected the closure to return the loss, got {type(loss).__name__}; return its loss alone"
            )
        if not isinstance(loss, numbers.Real):
            raise TypeError(
                f"expected the closure to return the loss, a tensor or a number, got {type(loss).__name__}"
                + ("; return the loss alone" if loss is not None else _NO_LOSS)
            )
        return float(loss)


def _named(losses: object) -> str:
    """What it is, in few words: a model's output or logits would fill the screen."""
    if isinstance(losses, torch.Tensor):
        return f"a tensor of shape {tuple(losses.shape)}"
    return type(losses).__name__ + (f" of {len(losses)}" if isinstance(losses, (list, tuple)) else "")
