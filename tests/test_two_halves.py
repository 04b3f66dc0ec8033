"""The contract of a step: `measure`, `step`, `discard`, `reduce`, `last`, in every storage mode."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.halves import (
    EPS,
    MODES,
    POOL,
    SEED,
    Batches,
    all_dtypes,
    all_modes,
    made,
    near,
    streamed_modes,
)
from support.kernel_calls import watch_calls
from support.small_model import largest_difference, make_model, same_bytes, weights_of

import fedkseed_kernels
from fedkseed import FedKSeedSGD, Inplace, SeedPool, Streamed
from fedkseed.storage import StorageOptions


@pytest.mark.few
@all_modes
@all_dtypes
@pytest.mark.parametrize("num_directions", [1, 3])
def test_between_the_halves_and_after_an_exception_and_discard_readers_meet_w(
    storage: StorageOptions, dtype: torch.dtype, num_directions: int
) -> None:
    model, batches, optimizer = made(storage, dtype, num_directions=num_directions)
    before, x = weights_of(model), batches.inputs[0].to(dtype)
    with torch.no_grad():
        want = model(x)

    def check() -> None:
        with torch.no_grad():
            found = model(x)
        state = [value.clone() for value in model.state_dict().values()]
        assert same_bytes(state, weights_of(model))
        if isinstance(storage, Streamed):
            assert same_bytes(state, before)
            assert same_bytes([found], [want])
        else:
            assert largest_difference(state, before) <= near(dtype)
            assert largest_difference([found], [want]) <= near(dtype) * 16

    optimizer.measure(batches(0))
    check()
    optimizer.measure(batches(1))
    check()
    calls = []

    def fails() -> Any:
        calls.append(1)
        if len(calls) == 2 * num_directions or batches.is_paired:
            raise OSError("gone")
        return batches(0)()

    with pytest.raises(OSError, match="gone"):
        optimizer.measure(fails)
    check()
    with pytest.raises(RuntimeError, match="got neither"):
        optimizer.step()
    optimizer.measure(batches(0))
    optimizer.discard()
    check()
    optimizer.discard()
    assert optimizer.last is None


@pytest.mark.few
@streamed_modes
@all_dtypes
@pytest.mark.parametrize("num_directions", [1, 3])
def test_two_measures_and_a_step_are_one_closure_of_their_mean(
    storage: StorageOptions, dtype: torch.dtype, num_directions: int
) -> None:
    options = {"num_directions": num_directions, "weight_decay": 0.1}
    apart, its_batches, first = made(storage, dtype, **options)
    whole, other_batches, second = made(storage, dtype, **options)
    for step in range(3):
        losses = [first.measure(its_batches(0), weight=3), first.measure(its_batches(step), weight=1.5)]
        loss = first.step()
        assert loss == second.step(other_batches.mean((0, 3.0), (step, 1.5)))
        assert loss == pytest.approx((3 * losses[0] + 1.5 * losses[1]) / 4.5, rel=1e-12)
        assert first.last == second.last
        assert same_bytes(weights_of(apart), weights_of(whole))
    assert first.state_dict()["fedkseed"].keys() == second.state_dict()["fedkseed"].keys()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("chained", [False, True])
@all_dtypes
def test_in_place_two_measures_and_a_step_are_these_passes(
    chained: bool, dtype: torch.dtype, rounding: Any
) -> None:
    """Passes to both sides and back for each call; chained to both sides, and on from where that ended."""
    model, batches, optimizer = made(Inplace(chained, rounding), dtype)
    hand = make_model(dtype)
    rounding_seeds = iter(range(100))

    def move(*terms: tuple[int, float]) -> None:
        options: dict[str, Any] = {}
        if rounding == "stochastic":
            seed = fedkseed_kernels.derived.seeds(SEED, 3, np.array([next(rounding_seeds)]))[0]
            options = {"rounding": rounding, "rounding_seed": int(seed)}
        seeds, coeffs = zip(*terms, strict=True)
        fedkseed_kernels.seed_axpy_(list(hand.parameters()), seeds, coeffs, **options)

    with torch.no_grad():
        its_batches = Batches(hand, Inplace())
        s0, s1 = SeedPool(SEED, 2).seeds.tolist()
        losses = []
        for number in (0, 1):
            move((s0, EPS if number == 0 or not chained else 2 * EPS))
            losses.append([its_batches(number)()])
            move((s0, -2 * EPS))
            losses[-1].append(its_batches(number)())
            if not chained:
                move((s0, EPS))
        plus, minus = ((2 * a + b) / 3 for a, b in zip(*losses, strict=True))
        g = float(np.float32((plus - minus) / (2 * EPS)))
        move(*([(s0, EPS - 0.05 * g), (s1, EPS)] if chained else [(s0, -(0.05 * g))]))
    optimizer.measure(batches(0), weight=2)
    optimizer.measure(batches(1))
    loss = optimizer.step()
    assert loss == (plus + minus) / 2
    assert optimizer.projected_grads == (g,)
    assert same_bytes(weights_of(model), weights_of(hand))


@pytest.mark.parametrize("num_directions", [1, 3])
def test_passes_are_counted(num_directions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n = num_directions
    wanted = {
        # whole step, measure, and the step after it
        "in place": (2 * n + 1, 2 * n + 1, 1),
        "chained": (2 * n, 2 * n - 1, 1),  # the step before has perturbed already
        "streamed": (1, 0, 1),
    }
    for name, counts in wanted.items():
        model, batches, optimizer = made(MODES[name], num_directions=n)
        optimizer.step(batches(0))
        calls = watch_calls(monkeypatch)
        own = {weight.data_ptr() for weight in model.parameters()}

        def passes(calls: list[Any] = calls, own: set[int] = own) -> int:
            """Over the stored weights."""
            found = [operands for operands, _ in calls if operands.outs.tensors[0].data_ptr() in own]
            calls.clear()
            return len(found)

        optimizer.step(batches(0))
        found = [passes()]
        optimizer.measure(batches(0))
        found.append(passes())
        optimizer.step()
        found.append(passes())
        assert tuple(found) == counts, name
        monkeypatch.undo()


@all_modes
def test_the_last_step_and_what_it_consumed(storage: StorageOptions) -> None:
    _, batches, optimizer = made(storage, num_directions=2)
    state = optimizer.state_dict()
    for _ in range(3):
        optimizer.measure(batches(0))
    between = optimizer.state_dict()
    between["fedkseed"]["storage_state"].pop("num_passes", None)
    state["fedkseed"]["storage_state"].pop("num_passes", None)
    assert repr(between) == repr(state)
    loss = optimizer.step()
    last = optimizer.last
    assert last is not None
    assert last.loss == loss
    assert last.projected_grads == optimizer.projected_grads
    assert [g for g in last.projected_grads if g] == list(last.projected_grads)
    gaps = [(plus - minus) / (2 * EPS) for plus, minus in last.losses]
    assert last.projected_grads == tuple(float(np.float32(gap)) for gap in gaps)
    assert last.skipped == (False, False)
    assert optimizer.state_dict()["fedkseed"]["num_drawn"] == 2


@all_modes
def test_what_is_skipped_changes_nothing_and_is_noted(storage: StorageOptions) -> None:
    model, batches, optimizer = made(storage, weight_decay=0.5)
    before = weights_of(model)
    torch.manual_seed(1)
    start = torch.get_rng_state()
    optimizer.measure(batches(0))

    def diverges() -> Any:
        loss = math.nan * float(torch.rand(()))
        return (loss, loss) if batches.is_paired else loss

    assert math.isnan(optimizer.measure(diverges))
    loss = optimizer.step()
    assert math.isnan(loss)
    assert optimizer.last is not None
    assert optimizer.last.skipped == (True,)
    assert optimizer.last.projected_grads == (0.0,)
    assert optimizer.num_skipped == 1
    assert torch.equal(torch.get_rng_state(), start)
    optimizer.flush()
    assert largest_difference(before, weights_of(model)) < 1e-13
    assert optimizer.state_dict()["fedkseed"]["num_drawn"] == 1
    assert optimizer.state_dict()["fedkseed"]["carried_decay"] == [0.0]


def test_the_index_is_that_of_the_first_call() -> None:
    model = make_model()
    batches = Batches(model, Inplace())
    optimizer = FedKSeedSGD(model, 0.05, EPS, POOL)
    optimizer.measure(batches(0), seed_index=7)
    optimizer.measure(batches(1), seed_index=7)
    optimizer.measure(batches(2))
    with pytest.raises(ValueError, match="seed_index 7, along which this step is measured already, got 8"):
        optimizer.measure(batches(0), seed_index=8)
    optimizer.step()
    assert [index for index, _ in optimizer.history] == [7]
    optimizer.measure(batches(0))
    with pytest.raises(TypeError, match="got it alone; give it to measure"):
        optimizer.step(seed_index=3)
    optimizer.step(batches(1))  # adds to what was measured
    assert optimizer.history[1][0] == int(POOL.schedule(0, 0, 1)[0])
    with pytest.raises(TypeError, match="expected no seed_index"):
        made(Inplace())[2].measure(batches(0), seed_index=1)


@pytest.mark.parametrize(
    ("weight", "error"),
    [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("2", TypeError)],
)
def test_weights_that_are_none_are_refused_and_what_was_measured_stays(weight: Any, error: Any) -> None:
    _, batches, optimizer = made(Inplace())
    optimizer.measure(batches(0))
    with pytest.raises(error, match="weight"):
        optimizer.measure(batches(1), weight=weight)
    with pytest.raises(TypeError, match="expected a closure that returns the loss, got float"):
        optimizer.measure(1.0)  # type: ignore[arg-type]
    optimizer.step()
