"""A client between its two messages, and the working copy under it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from support.messages import patched
from support.small_client import (
    COEFFICIENTS,
    POOL,
    RUN,
    batches,
    loss,
    make_broadcast,
    make_client,
    make_model,
    rebuilt,
    same_bytes,
    weights_of,
)

import fedkseed_kernels
from fedkseed import (
    Broadcast,
    Client,
    FedKSeedSGD,
    IdentityError,
    MessageError,
    ModelIdentity,
    ProtocolError,
    Reply,
    SeedPool,
    WorkingCopy,
)


def test_a_step_walks_the_schedule_from_the_round_s_model() -> None:
    client = make_client(WorkingCopy(make_model()))
    reply = Reply.from_bytes(client.step(make_broadcast()))

    model = rebuilt()
    eps = float(np.float32(1e-3))
    optimizer = FedKSeedSGD(model, 0.05, eps, POOL)
    losses = [
        optimizer.step(lambda batch=batch: loss(model, batch), seed_index=index)
        for index, batch in zip((3, 31, 3, 0), batches(2, 4), strict=True)
    ]
    assert (reply.round, reply.client, reply.data_size) == (2, 4, 9)
    assert reply.digest == hashlib.sha256(make_broadcast()).digest()
    assert reply.scalars.tolist() == [g for _, g in optimizer.history]
    assert same_bytes(weights_of(client.working.model), weights_of(model))
    assert client.last_run is not None
    assert client.last_run.losses == tuple(losses)
    assert client.last_run.num_skipped == 0


@pytest.mark.parametrize("round_model", [None, "own"])
def test_nothing_is_left_of_an_earlier_round(round_model: Any) -> None:
    working = WorkingCopy(make_model(), round_model=round_model)
    client = make_client(working)
    first = client.step(make_broadcast())
    client.step(make_broadcast(coefficients=np.zeros(32, np.float32)))
    assert client.step(make_broadcast()) == first
    assert client.step(make_broadcast()) == first


def test_a_skipped_step_replies_zero() -> None:
    values = iter([1.0, float("nan"), 1.0, 1.0, 1.0, 1.0, float("inf"), 1.0])
    client = make_client(WorkingCopy(make_model()), loss=lambda model, batch: next(values))
    reply = Reply.from_bytes(client.step(make_broadcast()))
    assert reply.scalars.tolist() == [0.0] * 4
    assert client.last_run is not None
    assert client.last_run.num_skipped == 2


def test_a_step_whose_losses_lie_further_apart_than_the_bound_is_skipped() -> None:
    """The authors' rule for their grad_clip: skipped above the bound, taken at it."""
    losses = [1.0, 0.51, 1.0, 0.5, 0.25, 0.75, 0.0, 0.5625]
    replies = []
    for bound in (None, 0.5):
        values = iter(losses)
        client = make_client(
            WorkingCopy(make_model()), loss=lambda *_, values=values: next(values), max_loss_gap=bound
        )
        replies.append(Reply.from_bytes(client.step(make_broadcast())).scalars)
        assert client.last_run is not None
        assert client.last_run.num_skipped == (0 if bound is None else 1)
    free, bounded = replies
    assert (free != 0).all()
    assert bounded.tolist() == [*free[:3].tolist(), 0.0]
    with pytest.raises(ValueError, match="finite max_loss_gap"):
        make_client(WorkingCopy(make_model()), max_loss_gap=-1.0)


def test_on_step_is_called_after_each_step() -> None:
    calls = []
    client = make_client(WorkingCopy(make_model()), on_step=lambda: calls.append(None))
    client.step(make_broadcast())
    assert len(calls) == 4


def test_g_is_clipped_to_the_bound_of_the_broadcast() -> None:
    client = make_client(WorkingCopy(make_model()))
    free = Reply.from_bytes(client.step(make_broadcast())).scalars
    bound = np.float32(np.median(np.abs(free)))
    values = iter([1.0, 1.0, 2.0, 1.0, 1.0, 9.0, 1.0, 1.0 + 1e-6])
    client = make_client(WorkingCopy(make_model()), loss=lambda model, batch: next(values))
    scalars = Reply.from_bytes(client.step(make_broadcast(max_abs_g=float(bound)))).scalars
    assert scalars[:3].tolist() == [0.0, float(bound), -float(bound)]
    assert 0 < abs(scalars[3]) < bound


def test_the_pool_can_come_with_the_broadcast() -> None:
    expected = make_client(WorkingCopy(make_model())).step(make_broadcast())
    client = make_client(WorkingCopy(make_model()), pool=None)
    assert client.step(make_broadcast()) == expected
    assert client.step(make_broadcast(base_seed=22)) != expected


def other_weights() -> ModelIdentity:
    model = make_model()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-12
    return ModelIdentity.of(model)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"client": 5}, ProtocolError, "for client 4, got one for 5"),
        ({"base_seed": 22}, ProtocolError, r"got one for \(22, 32\)"),
        (
            {"coefficients": np.zeros(16, np.float32), "schedule": np.zeros(1, np.uint16)},
            ProtocolError,
            r"got one for \(21, 16\)",
        ),
        ({"run_id": bytes(16)}, ProtocolError, "of run b'one of many runs', got one of"),
        ({"identity": other_weights()}, IdentityError, "the same shapes, other numbers"),
        (
            {"identity": ModelIdentity.of(make_model(torch.float32))},
            IdentityError,
            "expected weights in float32, got float64",
        ),
        (
            {"identity": dataclasses.replace(other_weights(), structure=bytes(32))},
            IdentityError,
            "of structure 0000000000000000",
        ),
    ],
)
def test_a_message_for_others_changes_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    working = WorkingCopy(make_model())
    client = make_client(working, run_id=RUN)
    before = weights_of(working.model)
    with pytest.raises(error, match=message):
        client.step(make_broadcast(**changes))
    with pytest.raises(MessageError):
        client.step(make_broadcast()[:-1])
    assert same_bytes(before, weights_of(working.model))
    assert client.last_run is None


def test_random_changes_of_broadcasts_are_refused_or_walked() -> None:
    """Structured fuzz under a right checksum: a typed error and untouched weights, or a valid reply."""
    whole = make_broadcast()
    client = make_client(WorkingCopy(make_model()), run_id=RUN)
    generator = np.random.default_rng(7)
    num_walked = 0
    for _ in range(400):
        before = weights_of(client.working.model)
        start = int(generator.integers(8, len(whole) - 8))
        message = patched(whole, start, generator.bytes(int(generator.integers(1, 5))))
        try:
            reply = Reply.from_bytes(client.step(message))
        except (MessageError, ProtocolError, IdentityError):
            assert same_bytes(before, weights_of(client.working.model))
            continue
        num_walked += 1
        assert reply.digest == hashlib.sha256(message).digest()
        assert (np.abs(reply.scalars) <= Broadcast.from_bytes(message).max_abs_g).all()
    assert 50 < num_walked < 350


def test_bad_clients_and_too_few_batches() -> None:
    working = WorkingCopy(make_model())
    with pytest.raises(ValueError, match=r"data_size in \[1, 4294967295\], got 0"):
        make_client(working, data_size=0)
    with pytest.raises(ValueError, match="expected client in"):
        Client(-1, working, POOL, loss=loss, batches=batches, data_size=1)
    short = make_client(working, batches=lambda round, num_steps: batches(round, num_steps - 1))
    with pytest.raises(ValueError, match="expected 4 batches, one for each local step, got 3"):
        short.step(make_broadcast())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loading_is_one_rebuild_then_copies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = fedkseed_kernels.seed_axpy

    def seed_axpy(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(fedkseed_kernels, "seed_axpy", seed_axpy)
    expected = weights_of(rebuilt(dtype))
    working = WorkingCopy(make_model(dtype), round_model="own")
    for _ in range(3):
        for parameter in working.model.parameters():
            parameter.data.fill_(torch.nan)
        working.load(POOL, COEFFICIENTS)
        assert same_bytes(weights_of(working.model), expected)
    assert len(calls) == 1
    working.load(POOL, np.zeros(32, np.float32))
    assert same_bytes(weights_of(working.model), weights_of(make_model(dtype)))
    working.load(SeedPool(22, 32), COEFFICIENTS)
    assert not same_bytes(weights_of(working.model), expected)
    assert len(calls) == 3
    assert same_bytes(working.w0, weights_of(make_model(dtype)))


@pytest.mark.parametrize("round_model", [None, "own"])
def test_loaded_weights_are_those_that_a_forward_under_autocast_reads(round_model: Any) -> None:
    """Autocast keeps its casts as long as its context lasts; of weights loaded since, they are another's."""
    working, batch = WorkingCopy(make_model(torch.float32), round_model=round_model), torch.ones(4, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for coefficients in (COEFFICIENTS, 5 * COEFFICIENTS, 5 * COEFFICIENTS):
            working.model(batch)
            working.load(POOL, coefficients)
            found = working.model(batch)
            torch.clear_autocast_cache()
            assert torch.equal(found, working.model(batch))
            with torch.no_grad():
                working.model[0].weight.zero_()


def test_two_working_copies_share_one_w0() -> None:
    first = WorkingCopy(make_model())
    second = WorkingCopy(make_model(), w0=first.w0)
    assert all(a is b for a, b in zip(first.w0, second.w0, strict=True))
    first.load(POOL, COEFFICIENTS)
    second.load(POOL, COEFFICIENTS)
    assert same_bytes(weights_of(first.model), weights_of(second.model))
    with pytest.raises(ValueError, match="4 tuned parameters, got 3 tensors"):
        WorkingCopy(make_model(), w0=first.w0[:3])
    with pytest.raises(ValueError, match="got 4 tensors, 4 others"):
        WorkingCopy(make_model(torch.float32), w0=first.w0)


def test_the_identity_is_that_of_w0_and_of_the_frozen_parameters() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    expected = ModelIdentity.of(model)
    working = WorkingCopy(model)
    working.load(POOL, COEFFICIENTS)
    assert working.identity == expected
    second = WorkingCopy(make_model().requires_grad_(True), w0=None)
    assert second.identity == ModelIdentity.of(make_model()) != expected
    walked = make_model()
    with torch.no_grad():
        walked[2].bias.add_(1)
    shared = WorkingCopy(walked, w0=second.w0)
    assert shared.identity == second.identity


def test_frozen_parameters_get_no_noise_and_do_not_renumber() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    WorkingCopy(model).load(POOL, COEFFICIENTS)
    expected = weights_of(rebuilt())
    expected[0] = weights_of(make_model())[0]
    assert same_bytes(weights_of(model), expected)
    with pytest.raises(ValueError, match="all frozen"):
        WorkingCopy(make_model().requires_grad_(False))


@pytest.mark.parametrize("coefficients", [np.zeros(31, np.float32), np.zeros((32, 1), np.float32)])
def test_coefficients_of_another_pool_are_refused(coefficients: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match="expected 32 coefficients"):
        WorkingCopy(make_model()).load(POOL, coefficients)


def test_a_coefficient_that_is_not_finite_changes_nothing() -> None:
    working = WorkingCopy(make_model())
    before = weights_of(working.model)
    bad = COEFFICIENTS.copy()
    bad[7] = np.nan
    with pytest.raises(ValueError, match="finite"):
        working.load(POOL, bad)
    assert same_bytes(before, weights_of(working.model))
