"""Buffers that are put back: exactly those that moved, whatever a forward pass did with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedkseed import ZOSGD, Inplace, Streamed
from fedkseed.model.buffers import Buffers
from fedkseed.storage import StorageOptions

MODES = [Inplace(), Inplace(chained=True), Streamed()]


def made() -> nn.Module:
    """A module with a buffer of each kind, and one that holds none."""
    model = nn.Module()
    model.register_buffer("floats", torch.arange(3.0))
    model.register_buffer("counter", torch.tensor(7))
    model.register_buffer("mask", torch.arange(1000))
    model.register_buffer("not_a_number", torch.tensor([float("nan"), 1.0]))
    model.register_buffer("float8", torch.ones(4).to(torch.float8_e4m3fn))
    model.register_buffer("bits", torch.zeros(4, dtype=torch.uint8).view(torch.bits8))
    model.register_buffer("nothing", None)
    return model


def exchanged_in_number(model: nn.Module) -> None:
    """Takes one away and registers another: as many as before."""
    del model.floats
    model.register_buffer("other", torch.zeros(1))


def nothing_exchanged(model: nn.Module) -> None:
    """The same with the one that holds nothing."""
    del model.nothing
    model.register_buffer("other", torch.zeros(1))


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "written": lambda model: model.mask.add_(1),
    "written unseen": lambda model: model.floats.data.add_(1),
    "the counter unseen": lambda model: model.counter.data.add_(1),
    "its sign alone": lambda model: model.floats.neg_(),
    "exchanged": lambda model: setattr(model, "floats", model.floats + 1),
    "another shape": lambda model: setattr(model.floats, "data", torch.zeros(9)),
    "set": lambda model: setattr(model, "nothing", torch.zeros(1)),
    "new ones": lambda model: [model.register_buffer(name, torch.zeros(1)) for name in "ab"],
    "one for another": exchanged_in_number,
    "one for none": nothing_exchanged,
}


@pytest.mark.parametrize("is_again", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_whatever_moved_is_put_back(move: str, is_again: bool) -> None:
    model = made()
    expected = {name: value if value is None else value.clone() for name, value in model._buffers.items()}
    objects = dict(model._buffers)
    buffers = Buffers(model.named_modules())
    kept = buffers.keep()
    if is_again:
        MOVES["written"](model)
        kept.restore()
        kept = buffers.keep(kept)
    MOVES[move](model)
    kept.restore()
    assert model._buffers.keys() == expected.keys()
    for name, value in expected.items():
        found = model._buffers[name]
        assert found is objects[name]
        if value is not None and found is not None:
            assert (
                found.numpy(force=True).tobytes() == value.numpy(force=True).tobytes()
                if name in ("floats", "counter", "mask", "not_a_number")
                else torch.equal(found.view(torch.uint8), value.view(torch.uint8))
            )


@pytest.mark.parametrize("mode", MODES)
def test_buffers_that_stand_are_not_written(mode: StorageOptions) -> None:
    """They may lie in a file that was mapped to be read: a write would end the process."""
    model = nn.Sequential(nn.Linear(3, 1))
    for name, buffer in made().named_buffers():
        if name != "not_a_number" and name != "bits":
            model.register_buffer(name, buffer)
    optimizer = ZOSGD(model, 1e-3, 1e-3, num_directions=2, storage=mode)
    versions = [buffer._version for buffer in model.buffers()]
    for _ in range(2):
        optimizer.step(lambda: model(torch.ones(2, 3)).sum())
        optimizer.measure(lambda: model(torch.ones(2, 3)).sum())
        optimizer.discard()
    assert [buffer._version for buffer in model.buffers()] == versions
