"""A federation over a socket whose server, nodes and workers are killed in mid-round, with hostile guests.

A node asks the server for messages of its clients and hands them to its worker, a process that holds the
model; whoever was killed is started again, the server from its saved state. Guests send what no server takes.
A node that stays away longer than the others wait is left out of the round. In the end the ledger has to be
that of a run that nobody disturbed, over the clients that took part.

Every process is forked from the one that calls `disturb`, which therefore must have no threads.
"""

from __future__ import annotations

import json
import logging
import os
import random
import select
import signal
import socket
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedkseed import (
    Broadcast,
    Client,
    IdentityError,
    MessageError,
    ProtocolError,
    Reply,
    Server,
    TooFewRepliesError,
    WorkingCopy,
)
from fedkseed.federation.messages import broadcast_digest
from support import embedding
from support.hostile import forged_reply, hostile

CONFIG = replace(embedding.CONFIG, num_threads=1)
#: The clients of each node.
NODES = ((0, 1), (2, 3))
#: After so many seconds a round goes on without those who are missing.
PATIENCE = 1.0
#: Bounds every wait.
SECONDS = 120
_MOST_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")
_REQUEST = struct.Struct("<cI")
_PAUSE = 0.02
#: In the folder of a run.
_SOCKET, _STATE, _RECORD, _STOP, _LEDGER = "socket", "state", "record.jsonl", "stop", "ledger"


def send(connection: socket.socket, body: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> bytes:
    """A frame.

    Raises:
        EOFError: the other side has gone, or says that it sends too much.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > _MOST_BYTES:
        raise EOFError
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        part = connection.recv(length - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def serve(folder: Path, tell: Callable[[str], None]) -> None:
    """The server: goes on from the saved state, until a file says that the open round is the last."""
    task, state, path = embedding.make_task(), folder / _STATE, folder / _SOCKET
    first = task.server(CONFIG)
    server = first
    if state.exists():
        server = Server.resume(state, first.identity, first.pool, replace(first.config, run_id=None))
    else:
        server.save(state)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        listener.settimeout(_PAUSE)
        while True:
            is_last = (folder / _STOP).exists()
            replied, num_refused = collect(server, listener, tell)
            with open(folder / _RECORD, "a") as record:
                record.write(json.dumps([server.round - 1, replied]) + "\n")
            server.save(state)
            tell(f"closed {server.round - 1} {num_refused}")
            if is_last:
                (folder / _LEDGER).write_bytes(server.ledger().to_bytes())
                return


def collect(server: Server, listener: socket.socket, tell: Callable[[str], None]) -> tuple[list[int], int]:
    """One round: who replied, and how many requests were refused."""
    opened, start, num_refused = server.open(), time.monotonic(), 0
    while True:
        with suppress(TooFewRepliesError):
            if not opened.missing or time.monotonic() - start > PATIENCE:
                return list(opened.close().replied), num_refused
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection, suppress(OSError, EOFError):
            connection.settimeout(0.1)
            request = receive(connection)
            if len(request) < _REQUEST.size:
                num_refused += 1
                continue
            kind, client = _REQUEST.unpack_from(request)
            body = request[_REQUEST.size :]
            if kind == b"G":
                send(connection, opened.messages[client] if client in opened.missing else b"")
                continue
            try:
                opened.add(client, body)
            except (MessageError, ProtocolError):
                num_refused += 1
            else:
                tell(f"reply {opened.number} {client}")
            send(connection, b"")


def ask(folder: Path, kind: bytes, client: int, body: bytes = b"") -> bytes:
    """The server's answer; empty while there is none."""
    with suppress(OSError, EOFError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(str(folder / _SOCKET))
        send(connection, _REQUEST.pack(kind, client) + body)
        return receive(connection)
    return b""


@dataclass
class Worker:
    """A process that holds a node's model; started again when it is gone."""

    tell: Callable[[str], None]
    started: Callable[[int], str]
    connection: socket.socket | None = None

    def handle(self, message: bytes) -> bytes:
        while True:
            if self.connection is None:
                self.start()
            assert self.connection is not None
            try:
                send(self.connection, message)
                return receive(self.connection)
            except (OSError, EOFError):
                self.connection.close()
                self.connection = None
                with suppress(ChildProcessError):
                    os.waitpid(-1, 0)

    def start(self) -> None:
        self.connection, other = socket.socketpair()
        child = forked(lambda: work(other))
        other.close()
        self.tell(self.started(child))


def work(connection: socket.socket) -> None:
    """The worker: answers messages to any of its node's clients until the node is gone."""
    for number in list(map(int, os.listdir("/proc/self/fd"))):
        if number > 2 and number != connection.fileno():
            with suppress(OSError):
                os.close(number)  # or the node's end of the pair would outlive the node
    task = embedding.make_task()
    working = WorkingCopy(task.model)
    clients: dict[int, Client[Any]] = {}
    with suppress(OSError, EOFError):
        while True:
            message = receive(connection)
            number = Broadcast.peek(message).client
            client = clients.setdefault(number, task.client(number, working, CONFIG))
            send(connection, client.handle(message))


def node(folder: Path, number: int, tell: Callable[[str], None]) -> None:
    """A node: asks for its clients, one after the other, for ever."""
    worker = Worker(tell, lambda child: f"worker {number} {child}")
    worker.start()
    while True:
        for client in NODES[number]:
            if message := ask(folder, b"G", client):
                with suppress(IdentityError, MessageError, ProtocolError):
                    ask(folder, b"P", client, worker.handle(message))
        time.sleep(_PAUSE)


def visit(folder: Path, seed: int) -> None:
    """A hostile guest: takes messages to others, answers wrongly, sends noise and hangs up, for ever."""
    generator = np.random.default_rng(seed)
    known: list[bytes] = []
    while True:
        client = int(generator.integers(5))
        match generator.integers(5):
            case choice if choice == 0 or not known:
                if message := ask(folder, b"G", client):
                    known = [*known[-7:], message]
            case 1:
                told = Broadcast.from_bytes(known[-1])
                g = generator.normal(size=len(told.schedule)).astype(np.float32)
                reply = Reply(told.round, told.client, 2**32 - 1, broadcast_digest(known[-1]), g).to_bytes()
                ask(folder, b"P", told.client, forged_reply(generator, reply))
            case 2:
                ask(folder, generator.bytes(1), client, generator.bytes(9))
            case 3:
                with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(folder / _SOCKET))
                    connection.sendall(generator.bytes(int(generator.integers(1, 40))))
            case _:
                ask(folder, b"P", client, hostile(generator, known))
        time.sleep(_PAUSE / 4)


def forked(run: Callable[[], None]) -> int:
    """The number of a forked process that runs this."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            logging.disable(logging.WARNING)  # every refusal is told
            warnings.simplefilter("ignore")  # the model has dropout
            run()
            status = 0
        finally:
            os._exit(status)
    return child


@dataclass
class Told:
    """What server and nodes say about themselves, in lines of a pipe."""

    ends: tuple[int, int] = field(default_factory=os.pipe)
    rest: bytes = b""
    workers: dict[int, int] = field(default_factory=dict)
    num_refused: int = 0

    def tell(self, line: str) -> None:
        os.write(self.ends[1], line.encode() + b"\n")

    def next(self) -> list[str]:
        """The words of the next line.

        Raises:
            TimeoutError: nobody says anything.
        """
        while b"\n" not in self.rest:
            if not select.select([self.ends[0]], [], [], SECONDS)[0]:
                raise TimeoutError(f"expected the federation to go on, heard nothing for {SECONDS} s")
            self.rest += os.read(self.ends[0], 4096)
        line, self.rest = self.rest.split(b"\n", 1)
        words = line.decode().split()
        if words[0] == "worker":
            self.workers[int(words[1])] = int(words[2])
        if words[0] == "closed":
            self.num_refused += int(words[2])
        return words

    def wait(self, word: str) -> None:
        """Reads up to the next line that begins so."""
        while self.next()[0] != word:
            pass

    def waits(self) -> bool:
        """Whether there is something to read."""
        return b"\n" in self.rest or bool(select.select([self.ends[0]], [], [], 0)[0])


@dataclass(frozen=True)
class Outcome:
    """What became of a disturbed federation; its ledger was compared.

    Attributes:
        num_killed: of each kind of process.
        num_between: of those, how many after the first and before the last reply of a round.
        num_rounds, num_short: all, and those that somebody missed.
        num_refused: requests of guests.
    """

    num_killed: dict[str, int]
    num_between: int
    num_rounds: int
    num_short: int
    num_refused: int


def disturb(folder: Path, num_kills: int, seed: int = 16) -> Outcome:
    """Runs a federation, kills server, node and worker so many times each, and compares its ledger.

    Raises:
        AssertionError: another ledger than that of the undisturbed run, or of the saved state.
        TimeoutError: it does not go on.
    """
    folder.mkdir()
    task = embedding.make_task()
    (client, message), *_ = task.server(CONFIG).open().messages.items()
    task.client(client, None, CONFIG).handle(message)  # imports what the first step of every worker would
    draw = random.Random(seed)
    told = Told()
    starts = {"server": lambda: forked(lambda: serve(folder, told.tell))}
    for number in range(len(NODES)):
        starts[f"node {number}"] = lambda number=number: forked(lambda: node(folder, number, told.tell))
    children = {name: start() for name, start in starts.items()}
    guest = forked(lambda: visit(folder, seed))
    num_between = 0
    victims = [kind for kind in ("server", "node", "worker") for _ in range(num_kills)]
    draw.shuffle(victims)
    try:
        for count, kind in enumerate(victims):
            told.wait("closed")
            told.wait("reply")
            time.sleep(draw.uniform(0, _PAUSE / 2))
            number = draw.randrange(len(NODES))
            name = kind if kind == "server" else f"node {number}"
            if kind == "worker":
                os.kill(told.workers[number], signal.SIGKILL)  # its node starts another
            else:
                end(children.pop(name))
            lines = []
            while told.waits():
                lines.append(told.next()[0])
            num_between += "closed" not in lines
            if kind == "worker":
                continue
            if kind == "node" and count % 2:  # stays away until a round has gone on without it
                told.wait("closed")
                told.wait("closed")
            children[name] = starts[name]()
        (folder / _STOP).touch()
        _, status = os.waitpid(children.pop("server"), 0)
        assert status == 0, f"the server ended with {status}"
    finally:
        for child in (*children.values(), guest):
            end(child)
        for number in told.ends:
            os.close(number)
    rounds = dict(json.loads(line) for line in (folder / _RECORD).read_text().splitlines())
    compare(folder, rounds)
    short = sum(len(replied) < CONFIG.clients_per_round for replied in rounds.values())
    kinds = {kind: victims.count(kind) for kind in ("server", "node", "worker")}
    return Outcome(kinds, num_between, len(rounds), short, told.num_refused)


def compare(folder: Path, rounds: dict[int, list[int]]) -> None:
    """Raises unless the ledger is that of the same clients in the same rounds in this process alone."""
    task = embedding.make_task()
    server, working = task.server(CONFIG), WorkingCopy(task.model)
    for replied in rounds.values():
        opened = server.open()
        for client in replied:
            opened.add(client, task.client(client, working, CONFIG).handle(opened.messages[client]))
        opened.close()
    assert list(rounds) == list(range(server.round))
    assert (folder / _LEDGER).read_bytes() == server.ledger().to_bytes()
    kept = replace(server.config, run_id=None)
    with Server.resume(folder / _STATE, server.identity, server.pool, kept) as resumed:
        assert resumed.coefficients.tobytes() == server.coefficients.tobytes()


def end(child: int) -> None:
    """Kills a child by its number and waits for it."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
