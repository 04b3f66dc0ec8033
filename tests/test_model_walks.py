"""How often a model is traversed: once for each thing that is made of it, as its modules may be thousands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.small_client import COEFFICIENTS, POOL, make_model
from torch import nn

from fedkseed import Ledger, Manifest, ModelIdentity, Server, ServerConfig, WorkingCopy, manifest_parameters
from fedkseed.model import manifest
from fedkseed.model.identity import frozen_indices
from fedkseed.model.manifest import ModelParameters


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were traversed, one for each time."""
    found: list[nn.Module] = []

    class Counted(manifest._Traversal):
        def __init__(self, model: nn.Module) -> None:
            found.append(model)
            super().__init__(model)

    monkeypatch.setattr(manifest, "_Traversal", Counted)
    return found


ROUNDS = ServerConfig(num_clients=1, clients_per_round=1, num_local_steps=1, lr=0.1, eps=1e-3)
MADE: dict[str, Callable[[nn.Module], object]] = {
    "manifest": Manifest.of,
    "parameters": manifest_parameters,
    "frozen": frozen_indices,
    "identity": ModelIdentity.of,
    "identity of a tuned set": lambda model: ModelIdentity.of(model, (1,)),
    "working copy": WorkingCopy,
    "server": lambda model: Server.of(model, POOL, ROUNDS),
    "ledger": lambda model: Ledger.of(model, POOL, COEFFICIENTS),
}


@pytest.mark.parametrize("make", MADE.values(), ids=list(MADE))
def test_one_walk_each(make: Callable[[nn.Module], object], walks: list[nn.Module]) -> None:
    model = make_model()
    make(model)
    assert walks == [model]


def test_a_ledger_is_applied_in_one_walk_and_a_working_copy_loaded_in_none(walks: list[nn.Module]) -> None:
    model = make_model()
    working = WorkingCopy(model)
    walks.clear()
    for _ in range(3):
        working.load(POOL, COEFFICIENTS)
    assert walks == []
    assert working.identity == working.identity
    assert walks == [model]
    ledger, other = Ledger.of(make_model(), POOL, COEFFICIENTS), make_model()
    walks.clear()
    ledger.apply_(other)
    assert walks == [other]
    assert all((a == b).all() for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_what_one_walk_finds_is_what_each_of_three_found() -> None:
    model = make_model()
    model[0].bias.requires_grad_(False)
    known = ModelParameters.of(model)
    assert known.manifest == Manifest.of(model)
    assert known.manifest.names == tuple(dict(model.named_parameters()))
    assert all(a is b for a, b in zip(known.parameters, model.parameters(), strict=True))
    assert [name for name, _ in known.named] == list(known.manifest.names)
    assert known.frozen == frozen_indices(model) == (1,)
    assert ModelIdentity.of_parameters(known) == ModelIdentity.of(model) == ModelIdentity.of(model, (1,))
    assert ModelIdentity.of_parameters(known, ()) == ModelIdentity.of(make_model())
    assert np.array_equal(Ledger.of(model, POOL, COEFFICIENTS).frozen, (1,))
