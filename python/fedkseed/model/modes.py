"""What a model has beside its parameters, as plain values: modes of its modules, and buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Modes:
    """Which modules of a model are in train mode; may be sent to another process.

    Args:
        model: as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._is_training = {name: module.training for name, module in model.named_modules()}

    def restore(self, model: nn.Module) -> None:
        """Puts the modules of that name into the same modes."""
        for name, module in model.named_modules():
            module.training = self._is_training.get(name, module.training)


def buffers_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Copies of its buffers, those that are not saved among them."""
    named = model.named_buffers(remove_duplicate=False)
    return {name: buffer.detach().cpu().clone() for name, buffer in named if not buffer.is_meta}


@torch.no_grad()
def set_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Gives the buffers of these names these values.

    Raises:
        RuntimeError: shapes that differ.
    """
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in buffers:
            buffer.copy_(buffers[name])
