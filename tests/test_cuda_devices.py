"""A federation whose model is on a GPU, which is a stand-in: every tensor is where those are that it meets.

Preparation, working copy, batches, losses, steps in every storage mode, rebuilding, evaluation, generation:
the same bits as on the processor, and no copy from there but of the model, once, and of the batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.data_samples import make_tokenizer
from support.pretended_gpu import CPU, GPU, pretended_gpu
from support.tiny_language_model import make_model, make_task
from torch import Tensor, nn

from fedkseed import (
    Client,
    Ledger,
    ModelIdentity,
    RoundFailedError,
    RoundResult,
    Simulation,
    SimulationConfig,
    Streamed,
    Task,
    WorkingCopy,
    paired_losses,
)
from fedkseed.data.prompts import Batch, Encoded, collate, encode_example, iterate_batches
from fedkseed.data.scores import generate_greedy, response_loss, response_nll
from fedkseed.simulation.worker_pool import SharedWeights
from fedkseed.storage import PAIRED_STORAGE_MODES, STORAGE_MODES, StorageChoice, storage_mode

MODES = [name for name in (*STORAGE_MODES, *PAIRED_STORAGE_MODES) if name != "auto"]
SETTINGS: dict[str, Any] = {"num_rounds": 2, "clients_per_round": 2, "num_local_steps": 2, "batch_size": 2}
NUM_STEPS = 2 * 2 * 2


def rows_of(name: str) -> list[Encoded]:
    return [encode_example(make_tokenizer(), row, "plain") for row in make_task(name).train]


def one_loss(model: nn.Module, batch: Batch) -> float:
    return response_nll(model, batch, share_prefix=True)[0]


def both_losses(model: nn.Module, batch: Batch) -> Tensor:
    return paired_losses(model, vars(batch))


def task_on(device: torch.device, loss: Any, dtype: torch.dtype = torch.float32) -> Task[Encoded, Batch]:
    rows = [rows_of(name) for name in ("red", "blue")]

    def evaluate(model: Any, round: int) -> Mapping[str, float]:
        batches = iterate_batches(rows[0], 3, 0)
        prompts = [row.input_ids[: row.num_prompt] for row in rows[0]]
        answers = generate_greedy(model, make_tokenizer(), prompts, max_new_tokens=3)
        loss = response_loss(model, batches, share_prefix=True)
        return {"loss": loss, "letters": float(sum(map(len, answers)))}

    model: Any = make_model(dtype).to(device)
    return Task(model, rows, lambda chosen: collate(chosen, 0), loss, evaluate=evaluate)


def tuned(
    device: torch.device, storage: StorageChoice, dtype: torch.dtype, family: str
) -> tuple[list[dict[str, Any]], Ledger, list[Tensor]]:
    """Metrics, the ledger and the weights of two rounds."""
    config = SimulationConfig(
        **SETTINGS, lr=1e-3, eps=1e-2, num_seeds=8, family=family, storage=storage, num_threads=1
    )
    loss = both_losses if getattr(storage, "paired", False) else one_loss
    task = task_on(device, loss, dtype)
    with Simulation(task, config) as simulation:
        results: list[RoundResult] = list(simulation.rounds())
        ledger = simulation.ledger()
    applied: Any = make_model(dtype).to(device)
    ledger.apply_(applied)
    weights = list(task.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, applied.parameters(), strict=True))
    return [result.metrics for result in results], ledger, weights


@pytest.mark.few(10)
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_federation_on_a_gpu_has_the_same_bits(mode: str, dtype: torch.dtype, family: str) -> None:
    storage = storage_mode(mode)
    want, ledger, weights = tuned(CPU, storage, dtype, family)
    with pretended_gpu() as gpu:
        found, other, moved = tuned(GPU, storage, dtype, family)
        assert {weight.device for weight in moved} == {GPU}
        assert len(gpu.calls) > NUM_STEPS
    assert found == want
    assert other.to_bytes() == ledger.to_bytes()
    assert all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))


def test_nothing_but_batches_is_copied_from_the_processor_s_memory() -> None:
    with pretended_gpu() as gpu:
        task = task_on(GPU, one_loss)
        state = sum(1 for _ in (*task.model.parameters(), *task.model.buffers()))
        assert len(gpu.copies) == state
        before = gpu.state
        config = SimulationConfig(**SETTINGS, lr=1e-3, eps=1e-2, num_seeds=8)
        with Simulation(task, config) as simulation:
            assert all(tensor.device == GPU for tensor in simulation.working.w0)
            list(simulation.rounds())
        # Three tensors a batch, of the steps and of two evaluations each of two; two of what is generated.
        assert len(gpu.copies) - state == 3 * NUM_STEPS + 2 * (3 * 2 + 2)
        assert gpu.state is before, "the GPU's generator is put back"
        assert len(set(gpu.seeds[-4:])) == 4, "each client of each round seeds it by itself"


def test_auto_is_what_suits_a_gpu() -> None:
    config = SimulationConfig(**SETTINGS, lr=1e-3, eps=1e-2, num_seeds=8)
    with pretended_gpu(), Simulation(task_on(GPU, one_loss, torch.bfloat16), config) as simulation:
        assert simulation.storage == Streamed()


def test_a_task_may_move_its_batches_itself() -> None:
    calls: list[torch.device] = []

    def to_device(batch: Batch, device: torch.device) -> Batch:
        calls.append(device)
        return batch.to(device)

    config = SimulationConfig(**{**SETTINGS, "num_rounds": 1}, lr=1e-3, eps=1e-2, num_seeds=8)
    with pretended_gpu():
        task = task_on(GPU, one_loss)
        with Simulation(Task(**{**vars(task), "to_device": to_device}), config) as simulation:
            list(simulation.rounds())
    assert calls == [GPU] * (NUM_STEPS // 2)


def test_a_worker_copies_shared_weights_to_its_gpu_once() -> None:
    with pretended_gpu() as gpu:
        model: Any = make_model(torch.float32).to(GPU)
        count = sum(1 for _ in model.parameters())
        shared = SharedWeights.of(model, [GPU])
        assert {tensor.device for tensor in shared.w0.tensors()} == {CPU}
        before = len(gpu.copies)
        working = shared.working_copy(model, GPU)
        assert len(gpu.copies) - before == count
        assert {tensor.device for tensor in working.w0} == {GPU}
        found = working.identity
    assert found == ModelIdentity.of(make_model(torch.float32))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: (model.lm_head.weight[0] + torch.zeros(16)).sum(), "aten::add on one device"),
        (lambda model, batch: model.lm_head.weight.detach().numpy().sum(), "use Tensor.cpu"),
        (lambda model, batch: model(collate(rows_of("red"), 0).input_ids).logits.mean(), "on one device"),
    ],
    ids=["a tensor without a device", "numpy", "a batch that was not moved"],
)
def test_the_stand_in_refuses_what_a_gpu_refuses(loss: Any, message: str) -> None:
    config = SimulationConfig(**SETTINGS, lr=1e-3, eps=1e-2, num_seeds=8)
    with (
        pretended_gpu(),
        Simulation(task_on(GPU, loss), config) as simulation,
        pytest.raises(RoundFailedError, match=message),
    ):
        list(simulation.rounds())


def test_a_client_alone_takes_batches_where_its_model_is() -> None:
    """A client without a simulation does not move them: whoever makes them does."""
    with pretended_gpu():
        model: Any = make_model(torch.float32).to(GPU)
        config = SimulationConfig(**SETTINGS, lr=1e-3, eps=1e-2, num_seeds=8)
        with Simulation(task_on(GPU, one_loss), config) as simulation:
            message = simulation.server.broadcast(simulation.server.clients[0])
        batch = collate(rows_of("red")[:2], 0).to(GPU)
        client = Client(
            simulation.server.clients[0],
            WorkingCopy(model),
            loss=one_loss,
            batches=lambda round, num_steps: [batch] * num_steps,
            data_size=1,
        )
        assert client.step(message)
        assert client.last_run is not None
        assert client.last_run.num_skipped == 0
