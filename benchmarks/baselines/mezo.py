"""The local step of MeZO as its paper's Algorithm 1 puts it (arXiv 2305.17333), in torch.

    perturb(c):  reset the generator with s; for each theta_i: z ~ N(0, 1), theta_i += c z
    step:        perturb(eps), l+;  perturb(-2 eps), l-;  perturb(eps)
                 g = (l+ - l-) / (2 eps);  perturb(-lr g)

Every pass draws the noise of a tensor again, in its dtype, and adds it in place: one temporary of the
tensor's size. `official.py` is the same step as FedKSeed's code makes it, with a new tensor for each
parameter and a decay term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


@torch.no_grad()
def step_(
    parameters: Sequence[torch.nn.Parameter],
    loss: Callable[[], torch.Tensor],
    seed: int,
    lr: float,
    eps: float,
) -> float:
    """One step in place along the noise of seed (in [0, 2^63)); returns g.

    Args:
        parameters: all on one device.
        loss: of the weights as they stand, one element.
    """
    _add_noise_(parameters, seed, eps)
    plus = float(loss())
    _add_noise_(parameters, seed, -2 * eps)
    minus = float(loss())
    _add_noise_(parameters, seed, eps)
    g = (plus - minus) / (2 * eps)
    _add_noise_(parameters, seed, -lr * g)
    return g


def _add_noise_(parameters: Sequence[torch.nn.Parameter], seed: int, scale: float) -> None:
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    for parameter in parameters:
        z = torch.empty_like(parameter).normal_(generator=generator)
        parameter.add_(z, alpha=scale)
