"""Projected gradients of honest clients, as real models give them: `python -m benchmarks.liars.honest_g`.

SmolLM2-135M-Instruct in the two federations that come with the package, four clients with sentences and
sixteen with instructions, at their own settings; every g that a client sent stands in results/honest-g.json.
`benchmarks.liars` puts the bounds to them. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.common import environment
from benchmarks.common.places import RESULTS_FOLDER
from fedkseed import Reply, Simulation
from fedkseed.files import write_atomically
from fedkseed.scenarios.launch import with_data
from fedkseed.scenarios.run import make_task

RESULT = RESULTS_FOLDER / "honest-g.json"
#: Settings beside those that come with the data; the second has the local steps of the liars' setting.
RUNS: Mapping[str, Mapping[str, Any]] = {
    "sentences": {"data": "sentiment", "num_rounds": 6},
    "sentences, 20 steps": {"data": "sentiment", "num_rounds": 2, "num_local_steps": 20},
    "instructions": {"data": "instructions", "num_rounds": 4},
}

Row = dict[str, Any]


def measured(given: Mapping[str, Any]) -> Row:
    """The replies of a run: settings, and of each round every client's data size and g."""
    settings, data = with_data({**given, "round_rows": 1})
    config = settings.federation
    rounds = []
    with Simulation(make_task(settings, data), config) as simulation:
        opened = simulation.server.open()
        for _ in simulation.rounds():
            replies = {client: Reply.from_bytes(reply) for client, reply in opened.replies.items()}
            rounds.append(
                {
                    "clients": list(replies),
                    "data_sizes": [reply.data_size for reply in replies.values()],
                    "g": [np.round(reply.scalars.astype(float), 4).tolist() for reply in replies.values()],
                }
            )
            opened = simulation.server.open()
    names = ("lr", "eps", "num_seeds", "num_local_steps", "batch_size", "family", "weighting", "seed")
    return {**{name: getattr(config, name) for name in names}, "rounds": rounds}


def main() -> None:
    """Measures and writes the result."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.liars.honest_g", description=(__doc__ or "").splitlines()[0]
    ).parse_args()
    runs = []
    for name, given in RUNS.items():
        row = measured(given)
        magnitudes = np.abs(np.concatenate([np.ravel(round["g"]) for round in row["rounds"]]))
        runs.append({"name": name, **row})
        median, largest = np.median(magnitudes), magnitudes.max()
        print(f"{name}: {magnitudes.size} g, median |g| {median:.4g}, largest {largest:.4g}", flush=True)
    document = {
        "command": "python -m benchmarks.liars.honest_g",
        "environment": environment.describe(torch.get_num_threads()),
        "model": "SmolLM2-135M-Instruct",
        "runs": runs,
    }
    write_atomically(RESULT, (json.dumps(document) + "\n").encode())


if __name__ == "__main__":
    main()
