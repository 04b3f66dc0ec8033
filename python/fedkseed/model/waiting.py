"""Weights that wait, perturbed, for the next step: whoever reads them in between gets them clean."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Waiting(Protocol):
    """Weights that may stand perturbed between two steps."""

    #: Whether they stand perturbed now, for a step to come.
    is_waiting: bool

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """The weights themselves."""

    def flush(self) -> None:
        """Puts clean weights back if they wait; several threads may call this at once."""


_watched: weakref.WeakSet[Waiting] = weakref.WeakSet()


def flush_before_reads(model: nn.Module, weights: Waiting, owner: object) -> None:
    """Has the weights flushed by whatever reads or replaces them through the model, as long as `owner` lives.

    That is: a forward, ``state_dict`` or ``load_state_dict`` of the model or of any of its modules. A copy or
    a pickle of the model is refused while the weights wait. When the owner dies the weights are flushed and
    the hooks removed; the model is not kept alive by them.

    Raises:
        ValueError: a module compiled in place, whose compiled code may know no hooks.
        TypeError: a TorchScript module, which knows none. No hook is made then.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"expected modules that tell when they are read, got {name or 'the model itself'} "
                f"({type(module).__name__}), TorchScript, which knows no hooks; give the optimizer the model "
                "that was scripted or traced, or take Inplace()"
            )
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"expected a model that tells when it is read, got {name or 'one'} compiled in place "
                "(.compile()); give the optimizer torch.compile(model), or take Inplace()"
            )
    hook = _FlushHook(weights)
    handles: list[RemovableHandle] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(hook, prepend=True))
        handles.append(module.register_state_dict_pre_hook(hook))  # type: ignore[no-untyped-call]
        handles.append(module.register_load_state_dict_pre_hook(hook))  # type: ignore[no-untyped-call]
    _watched.add(weights)
    # The weights are not read again at the interpreter's end.
    weakref.finalize(owner, _end, weights, handles).atexit = False


def flush_waiting(tensors: Iterable[torch.Tensor]) -> None:
    """Flushes what waits on any of these tensors: for those who read or write them past the model's hooks."""
    used = {id(tensor) for tensor in tensors}
    for weights in list(_watched):
        if weights.is_waiting and not used.isdisjoint(map(id, weights.tensors)):
            weights.flush()


def _end(weights: Waiting, handles: list[RemovableHandle]) -> None:
    try:
        weights.flush()
    finally:
        for handle in handles:
            handle.remove()


class _FlushHook:
    """Flushes the weights before the read that it is a hook of."""

    def __init__(self, weights: Waiting) -> None:
        self._weights = weakref.ref(weights)

    def __call__(self, *_: Any) -> None:
        weights = self._weights()
        if weights is not None and weights.is_waiting:
            weights.flush()

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        weights = self._weights()
        if weights is not None and weights.is_waiting:
            raise RuntimeError(
                "expected clean weights to copy, got a model whose weights wait, perturbed, for the next "
                "step of an optimizer; call optimizer.flush() first"
            )
        return _NoHook, ()


class _NoHook:
    """What a copy of the model has in the hook's place: no optimizer perturbs it."""

    def __call__(self, *_: Any) -> None:
        pass
