"""Tensors within what modules are called with and return: tuples, lists, dicts, dataclasses, nested."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with ``function`` applied to every tensor within: the same object if none has changed.

    Anything but tensors, tuples, lists, dicts and dataclasses is left as it is.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = {key: map_tensors(item, function) for key, item in value.items()}
        if all(changed[key] is value[key] for key in changed):
            return value
        rebuilt = copy.copy(value)
        for key, item in changed.items():
            rebuilt[key] = item
        return rebuilt
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = {name: map_tensors(item, function) for name, item in fields.items()}
        if all(changed[name] is fields[name] for name in fields):
            return value
        twin = copy.copy(value)
        for name, item in changed.items():
            object.__setattr__(twin, name, item)
        return twin
    return value
