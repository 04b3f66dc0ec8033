"""Whether a model still holds the parameters that are tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fedkseed.model.manifest import manifest_parameters


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
        self._links = _links(model)

    def check(self) -> bool:
        """Whether the model's modules are those of the last call, too.

        Raises:
            RuntimeError: it holds another Parameter than a tuned one, or none; names the first.
        """
        for registry, name, held in self._links:
            if registry.get(name) is not held:
                break
        else:
            return True
        self._check_all()
        self._links = _links(self._model)
        return False

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


class _Live:
    """What a TorchScript module holds, asked as a dict is."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def get(self, name: str) -> Any:
        """What is held by that name now, or None."""
        return dict(self._held.items()).get(name)


def _links(model: nn.Module) -> list[tuple[Mapping[str, Any] | _Live, str, Any]]:
    links: list[tuple[Mapping[str, Any] | _Live, str, Any]] = []
    for module in model.modules():
        for registry in (module._modules, module._parameters):
            asked = registry if isinstance(registry, dict) else _Live(registry)
            links += [(asked, name, held) for name, held in registry.items()]
    return links
