"""How far liars move a round's weights, and what the bounds cost: `python -m benchmarks.liars`.

A liar states the largest data size, 2^32 - 1, and the largest |g| that a server takes, 1000, in every step;
honest clients state 1000 rows, and their g are normal with a standard deviation of 20. Sixteen clients, 20
local steps, 256 seeds, lr 1e-4. Replies travel as messages through a server, and what a round moves is
measured on a tensor, beside the same round with nobody lying and no bounds. Means over draws of g and seeds.

What the bounds cost is how far the update of an honest round with them is from the one without, relative to
the latter: four clients of sizes 58 : 17 : 15 : 10, with normal g, with heavier tails (Student's t with three
degrees of freedom) and with g of real models (`benchmarks.liars.honest_g`). A few minutes on two cores; the
result is results/liars.json, and docs/protocol.md shows its tables.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.common import environment
from benchmarks.common.places import RESULTS_FOLDER
from benchmarks.liars import honest_g
from benchmarks.liars.rounds import (
    NUM_STEPS,
    OFF,
    ROWS,
    Arena,
    Draw,
    Replies,
    Scalars,
    cosine,
    lies_at_the_bound,
    normal,
    rms,
    student,
)
from benchmarks.liars.tables import tables
from fedkseed import RECOMMENDED_BOUNDS
from fedkseed.federation.bounds import Bounds
from fedkseed.federation.config import Weighting
from fedkseed.files import write_atomically

RESULT = RESULTS_FOLDER / "liars.json"
NUM_CLIENTS = 16
NUM_LIARS = (0, 1, 4, 8)
#: Sizes of the honest clients whom the bounds have to leave alone.
SIZES = (58, 17, 15, 10)
CLIPS = (3.0, 4.0, 4.5, 5.0, 5.5, 6.0, 8.0, 12.0)
CAPS = (2.0, 2.2, 2.4, 3.0, 4.0)
#: What lies so low that the others are cut to it.
TINY = 1e-6

Row = dict[str, Any]
#: The g of so many liars, in so many steps.
Lie = Callable[[int, int], Scalars]


def attack_row(
    arena: Arena, seeds: Sequence[int], num_liars: int, bounds: Bounds, weighting: Weighting, lie: Lie
) -> Row:
    """How far rounds with liars move the weights, beside honest rounds without bounds."""
    moves, times, cosines = [], [], []
    for seed in seeds:
        honest = Replies.honest(normal, seed, (ROWS,) * NUM_CLIENTS)
        expected = arena.move(honest, OFF, seed=seed)
        told = honest.with_liars(lie(num_liars, NUM_STEPS))
        found = arena.move(told, bounds, seed=seed, weighting=weighting)
        moves.append(rms(found))
        times.append(rms(found) / rms(expected))
        cosines.append(cosine(found, expected))
    return {
        "weighting": weighting,
        "num_liars": num_liars,
        **bounds._asdict(),
        "rms": _mean(moves),
        "times_honest": _mean(times),
        "p95_times_honest": float(np.quantile(times, 0.95)),
        "cosine": _mean(cosines),
    }


def honest_row(
    arena: Arena, rounds: Iterable[tuple[int, Replies]], bounds: Bounds, weighting: Weighting
) -> Row:
    """How far the bounds move the update of honest rounds, in shares of it.

    Args:
        arena: where.
        rounds: seed and replies of each.
        bounds: of the server.
        weighting: of the replies.
    """
    offs, wholes, cosines = [], [], []
    for seed, replies in rounds:
        free = arena.move(replies, OFF, seed=seed, weighting=weighting)
        held = arena.move(replies, bounds, seed=seed, weighting=weighting)
        offs.append(rms(held - free))
        wholes.append(rms(free))
        cosines.append(cosine(held, free))
    changes = np.array(offs) / np.array(wholes)
    return {
        **bounds._asdict(),
        "num_rounds": len(changes),
        "mean_change": float(changes.mean()),
        "rms_change": float(np.sqrt(np.square(offs).sum() / np.square(wholes).sum())),
        "most_change": float(changes.max()),
        "changed_rounds": float((changes > 0).mean()),
        "cosine": _mean(cosines),
    }


def drawn_rounds(draw: Draw, seeds: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, Replies]]:
    """Honest rounds with a seed each."""
    return [(seed, Replies.honest(draw, seed, sizes)) for seed in seeds]


def window_row(arena: Arena, seeds: Sequence[int], honest_seeds: Sequence[int], bounds: Bounds) -> Row:
    """Both sides of a pair of values: what liars do under it, and what honest clients lose by it."""
    found = {}
    for number in (1, 4):
        row = attack_row(arena, seeds, number, bounds, "data_size", lies_at_the_bound)
        found |= {f"{name}_{number}": row[name] for name in ("times_honest", "p95_times_honest")}
    measured = {row["g"]: row["mean_change"] for row in measured_rows(arena, bounds)}
    drawn = honest_row(arena, drawn_rounds(normal, honest_seeds, SIZES), bounds, "data_size")
    return {**found, **drawn, "measured_mean_change": measured}


def measured_rows(arena: Arena, bounds: Bounds) -> list[Row]:
    """What the bounds cost in the rounds of real models, a row for each of their runs."""
    rows = []
    for run in json.loads(honest_g.RESULT.read_bytes())["runs"]:
        rounds = [
            (seed, Replies(np.array(round["g"], np.float32), tuple(round["data_sizes"])))
            for seed, round in enumerate(run["rounds"])
        ]
        row = honest_row(arena, rounds, bounds, run["weighting"])
        num_clients, num_steps = rounds[0][1].scalars.shape
        rows.append({"g": run["name"], "num_clients": num_clients, "num_local_steps": num_steps, **row})
    return rows


def measure(num_weights: int, num_attacks: int, num_honest: int) -> dict[str, list[Row]]:
    """All rows.

    Args:
        num_weights: of the tensor.
        num_attacks: draws behind each row of liars.
        num_honest: draws behind each row of honest clients.
    """
    arena = Arena(num_weights)
    seeds, honest_seeds = range(num_attacks), range(num_honest)
    attacks = [
        attack_row(arena, seeds, number, bounds, weighting, lies_at_the_bound)
        for weighting in get_args(Weighting)
        for bounds in (OFF, RECOMMENDED_BOUNDS)
        for number in NUM_LIARS
    ]

    def tiny(num_liars: int, num_steps: int) -> Scalars:
        return np.full((num_liars, num_steps), TINY, np.float32)

    shrinking = [attack_row(arena, seeds, n, RECOMMENDED_BOUNDS, "data_size", tiny) for n in NUM_LIARS[1:]]
    pairs = [Bounds(clip, RECOMMENDED_BOUNDS.share_cap) for clip in CLIPS]
    pairs += [Bounds(RECOMMENDED_BOUNDS.median_clip, cap) for cap in CAPS]
    window = [window_row(arena, seeds, honest_seeds, bounds) for bounds in dict.fromkeys(pairs)]
    honest = [
        {
            "g": name,
            "num_clients": len(sizes),
            "num_local_steps": NUM_STEPS,
            **honest_row(arena, drawn_rounds(draw, honest_seeds, sizes), RECOMMENDED_BOUNDS, "data_size"),
        }
        for name, draw in (("normal", normal), ("Student's t, 3 degrees of freedom", student))
        for sizes in (SIZES, (ROWS,) * NUM_CLIENTS)
    ]
    return {
        "attacks": attacks,
        "shrinking": shrinking,
        "window": window,
        "honest": [*honest, *measured_rows(arena, RECOMMENDED_BOUNDS)],
    }


def main() -> None:
    """Measures, prints and writes the result."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.liars", description=(__doc__ or "").splitlines()[0]
    ).parse_args()
    logging.getLogger("fedkseed").setLevel(logging.ERROR)  # every liar is told of
    sizes = {"num_weights": 1 << 14, "num_attacks": 100, "num_honest": 500}
    document = {
        "command": "python -m benchmarks.liars",
        "environment": environment.describe(torch.get_num_threads()),
        **sizes,
        **measure(**sizes),
    }
    print(tables(document))
    write_atomically(RESULT, (json.dumps(document, indent=2) + "\n").encode())


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


if __name__ == "__main__":
    main()
