"""One federated run on the instruction tasks: prints its tables and keeps itself in a folder."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

import fedkseed_kernels
from fedkseed._extras import require_extra
from fedkseed.data import load_causal_lm, load_instruction_tasks, load_smollm2
from fedkseed.data.models import smollm2_folder
from fedkseed.data.prompts import Batch, Encoded
from fedkseed.files import write_atomically
from fedkseed.model.identity import ModelIdentity
from fedkseed.model.manifest import Manifest
from fedkseed.scenarios.settings import RunSettings
from fedkseed.scenarios.workbench import Scores, Workbench, scores_table
from fedkseed.simulation.run_folder import LEDGER, METRICS
from fedkseed.simulation.simulation import RoundResult, Simulation
from fedkseed.simulation.task import Task

SUMMARY = "summary.json"

_COLUMNS = (
    ("round", 5),
    ("train loss", 10),
    ("held-out loss", 13),
    ("bytes down", 10),
    ("bytes up", 8),
    ("rebuild s", 9),
    ("local steps s", 13),
    ("evaluation s", 12),
)


def round_header() -> str:
    """The head of the table of rounds."""
    return "  ".join(name.rjust(width) for name, width in _COLUMNS)


def round_row(result: RoundResult) -> str:
    """One round as a row of that table."""
    cells = (
        str(result.round + 1),
        _loss(result.train_loss),
        _loss(result.evaluation.get("held_out_loss")),
        f"{result.bytes_down:,}",
        f"{result.bytes_up:,}",
        f"{result.seconds_rebuild + result.seconds_reset:.2f}",
        f"{result.seconds_local:.1f}",
        f"{result.seconds_evaluation:.1f}",
    )
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def make_workbench(settings: RunSettings) -> Workbench:
    """The model and the tasks of a run.

    Raises:
        DataError, FetchError, ModelError: as the functions of `fedkseed.data`.
        MissingExtraError: a package of the extra `hf` is not installed.
    """
    dtype = settings.torch_dtype
    model, tokenizer = load_causal_lm(settings.model, dtype) if settings.model else load_smollm2(dtype)
    tasks, unseen = load_instruction_tasks(tokenizer)
    return Workbench(model, tokenizer, tasks, unseen, settings.prompt)  # type: ignore[arg-type]


def make_task(settings: RunSettings, bench: Workbench | None = None) -> Task[Encoded, Batch]:
    """What the federation trains; loads the model and the tasks unless ``bench`` has them."""
    work = make_workbench(settings) if bench is None else bench

    def evaluate(_: torch.nn.Module, round: int) -> Mapping[str, float]:
        scores = {"held_out_loss": work.held_out_loss(settings.round_rows)}
        if settings.rouge_every and (round + 1) % settings.rouge_every == 0:
            scores["rouge_l"], scores["exact_match"] = work.answer_scores(settings.generate_rows)
        return scores

    return Task(
        model=work.model,
        datasets=work.train,
        collate=work.collate,
        loss=work.train_loss,
        data_sizes=work.response_tokens(),
        evaluate=evaluate,
    )


@dataclass(frozen=True)
class Place:
    """Where a run keeps itself.

    Attributes:
        folder: of the run.
        resume: go on with the run in it.
        tensorboard: also write event files to ``folder``/tensorboard.

    Raises:
        MissingExtraError: event files are asked for, and the package tensorboard is not installed.
    """

    folder: Path
    resume: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.tensorboard:
            require_extra("tensorboard", "tensorboard")


def run(settings: RunSettings, place: Place) -> dict[str, Any]:
    """One run; prints as it goes, and returns what it printed, ready for JSON.

    Raises:
        DataError, FetchError, ModelError: model or tasks cannot be had.
        MissingExtraError: a package of the extra `hf` is not installed.
        StateError, FolderInUseError, RunFolderError, IdentityError: the folder is not what ``place`` says.
        RoundFailedError, WorkerError: a round did not come through; resuming goes on before it.
        OSError: the folder cannot be written.
    """
    start = perf_counter()
    config = settings.simulation_config()
    torch.set_num_threads(config.num_threads)
    name = settings.model or "SmolLM2-135M-Instruct"
    print(f"Loading {name} and 20 instruction tasks", flush=True)
    bench = make_workbench(settings)
    set_up = perf_counter() - start
    _print_start(settings, bench)
    before = bench.scores(settings.final_rows, settings.generate_rows)
    place.folder.mkdir(parents=True, exist_ok=True)
    with tqdm(unit="step", desc="local steps", leave=False, disable=None) as bar:
        simulation = Simulation(
            make_task(settings, bench),
            config,
            make_task=functools.partial(make_task, settings),
            num_workers=settings.workers,
            folder=place.folder,
            resume=place.resume,
            on_step=bar.update,
        )
        with simulation, _Events(place) as events:
            if place.resume:
                print(f"Resuming {place.folder} after {simulation.server.round} rounds")
            left = config.num_rounds - simulation.server.round
            bar.reset(left * config.clients_per_round * config.num_local_steps)
            chosen = " (auto)" if config.storage == "auto" else ""
            print(f"Storage mode{chosen}: {simulation.storage}\n\n{round_header()}", flush=True)
            for result in simulation.rounds():
                events.add(result)
                bar.write(round_row(result))
                sys.stdout.flush()
            rounds = simulation.past_metrics
            # The working weights are those that the ledger rebuilds.
            content = ModelIdentity.of(bench.model).content.hex()
    after = bench.scores(settings.final_rows, settings.generate_rows)
    table = {
        "before": before,
        "after": after,
        "majority answer": bench.majority_scores(settings.generate_rows),
    }
    seconds = {"set_up": set_up, "run": perf_counter() - start - set_up}
    summary = {**_summary(settings, bench, table, rounds), "content": content, "seconds": seconds}
    write_atomically(place.folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    _print_end(settings, place.folder, table, summary)
    return summary


def _print_start(settings: RunSettings, bench: Workbench) -> None:
    kernels = fedkseed_kernels.info()
    num_parameters = Manifest.of(bench.model).numel
    print(
        f"{num_parameters:,} parameters in {settings.dtype}; kernels: {kernels['cpu_backend']} "
        f"({kernels['cpu_isa']}), {settings.workers} worker(s) of {torch.get_num_threads()} threads\n"
        f"{settings.rounds} rounds of {settings.clients_per_round} out of {len(bench.tasks)} clients, "
        f"{settings.local_steps} steps each; batch {settings.batch_size}, lr {settings.lr:g}, "
        f"eps {settings.eps:g}, {settings.family} noise of K = {settings.num_seeds} seeds from base seed "
        f"{settings.seed}, drawn {'uniformly' if settings.sampling == 'uniform' else 'by significance'}\n"
        f"Held-out loss below: nats a token, on {settings.round_rows} test rows of each client's task",
        flush=True,
    )


def _summary(
    settings: RunSettings,
    bench: Workbench,
    table: Mapping[str, Scores],
    rounds: list[dict[str, Any]],
) -> dict[str, Any]:
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in bench.model.parameters())
    return {
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "model": {"num_parameters": Manifest.of(bench.model).numel, "weight_bytes": weight_bytes},
        "kernels": fedkseed_kernels.info(),
        "scores": {row: asdict(scores) for row, scores in table.items()},
        "bytes": {
            "down": sum(row["bytes_down"] for row in rounds),
            "up": sum(row["bytes_up"] for row in rounds),
            "by_weights": 2 * weight_bytes * sum(len(row["clients"]) for row in rounds),
        },
    }


def _print_end(
    settings: RunSettings, folder: Path, table: Mapping[str, Scores], summary: Mapping[str, Any]
) -> None:
    traffic, seconds = summary["bytes"], summary["seconds"]
    exchanged = traffic["down"] + traffic["up"]
    ledger = folder / LEDGER
    base = settings.model or smollm2_folder()
    print(
        f"\nLosses on {settings.final_rows} test rows of each task; Rouge-L and exact match of the answers "
        f"to {settings.generate_rows} of each client's\n"
        f"{scores_table(table)}\n\n"
        f"Bytes in all: {traffic['down']:,} down and {traffic['up']:,} up. Sending the weights would have "
        f"cost {traffic['by_weights']:,}"
        + (f", {traffic['by_weights'] / exchanged:,.0f} times as much." if exchanged else ".")
        + f"\n{seconds['run']:.0f} s after {seconds['set_up']:.0f} s of set-up\n\n"
        f"The tuned model is {ledger} ({ledger.stat().st_size:,} bytes; metrics beside it in {METRICS}). "
        f"To rebuild it, content {summary['content'][:16]}...:\n"
        f"  {Path(sys.prefix) / 'bin' / 'fedkseed'} apply {ledger} --base {base} --out {folder / 'model'}"
    )


class _Events:
    """TensorBoard event files of the rounds, if asked for."""

    def __init__(self, place: Place) -> None:
        self._writer: Any = None
        if place.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(place.folder / "tensorboard"))

    def __enter__(self) -> _Events:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, result: RoundResult) -> None:
        if self._writer is None:
            return
        scalars = {"train_loss": result.train_loss, **result.evaluation, "seconds": result.seconds}
        scalars |= {"bytes_down": result.bytes_down, "bytes_up": result.bytes_up}
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, result.round + 1)
        self._writer.flush()
