"""A batch is moved to the model's device by the host, once, and not where it is there already."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from fedkseed.data.prompts import Encoded, collate
from fedkseed.model.placement import input_device
from fedkseed.simulation.batches import LocalBatches, moved

CPU, OTHER = torch.device("cpu"), torch.device("meta")
Pair = namedtuple("Pair", ["left", "right"])
ROWS = [Encoded((1, 2, 3), 1), Encoded((4, 5), 1)]


def places(batch: Any) -> set[torch.device]:
    """Where the tensors of a batch of the kinds below are."""
    if isinstance(batch, torch.Tensor):
        return {batch.device}
    if isinstance(batch, dict):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        batch = vars(batch).values()
    return set().union(*map(places, batch))


def make(kind: str) -> Any:
    one, two = torch.zeros(2), torch.ones(3, dtype=torch.int64)
    return {
        "tensor": one,
        "tuple": (one, two),
        "list": [one, [two]],
        "named tuple": Pair(one, two),
        "dict": {"input_ids": one, "labels": (two,)},
        "prompts": collate(ROWS, 0),
    }[kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "named tuple", "dict", "prompts"])
def test_a_batch_of_any_usual_kind_is_moved_whole(kind: str) -> None:
    batches = LocalBatches([0, 1], 0, 3, 2, lambda _: make(kind), OTHER)
    for found in batches(0, 2):
        assert type(found) is type(make(kind))
        assert places(found) == {OTHER}
    for found in LocalBatches([0], 0, 3, 2, lambda _: make(kind))(0, 1):
        assert places(found) == {CPU}


def test_what_is_no_batch_of_tensors_stays_as_it_is() -> None:
    rows = ["a text", None, 3]
    assert moved(rows, OTHER) == rows
    assert moved({"text": "a", "number": 1}, OTHER) == {"text": "a", "number": 1}


@pytest.mark.parametrize("place", [CPU, OTHER])
def test_the_task_s_own_way_is_gone_where_the_batch_is_elsewhere_alone(place: torch.device) -> None:
    calls = []

    def to_device(batch: Any, device: torch.device) -> Any:
        calls.append(device)
        return batch.to(device)

    made = [torch.zeros(2, device=place)]
    (found,) = LocalBatches([0], 0, 3, 1, lambda _: made[0], OTHER, to_device)(0, 1)
    assert calls == ([OTHER] if place == CPU else [])
    assert found.device == OTHER
    assert (found is made[0]) == (place == OTHER)


def test_inputs_are_read_where_the_first_parameter_is() -> None:
    assert input_device(nn.Linear(1, 1)) == CPU
    assert input_device(nn.Linear(1, 1, device="meta")) == OTHER
    assert input_device(nn.Tanh()) == CPU
