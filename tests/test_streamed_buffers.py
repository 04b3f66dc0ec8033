"""Buffers of 16 bits where streamed weights compute in fp32: as in a model that was converted to fp32."""

from __future__ import annotations

import pytest
import torch
from support.small_model import same_bytes
from support.streamed_models import projected, side_losses
from torch import Tensor, nn

from fedkseed import ZOSGD, Streamed
from fedkseed_kernels.contract import derived

SEED, EPS = 7, 2.0**-7
WIDE = Streamed(compute_dtype=torch.float32)


class Packed(nn.Module):
    """A quantised layer: integers, and scales that its kernel reads as they are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ones(4, dtype=torch.int32))
        self.register_buffer("scales", torch.full((4,), 0.3))
        self.seen: list[torch.dtype] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(self.scales.dtype)
        return hidden * (self.packed * self.scales).to(hidden.dtype)


class Table(nn.Module):
    """Buffers that are multiplied with what weights gave; one of them is also another module's."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("shared", shared)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("nothing", None)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed: Tensor = hidden @ self.shared * self.mask
        return mixed


def make_model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    shared = torch.randn(4, 4)
    layers = (
        nn.BatchNorm1d(4, affine=False, momentum=1.0),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        Table(shared),
        Packed(),
        Table(shared),
    )
    model = nn.Sequential(*layers).to(dtype).eval()
    model[5].shared = model[3].shared
    return model


def loss_of(model: nn.Module) -> Tensor:
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
    return (model(inputs).double() - 1).square().mean()


def step(model: nn.Module) -> float:
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=WIDE)
    optimizer.step(lambda: loss_of(model))
    (g,) = optimizer.projected_grads
    return g


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_g_is_that_of_the_converted_model_and_buffers_stay(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    buffers = list(model.buffers())
    before, places = [buffer.clone() for buffer in buffers], [buffer.data_ptr() for buffer in buffers]
    g = step(model)
    (seed,) = derived.candidate_seeds(SEED, 1)
    losses = side_losses(model, int(seed), EPS, loss_of, dtype=torch.float32)
    assert g == projected(losses, EPS) != 0
    assert set(model[4].seen) == {dtype}
    assert [id(buffer) for buffer in model.buffers()] == [id(buffer) for buffer in buffers]
    assert [buffer.dtype for buffer in buffers] == [buffer.dtype for buffer in before]
    assert [buffer.data_ptr() for buffer in buffers] == places
    assert same_bytes(buffers, before)


def test_statistics_that_moved_are_kept_in_16_bits() -> None:
    model = make_model(torch.bfloat16)
    model[0].train()
    step(model)
    wide = make_model(torch.float32)
    wide[0].train()
    loss_of(wide)
    assert torch.equal(model[0].running_mean, wide[0].running_mean.bfloat16())
    assert torch.equal(model[0].running_var, wide[0].running_var.bfloat16())


def test_buffers_are_put_back_when_a_closure_raises() -> None:
    model = make_model(torch.bfloat16)
    before = [buffer.clone() for buffer in model.buffers()]

    def closure() -> Tensor:
        assert model[2].running_mean.dtype == torch.float32
        raise KeyError("in a closure")

    with pytest.raises(KeyError, match="in a closure"):
        ZOSGD(model, 0.0, EPS, seed=SEED, storage=WIDE).step(closure)
    assert [buffer.dtype for buffer in model.buffers()] == [buffer.dtype for buffer in before]
    assert same_bytes(list(model.buffers()), before)


def test_buffers_of_other_models_are_left_alone() -> None:
    """Nothing is widened where no weight is."""
    model = make_model(torch.float32)
    model[4].scales = model[4].scales.bfloat16()
    model[4].packed = model[4].packed.long()
    step(model)
    assert set(model[4].seen) == {torch.bfloat16}
