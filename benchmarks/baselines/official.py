"""The weight passes of the official FedKSeed code, written again from its algorithm.

The official optimizer (FedKSeed, arXiv 2312.06353, itself after MeZO, arXiv 2305.17333) makes its noise again
for every pass: it seeds torch's global generator, then walks the trainable parameters in order and draws
z = torch.normal(mean=0, std=1) in the parameter's shape, device and dtype. Each pass rebinds `.data` to a new
tensor, so its temporaries have the parameter's size:

    perturb    w <- w + (scaling_factor eps) z
    update     w <- w - lr (g z + weight_decay w)       names without "bias", "layer_norm", "layernorm"
               w <- w - lr (g z)                        the others
    rebuild    one update after the other, for every seed of the pool with g != 0

The order of operations and the number of temporaries are the official ones; the decay term is computed even
when weight_decay is 0. `decay_terms=False` uses the second form for every parameter: how fast the official
pass would be if it left the term out. Not here: the copies of the model that the official server makes before
a rebuild.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

NamedParameters = Sequence[tuple[str, torch.nn.Parameter]]

_NOT_DECAYED = ("bias", "layer_norm", "layernorm")


def perturb_(named_parameters: NamedParameters, seed: int, scaling_factor: float, zo_eps: float) -> None:
    """w <- w + (scaling_factor zo_eps) z(seed) for every parameter, whose storage is replaced."""
    torch.manual_seed(seed)
    for _, parameter in named_parameters:
        z = _noise_like(parameter)
        parameter.data = parameter.data + scaling_factor * zo_eps * z


def update_(
    named_parameters: NamedParameters,
    seed: int,
    grad: float,
    lr: float,
    weight_decay: float = 0.0,
    *,
    decay_terms: bool = True,
) -> None:
    """w <- w - lr (grad z(seed) + weight_decay w) for every parameter, whose storage is replaced.

    Args:
        decay_terms: False leaves the decay term out instead of computing it with weight_decay = 0.
    Raises:
        ValueError: weight_decay without decay_terms.
    """
    if weight_decay != 0 and not decay_terms:
        raise ValueError(
            f"expected weight_decay 0 without decay terms, got {weight_decay}; pass decay_terms=True"
        )
    torch.manual_seed(seed)
    for name, parameter in named_parameters:
        z = _noise_like(parameter)
        if decay_terms and is_decayed(name):
            parameter.data = parameter.data - lr * (grad * z + weight_decay * parameter.data)
        else:
            parameter.data = parameter.data - lr * (grad * z)


def rebuild_(
    named_parameters: NamedParameters,
    seed_pool: Mapping[int, float],
    lr: float,
    weight_decay: float = 0.0,
    *,
    decay_terms: bool = True,
) -> None:
    """One `update_` for every (seed, accumulated grad) of the pool, in its order; a grad of 0 is skipped."""
    for seed, grad in seed_pool.items():
        if grad != 0:
            update_(named_parameters, seed, grad, lr, weight_decay, decay_terms=decay_terms)


def is_decayed(name: str) -> bool:
    """Whether the official update computes the decay term for a parameter of this name."""
    return not any(part in name for part in _NOT_DECAYED)


def official_seed(seed: int) -> int:
    """The seed of torch's generator that stands for a candidate seed: torch takes 63 bits."""
    return seed >> 1


def _noise_like(parameter: torch.nn.Parameter) -> torch.Tensor:
    data = parameter.data
    return torch.normal(mean=0, std=1, size=data.size(), device=data.device, dtype=data.dtype)
