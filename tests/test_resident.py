"""A resident worker: found again, started once, alive after failed messages, replaced when it was killed."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import federation
from support.resident_clients import make_client, make_echo, make_mute, make_none, make_nothing
from support.running import is_running, wait_for

import fedkseed
import fedkseed_kernels
from fedkseed import IdentityError, MessageError, ProtocolError, Server, Simulation, SimulationConfig
from fedkseed.federation.messages import MAX_BROADCAST_BYTES
from fedkseed.resident import Resident, ResidentError, connect, connection

SECONDS = 60.0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for sockets; workers that are left in it are ended by id."""
    place = tmp_path / "sockets"
    yield place
    for log in place.glob("*.log"):
        for line in log.read_text().splitlines():
            if "model loaded" in line:
                pid = int(line.rpartition(" ")[2])
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: not is_running(pid))  # type: ignore[misc]


def echo(folder: Path, **options: object) -> Resident:
    folder.mkdir(exist_ok=True, mode=0o700)
    return connect(functools.partial(make_echo, folder), folder, start_timeout=SECONDS, **options)  # type: ignore[arg-type]


def made(folder: Path) -> int:
    return len(list(folder.glob("made-*")))


def test_it_is_started_by_the_first_message_and_found_again(folder: Path) -> None:
    resident = echo(folder)
    with pytest.raises(ResidentError, match="expected a running worker"):
        resident.info()
    assert resident.handle(b"one") == b"answer to one"
    again = echo(folder)
    assert again.handle(bytearray(b"two")) == b"answer to two"
    script = (
        "import sys; from pathlib import Path; from test_resident import echo;"
        "sys.stdout.buffer.write(echo(Path(sys.argv[1])).handle(b'three'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, timeout=SECONDS
    )
    assert found.stdout == b"answer to three", found.stderr
    assert resident.info()["messages"] == 3
    assert made(folder) == 1
    assert stat.S_IMODE(resident.path.stat().st_mode) == 0o600
    resident.stop()
    assert not resident.path.exists()
    resident.stop()


def test_a_failed_message_comes_back_as_what_it_is_and_the_worker_lives(folder: Path) -> None:
    resident = echo(folder)
    for message, kind in (
        (b"message", MessageError),
        (b"protocol", ProtocolError),
        (b"identity", IdentityError),
    ):
        with pytest.raises(kind, match=f"expected another one than b'{message.decode()}'"):
            resident.handle(message)
    with pytest.raises(ResidentError, match="RuntimeError: expected room, got none"):
        resident.handle(b"other")
    assert resident.handle(b"good") == b"answer to good"
    info = resident.info()
    assert (info["messages"], info["failed"], info["loads"]) == (5, 4, 1)
    resident.stop()


@pytest.mark.slow
def test_a_killed_worker_is_replaced(folder: Path) -> None:
    resident = echo(folder)
    resident.handle(b"one")
    pid = resident.info()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid))
    assert resident.path.exists()
    assert resident.handle(b"two") == b"answer to two"
    assert resident.info()["pid"] != pid
    assert resident.handle(b"die once") == b"answer to die once"
    with pytest.raises(ResidentError, match="got its end twice"):
        resident.handle(b"die")
    resident.stop()


def test_workers_that_end_before_they_take_a_message_do_not_count(folder: Path) -> None:
    """One that was killed over another caller's message accepts a moment longer, and says nothing."""
    resident = echo(folder)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dying:
        dying.bind(str(resident.path))
        dying.listen()

        def accept() -> None:
            for _ in range(6):
                dying.accept()[0].close()
            dying.close()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        assert resident.handle(b"one") == b"answer to one"
        accepting.join()
    assert made(folder) == 1
    resident.stop()


@pytest.mark.slow
def test_callers_that_start_at_once_end_with_one_worker(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    script = (
        "import sys; from pathlib import Path; from test_resident import echo;"
        "echo(Path(sys.argv[1])).handle(b'x')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    callers = [
        subprocess.Popen([sys.executable, "-c", script, str(folder)], env=environment) for _ in range(4)
    ]
    assert [caller.wait(timeout=2 * SECONDS) for caller in callers] == [0] * 4
    assert made(folder) == 1
    echo(folder).stop()


@pytest.mark.slow
def test_an_idle_worker_ends(folder: Path) -> None:
    resident = echo(folder, idle_timeout=0.2)
    resident.handle(b"one")
    wait_for(lambda: not resident.path.exists())
    assert resident.handle(b"two") == b"answer to two"
    wait_for(lambda: not resident.path.exists())


def test_a_worker_that_cannot_start_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = connect(make_none, folder, start_timeout=SECONDS)
    with pytest.raises(ResidentError, match="FileNotFoundError: expected a model, got no such folder"):
        resident.handle(b"one")
    # More than a pipe takes, for a process that reads nothing.
    resident = connect(functools.partial(make_echo, bytes(1 << 20)), folder, name="false")  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("false"))
        with pytest.raises(ResidentError, match="its end with exit status 1: it said nothing"):
            resident.handle(b"one")
    with pytest.raises(ResidentError, match="at the top level of a module"):
        connect(lambda: make_echo(folder), folder)


def test_a_worker_whose_function_returns_no_client_says_so_at_its_start_and_ends(folder: Path) -> None:
    resident = connect(make_nothing, folder, start_timeout=SECONDS)
    words = "exit status 1: TypeError: expected make_client to return a client, got a NoneType; end it with"
    for _ in range(2):
        with pytest.raises(ResidentError, match=words):
            resident.start()
    assert not resident.path.exists()


def test_a_worker_whose_client_answers_with_nothing_says_so_and_lives_on(folder: Path) -> None:
    resident = connect(make_mute, folder, start_timeout=SECONDS)
    for failed in (1, 2):
        with pytest.raises(
            ResidentError, match="TypeError: expected handle to answer in bytes, got a NoneType"
        ):
            resident.handle(b"one")
        assert (resident.info()["loads"], resident.info()["failed"]) == (1, failed)
    resident.stop()


def test_folders_that_others_may_enter_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ResidentError, match=r"this user alone \(mode 0700\), got .* with mode 0755"):
        connect(make_none, tmp_path)
    with pytest.raises(ResidentError, match="stay below 108 bytes"):
        connect(make_none, tmp_path / ("long" * 25))
    with pytest.raises(ValueError, match="idle_timeout in seconds above 0"):
        connect(make_none, tmp_path / "sockets", idle_timeout=0)


def test_what_is_no_message_is_refused_before_a_worker_is_started(folder: Path) -> None:
    resident = echo(folder)
    for message in (10**15, None, "text", [1], bytes(MAX_BROADCAST_BYTES + 1)):
        with pytest.raises(MessageError, match="expected a message"):
            resident.handle(message)  # type: ignore[arg-type]
    assert made(folder) == 0


def test_a_worker_finds_modules_where_its_caller_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow = tmp_path / "shadow"
    for name in ("fedkseed", "support"):
        (shadow / name).mkdir(parents=True)
        (shadow / name / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(shadow)
    # An editable installation finds packages after sys.path, where "" would shadow them for the caller, too.
    roots = [str(Path(package.__file__ or "").parents[1]) for package in (fedkseed, fedkseed_kernels)]
    monkeypatch.setattr(sys, "path", [*roots, *sys.path, tmp_path, ""])
    resident = echo(folder)
    assert resident.handle(b"one") == b"answer to one"
    resident.stop()


def test_a_worker_whose_socket_was_removed_leaves_the_next_one_s(folder: Path) -> None:
    first = echo(folder, idle_timeout=2.0)
    first.start()
    pid = first.info()["pid"]
    first.path.unlink()
    second = echo(folder)
    second.start()
    wait_for(lambda: not is_running(pid))
    assert second.info()["pid"] != pid
    second.stop()
    assert not second.path.exists()


def test_a_function_of_the_program_itself_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_none, "__module__", "__main__")
    with pytest.raises(ResidentError, match="of the program itself; move it to a file"):
        connect(functools.partial(make_none), folder)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name is short wherever tests run."""
    with tempfile.TemporaryDirectory(prefix="fk-", dir="/tmp") as folder:
        yield Path(folder)


def test_the_folder_is_this_user_s_and_short(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, long = short / "run", short / ("long" * 25)
    for place in (runtime, long):
        place.mkdir()
    user = os.getuid()
    for seen_as, session, temporary, expected in (
        (user, runtime, short, runtime / "fedkseed"),
        (user + 1, runtime, short, short / f"fedkseed-{user + 1}"),
        (user, long, short, short / f"fedkseed-{user}"),
        (user, short / "none", long, Path("/tmp") / f"fedkseed-{user}"),
    ):
        monkeypatch.setattr(os, "getuid", lambda seen_as=seen_as: seen_as)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        assert connection._default_folder() == expected


def test_other_clients_have_other_workers(folder: Path) -> None:
    one, other = connect(make_none, folder), connect(make_none, folder, name="second")
    third = connect(functools.partial(make_client, 3), folder)
    assert len({one.path, other.path, third.path}) == 3
    assert connect(make_none, folder).path == one.path


@pytest.mark.slow
def test_a_federation_over_resident_workers_has_the_simulation_s_ledger(folder: Path) -> None:
    config = SimulationConfig(**{**federation.CONFIG, "num_rounds": 2})
    with Simulation(federation.make_task(), config) as simulation:
        list(simulation.rounds())
        expected = simulation.ledger().to_bytes()
    task = federation.make_task()
    server = Server.of(task.model, simulation.server.pool, config.server_config(5))
    workers = {
        number: connect(functools.partial(make_client, number), folder, start_timeout=SECONDS)
        for number in range(5)
    }
    rebuilds = []
    for _ in range(2):
        opened = server.open()
        for number, message in opened.messages.items():
            opened.add(number, workers[number].handle(message))
            assert workers[number].handle(message) == opened.replies[number]
            rebuilds.append(workers[number].info()["rebuilds"])
        opened.close()
    assert server.ledger().to_bytes() == expected
    # The second message of a round finds its model.
    assert all(count <= number for count, number in zip(rebuilds, (1, 1, 2, 2), strict=True))
    for worker in workers.values():
        worker.stop()
