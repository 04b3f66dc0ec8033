"""Randomness that a model's forward pass draws: dropout at work, and the generators it may draw from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_OWN_TYPES = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def active_dropout(model: nn.Module) -> list[tuple[str, float]]:
    """(name, p) of every dropout module that drops something: in train mode, with p above 0."""
    return [
        (name, module.p)
        for name, module in model.named_modules()
        if isinstance(module, _DROPOUT) and module.training and module.p > 0
    ]


def own_generators(model: nn.Module) -> list[Any]:
    """Generators that modules hold as attributes, or in a list, tuple or dict that is one, each once.

    Those are torch.Generator, NumPy's Generator and RandomState, and random.Random.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            values: Iterable[Any] = (value,)
            if isinstance(value, (list, tuple)):
                values = value
            elif isinstance(value, dict):
                values = value.values()
            found.update((id(item), item) for item in values if isinstance(item, _OWN_TYPES))
    return list(found.values())


class Generators:
    """The generators that a forward pass may draw from, taken and put back together.

    torch's of the CPU and of ``devices``, Python's and NumPy's of the process, and those in ``own``.
    """

    def __init__(self, devices: Iterable[torch.device] = (), own: Iterable[Any] = ()) -> None:
        # Functions are looked up at each call: tests and other libraries replace some of them.
        self._sources = [
            _Source(lambda: torch.get_rng_state(), lambda state: torch.set_rng_state(state)),
            _Source(lambda: random.getstate(), lambda state: random.setstate(state)),
            _Source(lambda: np.random.get_state(legacy=False), lambda state: np.random.set_state(state)),
            *(_of_device(device) for device in devices if device.type != "cpu"),
            *map(_of_object, own),
        ]

    def states(self) -> list[Any]:
        """Their states now, for `restore`."""
        return [source.get() for source in self._sources]

    def restore(self, states: Sequence[Any]) -> None:
        """Sets those back that are in another state by now."""
        for source, state in zip(self._sources, states, strict=True):
            if not _equal(source.get(), state):
                source.set(state)

    def have_changed(self, states: Sequence[Any]) -> bool:
        """Whether one is in another state by now."""
        return not all(
            _equal(source.get(), state) for source, state in zip(self._sources, states, strict=True)
        )


class _Source(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], object]


def _of_device(device: torch.device) -> _Source:
    module = torch.get_device_module(device)
    return _Source(lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device))


def _of_object(generator: Any) -> _Source:
    if isinstance(generator, torch.Generator):
        return _Source(generator.get_state, generator.set_state)
    if isinstance(generator, random.Random):
        return _Source(generator.getstate, generator.setstate)
    if isinstance(generator, np.random.RandomState):
        return _Source(lambda: generator.get_state(legacy=False), generator.set_state)
    bits = generator.bit_generator
    return _Source(lambda: bits.state, lambda state: setattr(bits, "state", state))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return bool(left == right)
