"""A hundred architectures of transformers in three storage modes, two steps each: served, or refused by name.

tests/test_architectures.py goes through all modes and what interrupts a step, with twelve others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from support.many_architectures import ROWS, ModelRow
from support.small_model import same_bytes, weights_of
from support.storage_reference import ChainedReference, InplaceReference, StreamedReference, same_weights
from support.streamed_models import projected, side_losses
from torch import nn

from fedkseed import ZOSGD, Inplace, Streamed
from fedkseed_kernels.contract import derived

# transformers 5.20 scripts functions of three of them when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SEED, LR = 17, 2e-2
EPS = {torch.float64: float(np.float32(1e-3)), torch.float32: float(np.float32(1e-2))}
# In place, the minus side is rounded twice. An fp32 loss of about 4 has a last bit of 5e-7: g, of 2e-5.
TOLERANCE = {torch.float64: {"rel": 1e-6, "abs": 1e-9}, torch.float32: {"rel": 0, "abs": 2e-4}}

MODES = {
    "in place": (Inplace(), InplaceReference),
    "chained": (Inplace(chained=True), ChainedReference),
    "streamed": (Streamed(), StreamedReference),
}
SERVED = [(row, mode) for row in ROWS for mode in MODES if not (mode == "streamed" and row.refused)]
REFUSED = [row for row in ROWS if row.refused]


def test_how_many_each_mode_serves() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert Counter(mode for _, mode in SERVED) == {"in place": 99, "chained": 99, "streamed": 92}
    assert {row.name.partition("For")[0] for row in REFUSED} == {
        "Deberta",
        "DebertaV2",
        "Detr",
        "Perceiver",
        "ProphetNet",
        "Rwkv",
        "Whisper",
    }


@lru_cache(maxsize=1)
def expected_gradient(row: ModelRow, seed: int) -> float:
    """g of two copies of the model, one at w + eps z and one at w - eps z."""
    model, batch, eps = row.make_model(), row.make_batch(), EPS[row.dtype]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return projected(side_losses(model, seed, eps, lambda copy: row.loss(copy, batch), frozen=frozen), eps)


def buffers_of(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same_buffers(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> bool:
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.few(13)
@pytest.mark.parametrize(
    ("row", "mode"), [pytest.param(row, mode, id=f"{row.name}-{mode}") for row, mode in SERVED]
)
def test_two_steps_are_those_of_perturbed_copies(row: ModelRow, mode: str) -> None:
    options, kind = MODES[mode]
    model, batch, eps = row.make_model(), row.make_batch(), EPS[row.dtype]
    buffers = buffers_of(model)
    reference: Any = kind(model, eps, LR, decay=0.0, seed=SEED)
    optimizer = ZOSGD(model, LR, eps, seed=SEED, storage=options)
    losses: list[float] = []

    def closure() -> float:
        losses.append(row.loss(model, batch))
        return losses[-1]

    first, second, third = (int(seed) for seed in derived.candidate_seeds(SEED, 3))
    for seed, next_seed in ((first, second), (second, third)):
        losses.clear()
        optimizer.step(closure)
        (g,) = optimizer.projected_grads
        sides = reference.losses(seed, lambda copy: row.loss(copy, batch))
        assert losses == list(sides)
        assert g == projected(losses, eps) != 0
        if seed == first:
            assert g == pytest.approx(expected_gradient(row, seed), **TOLERANCE[row.dtype])
        reference.update(seed, g, next_seed)
    optimizer.flush()
    reference.flush()
    assert same_weights(model, reference.model)
    assert same_buffers(buffers, buffers_of(model))


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_streamed_weights_refuse_by_name_and_change_nothing(row: ModelRow) -> None:
    model, batch = row.make_model(), row.make_batch()
    weights, places = weights_of(model), [parameter.data_ptr() for parameter in model.parameters()]
    buffers = buffers_of(model)
    optimizer = ZOSGD(model, LR, storage=Streamed())
    named = rf"^expected {re.escape(str(row.refused))} to be read .*; use storage=Inplace\(\) for this model$"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=named):
            optimizer.step(lambda: row.loss(model, batch))
        assert same_bytes(weights, weights_of(model))
        assert [parameter.data_ptr() for parameter in model.parameters()] == places
        assert same_buffers(buffers, buffers_of(model))
