"""What the halves of a paired evaluation must not share: buffers that move, casts of weights, statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkseed.model.buffers import Buffers, KeptBuffers
from fedkseed.storage.streamed.units import Unit


class Halves:
    """Keeps the two halves apart that a unit runs on one after the other.

    Each half meets the buffers that its own side left, from the evaluation's start on: a unit that runs again
    finds those of the plus half for the plus half. Afterwards they stand as the minus half left them. What is
    no part of a unit runs on both halves at once, and must not move or mix anything.

    Args:
        model: whose forward pass is evaluated.
        units: of it.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self._groups = _by_shared_buffers(units)
        self._plus: dict[Buffers, KeptBuffers] = {}
        inside = {id(module) for unit in units for module in unit.module.modules()}
        inside -= {id(unit.module) for unit in units if not unit.parameters}
        outside = [(name, module) for name, module in model.named_modules() if id(module) not in inside]
        self._outside = Buffers(outside)
        self._norms = [(name, module) for name, module in outside if isinstance(module, _BatchNorm)]

    def begin(self) -> None:
        """An evaluation begins: both sides meet the same buffers."""
        self._plus.clear()

    @contextmanager
    def half(self, unit: Unit, sign: int) -> Iterator[None]:
        """Around the unit's run on the plus half (sign 1), then on the minus half (-1)."""
        torch.clear_autocast_cache()  # by parameter, and those hold other weights now
        if sign < 0:
            yield
            return
        buffers = self._groups[unit]
        minus = buffers.keep()
        if buffers in self._plus:
            self._plus[buffers].restore()
        yield
        self._plus[buffers] = buffers.keep()
        minus.restore()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Around the model's forward pass, which runs on both halves but for the units.

        Raises:
            RuntimeError: a module outside of all units mixes the rows of the halves, or moves a buffer; names
                it.
        """
        for name, norm in self._norms:
            if norm.training or norm.running_mean is None:
                raise _refusal(f"{name} ({type(norm).__name__}) that normalises both halves together")
        kept = self._outside.keep()
        yield
        moved = kept.first_moved()
        if moved is not None:
            raise _refusal(f"one that moves its buffer {moved}, once for both halves")


def _refusal(got: str) -> RuntimeError:
    return RuntimeError(
        "expected modules without tuned weights to treat every row by itself in a paired step, got "
        f"{got}; call its eval(), or use Streamed(paired=False)"
    )


def _by_shared_buffers(units: Sequence[Unit]) -> dict[Unit, Buffers]:
    """For each unit the buffers of its modules, and of units with which it shares a module or a buffer."""
    groups: list[tuple[set[int], list[Unit]]] = []
    for unit in units:
        held = {id(part) for part in (*unit.module.modules(), *unit.module.buffers())}
        members = [unit]
        apart = []
        for ids, others in groups:
            if ids & held:
                held, members = held | ids, others + members
            else:
                apart.append((ids, others))
        groups = [*apart, (held, members)]
    found: dict[Unit, Buffers] = {}
    for _, members in groups:
        modules = [pair for unit in members for pair in unit.module.named_modules(prefix=unit.name)]
        found.update(dict.fromkeys(members, Buffers({id(m): (name, m) for name, m in modules}.values())))
    return found
