"""Optimizers inside a wrapper that borrows their class and attributes, as Lightning's does."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from support import stand_ins
from support.small_model import make_closure, make_model, same_bytes, weights_of
from support.stand_ins import LightningOptimizer
from torch import nn

from fedkseed import ZOSGD, Inplace
from fedkseed.storage import StorageOptions

IN_PLACE = [Inplace(), Inplace(chained=True)]


def made(storage: StorageOptions) -> tuple[nn.Module, ZOSGD, Any]:
    model = make_model(torch.float32)
    optimizer = ZOSGD(model, 0.05, 1e-2, seed=5, storage=storage)
    return model, optimizer, LightningOptimizer(optimizer)


@pytest.mark.parametrize("storage", IN_PLACE, ids=repr)
def test_measurements_and_a_step_with_the_last_closure_are_one_step(storage: StorageOptions) -> None:
    model, optimizer, wrapper = made(storage)
    assert isinstance(wrapper, ZOSGD)
    twin, other, _ = made(storage)
    for _ in range(2):
        wrapper.optimizer.measure(make_closure(model))
        loss = wrapper.step(lambda: 2 * make_closure(model)())
        other.measure(make_closure(twin))
        assert loss == other.step(lambda: 2 * make_closure(twin)())
        assert optimizer.last == other.last
    optimizer.flush()
    other.flush()
    assert same_bytes(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("storage", IN_PLACE, ids=repr)
def test_what_the_wrapper_would_keep_for_itself_is_refused(storage: StorageOptions) -> None:
    """It is: `measure` and `discard` on the wrapper, of which the optimizer inside would not know."""
    model, optimizer, wrapper = made(storage)
    before = weights_of(model)
    with pytest.raises(
        RuntimeError, match=r"got a wrapper .* LightningZOSGD, .*; call .optimizer.measure\(\)"
    ):
        wrapper.measure(make_closure(model))
    optimizer.measure(make_closure(model))
    with pytest.raises(RuntimeError, match=re.escape("call .optimizer.discard()")):
        wrapper.discard()
    with pytest.raises(TypeError, match="got NoneType; end it .*Lightning's step.* that of the last batch"):
        wrapper.step()
    optimizer.flush()
    for found, expected in zip(weights_of(model), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="expected a closure, or a measurement before"):
        optimizer.step()


@pytest.mark.parametrize("storage", IN_PLACE, ids=repr)
@pytest.mark.parametrize("had_gradients", [False, True])
def test_a_closure_that_runs_backward_is_warned_of_once(storage: StorageOptions, had_gradients: bool) -> None:
    """Also where the loss that it returns does not tell, as that of Lightning's automatic optimization."""
    model, _, wrapper = made(storage)
    if had_gradients:
        make_closure(model)().backward()

    def closure() -> torch.Tensor:
        with torch.enable_grad():
            loss = make_closure(model)()
            loss.backward()
        return loss.detach()

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            wrapper.step(closure)
    assert len(found) == 1
    assert "calls backward(): 4 of 4 tuned weights" in str(found[0].message)
    assert found[0].filename == stand_ins.__file__  # whose step calls the optimizer's


def test_gradients_of_before_are_no_reason_to_warn() -> None:
    model, _, wrapper = made(Inplace())
    make_closure(model)().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.step(make_closure(model))
