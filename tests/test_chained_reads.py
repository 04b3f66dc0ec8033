"""Whoever reads the weights between two chained steps gets them clean, in whatever way."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.inplace_passes import CHAINED, EPS, Passes, walked
from support.small_model import largest_difference, make_closure, make_model, same_bytes, weights_of
from torch import nn

from fedkseed import ZOSGD, ModelIdentity, SeedPool, WorkingCopy
from fedkseed.storage import Inplace, Streamed

READS: dict[str, Callable[[nn.Sequential, Any], Any]] = {
    "flush": lambda model, optimizer: optimizer.flush(),
    "the optimizer's state_dict": lambda model, optimizer: optimizer.state_dict(),
    "the optimizer's load_state_dict": lambda model, optimizer: optimizer.load_state_dict(
        ZOSGD(make_model(), 0.1, EPS, seed=3, storage=CHAINED).state_dict()
    ),
    "a forward": lambda model, optimizer: model(torch.zeros(1, 5, dtype=torch.float64)),
    "a forward in inference mode": lambda model, optimizer: torch.inference_mode()(model)(
        torch.zeros(1, 5, dtype=torch.float64)
    ),
    "a forward of a part": lambda model, optimizer: model[2](torch.zeros(1, 9, dtype=torch.float64)),
    "state_dict": lambda model, optimizer: model.state_dict(),
    "state_dict of a part": lambda model, optimizer: model[0].state_dict(),
    "identity": lambda model, optimizer: ModelIdentity.of(model),
    "a working copy": lambda model, optimizer: WorkingCopy(model),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("make", ["model", "compiled", "groups"])
def test_whoever_reads_the_weights_gets_them_clean(make: str, read: Callable[..., Any]) -> None:
    model, other = make_model(), make_model()
    if make == "groups":
        given: dict[str, Any] = {"params": [{"params": list(model.parameters())}], "model": model}
    else:
        given = {"params": torch.compile(model, backend="eager") if make == "compiled" else model}
    optimizer = ZOSGD(**given, lr=0.1, eps=EPS, seed=3, storage=CHAINED)
    plain = ZOSGD(other, 0.1, EPS, seed=3)
    for _ in range(2):
        optimizer.step(make_closure(model))
        plain.step(make_closure(other))
    assert largest_difference(weights_of(model), weights_of(other)) > 5e-3
    read(model, optimizer)
    assert largest_difference(weights_of(model), weights_of(other)) < 1e-14
    clean = weights_of(model)
    read(model, optimizer)
    assert same_bytes(clean, weights_of(model))
    # The steps go on from there.
    if optimizer.state_dict()["fedkseed"]["num_drawn"] == 2:
        optimizer.step(make_closure(model))
        plain.step(make_closure(other))
        optimizer.flush()
        assert largest_difference(weights_of(model), weights_of(other)) < 1e-13


def test_what_is_loaded_is_what_the_next_step_starts_from() -> None:
    for part in (slice(None), slice(2, 3)):
        model, other = make_model(), make_model(seed=8)
        optimizer = ZOSGD(model, 0.1, EPS, seed=3, storage=CHAINED)
        optimizer.step(make_closure(model))
        model[part].load_state_dict(other[part].state_dict())
        loaded = weights_of(model)
        assert same_bytes(loaded[-2:], weights_of(other)[-2:])
        seen, _ = walked(optimizer, model, 1)
        hand = Passes(loaded, "nearest", 0)
        assert same_bytes(seen[0], hand((SeedPool(3, 2).seeds.tolist()[1], EPS)))


def test_a_compiled_forward_sees_clean_weights() -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    inputs = torch.ones(2, 5, dtype=torch.float64)
    optimizer = ZOSGD(compiled, 0.1, EPS, storage=CHAINED)
    for _ in range(3):
        optimizer.step(lambda: compiled(inputs).square().sum())
        perturbed = weights_of(model)
        found = compiled(inputs)
        assert not same_bytes(perturbed, weights_of(model))
        assert torch.equal(found, model(inputs))


def test_a_copy_of_perturbed_weights_is_refused_and_one_of_clean_weights_is_free_of_the_optimizer() -> None:
    model = make_model()
    optimizer = ZOSGD(model, 0.1, EPS, storage=CHAINED)
    optimizer.step(make_closure(model))
    for copied in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(RuntimeError, match=r"clean weights to copy.*call optimizer.flush\(\) first"):
            copied(model)
    optimizer.flush()
    twin = copy.deepcopy(model)
    assert same_bytes(weights_of(twin), weights_of(pickle.loads(pickle.dumps(model))))
    optimizer.step(make_closure(model))
    perturbed = weights_of(model)
    twin(torch.zeros(1, 5, dtype=torch.float64))
    twin.load_state_dict(twin.state_dict())
    assert same_bytes(perturbed, weights_of(model))


def test_the_end_of_the_optimizer_leaves_clean_weights_without_hooks() -> None:
    model, other = make_model(), make_model()
    optimizer = ZOSGD(model, 0.1, EPS, storage=CHAINED)
    optimizer.step(make_closure(model))
    ZOSGD(other, 0.1, EPS).step(make_closure(other))
    assert all(module._forward_pre_hooks for module in model.modules())
    del optimizer
    gc.collect()
    assert largest_difference(weights_of(model), weights_of(other)) < 1e-14
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._state_dict_pre_hooks
        assert not module._load_state_dict_pre_hooks


def test_the_hooks_do_not_keep_the_model_alive() -> None:
    """The optimizer does, which looks at each step whether the model still holds what it tunes."""
    model = make_model()
    optimizer = ZOSGD(model, 0.1, EPS, storage=CHAINED)
    optimizer.step(make_closure(model))
    seen = weakref.ref(model)
    del model
    optimizer.flush()
    del optimizer
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("second", [CHAINED, Inplace(), Streamed()], ids=repr)
def test_two_optimizers_of_one_model_take_turns(second: Any) -> None:
    """The first forward of one's step finds what waits for the other's."""
    model, other = make_model(), make_model()
    pairs = [
        (ZOSGD(model, 0.1, EPS, seed=seed, storage=storage), ZOSGD(other, 0.1, EPS, seed=seed))
        for seed, storage in ((1, CHAINED), (2, second))
    ]
    for _ in range(3):
        for optimizer, plain in pairs:
            optimizer.step(make_closure(model))
            plain.step(make_closure(other))
    model.state_dict()
    assert largest_difference(weights_of(model), weights_of(other)) < 1e-13
