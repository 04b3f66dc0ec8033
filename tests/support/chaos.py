"""`fedkseed simulate` killed at many instants and resumed, and started twice at once on one folder.

`make chaos` runs it, tests/test_chaos.py a part; it prints a line for each instant and each pair of starts.
Before that it disturbs a federation over a socket (`federation_chaos`).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkseed import cli
from fedkseed.data import asking
from fedkseed.files import FolderInUseError, FolderNotEmptyError
from fedkseed.simulation.run_folder import BEST, CLIENTS, LEDGER, METRICS, SETTINGS, TIMINGS, RunFolder
from support.data_samples import save_model
from support.federation_chaos import disturb

STATE, OLDER_STATE = "server.state", "server.state.1"
#: The same bytes in every run of one command.
SAME = (STATE, OLDER_STATE, LEDGER, BEST, METRICS, CLIENTS, SETTINGS, asking.FILE)
#: Bounds every wait.
SECONDS = 300
_NUM_ROUNDS = 30


def write_inputs(folder: Path) -> None:
    """A model of some thousand weights and two hundred rows of four clients."""
    save_model(folder / "model")
    rows = [{"q": f"What is {n}?", "a": f"It is {n % 7}.", "who": f"client {n % 4}"} for n in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(folder: Path, out: Path, num_rounds: int = _NUM_ROUNDS, lr: float = 1e-3) -> list[str]:
    """Those of `fedkseed simulate`, for the inputs in ``folder``."""
    data = ["--data", str(folder / "rows.jsonl"), "--input", "q", "--output", "a", "--partition", "by:who"]
    sizes = [
        "--num-rounds",
        str(num_rounds),
        "--num-local-steps",
        "2",
        "--num-seeds",
        "64",
        "--batch-size",
        "2",
    ]
    rest = [
        "--num-threads",
        "1",
        "--final-rows",
        "1",
        "--lr",
        str(lr),
        "--sampling",
        "pro",
        "--out",
        str(out),
    ]
    return ["simulate", "--model", str(folder / "model"), *data, *sizes, *rest]


@dataclass(frozen=True)
class Life:
    """What one process came to.

    Attributes:
        status: exit status; None if it was killed.
        printed, error: what it wrote.
        seconds: how long it lived.
    """

    status: int | None
    printed: str
    error: str
    seconds: float


def live(command: Sequence[str], folder: Path, kill_after: float | None = None) -> Life:
    """One process with all its children, killed after some seconds if it has not ended by itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", dir=folder) as printed,
        tempfile.TemporaryFile("w+", dir=folder) as error,
        subprocess.Popen(
            command, stdout=printed, stderr=error, env=environment, start_new_session=True
        ) as process,
    ):
        status: int | None = None
        try:
            status = process.wait(SECONDS if kill_after is None else kill_after)
        except subprocess.TimeoutExpired:
            if kill_after is None:
                raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.monotonic() - start
        texts = []
        for file in (printed, error):
            file.seek(0)
            texts.append(file.read())
    return Life(status, *texts, seconds)


def line_that_goes_on(life: Life) -> list[str] | None:
    """The command that it printed for the case that it is interrupted, or that its refusal names."""
    if found := re.search(r"this goes on: (.+)$", life.printed, re.M):
        return shlex.split(found[1])
    if life.status == 2 and (found := re.search(r"or (--resume .+)$", life.error.strip())):
        return [sys.executable, "-m", "fedkseed.cli", "simulate", *shlex.split(found[1])]
    return None


def kill_and_go_on(folder: Path, whole: Path, name: str, kill_after: float) -> tuple[Life, int]:
    """A run killed once and brought to its end as a user would.

    Returns:
        Its first life, and after how many rounds that ended.
    """
    out = folder / name
    first = [sys.executable, "-m", "fedkseed.cli", *arguments(folder, out)]
    life = begun = live(first, folder, kill_after)
    metrics = out / METRICS
    rounds = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    for _ in range(3):
        if life.status == 0:
            break
        life = live(line_that_goes_on(life) or first, folder)
    assert life.status == 0, life
    compare(out, whole)
    return begun, rounds


def kill_at_instants(folder: Path, count: int) -> tuple[int, int]:
    """Runs killed at instants spread over the life of one that is left alone.

    One that has ended before its instant says how long a life is now, and is tried anew: other work on the
    machine makes them longer and shorter.

    Returns:
        How many were killed alive, and how many of these between their first and their last round.
    """
    whole = folder / "whole"
    undisturbed = live([sys.executable, "-m", "fedkseed.cli", *arguments(folder, whole)], folder)
    assert undisturbed.status == 0, undisturbed
    length = undisturbed.seconds
    num_killed = num_between = 0
    for number in range(count):
        for attempt in range(5):
            instant = length * (number + 0.5) / count
            begun, rounds = kill_and_go_on(folder, whole, f"killed-{number}-{attempt}", instant)
            if begun.status is None:
                num_killed += 1
                num_between += 0 < rounds < _NUM_ROUNDS
                break
            length = begun.seconds
        when = f"killed after {rounds} rounds" if begun.status is None else "ended before"
        print(
            f"instant {number + 1} of {count}, {instant:.2f} s: {when}, resumed to the same bytes", flush=True
        )
    return num_killed, num_between


def kill_at_writes(folder: Path, every: int = 1) -> int:
    """Runs of three rounds killed before each step that makes something durable, in forked processes.

    Such a step is a flush of a file or of a folder, or a rename: between two of them nothing else can be seen
    after a crash.

    Args:
        folder: with the inputs.
        every: of the steps one out of so many.

    Returns:
        How many were killed.
    """
    whole = folder / "whole-of-3"
    assert wait_for(fork_to(cli.main, arguments(folder, whole, 3), folder / "whole.txt")) == 0
    number = killed = 0
    while True:
        out = folder / f"written-{number}"
        first = arguments(folder, out, 3)
        printed = folder / f"{out.name}.txt"
        status = wait_for(fork_to(functools.partial(killed_before, number), first, printed))
        if status == 0:
            return killed
        assert status == -signal.SIGKILL, printed.read_text()
        killed += 1
        for _ in range(3):
            text = printed.read_text()
            line = line_that_goes_on(Life(status, text, text, 0.0))
            status = wait_for(
                fork_to(cli.main, first if line is None else line[line.index("simulate") :], printed)
            )
            if status == 0:
                break
        assert status == 0, printed.read_text()
        compare(out, whole)
        number += every


def killed_before(number: int, command: Sequence[str]) -> int:
    """The command, killed before the step of this number; ends by itself if it has fewer."""
    steps = itertools.count()

    def counted(whole: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **options: Any) -> Any:
            if next(steps) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*given, **options)

        return step

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    return cli.main(command)


def fork_to(run: Callable[[Sequence[str]], int], command: Sequence[str], printed: Path) -> int:
    """The number of a forked process that runs the command; what it says goes into a file."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(printed, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                status = run(command)
                sys.stdout.flush()
        finally:
            os._exit(status)
    return child


def compare(out: Path, whole: Path) -> None:
    """Raises unless both folders have the same files, with the same bytes where all runs have them."""
    for file in SAME:
        assert (out / file).read_bytes() == (whole / file).read_bytes(), (out.name, file)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}, out.name


def start_twice(folder: Path, name: str, start: Callable[[Path, int], int]) -> tuple[int, list[int]]:
    """Two starts on one folder, in two processes that are released together.

    Args:
        folder: the run's folder is made in it.
        name: of the run's folder.
        start: takes that folder and the number of the process, 0 or 1; gives the exit status.

    Returns:
        Who won, and both exit statuses.
    """
    reader, writer = os.pipe()
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(writer)
                with open(folder / f"{name}-{number}.txt", "w") as printed:
                    os.dup2(printed.fileno(), 1)
                    os.dup2(printed.fileno(), 2)
                    os.read(reader, 1)  # ends when the writer is closed
                    status = start(folder / name, number)
                    sys.stdout.flush()
            finally:
                os._exit(status)
        children.append(child)
    os.close(reader)
    time.sleep(0.05)
    os.close(writer)
    statuses = [wait_for(child) for child in children]
    return statuses.index(0) if 0 in statuses else -1, statuses


def wait_for(child: int) -> int:
    """The exit status of a child, which is ended if it takes too long."""
    for _ in range(SECONDS * 20):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a start took more than {SECONDS} s")


#: Of the two starts.
LEARNING_RATES = (1e-3, 2e-3)


def start_twice_often(folder: Path, count: int) -> None:
    """Each time exactly one wins, and every file is that of a run with the winner's settings alone."""

    def start(out: Path, number: int) -> int:
        return cli.main(arguments(folder, out, 2, LEARNING_RATES[number]))

    alone = [folder / f"alone-{number}" for number in range(2)]
    for path, lr in zip(alone, LEARNING_RATES, strict=True):
        assert (
            live([sys.executable, "-m", "fedkseed.cli", *arguments(folder, path, 2, lr)], folder).status == 0
        )
    assert (alone[0] / LEDGER).read_bytes() != (alone[1] / LEDGER).read_bytes()
    for number in range(count):
        name = f"both-{number}"
        winner, statuses = start_twice(folder, name, start)
        said = (folder / f"{name}-{1 - winner}.txt").read_text()
        assert sorted(statuses) == [0, 2], (statuses, said)
        assert re.search(r"^fedkseed simulate: expected .*$", said, re.M), said
        compare(folder / name, alone[winner])
        assert (folder / name / TIMINGS).read_bytes().count(b"\n") == 2
        print(f"starts {number + 1} of {count}: number {winner + 1} won, the folder is its alone", flush=True)


def take_twice_often(folder: Path, count: int) -> None:
    """The same for the folder alone, without a run in it: where both meet, as often as not."""

    def start(out: Path, number: int) -> int:
        try:
            with RunFolder.start(out) as taken:
                taken.write_settings({"number": number})
        except (FolderInUseError, FolderNotEmptyError):
            return 2
        return 0

    for number in range(count):
        winner, statuses = start_twice(folder, f"taken-{number}", start)
        assert sorted(statuses) == [0, 2], statuses
        with RunFolder.reopen(folder / f"taken-{number}") as taken:
            assert taken.read_settings() == {"number": winner}
        assert sorted(os.listdir(taken.path)) == [".lock", SETTINGS]
    print(f"{count} pairs took a folder: one winner each", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Kills fedkseed simulate and goes on, and starts it twice; without options in every way."
    )
    parser.add_argument("--instants", type=int, default=0, help="at which it is killed", metavar="N")
    parser.add_argument("--starts", type=int, default=0, help="pairs of starts on one folder", metavar="N")
    parser.add_argument("--folders", type=int, default=0, help="pairs that take a folder", metavar="N")
    parser.add_argument("--every", type=int, default=0, help="of the writes it is killed before", metavar="N")
    parser.add_argument(
        "--federation", type=int, default=0, help="kills of server, nodes and workers each", metavar="N"
    )
    chosen = parser.parse_args()
    if not any(vars(chosen).values()):
        chosen = argparse.Namespace(federation=10, folders=200, starts=40, every=1, instants=60)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # processes are forked
    with tempfile.TemporaryDirectory(prefix="fedkseed-chaos-") as name:
        folder = Path(name)
        if chosen.federation:
            outcome = disturb(folder / "federation", chosen.federation)
            print(
                f"a disturbed federation ended with the ledger of an undisturbed one: {outcome}", flush=True
            )
        if chosen.folders:
            take_twice_often(folder, chosen.folders)
        write_inputs(folder)
        if chosen.starts:
            start_twice_often(folder, chosen.starts)
        if chosen.every:
            num_killed = kill_at_writes(folder, chosen.every)
            print(f"killed before {num_killed} writes: each went on to the same bytes", flush=True)
        if chosen.instants:
            num_killed, num_between = kill_at_instants(folder, chosen.instants)
            print(
                f"{num_killed} of {chosen.instants} runs killed alive, {num_between} of them between two "
                "rounds: all came to the bytes of one left alone"
            )


if __name__ == "__main__":
    main()
