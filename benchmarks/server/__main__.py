"""How many client messages a second one server process merges on one core, and how much memory that takes.

    python -m benchmarks.server [--replies 20000] [--json FILE]

Measured through `Server.merge` with real replies to real broadcasts, K = 4096 and tau = 200: every reply is
parsed, its checksum and its digest are checked, its scalars bounded and added. The schedules of the round
were drawn when its broadcasts were made, which is timed by itself. The answer is compared with a plain sum
first.

Seconds are wall-clock and, beside them, the process's own CPU time, which waiting for a busy core does not
lengthen. Memory is the peak of what Python and NumPy allocate (tracemalloc, untimed): in a merge, schedules
included and the caller's replies not; and in a round of a server with 2^10 and with 2^24 registered clients.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment
from benchmarks.common.constants import LEARNING_RATE, ZO_EPS
from benchmarks.common.measure import spread
from fedkseed import ModelIdentity, Reply, SeedPool, Server, ServerConfig
from fedkseed.federation.config import Sampling
from fedkseed.federation.messages import broadcast_digest

NUM_SEEDS, NUM_STEPS = 4096, 200
NUM_ROUNDS = 5
TARGET = 50_000
_IDENTITY = ModelIdentity(bytes(32), bytes(32), "bfloat16")
#: The same for every server, as one of them merges what was sent to another.
_RUN_ID = b"benchmark merges"

Replies = list[tuple[int, bytes]]


def make_server(num_invited: int, sampling: Sampling, num_clients: int = 1 << 24) -> Server:
    """A server at the paper's size whose rounds invite ``num_invited`` clients."""
    config = ServerConfig(
        num_clients=num_clients,
        clients_per_round=num_invited,
        num_local_steps=NUM_STEPS,
        lr=LEARNING_RATE,
        eps=ZO_EPS,
        sampling=sampling,
        run_id=_RUN_ID,
    )
    return Server(_IDENTITY, SeedPool(1, NUM_SEEDS), config)


def make_replies(server: Server, messages: Replies) -> Replies:
    """A reply to each broadcast, normal scalars, in a random order of arrival."""
    generator = np.random.default_rng(server.round)
    replies = []
    for index in generator.permutation(len(messages)).tolist():
        client, message = messages[index]
        scalars = generator.normal(scale=30, size=NUM_STEPS).astype(np.float32)
        reply = Reply(server.round, client, 1 + client % 97, broadcast_digest(message), scalars)
        replies.append((client, reply.to_bytes()))
    return replies


def check_answer(sampling: Sampling) -> None:
    """Raises AssertionError unless a merge is the weighted sum of its replies."""
    server = make_server(50, sampling)
    replies = make_replies(server, [(client, server.broadcast(client)) for client in server.clients])
    expected = np.zeros(NUM_SEEDS)
    total = sum(Reply.from_bytes(message).data_size for _, message in replies)
    for client, message in replies:
        reply = Reply.from_bytes(message)
        moves = server.config.lr * reply.data_size / total * reply.scalars.astype(np.float64)
        np.subtract.at(expected, server.schedule(client), moves)
    server.merge(replies)
    np.testing.assert_allclose(server.coefficients, expected, rtol=1e-9, atol=1e-18)


def measure(num_replies: int, sampling: Sampling) -> dict[str, Any]:
    """One row: seconds of broadcasts and merges of whole rounds, and the peak of the last merge."""
    check_answer(sampling)
    server = make_server(num_replies, sampling)
    broadcasts, wall, cpu = [], [], []
    sizes = (0, 0)
    for _ in range(NUM_ROUNDS):
        start = time.perf_counter()
        messages = [(client, server.broadcast(client)) for client in server.clients]
        broadcasts.append(time.perf_counter() - start)
        replies = make_replies(server, messages)
        sizes = (len(messages[0][1]), len(replies[0][1]))
        del messages
        start, start_cpu = time.perf_counter(), time.process_time()
        server.merge(replies)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {
        "sampling": sampling,
        "num_replies": num_replies,
        "num_seeds": NUM_SEEDS,
        "num_local_steps": NUM_STEPS,
        "bytes_down": sizes[0],
        "bytes_up": sizes[1],
        "broadcast_seconds": spread(broadcasts),
        "merge_seconds": spread(wall),
        "merge_cpu_seconds": spread(cpu),
        "merges_per_second": num_replies / spread(wall)["median"],
        "merges_per_cpu_second": num_replies / spread(cpu)["median"],
        "merge_peak_bytes": _merge_peak(num_replies, sampling),
    }


def _peak(call: Callable[[], object]) -> int:
    """The most bytes that a call holds at once beyond what was held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _merge_peak(num_replies: int, sampling: Sampling) -> int:
    server = make_server(num_replies, sampling)
    replies = make_replies(server, [(client, server.broadcast(client)) for client in server.clients])
    resumed = make_server(num_replies, sampling)  # which draws the schedules again
    return _peak(lambda: resumed.merge(replies))


def _registered_peaks() -> list[dict[str, Any]]:
    """A server's whole life of one round of 10 clients, with few and with many registered ones."""
    rows = []
    for num_clients in (1 << 10, 1 << 24):

        def one_round(num_clients: int = num_clients) -> None:
            server = make_server(10, "pro", num_clients)
            server.merge(
                make_replies(server, [(client, server.broadcast(client)) for client in server.clients])
            )

        rows.append({"num_clients": num_clients, "peak_bytes": _peak(one_round)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--replies", type=int, default=20_000, help="clients that reply in a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    options = parser.parse_args()
    described = environment.describe(1)
    registered = _registered_peaks()
    rows = [measure(options.replies, sampling) for sampling in ("uniform", "pro")]
    result = {
        "command": f"python -m benchmarks.server --replies {options.replies}",
        "environment": {**described, "load_average_after": environment.load_average()},
        "target_per_second": TARGET,
        "rows": rows,
        "registered_clients": registered,
    }
    for row in rows:
        print(
            f"{row['sampling']}: {row['merges_per_second']:,.0f} messages/s merged "
            f"({row['merges_per_cpu_second']:,.0f} per second of CPU time; target {TARGET:,}), "
            f"{row['bytes_down']:,} bytes down, {row['bytes_up']:,} up"
        )
        each = row["merge_peak_bytes"] / row["num_replies"]
        print(f"  peak of a merge: {row['merge_peak_bytes']:,} bytes, {each:,.0f} a reply")
    for entry in registered:
        print(f"{entry['num_clients']:,} registered clients: peak of {entry['peak_bytes']:,} bytes")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
