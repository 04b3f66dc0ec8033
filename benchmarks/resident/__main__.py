"""Seconds of a first and a second message to one node, model unchanged: `python -m benchmarks.resident`.

Three ways that a node can answer where its framework starts a process for every message: all by that process;
by that process with the round's model in a file (`fedkseed.RoundModelFile`); by a resident worker that the
process calls (`fedkseed.resident`). SmolLM2-135M-Instruct in fp32, K = 4,096 Gaussian seeds, a broadcast of
one local step. The calling process of the last way counts, too: Python and imports, as a framework's would.

Every way's replies are compared byte for byte. Results go to results/resident.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.common import environment
from benchmarks.common.constants import LEARNING_RATE, ZO_EPS
from benchmarks.common.measure import spread
from benchmarks.common.places import RESULTS_FOLDER
from benchmarks.resident.node import make_client
from fedkseed import Broadcast, ModelIdentity, SeedPool, Server, ServerConfig
from fedkseed.data import load_smollm2
from fedkseed.files import write_atomically
from fedkseed.resident import connect

NUM_SEEDS = 4096
_SEED = 1
#: A second message of the same coefficients is to another client of the node.
_MESSAGES = ("first", "second")
_CALLER = (
    "import functools, sys; from pathlib import Path\n"
    "from benchmarks.resident.node import make_client; from fedkseed.resident import connect\n"
    "message, reply, folder = map(Path, sys.argv[1:])\n"
    "worker = connect(functools.partial(make_client, None), folder)\n"
    "reply.write_bytes(worker.handle(message.read_bytes()))\n"
)

Row = dict[str, Any]


def two_messages(num_seeds: int) -> list[bytes]:
    """Broadcasts of a second round, whose model is w0 no more, to two clients."""
    config = ServerConfig(num_clients=2, clients_per_round=2, num_local_steps=1, lr=LEARNING_RATE, eps=ZO_EPS)
    server = Server(ModelIdentity.of(load_smollm2(torch.float32)[0]), SeedPool(_SEED, num_seeds), config)
    server.coefficients = np.random.default_rng(_SEED).normal(scale=1e-5, size=num_seeds)
    server.skip_round()
    return list(server.open().messages.values())


def call(arguments: list[str]) -> tuple[float, str]:
    """Seconds of a process of its own, and what it printed."""
    start = perf_counter()
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return perf_counter() - start, done.stdout


def by_processes(messages: list[bytes], folder: Path, model_folder: str) -> Row:
    """Each message by a process that loads the model; the round's model in a file if a folder is named."""
    row: Row = {"replies": [], "seconds": [], "loads": [], "rebuilds": []}
    for number, message in enumerate(messages):
        (folder / "message").write_bytes(message)
        place = [str(folder / "message"), str(folder / "reply"), model_folder]
        seconds, printed = call(["-m", "benchmarks.resident.node", *place])
        trace = json.loads(printed)
        row["replies"].append((folder / "reply").read_bytes())
        row["seconds"].append(seconds)
        row["loads"].append(number + trace["loads"])
        row["rebuilds"].append((row["rebuilds"] or [0])[-1] + trace["rebuilds"])
    return row


def by_worker(messages: list[bytes], folder: Path) -> Row:
    """Each message by a process that calls the resident worker, which the first one starts."""
    row: Row = {"replies": [], "seconds": [], "loads": [], "rebuilds": []}
    worker = connect(functools.partial(make_client, None), folder / "sockets")
    try:
        for message in messages:
            (folder / "message").write_bytes(message)
            place = [str(folder / "message"), str(folder / "reply"), str(folder / "sockets")]
            seconds, _ = call(["-c", _CALLER, *place])
            trace = worker.info()
            row["replies"].append((folder / "reply").read_bytes())
            row["seconds"].append(seconds)
            row["loads"].append(trace["loads"])
            row["rebuilds"].append(trace["rebuilds"])
    finally:
        worker.stop()
    return row


def measure(num_rounds: int, num_seeds: int) -> list[Row]:
    """A row a way: median seconds of either message over the rounds, and what was loaded and rebuilt by then.

    Raises:
        AssertionError: two ways answered unlike.
    """
    messages = two_messages(num_seeds)
    ways: dict[str, Callable[[Path], Row]] = {
        "a process a message": lambda folder: by_processes(messages, folder, ""),
        "a process a message, the round's model in a file": lambda folder: by_processes(
            messages, folder, str(folder / "model")
        ),
        "resident worker": lambda folder: by_worker(messages, folder),
    }
    found: dict[str, list[Row]] = {way: [] for way in ways}
    expected = None
    for _ in range(num_rounds):
        for way, run in ways.items():
            with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder:
                row = run(Path(folder))
            replies = row.pop("replies")
            expected = expected or replies
            assert replies == expected, f"{way}: other replies than those before"
            found[way].append(row)
    return [
        {
            "way": way,
            "seconds": {
                name: spread([row["seconds"][place] for row in rows]) for place, name in enumerate(_MESSAGES)
            },
            "loads": dict(zip(_MESSAGES, rows[0]["loads"], strict=True)),
            "rebuilds": dict(zip(_MESSAGES, rows[0]["rebuilds"], strict=True)),
        }
        for way, rows in found.items()
    ]


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resident", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way (3)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="K (4096)")
    parser.add_argument("--json", type=Path, default=RESULTS_FOLDER / "resident.json", help="result file")
    options = parser.parse_args()
    rows = measure(options.rounds, options.seeds)
    message = Broadcast.peek(two_messages(options.seeds)[0])
    document = {
        "command": "python -m benchmarks.resident",
        "environment": environment.describe(torch.get_num_threads()),
        "model": "SmolLM2-135M-Instruct",
        "num_seeds": message.num_seeds,
        "num_local_steps": message.num_steps,
        "rows": rows,
    }
    for row in rows:
        first, second = (row["seconds"][name]["median"] for name in _MESSAGES)
        loads, rebuilds = (row[what]["second"] - row[what]["first"] for what in ("loads", "rebuilds"))
        print(
            f"{row['way']}: first {first:.1f} s, second {second:.1f} s, for which {loads} models were loaded "
            f"and {rebuilds} rebuilt"
        )
    write_atomically(options.json, (json.dumps(document, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
