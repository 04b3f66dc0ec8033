"""Paired storage in a federation: clients whose loss returns both sides of a doubled batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_samples import make_tokenizer
from support.tiny_language_model import make_model, make_task
from torch import nn

from fedkseed import RoundFailedError, Simulation, SimulationConfig, Streamed, Task, paired_losses
from fedkseed.data.prompts import Batch, Encoded, collate, encode_example
from fedkseed.simulation.run_folder import LEDGER
from fedkseed.storage import PAIRED_STORAGE_MODES, StorageOptions, storage_mode

CONFIG = SimulationConfig(
    num_rounds=2,
    clients_per_round=2,
    num_local_steps=3,
    batch_size=2,
    lr=1e-3,
    eps=1e-3,
    num_seeds=16,
    seed=3,
    storage=Streamed(),
)


def one_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    found: torch.Tensor = model(**vars(batch), use_cache=False).loss
    return found


def both_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    return paired_losses(model, vars(batch))


def task_with(loss: Callable[[Any, Batch], Any], dtype: torch.dtype = torch.float32) -> Task[Encoded, Batch]:
    tokenizer = make_tokenizer()
    rows = [
        [encode_example(tokenizer, row, "plain") for row in make_task(name).train] for name in ("red", "blue")
    ]
    return Task(make_model(dtype), rows, lambda chosen: collate(chosen, 0), loss)


def tuned(
    loss: Callable[[Any, Batch], Any], storage: StorageOptions, dtype: torch.dtype, folder: Path | None = None
) -> tuple[list[float | None], list[torch.Tensor]]:
    """Mean losses of the rounds, and the weights at the end."""
    config = SimulationConfig(**{**vars(CONFIG), "storage": storage})
    with Simulation(task_with(loss, dtype), config, folder=folder) as simulation:
        losses = [result.train_loss for result in simulation.rounds()]
        assert simulation.storage == storage
    return losses, [weight.detach() for weight in simulation.working.model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_paired_federation_is_the_other_up_to_the_rounding_of_its_losses(dtype: torch.dtype) -> None:
    widened = torch.float32 if dtype == torch.bfloat16 else None
    want, weights = tuned(one_loss, Streamed(compute_dtype=widened), dtype)
    found, paired = tuned(both_losses, Streamed(paired=True, compute_dtype=widened), dtype)
    assert found == pytest.approx(want, rel=1e-5)
    for ours, theirs in zip(weights, paired, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if widened else 1e-4, atol=1e-4)
    start = list(make_model(dtype).parameters())
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(start, paired, strict=True))


@pytest.mark.parametrize("name", PAIRED_STORAGE_MODES)
def test_every_paired_mode_has_a_name_and_a_folder_that_goes_on(name: str, tmp_path: Path) -> None:
    storage = storage_mode(name)
    assert storage != "auto"
    tuned(both_losses, storage, torch.bfloat16, tmp_path / "whole")
    half = SimulationConfig(**{**vars(CONFIG), "storage": storage})
    with Simulation(task_with(both_losses, torch.bfloat16), half, folder=tmp_path / "parts") as simulation:
        next(simulation.rounds())
    again = task_with(both_losses, torch.bfloat16)
    with Simulation(again, half, folder=tmp_path / "parts", resume=True) as simulation:
        assert [result.round for result in simulation.rounds()] == [1]
    assert (tmp_path / "whole" / LEDGER).read_bytes() == (tmp_path / "parts" / LEDGER).read_bytes()


@pytest.mark.parametrize(
    ("loss", "storage", "message"),
    [
        (one_loss, Streamed(paired=True), r"two losses, \(plus, minus\), got a tensor of shape \(\); return"),
        (lambda model, batch: 1.0, Streamed(paired=True), r"two losses, .* got float; .*paired_losses"),
        (both_losses, Streamed(), r"a loss of one element, got shape \(2,\)"),
    ],
)
def test_a_loss_for_the_wrong_number_of_sides_is_refused_in_words(
    loss: Callable[[Any, Batch], Any], storage: StorageOptions, message: str
) -> None:
    with pytest.raises(RoundFailedError, match=message):
        tuned(loss, storage, torch.float32)
