"""One ledger, to the byte, whatever carries the messages; the programs of docs/embedding.md as they stand."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import embedding
from support.embedding_pages import files, write
from support.running import wait_for

from fedkseed import Server, Simulation, WorkingCopy

SECONDS = 240  # of what takes some: then something hangs


def ledger_of(server: Server, clients: dict[int, Any]) -> bytes:
    while server.round < embedding.CONFIG.num_rounds:
        opened = server.open()
        for number, message in opened.messages.items():
            opened.add(number, clients[number].handle(message))
        opened.close()
    return server.ledger().to_bytes()


@pytest.mark.filterwarnings("ignore:the model is in train mode with dropout:UserWarning")
class TestWithoutATransport:
    def test_clients_with_a_model_each(self) -> None:
        clients = {number: embedding.make_client(number) for number in range(len(embedding.SIZES))}
        assert ledger_of(embedding.make_server(), clients) == embedding.reference_ledger()

    def test_clients_that_share_a_model(self) -> None:
        task = embedding.make_task()
        server, working = task.server(embedding.CONFIG), WorkingCopy(task.model)
        clients = {number: task.client(number, working, embedding.CONFIG) for number in range(4)}
        assert ledger_of(server, clients) == embedding.reference_ledger()

    @pytest.mark.slow
    @pytest.mark.parametrize("num_workers", [1, 4])
    def test_the_simulation_with_workers(self, num_workers: int) -> None:
        assert embedding.simulated_ledger(num_workers) == embedding.reference_ledger()


def test_model_and_data_of_the_page_are_a_task() -> None:
    names: dict[str, Any] = {"__name__": "my_task"}
    exec(compile(files("embedding")["my_task.py"], "my_task.py", "exec"), names)
    make_task, config = names["make_task"], names["config"]
    server = make_task().server(config)
    clients = {number: make_task().client(number, None, config) for number in range(4)}
    with Simulation(make_task(), config) as simulation:
        losses = [result.train_loss for result in simulation.rounds()]
        assert ledger_of(server, clients) == simulation.ledger().to_bytes()
    assert losses[-1] < losses[0]  # type: ignore[operator]


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of the page; ended by its id, and waited for."""
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=embedding.environment(), stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def succeed(folder: Path, program: str) -> None:
    with started(folder, program) as process:
        _, text = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, text.decode()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model is in train mode with dropout:UserWarning")
def test_through_pipes(tmp_path: Path) -> None:
    write("embedding", tmp_path, task="my_task.py")
    succeed(tmp_path, "pipe_server.py")
    assert (tmp_path / "model.ledger").read_bytes() == embedding.reference_ledger()


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nothing listens on."""
    for first in range(20000, 60000, 97):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("expected free ports, found none")


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model is in train mode with dropout:UserWarning")
@pytest.mark.parametrize("away", [None, 2])
def test_over_http(away: int | None, tmp_path: Path) -> None:
    """A client that is away leaves its weight to the others."""
    write("embedding", tmp_path, task="my_task.py")
    port = free_ports(4)
    for name in ("http_client.py", "http_server.py"):
        path = tmp_path / name
        text = path.read_text()
        assert text.count("8470") == 1
        path.write_text(text.replace("8470", str(port)))
    numbers = [number for number in range(4) if number != away]
    with ExitStack() as stack:
        for number in numbers:
            stack.enter_context(started(tmp_path, "http_client.py", str(number)))
        wait_for(lambda: all(listens(port + number) for number in numbers), SECONDS)
        succeed(tmp_path, "http_server.py")
    ledger = (tmp_path / "model.ledger").read_bytes()
    assert (ledger == embedding.reference_ledger()) == (away is None)
    assert ledger == (embedding.reference_ledger() if away is None else embedding.ledger_without(away))
