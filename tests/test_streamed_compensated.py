"""Compensated streamed weights: small updates stay, forwards read them, and a state resumes their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.small_model import same_bytes, weights_of
from support.streamed_models import LanguageModel, TiedModel, build, loss_of, make_ids, side_losses
from torch import Tensor, nn

import fedkseed_kernels
from fedkseed import ZOSGD, FedKSeedSGD, SeedPool, Streamed
from fedkseed_kernels.backends import widening
from fedkseed_kernels.contract import arithmetic

SEED, EPS, LR = 7, 1e-2, 2e-3
COMPENSATED = Streamed(compensated=True)
WIDE = Streamed(compensated=True, compute_dtype=torch.float32)


def residuals_of(optimizer: Any) -> list[Tensor]:
    found: list[Tensor] = optimizer.state_dict()["fedkseed"]["storage_state"]["residuals"]
    return found


def distance(tensors: list[Tensor], exact: list[Tensor]) -> float:
    return sum(float((a.double() - b).square().sum()) for a, b in zip(tensors, exact, strict=True)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_half_a_unit_stay(dtype: torch.dtype) -> None:
    ids, pool = make_ids(), SeedPool(SEED, 64)
    compensated, plain = build(TiedModel, dtype), build(TiedModel, dtype)
    start = [w.double() for w in weights_of(compensated)]
    lost = {}
    for model, storage in ((compensated, COMPENSATED), (plain, Streamed())):
        optimizer = FedKSeedSGD(model, LR / 100, EPS, pool, storage=storage)
        for _ in range(60):
            optimizer.step(lambda model=model: loss_of(model, ids))
        exact = [w.clone() for w in start]
        seeds = [int(seed) for seed in pool.seeds]
        fedkseed_kernels.seed_axpy_(exact, seeds, optimizer.coefficients.tolist())
        values = [w.float() for w in weights_of(model)]
        if storage is COMPENSATED:
            for weight, residual, value in zip(
                weights_of(model), residuals_of(optimizer), values, strict=True
            ):
                widening.write_value(weight, residual, value)
        lost[storage] = distance(values, exact) / distance(start, exact)
    assert lost[COMPENSATED] < 0.01
    assert lost[Streamed()] > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [COMPENSATED, WIDE], ids=["as stored", "in fp32"])
def test_forwards_read_the_residuals(storage: Streamed, dtype: torch.dtype) -> None:
    """Steps are those of an fp32 model whose weights are the values; as stored, rounded to 16 bits once."""
    model, ids = build(TiedModel, dtype), make_ids()
    values = build(TiedModel, dtype).float()
    optimizer = ZOSGD(model, LR, EPS, seed=SEED, storage=storage)
    for step, seed in enumerate(int(s) for s in SeedPool(SEED, 4).seeds):
        optimizer.step(lambda: loss_of(model, ids))

        def evaluate(perturbed: nn.Module) -> Tensor:
            return loss_of(perturbed if storage is WIDE else perturbed.to(dtype), ids)

        losses = side_losses(values, seed, optimizer.eps, evaluate)
        (g,) = optimizer.projected_grads
        assert g == pytest.approx((losses[0] - losses[1]) / (2 * optimizer.eps), rel=1e-6), step
        fedkseed_kernels.perturb_([p.data for p in values.parameters()], seed, -LR * g)
        if dtype == torch.float16:  # the split rounds below 2^-14 (contract, section 6.5)
            for value, weight, residual in zip(
                values.parameters(), model.parameters(), residuals_of(optimizer), strict=True
            ):
                widening.write_value(weight.data, residual, value.data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_those_of_the_reference(dtype: torch.dtype) -> None:
    """All weights of 16 bits but NaN, with residuals of both signs."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    weights = patterns.view(dtype)
    residuals = (patterns.int() * 40503 % 65536 - 32768).to(torch.int16)
    residuals[weights.isinf()] = 0
    is_number = ~weights.isnan()
    weights, residuals = weights[is_number], residuals[is_number]
    values = torch.full(weights.shape, float("nan"))
    widening.write_value(weights, residuals, values)
    name = str(dtype).removeprefix("torch.")
    expected = arithmetic.value(weights.view(torch.uint16).numpy(), residuals.numpy(), name)
    assert torch.equal(values.view(torch.int32), torch.from_numpy(expected.view("int32")))


@pytest.mark.parametrize("storage", [COMPENSATED, WIDE], ids=["as stored", "in fp32"])
def test_a_resumed_run_goes_on_with_the_same_bits(storage: Streamed) -> None:
    ids = make_ids()
    model, other = build(LanguageModel, torch.bfloat16), build(LanguageModel, torch.bfloat16, seed=9)
    optimizer = ZOSGD(model, LR, EPS, seed=SEED, storage=storage)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model, ids))
    other.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    resumed = ZOSGD(other, LR, EPS, seed=SEED, storage=storage)
    resumed.load_state_dict(saved)
    for _ in range(3):
        assert optimizer.step(lambda: loss_of(model, ids)) == resumed.step(lambda: loss_of(other, ids))
    assert same_bytes(weights_of(model), weights_of(other))
    assert same_bytes(residuals_of(optimizer), residuals_of(resumed))
    assert any(bool(residual.any()) for residual in residuals_of(resumed))
    assert not same_bytes(saved["fedkseed"]["storage_state"]["residuals"], residuals_of(optimizer))


def test_wide_weights_have_no_residuals() -> None:
    model = build(TiedModel, torch.bfloat16)
    model.norm.double()
    model.head.float()  # tied to the embedding
    optimizer = ZOSGD(model, LR, storage=COMPENSATED)
    shapes = [r.shape for r in residuals_of(optimizer)]
    assert shapes == [p.shape for name, p in model.named_parameters() if name.startswith("layers")]


@pytest.mark.parametrize(
    "damaged", [{}, {"residuals": 3}, {"residuals": []}, {"residuals": [torch.zeros(2)], "num_passes": 1}]
)
def test_a_damaged_state_changes_nothing(damaged: dict[str, Any]) -> None:
    optimizer = ZOSGD(build(LanguageModel, torch.bfloat16), LR, storage=COMPENSATED)
    before = residuals_of(optimizer)
    state = optimizer.state_dict()
    state["fedkseed"]["storage_state"] = damaged
    with pytest.raises(ValueError, match="expected (a storage state|residuals)"):
        optimizer.load_state_dict(state)
    assert same_bytes(before, residuals_of(optimizer))


def test_residuals_are_not_rounded_at_random() -> None:
    with pytest.raises(ValueError, match="expected compensated=True or rounding='stochastic', got both"):
        Streamed(compensated=True, rounding="stochastic")
