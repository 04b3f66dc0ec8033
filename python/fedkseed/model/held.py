"""Whether a model still holds the parameters that are tuned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from fedkseed.model.manifest import manifest_parameters
from fedkseed.model.registries import registry_of


class HeldParameters:
    """The tuned parameters of a model, by the places at which its modules hold them.

    Args:
        model: that holds them.
        parameters: (name, parameter) of each that is tuned.
        holder: what was made for them, as errors call it.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[tuple[str, Tensor]], holder: str = "optimizer"
    ) -> None:
        self._model = model
        self._parameters = list(parameters)
        self._holder = holder
        self._find()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles look at the copy of the model, anew: views of dicts cannot be copied."""
        return type(self), (self._model, self._parameters, self._holder)

    def check(self) -> bool:
        """Whether the modules, and the parameters that they hold, are those of the last call.

        Raises:
            RuntimeError: the model holds another Parameter than a tuned one, or none; names the first.
        """
        # Without a line of Python for each, since this is asked for at every step.
        now = list(chain.from_iterable(self._views))
        if len(now) == len(self._held) and all(map(is_, now, self._held)):
            return True
        self._check_all()
        self._find()
        return False

    def _find(self) -> None:
        #: What each module holds now: views follow their dict.
        self._views: list[Iterable[Any]] = [
            registry_of(held).values()
            for module in self._model.modules()
            for held in (module._modules, module._parameters)
        ]
        self._held = list(chain.from_iterable(self._views))

    def _check_all(self) -> None:
        now = manifest_parameters(self._model)
        held = {id(parameter) for _, parameter in now}
        for name, parameter in self._parameters:
            if id(parameter) not in held:
                other = dict(now).get(name)
                found = (
                    "none of that name"
                    if other is None
                    else f"another Parameter of shape {tuple(other.shape)}, {other.dtype}, in its place"
                )
                raise RuntimeError(
                    f"expected the model to hold the parameter {name} that is tuned, got {found}: it was "
                    f"exchanged after the {self._holder} was made (load_state_dict(assign=True), resizing, "
                    f"a new module), and nothing would move it; make a new {self._holder}"
                )
