"""Inputs that the zeroth-order Trainer cannot train with: one line each, before a weight has changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_model import largest_difference, weights_of
from support.tiny_trainer import EPS, LR, Rows, digest_of, make_arguments, make_llama, make_trainer
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from fedkseed import ZOSGD, SeedPool, Streamed
from fedkseed.adapters.transformers import ZOTrainer

POOL = SeedPool(base_seed=5, num_seeds=64)
SAVED = {"save_strategy": "steps", "save_steps": 6, "max_steps": 6}
PAIRED = Streamed(paired=True)


def refuses(
    error: type[Exception],
    match: str,
    folder: Path,
    arguments: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    in_place: bool = False,
    **options: Any,
) -> None:
    """Making such a Trainer, or its first step, is an error of one line, and the weights are what they were.

    Args:
        in_place: the first evaluation fails, after which they come back within the rounding of passes.
    """
    model = make_llama()
    with pytest.raises(error, match=match) as caught:
        make_trainer(folder, model, arguments, **options).train(checkpoint and str(checkpoint))
    assert "\n" not in str(caught.value)
    if in_place:
        assert largest_difference(weights_of(model), weights_of(make_llama())) < 1e-7
    elif checkpoint is None:  # whose weights are loaded first
        assert digest_of(model) == digest_of(make_llama())


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("num_directions 1 with a seed_pool, got 2", {"seed_pool": POOL, "num_directions": 2}),
        ("either seed_pool or noise_seed, got both", {"seed_pool": POOL, "noise_seed": 1}),
        ("eps", {"eps": 0.0}),
        ("family", {"family": "cauchy"}),
    ],
)
def test_settings_that_cannot_be(match: str, options: dict[str, Any], tmp_path: Path) -> None:
    refuses(ValueError, match, tmp_path, **options)


def test_weight_decay_with_a_pool(tmp_path: Path) -> None:
    refuses(ValueError, "weight_decay", tmp_path, {"weight_decay": 0.1}, seed_pool=POOL)


@pytest.mark.parametrize("storage", [Streamed(), PAIRED], ids=repr)
def test_compiled_models_beside_streamed_storage(storage: Streamed, tmp_path: Path) -> None:
    arguments = {"torch_compile": True, "torch_compile_backend": "eager"}
    refuses(ValueError, "expected no torch_compile beside streamed", tmp_path, arguments, storage=storage)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"label_smoothing_factor": 0.1}, {}),
        ({}, {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.mean()}),
    ],
)
def test_a_paired_mode_beside_another_loss_than_the_models(
    arguments: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    refuses(
        ValueError, "own loss with a paired storage mode, got", tmp_path, arguments, storage=PAIRED, **options
    )


class Unlabelled(Dataset[dict[str, torch.Tensor]]):
    """Rows that are never given labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value for name, value in Rows()[index].items() if name != "labels"}


@pytest.mark.parametrize("storage", ["auto", PAIRED], ids=str)
def test_rows_without_labels(storage: Any, tmp_path: Path) -> None:
    match = "did not return a loss|expected a batch with labels"
    refuses(
        ValueError, match, tmp_path, in_place=storage == "auto", storage=storage, train_dataset=Unlabelled()
    )


def test_optimizers_that_take_gradients(tmp_path: Path) -> None:
    adam = torch.optim.AdamW(make_llama().parameters())
    match = "expected ZOSGD or FedKSeedSGD, or no optimizer at all, got AdamW"
    refuses(TypeError, match, tmp_path, optimizers=(adam, None))
    refuses(
        ValueError,
        "expected no optimizer_cls_and_kwargs, got some",
        tmp_path,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3}),
    )


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    refuses(ValueError, "expected one GPU a process, got 2; start with torchrun", tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("scaler", object(), "expected no GradScaler, got mixed precision fp16 from the launcher"),
        ("is_deepspeed_enabled", True, "got deepspeed or FSDP from the launcher"),
        ("is_fsdp_enabled", True, "got deepspeed or FSDP from the launcher"),
    ],
)
def test_what_a_launcher_brings(
    name: str, value: object, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Trainer.create_accelerator_and_postprocess

    def launched(self: Any) -> None:
        made(self)
        setattr(self.accelerator if name == "scaler" else self, name, value)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", launched)
    with pytest.raises(ValueError, match=match):
        ZOTrainer(make_llama(), make_arguments(tmp_path))


def test_the_trainer_of_transformers_with_a_zeroth_order_optimizer_is_told_which_one_to_take(
    tmp_path: Path,
) -> None:
    model = make_llama()
    optimizer = ZOSGD(model, LR, EPS)
    trainer = make_trainer(tmp_path, model, kind=Trainer, optimizers=(optimizer, None))
    with pytest.raises(RuntimeError, match=r"take fedkseed\.adapters\.transformers\.ZOTrainer$"):
        trainer.train()
    assert digest_of(model) == digest_of(make_llama())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of checkpoints at the sixth step: of AdamW, of ZOSGD and of FedKSeedSGD."""
    folder = tmp_path_factory.mktemp("checkpoints")
    runs: dict[str, tuple[type[Any], dict[str, Any]]] = {
        "first order": (Trainer, {}),
        "new seeds": (ZOTrainer, {}),
        "pool": (ZOTrainer, {"seed_pool": POOL}),
    }
    for name, (kind, options) in runs.items():
        make_trainer(folder / name, None, SAVED, kind, **options).train()
        (folder / name / "checkpoint-6").rename(folder / f"{name}, saved")
    return folder


@pytest.mark.parametrize(
    ("name", "match", "options"),
    [
        ("first order", "expected a state_dict of ZOSGD, got one of another optimizer", {}),
        ("pool", "expected a state_dict of ZOSGD, got one of another optimizer", {}),
        ("first order", "expected ledger.safetensors .* it was not along a seed_pool", {"seed_pool": POOL}),
        ("new seeds", "expected ledger.safetensors .* it was not along a seed_pool", {"seed_pool": POOL}),
        ("pool", "expected a state with .*base_seed", {"seed_pool": SeedPool(6, 64)}),
    ],
)
def test_checkpoints_of_other_optimizers(
    name: str, match: str, options: dict[str, Any], checkpoints: Path, tmp_path: Path
) -> None:
    refuses(ValueError, match, tmp_path, checkpoint=checkpoints / f"{name}, saved", **options)


@pytest.mark.parametrize(
    ("match", "arguments", "options"),
    [
        ("a state with eps", {}, {"eps": 2 * EPS}),
        ("a state with seed 7, got 42", {"seed": 7}, {}),
        ("a state with seed 7, got 42", {}, {"noise_seed": 7}),
        ("a state with num_directions 2, got 1", {}, {"num_directions": 2}),
        ("a state with storage", {}, {"storage": Streamed()}),
        ("a state with streams", {"weight_decay": 0.1}, {}),
    ],
)
def test_checkpoints_of_other_settings(
    match: str, arguments: dict[str, Any], options: dict[str, Any], checkpoints: Path, tmp_path: Path
) -> None:
    refuses(ValueError, match, tmp_path, arguments, checkpoint=checkpoints / "new seeds, saved", **options)


def test_checkpoints_without_the_state_of_the_optimizer(tmp_path: Path) -> None:
    make_trainer(tmp_path, None, {**SAVED, "save_only_model": True}).train()
    checkpoint = tmp_path / "checkpoint-6"
    match = r"expected optimizer.pt in the checkpoint .*checkpoint-6, got none: .* without save_only_model$"
    refuses(ValueError, match, tmp_path, checkpoint=checkpoint)
    refuses(ValueError, match, tmp_path, checkpoint=checkpoint, seed_pool=POOL)
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path).train(True)
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        make_trainer(tmp_path / "empty").train(True)


def test_settings_beside_an_optimizer_of_ones_own_are_refused(tmp_path: Path) -> None:
    """Settings would go unheard: the optimizer has its own."""
    for unheard in ({"eps": 0.1}, {"seed_pool": SeedPool(1, 8)}):
        model = make_llama()
        given = {"eps": 1e-3, "optimizers": (ZOSGD(model, 1e-6), None), **unheard}
        (name,) = unheard
        with pytest.raises(ValueError, match=f"expected no {name} beside an optimizer of your own"):
            make_trainer(tmp_path, model, **given)
