"""ZOSGD: groups, streams, schedulers, warnings, what it refuses, and clean weights whatever happens."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.small_model import largest_difference, make_closure, make_model, same_bytes, weights_of
from torch import nn

import fedkseed_kernels
from fedkseed import ZOSGD, FedKSeedSGD, Inplace, Manifest, SeedPool

POOL = SeedPool(2**64 - 3, 32)


def test_it_minimises_and_its_seeds_are_those_of_a_pool() -> None:
    model = make_model()
    start, closure = weights_of(model), make_closure(model)
    first = float(closure().detach())
    optimizer = ZOSGD(model, lr=0.02, seed=21, num_directions=2)
    coefficients = []
    for _ in range(150):
        optimizer.step(closure)
        coefficients += [-(0.02 * g) / 2 for g in optimizer.projected_grads]
    assert float(closure().detach()) < 0.5 * first
    fedkseed_kernels.seed_axpy_(start, SeedPool(21, 300).seeds, coefficients)
    assert largest_difference(start, weights_of(model)) < 1e-13


def test_one_direction_of_zosgd_is_a_step_of_fedkseed_with_the_same_seed() -> None:
    model, other = make_model(dtype=torch.bfloat16), make_model(dtype=torch.bfloat16)
    options: dict[str, Any] = {"max_abs_g": 0.5, "max_loss_gap": 0.1, "storage": Inplace()}
    optimizer = ZOSGD(model, 0.1, 1e-2, seed=POOL.base_seed, **options)
    pooled = FedKSeedSGD(other, 0.1, 1e-2, POOL, **options)
    for index in range(6):
        assert optimizer.step(make_closure(model)) == pooled.step(make_closure(other), seed_index=index)
        assert pooled.history[-1] == (index, *optimizer.projected_grads)
    assert same_bytes(weights_of(model), weights_of(other))
    assert optimizer.num_skipped == pooled.num_skipped


def test_fedkseed_clips_and_skips() -> None:
    model = make_model()
    losses = iter([3.0, 1.0, 3.0, 2.5, 3.0, 2.999])
    optimizer = FedKSeedSGD(model, 0.1, 1.0, POOL, max_abs_g=0.1, max_loss_gap=1.5)
    for _ in range(3):
        optimizer.step(lambda: next(losses))
    gradients = [g for _, g in optimizer.history]
    below = np.nextafter(np.float32(0.1), np.float32(0))  # the fp32 next to 0.1 is above it
    assert gradients == [0.0, float(below), float(np.float32((3.0 - 2.999) / 2))]
    assert gradients[1] < 0.1
    assert optimizer.num_skipped == 1
    moved = {index: -0.1 * g for index, g in optimizer.history if g}
    assert {k: c for k, c in enumerate(optimizer.coefficients.tolist()) if c} == pytest.approx(moved)


@pytest.mark.parametrize("num_directions", [1, 3])
def test_all_evaluations_see_the_same_random_numbers_and_the_next_step_others(num_directions: int) -> None:
    seen = []

    def closure() -> float:
        seen.append(float(torch.rand(())))
        return 1.0

    torch.manual_seed(0)
    optimizer = ZOSGD([torch.zeros(3)], 0.1, num_directions=num_directions)
    optimizer.step(closure)
    optimizer.step(closure)
    after = float(torch.rand(()))
    torch.manual_seed(0)
    first, second, third = (float(torch.rand(())) for _ in range(3))
    assert seen == [first] * (2 * num_directions) + [second] * (2 * num_directions)
    assert after == third


def test_groups_have_their_own_lr_and_weight_decay() -> None:
    model = make_model()
    start = weights_of(model)
    optimizer = ZOSGD(
        [
            {"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.125},
            {"params": list(model[2].parameters())},
        ],
        lr=0.25,
        weight_decay=0.25,
        seed=6,
    )
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.125), (0.25, 0.25)]
    optimizer.step(make_closure(model))
    (g,) = optimizer.projected_grads
    for stream, (before, after) in enumerate(zip(start, weights_of(model), strict=True)):
        z = fedkseed_kernels.normal(
            before.shape, int(SeedPool(6, 1).seeds[0]), stream=stream, dtype=torch.float64
        )
        lr, decay = (0.5, 0.0625) if stream < 2 else (0.25, 0.0625)
        assert float((after - ((1 - decay) * before - lr * g * z)).abs().max()) < 1e-14


@pytest.mark.parametrize("lrs", [(0.1, 0.1), (0.1, 0.2)])
def test_the_model_beside_groups_numbers_the_parameters(lrs: tuple[float, float]) -> None:
    whole, grouped, listed = make_model(), make_model(), make_model()
    for model in (whole, listed):
        model[0].weight.requires_grad_(False)
    groups = [
        {"params": [grouped[2].bias, grouped[0].bias], "lr": lrs[0]},
        {"params": [grouped[2].weight], "lr": lrs[1]},
    ]
    first = ZOSGD(whole, 0.1, seed=4)
    second = ZOSGD(groups, 0.1, seed=4, model=torch.compile(grouped))
    names = [(name, p) for name, p in listed.named_parameters() if p.requires_grad]
    third = ZOSGD(names, 0.1, seed=4, model=listed)
    assert first.manifest == second.manifest == third.manifest == Manifest.of(whole)
    for optimizer, model in ((first, whole), (second, grouped), (third, listed)):
        optimizer.step(make_closure(model))
    assert same_bytes(weights_of(whole), weights_of(listed))
    assert same_bytes(weights_of(whole), weights_of(grouped)) == (lrs == (0.1, 0.1))
    assert ZOSGD(list(whole.parameters()), 0.1).manifest is None


def test_frozen_and_tied_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1)).double()
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    before = weights_of(model)
    optimizer = ZOSGD(model, 1.0, seed=1, weight_decay=0.5)
    optimizer.step(lambda: model(torch.ones(2, 3, dtype=torch.float64)).square().sum())
    (g,) = optimizer.projected_grads
    assert g != 0
    after = weights_of(model)
    assert same_bytes(before[1:2], after[1:2])
    for index, stream in ((0, 0), (2, 2)):
        z = fedkseed_kernels.normal(
            before[index].shape, int(SeedPool(1, 1).seeds[0]), stream=stream, dtype=torch.float64
        )
        assert float((after[index] - (0.5 * before[index] - g * z)).abs().max()) < 1e-13


def test_a_scheduler_changes_lr_and_so_the_decay() -> None:
    weight = torch.ones(4, dtype=torch.float64)
    optimizer = ZOSGD([weight], 0.5, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    expected = 1.0
    for lr in (0.5, 0.25, 0.125):
        optimizer.step(lambda: 1.0)
        scheduler.step()
        expected *= 1 - 0.5 * lr
        assert float((weight - expected).abs().max()) < 1e-15


def test_dropout_in_train_mode_is_warned_of_once() -> None:
    model = make_model(dropout=0.25).train()
    optimizer = ZOSGD(model, 0.1)
    with pytest.warns(UserWarning, match=r"dropout: 3 \(p=0.25\), 1 in all.*model.eval\(\)") as caught:
        optimizer.step(make_closure(model))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(make_closure(model))
        optimizer = ZOSGD(model, 0.1)
        model.eval()  # what counts is the mode in the first step
        optimizer.step(make_closure(model))
        ZOSGD(make_model(dropout=0.0).train(), 0.1).step(lambda: 1.0)
        ZOSGD(list(model.train().parameters()), 0.1).step(lambda: 1.0)  # no model to look at


def test_a_skip_is_logged_and_only_the_first_aloud(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = ZOSGD([torch.ones(2)], 0.1, num_directions=2)
    with caplog.at_level(logging.INFO, logger="fedkseed"):
        optimizer.step(lambda: math.nan)
        optimizer.step(lambda: 1.0)
        optimizer.step(lambda: math.inf)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] + 3 * [logging.INFO]
    assert "skipped: losses nan and nan" in caplog.text
    assert optimizer.num_skipped == 4


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_any_evaluation_takes_the_perturbation_back(
    call: int, error: type[BaseException]
) -> None:
    model, mirror = make_model(), make_model()
    before = weights_of(model)
    optimizer = ZOSGD(model, 0.1, 1e-2, seed=5, num_directions=3)
    during = []

    def closure() -> float:
        during.append(largest_difference(before, weights_of(model)))
        if len(during) == call + 1:
            raise error("stop")
        return 1.0

    with pytest.raises(error, match="stop"):
        optimizer.step(closure)
    assert len(during) == call + 1
    assert min(during) > 5e-3
    assert largest_difference(before, weights_of(model)) < 1e-14
    assert optimizer.projected_grads == ()
    # The same seeds are taken again.
    optimizer.step(make_closure(model))
    ZOSGD(mirror, 0.1, 1e-2, seed=5, num_directions=3).step(make_closure(mirror))
    assert largest_difference(weights_of(mirror), weights_of(model)) < 1e-12


@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize("stop_at", range(1, 7))
def test_ctrl_c_inside_a_pass_updates_all_groups_or_none(
    stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mirror = make_model(), make_model()
    before = weights_of(model)

    def make(model: nn.Sequential) -> ZOSGD:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]
        return ZOSGD(groups, 0.1, 1e-2, num_directions=2)

    make(mirror).step(make_closure(mirror))
    optimizer = make(model)
    original = fedkseed_kernels.Prepared.seed_axpy_
    count = itertools.count(1)

    def seed_axpy_(self: fedkseed_kernels.Prepared, *terms: Any, **options: Any) -> None:
        original(self, *terms, **options)
        if next(count) == stop_at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fedkseed_kernels.Prepared, "seed_axpy_", seed_axpy_)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(make_closure(model))
    # Four passes to the points, and one for each group.
    updated = stop_at >= 5
    assert len(optimizer.projected_grads) == (2 if updated else 0)
    assert largest_difference(weights_of(mirror) if updated else before, weights_of(model)) < 1e-14


def test_a_closure_that_moves_a_parameter_is_noticed_and_nothing_stays_perturbed() -> None:
    for call in (1, 2):
        model = make_model()
        before = weights_of(model)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]
        optimizer = ZOSGD(groups, 0.1)
        calls = []

        def closure(model: nn.Sequential = model, call: int = call, calls: list[int] = calls) -> float:
            calls.append(1)
            if len(calls) == call:
                model[2].bias.data = model[2].bias.data.clone()
            return float(len(calls))

        with pytest.raises(
            RuntimeError,
            match="expected tensor 3 where and what it was, but its address changed .*; make a new",
        ):
            optimizer.step(closure)
        assert optimizer.projected_grads == ()
        assert largest_difference(before, weights_of(model)) < 1e-15


def test_an_update_beyond_fp32_is_refused_before_any_group_moves() -> None:
    first, second = torch.zeros(3), torch.zeros(3)
    optimizer = ZOSGD([{"params": [first]}, {"params": [second], "lr": 1e30}], 1.0, 1e-3)
    losses = iter([1e10, -1e10])
    with pytest.raises(ValueError, match=r"finite in fp32, got lr 1e\+30 .* lower lr or set max_abs_g"):
        optimizer.step(lambda: next(losses))
    assert optimizer.projected_grads == ()
    assert float(first.abs().max()) < 1e-9
    assert float(second.abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "finite lr of at least 0"),
        ({"eps": 0.0}, ValueError, "expected eps in"),
        ({"seed": 0.5}, TypeError, "integer seed, got 0.5"),
        ({"seed": True}, TypeError, "integer seed, got True"),
        ({"weight_decay": -1.0}, ValueError, "finite weight_decay of at least 0, got -1.0"),
        ({"weight_decay": "1"}, TypeError, "real number for weight_decay"),
        ({"weight_decay": math.nan}, ValueError, "finite weight_decay"),
        ({"weight_decay": 20.0}, ValueError, "lr weight_decay of at most 1, got 0.1 times 20.0"),
        ({"num_directions": 0}, ValueError, "num_directions in"),
        ({"num_directions": 1.0}, TypeError, "integer num_directions"),
        ({"max_abs_g": 0.0}, ValueError, "finite max_abs_g of at least .* None means no bound"),
        ({"max_abs_g": math.inf}, ValueError, "finite max_abs_g"),
        ({"max_loss_gap": -1.0}, ValueError, "finite max_loss_gap"),
        ({"max_loss_gap": math.nan}, ValueError, "finite max_loss_gap"),
        ({"params": [{"params": [torch.zeros(3)], "momentum": 0.9}]}, ValueError, "alone, got momentum"),
        (
            {"params": [{"params": [torch.zeros(3)], "lr": -1.0}]},
            ValueError,
            "finite lr of at least 0, got -1",
        ),
        ({"params": [{"params": [torch.zeros(3)], "weight_decay": 11}]}, ValueError, "at most 1"),
        ({"model": nn.Linear(2, 2)}, ValueError, "parameters of the model, got tensor 0, which is none"),
        ({"params": nn.Linear(2, 2), "model": nn.Linear(2, 2)}, TypeError, "got two models"),
        ({"params": []}, ValueError, "at least one tensor to tune, got none"),
    ],
)
def test_refused_at_construction(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"params": [torch.zeros(3)], "lr": 0.1}
    with pytest.raises(error, match=message):
        ZOSGD(**{**arguments, **changes})


def test_refused_later() -> None:
    weight = torch.ones(3)
    optimizer = ZOSGD([weight], 0.1)
    with pytest.raises(RuntimeError, match="make a new ZOSGD"):
        optimizer.add_param_group({"params": [torch.zeros(2)]})
    for key, value, message in (
        ("lr", math.nan, "finite lr"),
        ("weight_decay", 11.0, "at most 1"),
        ("weight_decay", -1.0, "finite weight_decay"),
    ):
        good = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=message):
            optimizer.step(lambda: 1.0)
        optimizer.param_groups[0][key] = good
    pooled = FedKSeedSGD([weight], 0.1, 1e-3, POOL)
    pooled.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="weight_decay 0, got 0.1: a model tuned by FedKSeed"):
        pooled.step(lambda: 1.0)
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize(("plus", "clipped"), [(9.0, 0.5), (-9.0, -0.5), (0.25, 0.125), (-0.25, -0.125)])
def test_g_is_clipped_on_both_sides(plus: float, clipped: float) -> None:
    optimizer = ZOSGD(make_model(), 0.0, 1.0, seed=1, max_abs_g=0.5)
    losses = iter([plus, 0.0])
    optimizer.step(lambda: next(losses))
    assert optimizer.projected_grads == (clipped,)
