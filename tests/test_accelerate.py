"""Optimizers that accelerate has prepared: in one process, in two with `reduce`, and state that it moves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import move_to_device
from accelerate.state import AcceleratorState, GradientState
from support import ranks
from support.ports import free_port
from support.running import SECONDS
from support.small_model import make_closure, make_model, same_bytes, weights_of
from support.two_devices import FIRST, SECOND, two_devices
from torch import Tensor, nn

from fedkseed import ZOSGD, FedKSeedSGD, Inplace, SeedPool, Streamed
from fedkseed.storage import StorageOptions

NUM_RANKS = 2


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    """Accumulates four micro-batches; its state is the process's, and is dropped afterwards."""
    mixed_precision = getattr(request, "param", "no")
    yield Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision=mixed_precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def twins(**options: Any) -> list[tuple[nn.Module, ZOSGD]]:
    models = [make_model(torch.float32) for _ in range(2)]
    return [(model, ZOSGD(model, 0.05, 1e-2, seed=5, **options)) for model in models]


def batch_of(model: nn.Module, number: int) -> Callable[[], Tensor]:
    inputs = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4))[number]
    return lambda: (model(inputs).float() - 1).square().mean()


@pytest.mark.parametrize("storage", [Inplace(), Inplace(chained=True), Streamed()], ids=repr)
def test_a_prepared_optimizer_steps_as_before(accelerator: Accelerator, storage: StorageOptions) -> None:
    """Its wrapper passes `step` on and returns nothing; `measure` is reached through `.optimizer`."""
    (model, optimizer), (twin, other) = twins(storage=storage)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    for number in range(3):
        assert prepared.step(batch_of(wrapped, number)) is None
        assert optimizer.last is not None
        assert optimizer.last.loss == other.step(batch_of(twin, number))
        measured = [prepared.optimizer.measure(batch_of(wrapped, 3)), other.measure(batch_of(twin, 3))]
        assert measured[0] == measured[1]
        prepared.step()
        other.step()
        assert optimizer.last == other.last
    optimizer.flush()
    other.flush()
    assert same_bytes(weights_of(model), weights_of(twin))
    with pytest.raises(AttributeError):
        prepared.measure(batch_of(wrapped, 0))


def test_what_accumulate_does_to_a_closure_and_to_measurements(accelerator: Accelerator) -> None:
    """It calls no `step` but in the last micro-batch: only what is measured before counts."""
    (model, optimizer), (twin, other) = twins()
    wrapped, prepared = accelerator.prepare(model, optimizer)
    for number in range(4):
        with accelerator.accumulate(wrapped):
            prepared.step(batch_of(wrapped, number))
    other.step(batch_of(twin, 3))
    assert optimizer.last == other.last
    for number in range(4):
        with accelerator.accumulate(wrapped):
            prepared.optimizer.measure(batch_of(wrapped, number), weight=number + 1)
            prepared.step()
        other.measure(batch_of(twin, number), weight=number + 1)
    other.step()
    assert optimizer.last == other.last
    assert same_bytes(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("accelerator", ["bf16"], indirect=True)
def test_mixed_precision_is_autocast_around_the_forward(accelerator: Accelerator) -> None:
    (model, optimizer), (twin, other) = twins()
    autocast = torch.autocast("cpu", torch.bfloat16)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    for number in range(3):
        prepared.step(batch_of(wrapped, number))
        with autocast:
            other.step(lambda number=number: batch_of(twin, number)())  # type: ignore[misc]
        assert optimizer.projected_grads != (0.0,)
    assert same_bytes(weights_of(model), weights_of(twin))


def tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for item in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(item)


@pytest.mark.parametrize(
    "storage",
    [Inplace(), Inplace(rounding="stochastic"), Inplace(chained=True), Streamed(compensated=True)],
    ids=repr,
)
def test_a_state_that_was_moved_to_another_device_loads(storage: StorageOptions) -> None:
    """accelerate moves all tensors of a state to its device, also those that belong on the processor."""
    pool = SeedPool(5, 8)
    models = [make_model(torch.bfloat16) for _ in range(2)]
    optimizers = [FedKSeedSGD(model, 0.05, 1e-2, pool, storage=storage) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            optimizer.step(make_closure(model))
    with two_devices():
        moved = move_to_device(optimizers[0].state_dict(), SECOND)
        found = list(tensors_in(moved["fedkseed"]))
        assert len(found) == (1 + 4 if isinstance(storage, Streamed) else 1)
        assert all(tensor.device == SECOND for tensor in found)
        optimizers[0].load_state_dict(moved)
        state = optimizers[0].state_dict()
        assert all(tensor.device == FIRST for tensor in tensors_in(state["fedkseed"]))
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(2):
            optimizer.step(make_closure(model))
        optimizer.flush()
    assert optimizers[0].history == optimizers[1].history
    assert (optimizers[0].coefficients == optimizers[1].coefficients).all()
    assert same_bytes(weights_of(models[0]), weights_of(models[1]))


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found in a gloo group; one start for all modes."""
    folder = tmp_path_factory.mktemp("ranks")
    group = {"WORLD_SIZE": NUM_RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    try:
        for rank in range(NUM_RANKS):
            own = {key: str(value) for key, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
            paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "support.ranks", str(folder)],
                    env={**os.environ, **own, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in processes:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ranks.MODES)
def test_two_ranks_with_reduce_walk_as_one(of_ranks: list[dict[str, Any]], mode: str) -> None:
    """accelerate copies the weights to its device and wraps the model; then 20 steps, each rank its rows."""
    first, second = (found[mode] for found in of_ranks)
    assert [found["num_ranks"] for found in of_ranks] == [NUM_RANKS, NUM_RANKS]
    assert of_ranks[0]["backend"] == "gloo"
    assert first["model"] == "DistributedDataParallel"
    assert first["optimizer"] == "AcceleratedOptimizer"
    assert first["moved"]
    assert first == second
    model, optimizer = ranks.made(mode)
    alone = torch.tensor(ranks.walk(model, optimizer), dtype=torch.float64)
    assert alone.shape == (ranks.NUM_STEPS, 2)
    torch.testing.assert_close(torch.tensor(first["steps"], dtype=torch.float64), alone, rtol=1e-6, atol=1e-6)
    assert alone[:, 1].abs().max() > 0.1


@pytest.mark.slow
def test_two_ranks_without_reduce_are_refused_in_words(of_ranks: list[dict[str, Any]]) -> None:
    refusal = "expected reduce= at construction, got none, with 2 ranks"
    for found in of_ranks:
        for call in ("step", "measure"):
            assert refusal in found[f"{call} without reduce"]
        assert found["left alone"]
