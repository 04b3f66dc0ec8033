"""A federation over a socket whose server, nodes and workers are killed in mid-round, with hostile guests.

A node asks the server for messages of its clients and hands them to its resident worker; whoever was killed
is started again, a worker by its node, the server from its saved state. Guests send what no server takes.
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

import numpy as np

from fedkseed import (
    Broadcast,
    IdentityError,
    MessageError,
    ProtocolError,
    Reply,
    Server,
    TooFewRepliesError,
    WorkingCopy,
)
from fedkseed.federation.messages import broadcast_digest
from fedkseed.resident import Resident, ResidentError, connect
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


class NodeClients:
    """What a worker holds: the clients of its node, which share a model."""

    def __init__(self) -> None:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")  # the model has dropout
        self.task = embedding.make_task()
        self.working = WorkingCopy(self.task.model, round_model="own")

    def handle(self, message: bytes) -> bytes:
        client = Broadcast.peek(message).client
        return self.task.client(client, self.working, CONFIG).handle(message)


def worker(folder: Path, number: int) -> Resident:
    """The resident worker of a node, which outlives it."""
    return connect(
        NodeClients, folder / "workers", idle_timeout=SECONDS, start_timeout=SECONDS, name=str(number)
    )


def node(folder: Path, number: int) -> None:
    """A node: asks for its clients, one after the other, until there is a ledger."""
    resident = worker(folder, number)
    while not (folder / _LEDGER).exists():
        for client in NODES[number]:
            if message := ask(folder, b"G", client):
                with suppress(ResidentError, IdentityError, MessageError, ProtocolError):
                    ask(folder, b"P", client, resident.handle(message))
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
    """What the server says about itself, in lines of a pipe."""

    ends: tuple[int, int] = field(default_factory=os.pipe)
    rest: bytes = b""
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
    draw = random.Random(seed)
    told = Told()
    starts = {"server": lambda: forked(lambda: serve(folder, told.tell))}
    for number in range(len(NODES)):
        starts[f"node {number}"] = lambda number=number: forked(lambda: node(folder, number))
    starts["guest"] = lambda: forked(lambda: visit(folder, seed))
    residents = [worker(folder, number) for number in range(len(NODES))]
    children: dict[str, int] = {}
    num_between = 0
    victims = [kind for kind in ("server", "node", "worker") for _ in range(num_kills)]
    draw.shuffle(victims)
    try:
        for resident in residents:
            resident.start()  # or the first rounds would have nobody
        children |= {name: start() for name, start in starts.items()}
        for count, kind in enumerate(victims):
            told.wait("closed")
            told.wait("reply")
            time.sleep(draw.uniform(0, _PAUSE / 2))
            number = draw.randrange(len(NODES))
            name = kind if kind == "server" else f"node {number}"
            if kind == "worker":
                os.kill(pid_of(residents[number]), signal.SIGKILL)  # its node starts another
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
        for name in (
            "server",
            *(name for name in starts if name.startswith("node")),
        ):  # they end by themselves
            _, status = os.waitpid(children.pop(name), 0)
            assert status == 0, f"{name} ended with {status}"
    finally:
        for child in children.values():
            end(child)
        for resident in residents:
            resident.stop()
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


def pid_of(resident: Resident) -> int:
    """The running worker's process; one that was killed just now may still be found."""
    for _ in range(int(SECONDS / _PAUSE)):
        with suppress(ResidentError):
            resident.start()
            return int(resident.info()["pid"])
        time.sleep(_PAUSE)
    raise TimeoutError(f"expected a worker at {resident.path} within {SECONDS} s, got none")


def end(child: int) -> None:
    """Kills a child by its number and waits for it."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
