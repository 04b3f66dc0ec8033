"""Randomness that a model's forward pass draws: dropout at work, and the generators it may draw from."""

from __future__ import annotations

import ctypes
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_OWN_TYPES = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def active_dropout(model: nn.Module) -> list[tuple[str, float]]:
    """(name, p) of every dropout module that drops something: in train mode, with p above 0."""
    return [
        (name, module.p)
        for name, module in model.named_modules()
        if isinstance(module, _DROPOUT) and module.training and module.p > 0
    ]


class OwnGenerators:
    """The generators that a model's modules own: attributes, or in a list, tuple or dict that is one.

    Those are torch.Generator, NumPy's Generator and RandomState, and random.Random.

    Args:
        model: whose modules, as they are now, are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = [vars(module) for module in model.modules()]
        self._find()

    def now(self) -> list[Any]:
        """Each of them once; the same list as before where none was exchanged, set or taken away.

        One that comes into a list in which there was none is not seen.
        """
        if self._have_changed():
            self._find()
        return self._generators

    def _find(self) -> None:
        self._counts = list(map(len, self._owners))
        #: What holds generators, or nothing yet: the attributes of a module, a name among them, the value.
        self._places: list[tuple[dict[str, Any], str, Any, list[Any]]] = []
        for attributes in self._owners:
            for name, value in attributes.items():
                found = _generators_in(value)
                if found or (value is None and name not in _OF_EVERY_MODULE):
                    self._places.append((attributes, name, value, found))
        self._generators = list({id(item): item for *_, found in self._places for item in found}.values())

    def _have_changed(self) -> bool:
        if list(map(len, self._owners)) != self._counts:
            return True
        for attributes, name, value, found in self._places:
            now = attributes.get(name)
            if now is not value or (found and not _are_same(found, _generators_in(now))):
                return True
        return False


def _are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _generators_in(value: Any) -> list[Any]:
    if isinstance(value, _OWN_TYPES):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [item for item in value if isinstance(item, _OWN_TYPES)]


class GivenGenerators:
    """Generators that are taken and put back together."""

    def __init__(self, given: Iterable[Any]) -> None:
        self._sources: list[_Source | _OfNumpy] = [_of_object(generator) for generator in given]

    def states(self) -> list[Any]:
        """Their states now, for `restore`."""
        return [source.get() for source in self._sources]

    def restore(self, states: Sequence[Any]) -> list[Any] | None:
        """Sets those back that have moved since; gives the states they were in, or None if none has."""
        now = self.states()
        have_moved = [not _equal(found, state) for found, state in zip(now, states, strict=True)]
        for source, state, has_moved in zip(self._sources, states, have_moved, strict=True):
            if has_moved:
                source.set(state)
        return now if any(have_moved) else None

    def have_changed(self, states: Sequence[Any]) -> bool:
        """Whether one is in another state by now."""
        return not all(
            _equal(source.get(), state) for source, state in zip(self._sources, states, strict=True)
        )


class Generators(GivenGenerators):
    """The generators that a forward pass may draw from, taken and put back together.

    torch's of the CPU and of ``devices``, Python's and NumPy's of the process, and those in ``own``.
    """

    def __init__(self, devices: Iterable[torch.device] = (), own: Iterable[Any] = ()) -> None:
        super().__init__(own)
        # Functions are looked up at each call: tests and other libraries replace some of them.
        self._sources += [
            _Source(lambda: torch.get_rng_state(), lambda state: torch.set_rng_state(state)),
            _Source(lambda: random.getstate(), lambda state: random.setstate(state)),
            _OfNumpy(),
            *(_of_device(device) for device in devices if device.type != "cpu"),
        ]

    def seed(self, *entropy: int) -> None:
        """Seeds those of the process, each by these numbers of its own."""
        of_torch, of_numpy, of_python = np.random.SeedSequence(entropy).generate_state(3).tolist()
        torch.manual_seed(of_torch)
        np.random.seed(of_numpy)
        random.seed(of_python)


@contextmanager
def seeded(model: nn.Module, *entropy: int) -> Iterator[None]:
    """A context in which random numbers of the process (dropout) derive from these, whoever ran before.

    Args:
        model: on whose devices they are drawn, too.
        entropy: numbers of at least 0.
    """
    generators = Generators({parameter.device for parameter in model.parameters()})
    states = generators.states()
    generators.seed(*entropy)
    try:
        yield
    finally:
        generators.restore(states)


class _Source(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], object]


class _OfNumpy:
    """NumPy's generator of the process, whose whole state takes 30 us: not read where it stands still.

    A draw moves the words of the Mersenne twister, but for the second of a pair of normal variates, which
    waits beside them. So if none waited, equal words mean an equal state.
    """

    _NUM_BYTES = 625 * 4  # of the twister's words and its position, behind the address that NumPy tells

    def __init__(self) -> None:
        self._known: tuple[bytes, dict[str, Any]] | None = None

    def get(self) -> dict[str, Any]:
        words = self._words()
        if self._known is not None and words == self._known[0]:
            return self._known[1]
        state: dict[str, Any] = np.random.get_state(legacy=False)
        self._known = None if words is None or state["has_gauss"] else (words, state)
        return state

    def set(self, state: dict[str, Any]) -> None:
        np.random.set_state(state)

    def _words(self) -> bytes | None:
        bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
        return (
            ctypes.string_at(bits.ctypes.state_address, self._NUM_BYTES)
            if type(bits) is np.random.MT19937
            else None
        )


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
    if left is right:
        return True
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return bool(left == right)
