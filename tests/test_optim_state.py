"""State of the optimizers: runs that go on with the same bits, and states that are refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small_model import make_closure, make_model, same_bytes, weights_of
from torch import nn

from fedkseed import ZOSGD, FedKSeedSGD, Inplace, SeedPool

POOL = SeedPool(2**64 - 3, 32)


def new_zosgd(model: nn.Sequential) -> ZOSGD:
    head = {"params": list(model[2].parameters()), "weight_decay": 0.0}
    body = {"params": list(model[0].parameters())}
    return ZOSGD(
        [body, head],
        0.05,
        1e-2,
        seed=2**64 - 1,
        weight_decay=0.1,
        num_directions=3,
        max_abs_g=2.0,
        max_loss_gap=0.3,
        model=model,
        storage=Inplace(),
    )


def new_fedkseed(model: nn.Sequential) -> FedKSeedSGD:
    return FedKSeedSGD(model, 0.05, 1e-2, POOL, max_abs_g=2.0, storage=Inplace())


@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [new_zosgd, new_fedkseed])
def test_ten_steps_are_five_and_five_after_a_resume(
    make: Callable[[nn.Module], Any], dtype: torch.dtype
) -> None:
    def start(seed: int) -> tuple[nn.Module, Any, Any]:
        model = make_model(dtype, seed, dropout=0.3).train()
        optimizer = make(model)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    def walk(model: nn.Module, optimizer: Any, scheduler: Any, num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            losses.append(optimizer.step(make_closure(model)))
            scheduler.step()
        return losses

    model, optimizer, scheduler = start(0)
    torch.manual_seed(9)
    losses = walk(model, optimizer, scheduler, 5)
    file = io.BytesIO()
    parts = (model, optimizer, scheduler)
    torch.save([*(part.state_dict() for part in parts), torch.get_rng_state()], file)
    losses += walk(model, optimizer, scheduler, 5)

    other, resumed, its_scheduler = start(1)  # other weights and random numbers
    torch.rand(7)
    file.seek(0)
    *states, rng_state = torch.load(file, weights_only=True)
    for part, state in zip((other, resumed, its_scheduler), states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(rng_state)
    assert walk(other, resumed, its_scheduler, 5) == losses[5:]
    assert same_bytes(weights_of(model), weights_of(other))
    assert len(set(losses)) == 10
    final, again = optimizer.state_dict(), resumed.state_dict()
    if make is new_fedkseed:
        coefficients = [s["fedkseed"].pop("coefficients") for s in (final, again)]
        assert torch.equal(*coefficients)
        assert coefficients[0].any()
    assert final == again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 1, got 0; construct the optimizer with those of the state"),
        ({"eps": 2e-3}, "a state with eps 0.002"),
        ({"num_directions": 2}, "num_directions 2, got 1"),
        ({"max_abs_g": 1.0}, "max_abs_g 1.0, got None"),
        ({"max_loss_gap": 1.0}, "max_loss_gap 1.0, got None"),
        ({"params": [torch.zeros(2), torch.zeros(2)]}, r"streams \[\[0, 1\]\], got \[\[0\]\]"),
    ],
)
def test_the_state_of_an_optimizer_made_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    state = ZOSGD([torch.zeros(2)], 0.1).state_dict()
    optimizer = ZOSGD(**{"params": [torch.zeros(2)], "lr": 0.7, **changes})
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda own: own.pop("num_drawn"),
        lambda own: own.update(num_skipped=-1),
        lambda own: own.update(num_drawn=0.5),
        lambda own: own.update(history=[3]),
        lambda own: own.update(history=[(32, 0.0)]),
        lambda own: own.update(coefficients=None),
        lambda own: own.update(coefficients=torch.zeros(31)),
        lambda own: own.update(coefficients=torch.full((32,), math.nan)),
        lambda own: own.update(schedule=[1, 99]),
        lambda own: own.update(optimizer="ZOSGD"),
    ],
)
def test_a_damaged_state_changes_nothing(damage: Callable[[dict[str, Any]], Any]) -> None:
    model = make_model()
    optimizer = FedKSeedSGD(model, 0.1, 1e-3, POOL)
    optimizer.step(make_closure(model))
    state = FedKSeedSGD(make_model(), 0.3, 1e-3, POOL).state_dict()
    damage(state["fedkseed"])
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match="expected"):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before


def test_a_state_of_other_groups_changes_nothing() -> None:
    model = make_model(torch.bfloat16)
    optimizer = ZOSGD(model, 0.1, 1e-2, storage=Inplace(rounding="stochastic"))
    state = optimizer.state_dict()
    optimizer.step(make_closure(model))
    before = str(optimizer.state_dict())
    for groups in ([], [{"params": [0]}], [{}]):
        with pytest.raises(ValueError, match="expected"):
            optimizer.load_state_dict({**state, "param_groups": groups})
    with pytest.raises(ValueError, match="damaged"):
        optimizer.load_state_dict({"fedkseed": state["fedkseed"]})
    assert str(optimizer.state_dict()) == before


def test_a_copy_is_refused() -> None:
    optimizer = ZOSGD([torch.zeros(2)], 0.1)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="load the state_dict"):
            copied(optimizer)
