"""Clients in several threads of one process, on one working copy or on working copies of one model."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.small_model import same_bytes, weights_of
from torch import nn

from fedkseed import Broadcast, Client, IdentityError, Inplace, ModelIdentity, SeedPool, Streamed, WorkingCopy
from fedkseed.storage import StorageOptions

POOL = SeedPool(21, 32)
COEFFICIENTS = np.random.default_rng(1).normal(scale=0.01, size=32).astype(np.float32)
NUM_CLIENTS = 4


def make_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    time.sleep(0)  # lets another thread have its turn, between the two sides of a step
    return (model(batch) - 2).square().mean()


def make_client(client: int, working: WorkingCopy, storage: StorageOptions) -> Client[torch.Tensor]:
    def batches(round: int, num_steps: int) -> Iterable[torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * round + client)
        return [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(num_steps)]

    return Client(client, working, POOL, loss=loss, batches=batches, data_size=9, storage=storage)


def make_broadcast(client: int, identity: ModelIdentity | None = None) -> bytes:
    return Broadcast(
        round=2,
        client=client,
        run_id=b"one of many runs",
        identity=ModelIdentity.of(make_model()) if identity is None else identity,
        base_seed=21,
        lr=0.05,
        eps=1e-3,
        max_abs_g=1e3,
        coefficients=COEFFICIENTS,
        schedule=np.arange(32, dtype=np.uint16),
    ).to_bytes()


def serial(storage: StorageOptions) -> list[bytes]:
    """The reply of each client, each on a model of its own."""
    return [
        make_client(client, WorkingCopy(make_model()), storage).step(make_broadcast(client))
        for client in range(NUM_CLIENTS)
    ]


def in_threads(workings: Sequence[WorkingCopy], storage: StorageOptions) -> list[bytes | None]:
    """The reply of each client, all at once; None of one that failed."""
    replies: dict[int, bytes] = {}
    messages = [make_broadcast(client) for client in range(NUM_CLIENTS)]
    together = threading.Barrier(NUM_CLIENTS)

    def run(client: int) -> None:
        party = make_client(client, workings[client], storage)
        together.wait()
        replies[client] = party.step(messages[client])

    threads = [threading.Thread(target=run, args=(client,)) for client in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [replies.get(client) for client in range(NUM_CLIENTS)]


@pytest.mark.parametrize("storage", [Inplace(), Inplace(chained=True), Streamed()], ids=repr)
def test_clients_on_one_working_copy_reply_as_one_after_the_other(storage: StorageOptions) -> None:
    assert in_threads([WorkingCopy(make_model())] * NUM_CLIENTS, storage) == serial(storage)


def test_working_copies_of_one_model_wait_for_each_other_too() -> None:
    model = make_model()
    first = WorkingCopy(model, round_model="own")
    others = [WorkingCopy(model, w0=first.w0) for _ in range(NUM_CLIENTS - 1)]
    assert in_threads([first, *others], Inplace()) == serial(Inplace())


def test_who_holds_the_working_copy_sees_no_client_at_work() -> None:
    working, message = WorkingCopy(make_model()), make_broadcast(1)
    (expected, *_) = serial(Inplace())[1:]
    replies: list[bytes] = []
    thread = threading.Thread(target=lambda: replies.append(make_client(1, working, Inplace()).step(message)))
    with working.exclusive():
        working.load(POOL, COEFFICIENTS)
        found = weights_of(working.model)
        thread.start()
        thread.join(0.2)  # as long as many such steps take
        assert thread.is_alive()
        assert same_bytes(found, weights_of(working.model))
        # The holder itself does not wait.
        assert make_client(1, working, Inplace()).step(message) == expected
        assert working.identity == ModelIdentity.of(make_model())
    thread.join()
    assert replies == [expected]


def test_a_message_that_is_refused_waits_for_nothing() -> None:
    working = WorkingCopy(make_model())
    assert working.identity  # read once
    message = make_broadcast(1, ModelIdentity(bytes(32), bytes(32), "float64"))
    errors: list[str] = []

    def refused() -> None:
        try:
            make_client(1, working, Inplace()).step(message)
        except IdentityError as error:
            errors.append(str(error))

    thread = threading.Thread(target=refused)
    with working.exclusive():
        thread.start()
        thread.join(30)
        assert len(errors) == 1


def unpickled(working: WorkingCopy) -> Any:
    return pickle.loads(pickle.dumps(working))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, unpickled])
def test_a_copy_of_a_working_copy_works_and_waits_for_itself_alone(
    duplicate: Callable[[WorkingCopy], WorkingCopy],
) -> None:
    working, message = WorkingCopy(make_model(), round_model="own"), make_broadcast(1)
    expected = serial(Inplace())[1]
    with working.exclusive():
        other = duplicate(working)
        replies: list[bytes] = []
        thread = threading.Thread(
            target=lambda: replies.append(make_client(1, other, Inplace()).step(message))
        )
        thread.start()
        thread.join(30)
        assert replies == [expected]
    assert make_client(1, working, Inplace()).step(message) == expected
    assert in_threads([other] * NUM_CLIENTS, Inplace()) == serial(Inplace())
