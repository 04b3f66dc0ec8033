"""What workers of tests hold: made in other processes, so it stands at the top level of a module."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from fedkseed import Client, IdentityError, MessageError, ProtocolError, SimulationConfig, WorkingCopy
from support.federation import CONFIG, Batch, make_task


class Echo:
    """Answers with the message; some messages have other effects."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def handle(self, message: bytes) -> bytes:
        errors = {b"message": MessageError, b"protocol": ProtocolError, b"identity": IdentityError}
        if message in errors:
            raise errors[message](f"expected another one than {message!r}")
        if message == b"other":
            raise RuntimeError("expected room, got none")
        if message == b"die" or (message == b"die once" and not (self.folder / "died").exists()):
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return b"answer to " + message


def make_echo(folder: Path) -> Echo:
    """An `Echo`, whose making leaves a file of its process."""
    (folder / f"made-{os.getpid()}").touch()
    return Echo(folder)


def make_none() -> Echo:
    raise FileNotFoundError("expected a model, got no such folder")


def make_late(folder: Path) -> Echo:
    """A client whose loading does not end; it leaves a file of its process."""
    (folder / f"loading-{os.getpid()}").touch()
    time.sleep(600)
    return Echo(folder)


def make_nothing() -> Echo:
    """A function whose author forgot to return the client."""
    return None  # type: ignore[return-value]


class Mute:
    """Answers with nothing."""

    def handle(self, message: bytes) -> bytes:
        return None  # type: ignore[return-value]


def make_mute() -> Mute:
    return Mute()


def make_client(number: int) -> Client[Batch]:
    """A client of the small federation, with its model."""
    task = make_task()
    working = WorkingCopy(task.model, round_model="own")
    return task.client(number, working, SimulationConfig(**CONFIG))
