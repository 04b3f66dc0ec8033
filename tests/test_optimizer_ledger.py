"""The ledger that an optimizer's walk makes: the model that it rebuilds is the walk's, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.small_model import largest_difference, make_closure, make_model, weights_of
from torch import nn

from fedkseed import FedKSeedSGD, IdentityError, LedgerError, SeedPool

POOL = SeedPool(3, 16)
LR = 0.05
NUM_STEPS = 10
ROUNDED = 1e-6  # coefficients of order 1, rounded to fp32


def frozen_model(seed: int = 3) -> nn.Sequential:
    model = make_model(seed=seed)
    model[0].requires_grad_(False)
    return model


def walked(optimizer: Any, model: nn.Module) -> Any:
    closure = make_closure(model)
    for _ in range(NUM_STEPS):
        optimizer.step(closure)
    return optimizer


def difference(rebuilt: nn.Module, model: nn.Module) -> float:
    return largest_difference(weights_of(rebuilt), weights_of(model))


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("make", [make_model, frozen_model])
def test_the_ledger_rebuilds_the_walk(make: Callable[[], nn.Module], family: str) -> None:
    model, w0 = make(), make()
    optimizer = walked(FedKSeedSGD(model, LR, 1e-3, POOL, family=family), model)
    found = optimizer.ledger(w0, {"creator": "a test"})
    assert (found.seed_pool, found.family, found.notes) == (POOL, family, {"creator": "a test"})
    assert np.array_equal(found.coefficients, optimizer.coefficients.astype(np.float32))
    assert found.frozen == ((0, 1) if make is frozen_model else ())
    assert difference(w0, make()) == 0
    found.apply_(w0)
    assert difference(w0, model) < ROUNDED
    assert difference(w0, make()) > 0.3


def test_a_copy_made_before_the_first_step_is_a_w0() -> None:
    model = frozen_model()
    w0 = copy.deepcopy(model)
    optimizer = walked(FedKSeedSGD(model, LR, 1e-3, POOL), model)
    optimizer.ledger(w0).apply_(w0)
    assert difference(w0, model) < ROUNDED


Params = Callable[[nn.Module], Any]
LISTS: dict[str, Params] = {
    "what is tuned, by a filter": lambda model: [p for p in model.parameters() if p.requires_grad],
    "another order": lambda model: [p for p in model.parameters() if p.requires_grad][::-1],
    "groups": lambda model: [{"params": [p]} for p in model.parameters() if p.requires_grad],
}


@pytest.mark.parametrize("params", LISTS.values(), ids=LISTS)
def test_a_plain_list_is_refused(params: Params) -> None:
    """Such a ledger was off by as much as the model had moved: 0.84 in the first row."""
    model = frozen_model()
    optimizer = walked(FedKSeedSGD(params(model), LR, 1e-3, POOL), model)
    with pytest.raises(LedgerError, match="give the optimizer the model, or model= beside the list"):
        optimizer.ledger(frozen_model())


def a_part(model: nn.Module) -> Any:
    return [parameter for name, parameter in model.named_parameters() if name == "2.weight"]


@pytest.mark.parametrize("params", [*LISTS.values(), a_part], ids=[*LISTS, "a part"])
def test_a_list_beside_its_model_is_right_whatever_its_order(params: Params) -> None:
    model, w0 = frozen_model(), frozen_model()
    if params is a_part:
        w0[2].bias.requires_grad_(False)
    optimizer = walked(FedKSeedSGD(params(model), LR, 1e-3, POOL, model=model), model)
    optimizer.ledger(w0).apply_(w0)
    assert difference(w0, model) < ROUNDED
    assert difference(w0, frozen_model()) > 0.1


def test_a_part_is_refused_where_w0_says_that_more_was_tuned() -> None:
    model = frozen_model()
    optimizer = FedKSeedSGD(a_part(model), LR, 1e-3, POOL, model=model)
    with pytest.raises(IdentityError, match=r"expected 2\.bias in w0 to be frozen .* to False"):
        optimizer.ledger(frozen_model())


def more(model: nn.Sequential) -> nn.Module:
    return model.append(nn.Linear(2, 2))


def fewer(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(model[0])


def renamed(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(nn.Identity(), *model)


def resized(model: nn.Sequential) -> nn.Module:
    model[2] = nn.Linear(9, 2).double()
    return model


def thawed(model: nn.Sequential) -> nn.Module:
    return model.requires_grad_(True)


def frozen_further(model: nn.Sequential) -> nn.Module:
    model[2].bias.requires_grad_(False)
    return model


def narrowed(model: nn.Sequential) -> nn.Module:
    model[2].bias.data = model[2].bias.data.bfloat16()
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (more, r"expected w0 to have the tuned model's 4 parameters, got 4\.weight after them"),
        (fewer, r"expected 2\.weight as parameter 2 of w0, got no parameter any more"),
        (renamed, r"expected 0\.weight as parameter 0 of w0, got 1\.weight in its place"),
        (resized, r"expected 2\.weight in w0 in shape \(1, 9\), got \(2, 9\)"),
        (thawed, r"expected 0\.weight in w0 to be frozen .* got it tuned; .* to False"),
        (
            frozen_further,
            r"expected 2\.bias in w0 to be tuned .* got it frozen; .* to True",
        ),
        (narrowed, r"expected 2\.bias in w0 in float64 as in the tuned model, got it in bfloat16"),
    ],
)
def test_a_w0_of_another_make_is_refused_by_the_parameter_that_differs(
    change: Callable[[nn.Sequential], nn.Module], message: str
) -> None:
    model = frozen_model()
    optimizer = FedKSeedSGD(model, LR, 1e-3, POOL)
    with pytest.raises(IdentityError, match=message):
        optimizer.ledger(change(frozen_model()))
    optimizer.ledger(frozen_model())


def of_its_memory(model: nn.Sequential) -> nn.Module:
    other = frozen_model()
    other[2].weight.data = model[2].weight.data
    return other


@pytest.mark.parametrize("w0", [lambda model: model, torch.compile, of_its_memory])
def test_the_tuned_model_is_no_w0(w0: Callable[[Any], Any]) -> None:
    model = frozen_model()
    optimizer = walked(FedKSeedSGD(model, LR, 1e-3, POOL), model)
    with pytest.raises(IdentityError, match=r"got the tuned one: they share 2\.weight; load the base"):
        optimizer.ledger(w0(model))


def test_frozen_weights_may_be_shared_with_w0() -> None:
    model, w0 = frozen_model(), frozen_model()
    w0[0] = model[0]
    optimizer = walked(FedKSeedSGD(model, LR, 1e-3, POOL), model)
    optimizer.ledger(w0).apply_(w0)
    assert difference(w0, model) < ROUNDED
