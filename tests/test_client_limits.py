"""A client's own limits: what a hostile or careless server asks for beyond them changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.small_client import COEFFICIENTS, make_broadcast, make_client, make_model, same_bytes, weights_of

from fedkseed import ClientLimits, ModelIdentity, ProtocolError, WorkingCopy

#: The numbers of `make_broadcast`, as limits.
ASKED: dict[str, Any] = {
    "lr": 0.05,
    "eps": 1e-3,
    "max_abs_g": 1e3,
    "num_local_steps": 4,
    "num_seeds": 32,
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_number_at_its_limit_is_taken_and_one_beyond_it_refused(name: str, evaluates: bool) -> None:
    calls = []
    working = WorkingCopy(make_model())
    asked = {"schedule": np.zeros(0, np.uint16)} if evaluates else {}

    def client(limits: ClientLimits) -> Any:
        return make_client(
            working, limits=limits, on_step=lambda: calls.append(1), evaluate=lambda *_: calls.append(1) or {}
        )

    free = client(ClientLimits()).handle(make_broadcast(**asked))
    assert client(ClientLimits(**ASKED)).handle(make_broadcast(**asked)) == free
    below = ASKED[name] - 1 if isinstance(ASKED[name], int) else ASKED[name] * (1 - 1e-6)
    before = weights_of(working.model)
    calls.clear()
    party = client(ClientLimits(**{**ASKED, name: below}))
    if evaluates and name == "num_local_steps":
        assert party.handle(make_broadcast(**asked)) == free
        return
    with pytest.raises(ProtocolError, match=f"with {name} of at most .*, the limit of client 4"):
        party.handle(make_broadcast(**asked))
    with pytest.raises(ProtocolError, match=name):
        party.load(make_broadcast(**asked))
    assert calls == []
    assert party.last_run is None
    assert same_bytes(before, weights_of(working.model))


def test_every_limit_that_a_message_exceeds_is_named() -> None:
    limits = ClientLimits(lr=0.01, eps=1e-3, num_local_steps=3, num_seeds=16)
    words = (
        "a broadcast with lr of at most 0.01 and num_local_steps of at most 3 and num_seeds of at most 16, "
        "the limits of client 4, got 0.05 and 4 and 32; raise them if that server is trusted"
    )
    with pytest.raises(ProtocolError, match=words):
        make_client(WorkingCopy(make_model()), limits=limits).step(make_broadcast())


def test_a_limit_costs_nothing_when_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the hash of the weights, which takes seconds of a large model."""
    message = make_broadcast()

    def never(*_: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(ModelIdentity, "of_weights", never)
    with pytest.raises(ProtocolError, match="num_seeds"):
        make_client(WorkingCopy(make_model()), limits=ClientLimits(num_seeds=31)).step(message)


def test_hostile_numbers_of_a_valid_message_are_refused() -> None:
    client = make_client(WorkingCopy(make_model()), pool=None, limits=ClientLimits(**ASKED))
    for changes in (
        {"lr": 1e30},
        {"eps": 1e30},
        {"max_abs_g": 1e38},
        {"schedule": np.zeros(2**16 - 1, np.uint16)},
        {"coefficients": np.zeros(2**16, np.float32)},
    ):
        with pytest.raises(ProtocolError, match="the limit of client 4"):
            client.step(make_broadcast(**changes))
    assert same_bytes(weights_of(client.working.model), weights_of(make_model()))
    assert len(COEFFICIENTS) == ASKED["num_seeds"]


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "finite lr of at least 0"),
        ({"lr": float("nan")}, ValueError, "finite lr"),
        ({"eps": 0.0}, ValueError, "expected eps in"),
        ({"max_abs_g": float("inf")}, ValueError, "expected max_abs_g in"),
        ({"num_local_steps": 0}, ValueError, r"num_local_steps in \[1, 65535\]"),
        ({"num_seeds": 2.5}, TypeError, "integer num_seeds"),
        ({"num_seeds": torch.tensor(4.0)}, TypeError, "integer num_seeds"),
    ],
)
def test_limits_that_are_none(limits: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClientLimits(**limits)
