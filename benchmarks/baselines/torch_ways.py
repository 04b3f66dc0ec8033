"""The simplest ways to do the same in torch: noise in a temporary, then one in-place addition."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def axpy_(parameters: Iterable[torch.nn.Parameter], seed: int, coeff: float) -> None:
    """w <- w + coeff z(seed) in place: `randn_like`, then `add_`. One temporary of the parameter's size."""
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data.add_(torch.randn_like(parameter.data), alpha=coeff)


def rademacher_axpy_(parameters: Iterable[torch.nn.Parameter], seed: int, coeff: float) -> None:
    """The same with z = +1 or -1 from `bernoulli_`."""
    torch.manual_seed(seed)
    for parameter in parameters:
        z = torch.empty_like(parameter.data).bernoulli_(0.5).mul_(2).sub_(1)
        parameter.data.add_(z, alpha=coeff)


def noise(parameters: Iterable[torch.nn.Parameter], seed: int) -> None:
    """Only draws the noise, one parameter at a time, and drops it: what no torch pass can avoid."""
    torch.manual_seed(seed)
    for parameter in parameters:
        torch.randn_like(parameter.data)
