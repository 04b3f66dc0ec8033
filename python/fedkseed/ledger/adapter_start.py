"""The start of LoRA's low-rank matrices as a rule: a seed makes them, with the same bits on every machine.

lora_A of a linear layer with n inputs is z / sqrt(n), z the noise of the seed with the parameter's manifest
index as stream (noise contract, sections 4 and 6.1); lora_B is zeros, so the model computes as before.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

import fedkseed_kernels
from fedkseed.ledger.origin import AdapterStart, OriginError
from fedkseed.model.manifest import ModelParameters

_MATRIX = re.compile(r"(?:.*\.)?lora_([AB])\.[^.]+\.weight")
#: Of every parameter that LoRA adds.
MARK = "lora_"


@torch.no_grad()
def start_adapter(model: nn.Module, seed: int) -> AdapterStart:
    """Fills the low-rank matrices of a model with adapters (`peft.get_peft_model`) by the rule.

    Args:
        model: with LoRA beside linear layers; its own weights are in one dtype.
        seed: in [0, 2^64).

    Returns:
        What an `Origin` says of it.

    Mutates: every lora_A and lora_B; nothing if an error is raised.

    Raises:
        OriginError: no adapter, one with more than these matrices, weights of several dtypes, or another
            seed.
        TypeError, ValueError: as `Manifest.of`.
    """
    named = ModelParameters.of(model).named
    start = AdapterStart(seed, base_dtype(model))
    matrices = []
    for stream, (name, weight) in enumerate(named):
        if MARK not in name:
            continue
        match = _MATRIX.fullmatch(name)
        if match is None or weight.ndim != 2:
            raise OriginError(
                f"expected LoRA beside linear layers, got {name} of shape {tuple(weight.shape)}, which the "
                "rule does not make; store the adapter's start instead (AdapterStart())"
            )
        matrices.append((stream, match[1], weight))
    for stream, letter, weight in matrices:
        weight.zero_()
        if letter == "A":
            scale = 1 / math.sqrt(weight.shape[1])
            fedkseed_kernels.seed_axpy_([weight], [seed], [scale], streams=[stream])
    return start


def base_dtype(model: nn.Module) -> str:
    """The dtype of the weights that adapters stand beside, a name out of `DTYPE_CODES`.

    Raises:
        OriginError: a model without adapters, or weights of several dtypes.
    """
    named = ModelParameters.of(model).named
    if not any(MARK in name for name, _ in named):
        raise OriginError(
            f"expected a model with LoRA's matrices, got {type(model).__name__} without; "
            "add them first (peft.get_peft_model)"
        )
    found = sorted({str(weight.dtype).removeprefix("torch.") for name, weight in named if MARK not in name})
    if len(found) != 1:
        raise OriginError(f"expected a base with weights of one dtype, got {', '.join(found) or 'none'}")
    return found[0]
