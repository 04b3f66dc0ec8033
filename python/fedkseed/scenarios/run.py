"""One federated run on any data: prints its tables and keeps itself in a folder."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import fedkseed_kernels
from fedkseed.data.architectures import ModelError
from fedkseed.data.asking import NOTE
from fedkseed.data.built_in_models import DEFAULT_MODEL
from fedkseed.data.federated import FederatedData
from fedkseed.data.own import DataChoice
from fedkseed.data.shapes import num_positions, weight_file_bytes
from fedkseed.documents import finite, read_json
from fedkseed.files import write_atomically
from fedkseed.model.identity import ModelIdentity
from fedkseed.model.manifest import Manifest
from fedkseed.model.placement import input_device
from fedkseed.scenarios import built_in
from fedkseed.scenarios.autocast import forward_passes
from fedkseed.scenarios.baselines import costs
from fedkseed.scenarios.baselines.memory import plan_run
from fedkseed.scenarios.baselines.rounds import BaselineRounds
from fedkseed.scenarios.bench import Bench
from fedkseed.scenarios.classification import ClassificationBench
from fedkseed.scenarios.events import Events
from fedkseed.scenarios.instructions import InstructionBench, Scoring
from fedkseed.scenarios.model_source import ModelSource
from fedkseed.scenarios.peak_memory import peaks, reset_peaks
from fedkseed.scenarios.presets import SENTIMENT
from fedkseed.scenarios.report import (
    data_name,
    end_text,
    method_text,
    model_name,
    processor_name,
    round_header,
    round_row,
    start_text,
)
from fedkseed.scenarios.settings import RunSettings, SettingsError
from fedkseed.scenarios.untuned_prompt import UntunedPrompt, best_untuned_prompt
from fedkseed.scenarios.wording import counted
from fedkseed.simulation.devices import choose_device, device_name
from fedkseed.simulation.run_folder import PICTURE, RunFolder
from fedkseed.simulation.simulation import Simulation
from fedkseed.simulation.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUMMARY = "summary.json"
#: Of a summary: that of a classification has some lines of each client.
_MAX_SUMMARY_BYTES = 8 << 20


def make_bench(
    settings: RunSettings,
    data: FederatedData | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Bench:
    """The rows of a run as tokens, around a model.

    Args:
        settings: of the run.
        data: what `load_data` gave: None for the built-in tasks, whose rows are chosen by their tokens.
        model: its shapes are enough; whoever scores puts the model with its weights in its place.
        tokenizer: of the model.

    Raises:
        DataError, FetchError: as the functions of `fedkseed.data`.
        ValueError: rows that do not fit, or a model that cannot take them.
    """
    if data is None:
        data = built_in.instruction_tasks(tokenizer, settings.choice)
    is_paired = bool(getattr(settings.federation.storage, "paired", False))
    max_length = min(settings.max_length, num_positions(model) or settings.max_length)
    if data.kind == "classification":
        return ClassificationBench(
            model,
            tokenizer,
            data,
            round_rows=settings.round_rows,
            final_rows=settings.final_rows,
            max_length=max_length,
            is_paired=is_paired,
            prompt=_measured_prompt(settings),
            threshold_rows=settings.threshold_rows,
            seed=settings.federation.seed,
        )
    if settings.threshold_rows:
        raise SettingsError("expected a classification with threshold_rows, got instructions; leave it out")
    scoring = Scoring(
        round_rows=settings.round_rows,
        final_rows=settings.final_rows,
        generate_rows=settings.generate_rows,
        rouge_every=settings.rouge_every,
        round_unseen=settings.round_unseen,
        mean=settings.held_out_mean,
        answer_tokens=settings.answer_tokens,
        paper_rouge=settings.paper_rouge,
    )
    return InstructionBench(
        model, tokenizer, data, scoring, max_length, is_paired, settings.truncate, settings.data_size
    )


def _measured_prompt(settings: RunSettings) -> UntunedPrompt | None:
    """What an untuned prompt does on the very rows that the run is scored on, if that was measured."""
    prompt = best_untuned_prompt()
    is_same = settings.choice == DataChoice(SENTIMENT) and settings.model in ("", DEFAULT_MODEL)
    return prompt if is_same and settings.final_rows == prompt.rows_per_client else None


def make_task(
    settings: RunSettings, data: FederatedData | None, bench: Bench | None = None
) -> Task[Any, Any]:
    """What the federation trains; loads the model and the rows unless ``bench`` has them."""
    if bench is None:
        bench = make_bench(settings, data, *ModelSource.of(settings, data).load())
    task = bench.task()
    loss, evaluate = task.loss, task.evaluate

    def train_loss(model: torch.nn.Module, batch: Any) -> Any:
        with forward_passes(settings.autocast, input_device(model)):
            return loss(model, batch)

    def scores(model: torch.nn.Module, round: int) -> Mapping[str, float]:
        is_last = round + 1 == settings.federation.num_rounds
        if (round + 1) % settings.eval_every and not is_last:
            return {}
        with forward_passes(settings.autocast, input_device(model)):
            return evaluate(model, round) if evaluate is not None else {}

    return dataclasses.replace(task, loss=train_loss, evaluate=scores)


def run(
    settings: RunSettings, data: FederatedData | None, folder: RunFolder, *, tensorboard: bool = False
) -> dict[str, Any]:
    """One run; prints as it goes, and returns what it printed, ready for JSON.

    Args:
        settings: of the run.
        data: what `load_data` gave.
        folder: held by the caller; a run that is in it goes on.
        tensorboard: also write event files to ``folder``/tensorboard.

    Raises:
        DataError, FetchError, ModelError: model or rows cannot be had.
        MissingExtraError: a package of an extra is not installed.
        StateError, RunFolderError, IdentityError: the folder holds another run.
        RoundFailedError, WorkerError: a round did not come through; resuming goes on before it.
        OSError: the folder cannot be written.
    """
    start = perf_counter()
    config = settings.federation
    torch.set_num_threads(config.num_threads)
    device = choose_device(settings.device)
    reset_peaks(device)
    print(f"Loading {model_name(settings)}; it runs on {device_name(device)}", flush=True)
    source = ModelSource.of(settings, data)
    bench = make_bench(settings, data, *source.load_shapes())
    _plan_memory(settings, bench, source, device)
    bench.model = source.load()[0].to(device)  # type: ignore[arg-type]
    task = make_task(settings, data, bench)
    num_rows, size = [len(rows) for rows in task.datasets], _size(bench.model)
    set_up = perf_counter() - start
    print(start_text(settings, bench), flush=True)
    with forward_passes(settings.autocast, device):
        before = bench.scores()
    _check_finite(before, bench.model)
    if settings.workers > 1:
        print(f"Starting {settings.workers} workers, which load the model", flush=True)
    # Version 0.1 did not say how a model is asked: the ledger of such a run stays as it is.
    is_noted = "data" in folder.read_settings()
    with tqdm(unit="step", desc="local steps", leave=False, disable=None) as bar:
        notes = {NOTE: bench.asking.digest} if is_noted else {}
        opened = _open_rounds(settings, data, bench, task, folder, notes, bar.update)
        events_folder = folder.path / "tensorboard" if tensorboard else None
        with opened, Events(events_folder) as events:
            if is_noted:
                bench.asking.write(folder.path)
            if folder.notice:
                print(folder.notice)
            if opened.num_complete:
                print(f"Resuming {folder.path} after {counted(opened.num_complete, 'round')}")
            bar.reset(costs.steps_left(settings, num_rows, opened.num_complete))
            print(f"{method_text(settings, opened.storage)}\n\n{round_header()}", flush=True)
            for result in opened.rounds():
                events.add(result)
                bar.write(round_row(result))
                sys.stdout.flush()
            rounds, best_round = opened.past_metrics, opened.best_round
            # The working weights are those that the ledger rebuilds, or the state holds.
            content = ModelIdentity.of(bench.model).content.hex()
    with forward_passes(settings.autocast, device):
        after = bench.scores()
    summary = {
        **_summary(settings, bench, size, rounds),
        "forward_passes": {
            "rounds": costs.forward_passes(settings, num_rows, rounds),
            "convention": costs.CONVENTION,
        },
        "best_round": best_round,
        "scores": bench.summary(before, after),
        "content": content,
        "peak_memory": peaks(device),
        "seconds": {"set_up": set_up, "run": perf_counter() - start - set_up},
    }
    if rounds and importlib.util.find_spec("matplotlib"):
        bench.draw(folder.path / PICTURE, rounds, summary["scores"], summary["model"]["weight_bytes"])
        print(f"\nA picture of the run: {folder.path / PICTURE}")
    # The last file: where it is, the run is finished.
    text = json.dumps(finite(summary), indent=2, allow_nan=False)
    write_atomically(folder.path / SUMMARY, (text + "\n").encode())
    print(end_text(folder.path, source.name, bench.table(before, after), summary, bench.asking.template))
    return summary


def read_summary(folder: Path) -> Any:
    """What `run` has left in the folder of a finished run; what stands in it is for its reader to check.

    Raises:
        DocumentError: it is damaged, or too large.
        OSError: it cannot be read, or the run is not finished.
    """
    return read_json(folder / SUMMARY, max_bytes=_MAX_SUMMARY_BYTES)


def _open_rounds(
    settings: RunSettings,
    data: FederatedData | None,
    bench: Bench,
    task: Task[Any, Any],
    folder: RunFolder,
    notes: Mapping[str, str],
    on_step: Callable[[], None],
) -> Simulation[Any, Any] | BaselineRounds:
    """The rounds of the run's method."""
    if settings.baseline.method == "fedkseed":
        return Simulation(
            task,
            settings.federation,
            make_task=functools.partial(make_task, settings, data),
            num_workers=settings.workers,
            worker_timeout=settings.worker_timeout,
            folder=folder,
            task_settings=_task_settings(settings, bench),
            notes=notes,
            on_step=on_step,
        )

    def gradient_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with forward_passes(settings.autocast, input_device(model)):
            return bench.gradient_loss(model, batch)

    return BaselineRounds(
        task,
        gradient_loss,
        settings.federation,
        settings.baseline,
        folder,
        task_settings=_task_settings(settings, bench),
        on_step=on_step,
    )


def _check_finite(before: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuses a model that has no loss to tune.

    Raises:
        ModelError: a loss that is not finite; names weights that are not.
    """
    parts = [part["loss"] for part in before.values() if isinstance(part, dict)]
    found = (before.get("held_out_loss"), before.get("unseen_loss"), *parts)
    losses = [loss for loss in found if loss is not None]
    if all(map(math.isfinite, losses)):
        return
    reason = "the weights are finite, the forward pass is not: take --dtype float32"
    broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if broken:
        named = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        reason = f"{named} hold NaN or infinity: load other weights"
    loss = next(loss for loss in losses if not math.isfinite(loss))
    raise ModelError(f"expected a finite loss before tuning, got {loss}; {reason}")


def _plan_memory(settings: RunSettings, bench: Bench, source: ModelSource, device: torch.device) -> None:
    """Prints what the run will take, before anything is loaded, and refuses what cannot fit."""
    train, evaluations = bench.batch_shapes(settings.federation.batch_size)
    planned = plan_run(
        bench.model,
        settings,
        device=device,
        train=train,
        evaluations=evaluations,
        file_bytes=weight_file_bytes(source.name),
    )
    print("\n".join(planned.lines()), flush=True)
    planned.refuse()


def _task_settings(settings: RunSettings, bench: Bench) -> dict[str, Any]:
    """What a resumed run must have beside the federation's numbers, or it would be another from there on."""
    return {
        "rows": bench.digest,
        "asking": bench.asking.digest,
        "dtype": settings.dtype,
        "autocast": settings.autocast,
        "data_size": settings.data_size,
    }


def _size(model: torch.nn.Module) -> dict[str, int]:
    """The model's own size, without what a method puts into it."""
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {"num_parameters": Manifest.of(model).numel, "weight_bytes": weight_bytes}


def _summary(
    settings: RunSettings, bench: Bench, size: Mapping[str, int], rounds: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "settings": settings.values(),
        "data": {"name": data_name(settings), "rows": bench.rows_digest},
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "model": dict(size),
        "kernels": fedkseed_kernels.info(),
        "bytes": {
            "down": sum(row["bytes_down"] for row in rounds),
            "up": sum(row["bytes_up"] for row in rounds),
            "by_weights": 2 * size["weight_bytes"] * sum(len(row["clients"]) for row in rounds),
        },
    }
