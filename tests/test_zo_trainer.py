"""The zeroth-order Trainer against plain loops, and against Trainer's own: losses, callbacks, logs, saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.tiny_trainer import EPS, LR, Rows, digest_of, losses_of, make_llama, make_trainer, stir
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainerCallback

from fedkseed import ZOSGD, Inplace, Streamed, paired_losses
from fedkseed.adapters.transformers import ZOTrainer
from fedkseed.storage import StorageOptions


class CountsNothing(LlamaForCausalLM):
    """A model whose loss is the mean of a batch, however many of them are a step."""

    accepts_loss_kwargs = False


class MeansOfBatches:
    """Makes a Trainer with a loss of its own, the mean of a batch, which says so."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss


class SharesOfSteps(MeansOfBatches):
    """The same, divided by the batches of a step."""

    loss_is_scaled_for_ga = True
    current_gradient_accumulation_steps: int

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) / self.current_gradient_accumulation_steps


def twice_the_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    tokens = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return 2 * functional.cross_entropy(*tokens, reduction="sum") / num_items_in_batch


class Loss(NamedTuple):
    """What says how the losses of micro-batches become that of a step.

    Attributes:
        all_count: batches have to have equally many labels for a step of two to be that of one batch.
        options: of a zeroth-order Trainer.
    """

    model: type[LlamaForCausalLM] = LlamaForCausalLM
    all_count: bool = False
    arguments: Mapping[str, Any] = MappingProxyType({})
    function: Callable[..., torch.Tensor] | None = None
    method: type[Any] | None = None
    options: Mapping[str, Any] = MappingProxyType({})

    def trainer(self, base: type[Any], folder: Path, num_batches: int, num_rows: int, **options: Any) -> Any:
        """A Trainer along it; of its epochs' ten rows the last two are a step of fewer batches, or rows."""
        kind = base if self.method is None else type(base.__name__, (self.method, base), {})
        arguments = {
            "gradient_accumulation_steps": num_batches,
            "per_device_train_batch_size": num_rows,
            "max_steps": 6,
            **self.arguments,
        }
        rows = Rows(10, all_count=self.all_count)
        model = make_llama(kind=self.model)
        options = {"compute_loss_func": self.function, "train_dataset": rows, **options}
        return make_trainer(folder, model, arguments, kind, **options)


SMOOTHED = {"label_smoothing_factor": 0.2}
PAIRED = {"storage": Streamed(paired=True)}
LOSSES = {
    "a model that counts labels": Loss(),
    "a model that does not": Loss(CountsNothing, all_count=True),
    "paired": Loss(options=PAIRED),
    "paired, a model that does not": Loss(CountsNothing, all_count=True, options=PAIRED),
    "label smoothing": Loss(arguments=SMOOTHED),
    "label smoothing, a model that does not": Loss(CountsNothing, all_count=True, arguments=SMOOTHED),
    "a function": Loss(function=twice_the_loss),
    "a method of means": Loss(all_count=True, method=MeansOfBatches),
    "a method of shares": Loss(all_count=True, method=SharesOfSteps),
}
all_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

STORAGES: dict[str, StorageOptions] = {
    "in place": Inplace(),
    "chained": Inplace(chained=True),
    "streamed": Streamed(),
    "paired": Streamed(paired=True),
}


def looped(
    twin: ZOTrainer, storage: StorageOptions, num_batches: int = 1, at_once: bool = False, save_steps: int = 0
) -> list[float]:
    """Losses of a plain loop over a Trainer's batches, in fp32; it tunes the Trainer's model.

    Args:
        at_once: steps by ``step(closure)``; by measure and step if not, as Trainer's loop has it.
        save_steps: flushes after so many steps, where Trainer saves.
    """
    model, seed = twin.model, twin.args.seed
    optimizer = ZOSGD(model, LR, EPS, seed=seed, storage=storage)
    is_paired, losses = getattr(storage, "paired", False), []
    batches = iter(twin.get_train_dataloader())
    for number in range(1, twin.args.max_steps + 1):
        samples, num_items = twin.get_batch_samples(batches, num_batches, twin.args.device)

        def closure(batch: Any, num_items: Any = num_items) -> torch.Tensor:
            if is_paired:
                return num_batches * paired_losses(model, {**batch, "num_items_in_batch": num_items})
            loss: torch.Tensor = model(**batch, num_items_in_batch=num_items).loss
            return num_batches * loss

        if at_once:
            (batch,) = samples
            losses.append(optimizer.step(lambda batch=batch: closure(batch)))  # type: ignore[misc]
        else:
            for batch in samples:
                optimizer.measure(lambda batch=batch: closure(batch))  # type: ignore[misc]
            losses.append(optimizer.step())
        if save_steps and number % save_steps == 0:
            optimizer.flush()
    optimizer.flush()
    return [float(np.float32(loss)) for loss in losses]


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_the_loss_curve_is_that_of_a_plain_loop_in_bits(storage: StorageOptions, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 5}
    trainer = make_trainer(tmp_path, arguments=saved, storage=storage)
    twin = make_trainer(tmp_path, storage=storage)
    stir(3)
    trainer.train()
    assert losses_of(trainer) == looped(twin, storage, save_steps=5)
    assert len(set(losses_of(trainer))) > 9
    assert digest_of(trainer.model) == digest_of(twin.model) != digest_of(make_llama())


def test_streamed_it_is_that_of_step_with_a_closure_too(tmp_path: Path) -> None:
    """In place a pass is saved by that, so that weights are rounded in other places."""
    trainer, twin = (make_trainer(tmp_path, storage=Streamed()) for _ in range(2))
    trainer.train()
    assert losses_of(trainer) == looped(twin, Streamed(), at_once=True)


@pytest.mark.filterwarnings("ignore:the model is in train mode with dropout:UserWarning")
def test_dropout_is_off_unless_train_mode_keeps_it(tmp_path: Path) -> None:
    runs = [
        make_trainer(tmp_path, make_llama(dropout=dropout), train_mode=train_mode)
        for dropout, train_mode in [(0.0, False), (0.5, False), (0.5, True)]
    ]
    for run in runs:
        run.model.train()
        run.train()
    without, off, on = map(losses_of, runs)
    assert without == off != on


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Notes g of each step."""

    def __init__(self) -> None:
        self.noted: list[float] = []

    def on_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        self.noted.extend(optimizer.optimizer.last.projected_grads)


@all_losses
@pytest.mark.few(3)
def test_a_step_of_two_batches_is_that_of_one_with_the_rows_of_both(loss: Loss, tmp_path: Path) -> None:
    noted = [Gradients(), Gradients()]
    runs = [
        loss.trainer(ZOTrainer, tmp_path, *sizes, callbacks=[gradients], **loss.options)
        for sizes, gradients in zip([(2, 2), (1, 4)], noted, strict=True)
    ]
    for run in runs:
        run.train()
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), rel=1e-5)
    assert noted[0].noted == pytest.approx(noted[1].noted, rel=1e-3, abs=1e-3)
    assert len(noted[0].noted) == 6
    assert max(map(abs, noted[0].noted)) > 0.1


@all_losses
@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.few(4)
def test_the_loss_that_is_logged_is_that_of_trainer(loss: Loss, num_batches: int, tmp_path: Path) -> None:
    """Around weights that stay, the mean of both sides is the loss but for terms of eps^2."""
    idle = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.0)
    first = loss.trainer(Trainer, tmp_path, num_batches, 2, optimizers=(idle, None))
    zeroth = loss.trainer(ZOTrainer, tmp_path, num_batches, 2, **{**loss.options, "eps": 1e-4})
    zeroth.args.learning_rate = 0.0
    first.train()
    zeroth.train()
    assert losses_of(zeroth) == pytest.approx(losses_of(first), rel=1e-4)


EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class Events(TrainerCallback):  # type: ignore[misc]
    """Notes each event, and where in the run."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, int, float | None]] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in EVENTS:
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.noted.append((name, state.global_step, state.epoch))

        return note


def first_order(model: nn.Module) -> tuple[torch.optim.Optimizer, None]:
    """Steps that hardly tune, for Trainer's own loop."""
    return torch.optim.SGD(model.parameters(), 1e-6), None


def test_callbacks_see_the_events_of_trainer(tmp_path: Path) -> None:
    arguments = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_on_start": True,
        "save_strategy": "epoch",
    }
    noted = {}
    for kind in (Trainer, ZOTrainer):
        events, model = Events(), make_llama()
        given = {} if kind is ZOTrainer else {"optimizers": first_order(model)}
        rows = {"train_dataset": Rows(18), "eval_dataset": Rows(4, seed=8)}
        folder = tmp_path / kind.__name__
        make_trainer(folder, model, arguments, kind, callbacks=[events], **rows, **given).train()
        noted[kind] = events.noted
    assert noted[ZOTrainer] == noted[Trainer]
    # All there are but that of a push.
    seen = {name for name, _, _ in noted[ZOTrainer]}
    assert set(EVENTS) - seen <= {"on_predict", "on_push_begin"}
    assert {"on_substep_end", "on_pre_optimizer_step", "on_save", "on_evaluate", "on_prediction_step"} <= seen


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        ("cosine", {"warmup_steps": 3}),
        ("linear", {"warmup_steps": 0.25}),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 1e-4}}),
        ("reduce_lr_on_plateau", {"eval_strategy": "steps", "eval_steps": 2}),
    ],
)
@pytest.mark.few(2)
def test_learning_rates_are_those_of_trainer(schedule: str, changes: dict[str, Any], tmp_path: Path) -> None:
    logged = []
    for kind in (Trainer, ZOTrainer):
        arguments = {"lr_scheduler_type": schedule, **changes}
        trainer = make_trainer(tmp_path, None, arguments, kind, eval_dataset=Rows(4, seed=8))
        trainer.train()
        logged.append(
            [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        )
    assert logged[0] == logged[1]
    assert len(logged[0]) == 12
    assert len(set(logged[0])) > 3 or schedule == "reduce_lr_on_plateau"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_parameters_that_decay_are_those_of_trainer(weight_decay: float, tmp_path: Path) -> None:
    groups = {}
    for kind in (Trainer, ZOTrainer):
        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=40, n_positions=8))
        model.transformer.wpe.weight.requires_grad_(False)
        trainer = make_trainer(tmp_path, model, {"weight_decay": weight_decay}, kind)
        trainer.create_optimizer()
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups[kind] = {
            (names[parameter], group["weight_decay"])
            for group in trainer.optimizer.param_groups
            for parameter in group["params"]
        }
    assert groups[ZOTrainer] == groups[Trainer]
    assert {decay for _, decay in groups[ZOTrainer]} == {0.0, weight_decay}


def test_logs_have_the_projected_gradient_in_place_of_a_norm(tmp_path: Path) -> None:
    noted = Gradients()
    trainer = make_trainer(tmp_path, None, {"logging_steps": 3}, num_directions=2, callbacks=[noted])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [set(entry) for entry in logged] == 4 * [
        {"loss", "learning_rate", "projected_grad", "epoch", "step"}
    ]
    of_steps = [
        (abs(first) + abs(second)) / 2 for first, second in zip(*2 * [iter(noted.noted)], strict=True)
    ]
    assert [entry["projected_grad"] for entry in logged] == of_steps[2::3]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_logs_count_what_was_skipped(max_grad_norm: float, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None, {"max_grad_norm": max_grad_norm}, max_loss_gap=1e-12)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["num_skipped"] for entry in logged] == list(range(1, 13))
    assert {entry["projected_grad"] for entry in logged} == {0.0}
    assert trainer.zeroth_order.num_skipped == 12
