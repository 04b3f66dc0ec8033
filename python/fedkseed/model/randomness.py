"""Randomness that a model's forward pass draws: dropout at work, and the states of torch's generators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def active_dropout(model: nn.Module) -> list[tuple[str, float]]:
    """(name, p) of every dropout module that drops something: in train mode, with p above 0."""
    return [
        (name, module.p)
        for name, module in model.named_modules()
        if isinstance(module, _DROPOUT) and module.training and module.p > 0
    ]


class GeneratorStates:
    """States of torch's random number generators as they are now: the CPU's and those of ``devices``."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._of_cpu = torch.get_rng_state()
        self._of_devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type != "cpu"
        }

    def restore(self) -> None:
        """Sets the generators back to these states."""
        torch.set_rng_state(self._of_cpu)
        for device, state in self._of_devices.items():
            torch.get_device_module(device).set_rng_state(state, device)

    def have_changed(self) -> bool:
        """Whether a generator is in another state by now."""
        now = GeneratorStates(self._of_devices)
        return not torch.equal(self._of_cpu, now._of_cpu) or any(
            not torch.equal(state, now._of_devices[device]) for device, state in self._of_devices.items()
        )
