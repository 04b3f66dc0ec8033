"""A process that plays a federation on a state folder while its children are killed: `test_server_state.py`.

Each child resumes the folder's state, or starts, and merges and saves rounds until the last. A child is
killed a random time (fixed seed) after a random number of rounds, anywhere in its next round or two; at the
end one child runs undisturbed. Prints how many children were killed and in how many states the folder was.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from fedkseed import Server, ServerConfig
from fedkseed.federation.state import StateFolder
from support.messages import CONFIG, IDENTITY, POOL, make_replies

NUM_ROUNDS = 150


def play(folder: str, progress: int | None = None) -> None:
    """Goes on until the last round is saved; writes a byte to ``progress`` after each."""
    config = ServerConfig(**{**CONFIG, "sampling": "pro", "run_id": b"one of many runs"})
    if (Path(folder) / StateFolder.FILE).exists():
        server = Server.resume(folder, IDENTITY, POOL, config)
    else:
        server = Server(IDENTITY, POOL, config)
    while server.round < NUM_ROUNDS:
        replies = make_replies(server)
        if server.round % 7 == 3:
            server.skip_round()
        else:
            server.merge(replies[: 1 + server.round % 3])
        server.save(folder)
        if progress is not None:
            os.write(progress, b".")


def main(folder: str, num_kills: int) -> None:
    generator = np.random.default_rng(12)
    num_killed, states = 0, set()
    for kill in range(num_kills + 1):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                play(folder, writer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        if kill < num_kills:
            for _ in range(generator.integers(0, 4)):
                os.read(reader, 1)
            time.sleep(generator.uniform(0, 0.006))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reader)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and os.waitstatus_to_exitcode(status) != 0:
            sys.exit("expected a child to go on, got one that failed")
        num_killed += killed
        path = Path(folder) / StateFolder.FILE
        states.add(path.read_bytes() if path.exists() else b"")
    print(num_killed, len(states))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
