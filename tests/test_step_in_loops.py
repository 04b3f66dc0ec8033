"""What comes into a step from the loops of others: ranks, errors, hooks, writes, moves, threads, signals."""

from __future__ import annotations

import math
import random
import re
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.halves import (
    EPS,
    all_modes,
    made,
)
from support.small_model import largest_difference, make_model, same_bytes, weights_of
from torch import nn

from fedkseed import ZOSGD, Inplace, Streamed
from fedkseed.storage import StorageOptions


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_reduce_is_called_once_a_step_and_its_losses_count(returns: bool, apart: bool) -> None:
    seen = []

    def reduce(losses: torch.Tensor) -> torch.Tensor | None:
        seen.append(losses.clone())
        if returns:
            return losses + torch.tensor([1.0, 2.0])
        losses += torch.tensor([1.0, 2.0])
        return None

    _, batches, optimizer = made(Inplace(), reduce=reduce, num_directions=2)
    if apart:
        optimizer.measure(batches(0))
        optimizer.measure(batches(0))
        loss = optimizer.step()
    else:
        loss = optimizer.step(batches(0))
    (losses,) = seen
    assert (losses.shape, losses.dtype, losses.device.type) == ((2, 2), torch.float64, "cpu")
    assert optimizer.last is not None
    assert loss == optimizer.last.loss == pytest.approx(float(losses.mean()) + 1.5, rel=1e-12)
    assert optimizer.last.losses == tuple((a + 1, b + 2) for a, b in losses.tolist())
    gaps = [(a + 1 - (b + 2)) / (2 * EPS) for a, b in losses.tolist()]
    assert optimizer.projected_grads == tuple(float(np.float32(gap)) for gap in gaps)


def test_losses_are_reduced_on_the_processor_whatever_the_default_device_is() -> None:
    devices = []
    _, batches, optimizer = made(Inplace(), reduce=lambda losses: devices.append(losses.device.type))
    torch.set_default_device("meta")
    try:
        optimizer.step(lambda: float(batches(0)()))
    finally:
        torch.set_default_device(None)
    assert devices == ["cpu"]


@all_modes
@pytest.mark.parametrize(
    ("reduce", "error", "message"),
    [
        (lambda losses: 1 / 0, ZeroDivisionError, "division"),
        (lambda losses: 1.0, TypeError, "in place, or to return them, got float"),
        (lambda losses: losses[0], ValueError, r"losses of shape \(1, 2\), got \(2,\)"),
    ],
)
def test_an_error_in_reduce_restores_and_discards(
    storage: StorageOptions, reduce: Any, error: Any, message: str
) -> None:
    model, batches, optimizer = made(storage, reduce=reduce)
    before = weights_of(model)
    for apart in (False, True):
        if apart:
            optimizer.measure(batches(0))
        with pytest.raises(error, match=message):
            optimizer.step(None if apart else batches(0))
        optimizer.flush()
        assert largest_difference(before, weights_of(model)) < 1e-13
        with pytest.raises(RuntimeError, match="got neither"):
            optimizer.step()
    assert optimizer.state_dict()["fedkseed"]["num_drawn"] == 0
    with pytest.raises(
        TypeError, match="expected reduce as a function of the losses, False or None, got 'mean'"
    ):
        ZOSGD(make_model(), 0.1, reduce="mean")  # type: ignore[arg-type]


def test_several_ranks_without_reduce_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model, batches, optimizer = made(Inplace())
    before = weights_of(model)
    for call in (optimizer.step, optimizer.measure):
        with pytest.raises(RuntimeError, match="expected reduce= at construction, got none, with 2 ranks"):
            call(batches(0))
    assert same_bytes(before, weights_of(model))
    for reduce in (False, lambda losses: None):
        made(Inplace(), reduce=reduce)[2].step(batches(0))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    optimizer.step(batches(0))


@pytest.mark.parametrize("arguments", [(), (None,)])
def test_a_step_without_anything_says_what_to_do(arguments: Any) -> None:
    """What a loop made for backward() and step() calls: Trainer, accelerate."""
    model, _, optimizer = made(Inplace())
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=re.escape("call optimizer.step(lambda: loss_of(model, batch))")):
        optimizer.step(*arguments)
    assert same_bytes(before, weights_of(model))


def test_hooks_and_schedulers_see_one_step() -> None:
    seen = []
    _, batches, optimizer = made(Inplace())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(batches(0))
    scheduler.step()
    optimizer.measure(batches(0))
    optimizer.step()
    scheduler.step()
    assert seen == 2 * ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.05 / 4


@all_modes
def test_a_load_drops_what_was_measured(storage: StorageOptions) -> None:
    model, batches, optimizer = made(storage)
    state = optimizer.state_dict()
    before = weights_of(model)
    optimizer.measure(batches(0))
    optimizer.load_state_dict(state)
    assert largest_difference(before, weights_of(model)) < 1e-13
    with pytest.raises(RuntimeError, match="got neither"):
        optimizer.step()


@all_modes
@pytest.mark.parametrize("second", ["step", "measure"])
def test_weights_written_in_between_make_it_raise(storage: StorageOptions, second: str) -> None:
    model, batches, optimizer = made(storage)
    optimizer.measure(batches(0))
    optimizer.flush()
    with torch.no_grad():
        model[2].bias.add_(1.0)  # type: ignore[operator, index]
    written = weights_of(model)
    with pytest.raises(RuntimeError, match=r"between measure and step, got 2.bias written: .* measure again"):
        optimizer.step() if second == "step" else optimizer.measure(batches(0))
    assert same_bytes(written, weights_of(model))
    optimizer.step(batches(0))
    with torch.no_grad():
        model.load_state_dict(model.state_dict())
    optimizer.step(batches(0))


@pytest.mark.parametrize("storage", [Inplace(), Inplace(chained=True), Streamed()], ids=repr)
def test_a_write_in_between_by_a_load_of_the_model_is_seen(storage: StorageOptions) -> None:
    model, batches, optimizer = made(storage)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.measure(batches(0))
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="got 0.weight written"):
        optimizer.step()
    assert same_bytes(list(state.values()), weights_of(model))


@all_modes
def test_a_move_in_between_goes_on(storage: StorageOptions) -> None:
    moved, its_batches, first = made(storage)
    stayed, other_batches, second = made(storage)
    for optimizer, batches in ((first, its_batches), (second, other_batches)):
        optimizer.measure(batches(0))
        if optimizer is first:
            for weight in moved.parameters():
                weight.data = weight.data.clone()
        optimizer.measure(batches(1))
        optimizer.step()
        optimizer.flush()
    assert first.last == second.last
    assert same_bytes(weights_of(moved), weights_of(stayed))


def test_flush_keeps_what_was_measured() -> None:
    model, batches, optimizer = made(Inplace(chained=True))
    other, its_batches, plain = made(Inplace())
    before = weights_of(model)
    optimizer.measure(batches(0))
    assert largest_difference(before, weights_of(model)) > EPS / 2
    with pytest.raises(RuntimeError, match=r"call optimizer.flush\(\) first"):
        __import__("copy").deepcopy(model)
    optimizer.flush()
    assert largest_difference(before, weights_of(model)) < 1e-15
    optimizer.step()
    plain.step(its_batches(0))
    optimizer.flush()
    assert optimizer.last is not None
    assert plain.last is not None
    assert optimizer.last.losses[0] == pytest.approx(plain.last.losses[0], rel=1e-12)
    assert largest_difference(weights_of(other), weights_of(model)) < 1e-13


@all_modes
def test_generators_and_buffers_stand_as_the_last_call_left_them_or_as_at_the_start(
    storage: StorageOptions,
) -> None:
    if getattr(storage, "paired", False):
        pytest.skip("random numbers are refused there")
    _, batches, optimizer = made(storage)
    drawn: list[tuple[float, float, float]] = []

    def closure() -> float:
        drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
        return float(batches(0)())

    def start() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        drawn.clear()

    def next_ones() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    start()
    expected = [next_ones() for _ in range(3)]
    start()
    optimizer.measure(closure)
    optimizer.measure(closure)
    optimizer.step()
    assert drawn == [expected[0], expected[0], expected[1], expected[1]]
    assert next_ones() == expected[2]
    start()
    optimizer.measure(closure)
    optimizer.measure(closure)
    optimizer.discard()
    assert next_ones() == expected[0]
    start()
    optimizer.measure(closure)
    with pytest.raises(ZeroDivisionError):
        optimizer.measure(lambda: closure() / 0)
    assert next_ones() == expected[0]


@all_modes
def test_a_closure_that_calls_its_optimizer_is_refused_in_words(storage: StorageOptions) -> None:
    model, batches, optimizer = made(storage)
    before = weights_of(model)
    calls: list[Callable[[], object]] = [
        lambda: optimizer.step(batches(0)),
        lambda: optimizer.measure(batches(0)),
        optimizer.step,
        optimizer.discard,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="got one that calls its own optimizer"):
            optimizer.step(lambda call=call: (call(), batches(0)())[1])  # type: ignore[misc]
    optimizer.flush()
    assert largest_difference(before, weights_of(model)) < 1e-13
    optimizer.step(batches(0))


def test_another_thread_is_refused_during_a_step_in_words() -> None:
    _, batches, optimizer = made(Inplace())
    caught = []

    def step() -> None:
        try:
            optimizer.step(batches(0))
        except RuntimeError as error:
            caught.append(str(error))

    def closure() -> torch.Tensor:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        return batches(0)()

    optimizer.step(closure)
    assert len(caught) == 2  # one for each side
    assert all(
        text.endswith("from another thread during a step; an optimizer makes one step at a time")
        for text in caught
    )


def test_sides_that_draw_other_numbers_are_said_once() -> None:
    _, batches, optimizer = made(Inplace(), num_directions=2)

    def fair() -> float:
        return float(batches(0)()) + 0 * float(torch.rand(())) + 0 * random.random()

    def seeded_anew() -> float:
        torch.seed()
        return fair()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(fair)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(seeded_anew)
    (warning,) = caught
    assert "seeds a generator anew from the system (torch.seed())" in str(warning.message)
    assert warning.filename == __file__


class Interrupting(random.Random):
    """A generator that is interrupted as it is put back, once armed."""

    is_armed = False

    def setstate(self, state: tuple[Any, ...]) -> None:
        if self.is_armed:
            signal.raise_signal(signal.SIGINT)
        super().setstate(state)


@pytest.mark.parametrize("is_skipped", [False, True])
@pytest.mark.parametrize("storage", [Inplace(), Inplace(chained=True), Streamed()])
@pytest.mark.usefixtures("ctrl_c_raises")
def test_an_interrupt_while_the_world_is_put_back_waits_for_the_rest(
    storage: StorageOptions, is_skipped: bool
) -> None:
    model, batches, optimizer = made(storage)
    generator = Interrupting(3)
    model[0].generator = generator  # type: ignore[assignment]
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        generator.random()
        torch.rand(())
        generator.is_armed = calls == 2  # once both sides are evaluated
        return float(batches(0)()) * (math.nan if is_skipped else 1)

    states = torch.get_rng_state(), generator.getstate()
    with pytest.raises(KeyboardInterrupt):
        if is_skipped:
            optimizer.step(closure)
        else:
            optimizer.measure(closure)
            optimizer.discard()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert generator.getstate() == states[1]


class Scaled(nn.Module):
    """A layer whose forward pass moves a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1).double()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale *= 0.5
        return self.layer(x) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("storage", [Inplace(), Inplace(chained=True), Streamed()], ids=repr)
@pytest.mark.parametrize("change", ["nothing", "load", "convert"])
@pytest.mark.parametrize("end", ["discard", "step"])
def test_buffers_that_were_loaded_or_converted_in_between_stay(
    storage: StorageOptions, change: str, end: str
) -> None:
    model = Scaled()
    checkpoint = {name: torch.full_like(value, 7.0) for name, value in model.state_dict().items()}
    optimizer = ZOSGD(model, 0.1, storage=storage, reduce=lambda losses: losses[0])
    x = torch.ones(2, 5, dtype=torch.float64)
    optimizer.measure(lambda: model(x).square().mean())
    if change == "load":
        model.load_state_dict(checkpoint)
    elif change == "convert":
        model.float()
    if end == "discard":
        optimizer.discard()
    else:
        with pytest.raises((RuntimeError, ValueError)):  # written weights, or what reduce gives
            optimizer.step()
    assert float(model.scale) == {"nothing": 1.0, "load": 7.0, "convert": 0.5}[change]
    assert model.scale.dtype == (torch.float32 if change == "convert" else torch.float64)
    if change == "load":
        assert all(bool((weight == 7).all()) for weight in model.parameters())
