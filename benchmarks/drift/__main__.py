"""How far stored weights of 16 bits drift from exact arithmetic in local steps: `python -m benchmarks.drift`.

The definitions stand in docs/numerics.md. One walk with fp32 weights is recorded first, on real text; every
algorithm then walks from the same w0 along its seeds and scalars, so that only their arithmetic differs. The
error of g is measured apart, with forward passes of each algorithm's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fedkseed_kernels
from benchmarks.common import environment
from benchmarks.common.constants import DTYPES
from benchmarks.drift import errors as drift_errors
from benchmarks.drift import report as drift_report
from benchmarks.drift.settings import QUICK, DriftSettings
from benchmarks.drift.walks import ExactSum, OfficialWalk, StorageWalk, Stored, distance, num_kept, snapshot
from benchmarks.models import modes, workloads
from fedkseed import FedKSeedSGD, Ledger
from fedkseed.files import write_atomically
from fedkseed.model.manifest import manifest_parameters

OFFICIAL = "official"
ALGORITHMS = (OFFICIAL, *modes.ONE_SIDED)


def record(settings: DriftSettings) -> list[float]:
    """g of every step of a walk with fp32 weights, which all others repeat."""
    work = settings.load(torch.float32)
    optimizer = FedKSeedSGD(
        work.model, settings.lr, settings.eps, settings.pool, schedule=range(settings.num_steps)
    )
    for rows in work.train:
        optimizer.step(functools.partial(workloads.mean_loss, work.model, rows[None]))
    return [g for _, g in optimizer.history]


def measure_storage(
    settings: DriftSettings, dtype_name: str, names: Sequence[str], gradients: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for each storage mode; the walks take turns, so that the exact sum is made once for all."""
    dtype, pool = DTYPES[dtype_name], settings.pool
    walks = {
        name: StorageWalk(settings.load(dtype).model, modes.ONE_SIDED[name], pool, settings.lr, settings.eps)
        for name in names
    }
    start = settings.load(dtype).model
    w0 = [parameter.detach() for _, parameter in manifest_parameters(start)]
    exact = ExactSum(start)
    distances: dict[str, list[float]] = {name: [] for name in walks}
    kept, num_due = dict.fromkeys(walks, 0), 0
    for step, g in enumerate(gradients):
        is_point = step + 1 in settings.points
        seed = int(pool.seeds[step])
        for name, walk in walks.items():
            before = snapshot(walk) if is_point else []
            walk.step(g)
            if is_point:
                kept[name] += _num_kept(before, walk, seed)
        coefficient = _common([float(walk.optimizer.coefficients[step]) for walk in walks.values()])
        exact.add_(seed, coefficient)
        if is_point:
            num_due += sum(_num_due(tensor, seed, index) for index, tensor in enumerate(w0))
            for name, walk in walks.items():
                distances[name].append(distance(walk.stored, w0, exact.tensors))
    held_out = drift_errors.HeldOut(settings)
    walked = {
        name: held_out.loss(walk.stored(index)[0] for index in range(len(w0))) for name, walk in walks.items()
    }
    coefficients = next(iter(walks.values())).optimizer.coefficients
    at_start = held_out.loss(w0)
    Ledger.of(start, pool, coefficients).apply_(start)
    from_ledger = held_out.loss(w0)
    del walks, exact  # room for the models of what follows
    errors = drift_errors.of_storage(settings, dtype, names, held_out.model)
    return [
        {
            "dtype": dtype_name,
            "algorithm": name,
            "distance": distances[name],
            "kept": kept[name] / num_due,
            "g": errors[name],
            "held_out_loss": {"start": at_start, "ledger": from_ledger, "walked": walked[name]},
        }
        for name in distances
    ]


def measure_official(settings: DriftSettings, dtype_name: str, gradients: Sequence[float]) -> dict[str, Any]:
    """The row of the official algorithm, with its own noise."""
    dtype = DTYPES[dtype_name]
    model = settings.load(dtype).model
    walk = OfficialWalk(model, settings.lr, settings.eps)
    w0 = [parameter.detach().clone() for parameter in walk.parameters]
    seeds = settings.pool.seeds
    distances, kept, due = [], 0, 0
    for step, g in enumerate(gradients):
        counts = walk.step(int(seeds[step]), g)
        if step + 1 in settings.points:
            kept, due = kept + counts[0], due + counts[1]
            distances.append(distance(walk.stored, w0, walk.exact))
    held_out = drift_errors.HeldOut(settings)
    losses = {
        "start": held_out.loss(w0),
        "ledger": held_out.loss(walk.rebuilt),
        "walked": held_out.loss(walk.stored(index)[0] for index in range(len(w0))),
    }
    del walk, model  # room for the models of what follows
    return {
        "dtype": dtype_name,
        "algorithm": OFFICIAL,
        "distance": distances,
        "kept": kept / due,
        "g": drift_errors.of_official(settings, dtype, held_out.model),
        "held_out_loss": losses,
    }


def run(
    settings: DriftSettings,
    num_threads: int,
    algorithms: Sequence[str],
    previous: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The document: settings, the recorded g, the environment of each run that it was made in, and the rows.

    Args:
        previous: of the same settings: its g is repeated, its rows of other algorithms stay.

    Raises:
        ValueError: an unknown algorithm, or a document of other settings.
    """
    unknown = sorted(set(algorithms) - set(ALGORITHMS))
    if unknown:
        raise ValueError(f"expected algorithms out of {', '.join(ALGORITHMS)}, got {', '.join(unknown)}")
    # As JSON has it: tuples become lists.
    described = json.loads(json.dumps({**dataclasses.asdict(settings), "points": settings.points}))
    if previous is not None and previous["settings"] != described:
        raise ValueError(f"expected a result of the settings {described}, got one of {previous['settings']}")
    run_environment = environment.describe(num_threads)
    torch.set_num_threads(num_threads)
    gradients = record(settings) if previous is None else previous["recorded_g"]
    jobs = [
        (settings, dtype_name, part, gradients)
        for dtype_name in settings.dtypes
        for part in ([name for name in algorithms if (name == OFFICIAL) is alone] for alone in (True, False))
        if part
    ]
    if num_threads == 1:
        found = [_run_job(job) for job in jobs]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(num_threads, len(jobs)), spawn) as workers:
            found = list(workers.map(_run_job, jobs))
    runs = [] if previous is None else previous["runs"]
    rows = [{**row, "run": len(runs)} for part in found for row in part]
    rows += (
        [] if previous is None else [row for row in previous["rows"] if row["algorithm"] not in algorithms]
    )
    run_environment["load_average_after"] = environment.load_average()
    return {"settings": described, "recorded_g": gradients, "runs": [*runs, run_environment], "rows": rows}


def merged(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document of several that repeat the same walk; of rows that stand in several the last one's.

    Raises:
        ValueError: documents of other settings, or of another walk.
    """
    first = documents[0]
    runs: list[dict[str, Any]] = []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for document in documents:
        if any(document[key] != first[key] for key in ("settings", "recorded_g")):
            raise ValueError(
                "expected results of one recorded walk, got several; extend the first one instead"
            )
        runs += [environment for environment in document["runs"] if environment not in runs]
        for row in document["rows"]:
            number = runs.index(document["runs"][row["run"]])
            rows[row["dtype"], row["algorithm"]] = {**row, "run": number}
    return {**first, "runs": runs, "rows": list(rows.values())}


def _run_job(job: tuple[DriftSettings, str, list[str], list[float]]) -> list[dict[str, Any]]:
    settings, dtype_name, algorithms, gradients = job
    torch.set_num_threads(1)
    if algorithms == [OFFICIAL]:
        return [measure_official(settings, dtype_name, gradients)]
    return measure_storage(settings, dtype_name, algorithms, gradients)


def _num_kept(before: list[Stored], walk: StorageWalk, seed: int) -> int:
    return sum(
        num_kept(stored, walk.stored(index), _due(stored[0], seed, index))
        for index, stored in enumerate(before)
    )


def _num_due(tensor: torch.Tensor, seed: int, stream: int) -> int:
    return int(_due(tensor, seed, stream).sum())


def _due(tensor: torch.Tensor, seed: int, stream: int) -> torch.Tensor:
    """Where the exact update is not zero: where z is not."""
    return fedkseed_kernels.normal(tensor.shape, seed, stream=stream) != 0


def _common(values: Sequence[float]) -> float:
    if len(set(values)) != 1:
        raise AssertionError(f"expected one coefficient in all ledgers, got {values}")
    return values[0]


def main() -> None:
    """Runs it, prints the table, writes what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model, seconds: a smoke test")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use (%(default)s)")
    parser.add_argument("--steps", type=int, help=f"local steps ({DriftSettings.num_steps})")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="algorithms to measure (all that lack)")
    parser.add_argument(
        "--extend", type=Path, nargs="+", help="earlier results of one walk: repeat it, keep their other rows"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw distance against steps (needs the extra plot)")
    options = parser.parse_args()
    settings = QUICK if options.quick else DriftSettings()
    if options.steps is not None:
        settings = dataclasses.replace(settings, num_steps=options.steps)
    previous = None
    if options.extend is not None:
        previous = merged([json.loads(path.read_text()) for path in options.extend])
    done = {row["algorithm"] for row in previous["rows"]} if previous else set()
    lacking = [name for name in ALGORITHMS if name not in done]
    algorithms = lacking if options.only is None else options.only
    if previous is not None and not algorithms:
        document = previous
    else:
        document = run(settings, options.threads, algorithms, previous)
    print(drift_report.table(document))
    if options.json is not None:
        write_atomically(options.json, (json.dumps(document, indent=1) + "\n").encode())
    if options.plot is not None:
        drift_report.draw(document, options.plot)


if __name__ == "__main__":
    main()
