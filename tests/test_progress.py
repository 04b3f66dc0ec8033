"""Bars of long work: in pieces only where a command asked for them, and never other work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkseed import Ledger, ModelIdentity, SeedPool, WorkingCopy, _progress

SIZES = [5, 0, 100, 3, 3, 3, 200, 1]


def make_model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Linear(7, 7) for _ in range(40)))


def test_outside_of_a_command_all_work_is_one_piece() -> None:
    assert list(_progress.pieces(SIZES, "work")) == [list(range(len(SIZES)))]


def test_pieces_have_every_position_once_in_order() -> None:
    with _progress.bars():
        found = list(_progress.pieces(SIZES, "work"))
        assert list(_progress.each(["abc", "", "d" * 500], "letters")) == ["abc", "", "d" * 500]
    assert [position for piece in found for position in piece] == list(range(len(SIZES)))
    assert len(found) > 3
    assert list(_progress.pieces(SIZES, "work")) == [list(range(len(SIZES)))], "the context has ended"


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_a_model_rebuilt_in_pieces_has_the_same_bits(family: str) -> None:
    pool, w0 = SeedPool(3, 5), make_model()
    coefficients = torch.linspace(-1e-3, 1e-3, 5).numpy()
    ledger = Ledger.of(w0, pool, coefficients, family=family)
    models = [make_model(), make_model()]
    ledger.apply_(models[0])
    with _progress.bars():
        ledger.apply_(models[1])
        working = WorkingCopy(make_model())
        working.load(pool, coefficients, family)
        identities = [ModelIdentity.of(model) for model in (*models, working.model)]
    assert identities == [ModelIdentity.of(models[0])] * 3
    assert identities[0] != ModelIdentity.of(w0)
