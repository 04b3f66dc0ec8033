"""Resident workers that are ended while they load, and files that nobody owns any more."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.resident_clients import make_echo, make_late
from support.running import is_running, wait_for

from fedkseed.resident import Resident, ResidentError, connect

SECONDS = 60.0
TWO_DAYS = 2 * 24 * 3600.0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for sockets; workers that still load in it are ended by id."""
    place = tmp_path / "sockets"
    place.mkdir(mode=0o700)
    yield place
    for pid in loading(place):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def late(folder: Path) -> Resident:
    return connect(functools.partial(make_late, folder), folder, start_timeout=SECONDS)


def loading(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("loading-")) for path in folder.glob("loading-*")]


def test_stop_ends_a_worker_that_still_loads_and_its_starter_is_told(folder: Path) -> None:
    told: list[str] = []

    def start() -> None:
        with pytest.raises(ResidentError) as caught:
            late(folder).start()
        told.append(str(caught.value))

    starter = threading.Thread(target=start)
    starter.start()
    wait_for(lambda: bool(loading(folder)))
    late(folder).stop()
    starter.join(SECONDS)
    assert not is_running(loading(folder)[0])
    assert "its end with exit status -15" in told[0]


def test_stop_ends_a_worker_whose_starter_was_killed_while_it_loads(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from test_resident_leftovers import late;"
        "late(Path(sys.argv[1])).start()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], env=environment) as starter:
        wait_for(lambda: bool(loading(folder)))
        starter.kill()
    (pid,) = loading(folder)
    assert is_running(pid)
    late(folder).stop()
    assert not is_running(pid)


def test_stop_leaves_workers_of_others_and_their_callers_alone(folder: Path) -> None:
    other = connect(functools.partial(make_echo, folder), folder, start_timeout=SECONDS)
    other.start()
    late(folder).stop()
    assert other.handle(b"one") == b"answer to one"
    other.stop()


def abandoned(folder: Path, name: str, age: float = TWO_DAYS) -> list[Path]:
    """The files of a worker that was killed, so long ago."""
    made = [folder / (name + suffix) for suffix in (".lock", ".log", ".socket")]
    for path in made:
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    return made


def test_a_worker_that_starts_removes_what_others_left_long_ago_and_nothing_else(folder: Path) -> None:
    running = connect(functools.partial(make_echo, folder), folder, start_timeout=SECONDS)
    running.start()
    kept = abandoned(folder, running.path.stem)  # as old as a worker that nobody asks for long
    kept += abandoned(folder, "a" * 16, age=3600.0)
    kept += abandoned(folder, "not a worker's")
    kept += abandoned(folder, "b" * 16)
    gone = [*abandoned(folder, "0123456789abcdef"), *abandoned(folder, "f" * 16)]
    another = connect(functools.partial(make_echo, folder), folder, start_timeout=SECONDS, name="another")
    with kept[-3].open() as lock:  # as of a caller that waits for its worker
        fcntl.flock(lock, fcntl.LOCK_EX)
        another.start()
    assert [path.name for path in gone if path.exists()] == []
    assert [path.name for path in kept if not path.exists()] == []
    assert running.handle(b"one") == b"answer to one"
    running.stop()
    another.stop()
