"""Scores of a model with dropout: what is said of them, once, and when nothing is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from fedkseed.federation.scoring import scores_of


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Dropout(0.1))


def measured(model: nn.Module, round: int) -> Mapping[str, float]:
    return {"mean": float(model(torch.ones(4, 3)).mean())}


def in_eval_mode(model: nn.Module, round: int) -> Mapping[str, float]:
    model.eval()
    return measured(model, round)


def in_eval_mode_for_a_while(model: nn.Module, round: int) -> Mapping[str, float]:
    model.eval()
    try:
        return measured(model, round)
    finally:
        model.train()


def test_dropout_at_work_is_told_once_for_a_model() -> None:
    for _ in range(2):
        model = make_model()
        with pytest.warns(
            UserWarning, match=r"evaluate runs .* dropout: 1 \(p=0.5\), 2 in all\..* call model.eval"
        ):
            scores_of(measured, model, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores_of(measured, model, 1)
        assert model.training


@pytest.mark.parametrize("evaluate", [in_eval_mode, in_eval_mode_for_a_while])
def test_an_evaluation_in_eval_mode_is_left_alone(
    evaluate: Callable[[nn.Module, int], Mapping[str, float]],
) -> None:
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores_of(evaluate, model, 0) == scores_of(evaluate, model, 1)
    assert all(module.training for module in model.modules())


def test_nothing_is_left_on_the_model() -> None:
    model = make_model()
    with pytest.warns(UserWarning, match="dropout"):
        scores_of(measured, model, 0)
    other = make_model()
    with pytest.raises(ZeroDivisionError):
        scores_of(lambda *_: {"mean": 1 / 0}, other, 0)
    for module in (*model.modules(), *other.modules()):
        assert not module._forward_pre_hooks
