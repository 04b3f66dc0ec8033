"""Flower's processes over loopback, in a home of their own; all that they start is ended by id (Linux)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.embedding import environment
from support.ports import free_port
from support.running import is_running, wait_for

APP = Path(__file__).parent.parent.parent / "apps" / "flower-fedkseed"
#: Of what takes some seconds on an idle machine.
SECONDS = 240.0


class Flower:
    """One SuperLink, its nodes and runs.

    Args:
        folder: for everything that is written.
        tls: certificate folder with ca.pem, server.pem and server.key; plain HTTP if None.
    """

    def __init__(self, folder: Path, tls: Path | None = None) -> None:
        self.folder = folder
        self.tls = tls
        self.port = free_port()
        self.home = folder / "home"
        self.home.mkdir()
        # Short wherever tests run: names of sockets have an end.
        self.runtime = Path(tempfile.mkdtemp(prefix="fk-", dir="/tmp"))
        self.environment = {
            **environment(),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_RUNTIME_DIR": str(self.runtime),  # of resident workers
            "FEDKSEED_TEST_FOLDER": str(folder),
        }
        self.environment["PYTHONPATH"] += f"{os.pathsep}{folder}"  # of a page's files
        security = "insecure = true" if tls is None else f'root-certificates = "{tls / "ca.pem"}"'
        link = f'[superlink.test]\naddress = "127.0.0.1:{self.port}"\n{security}\n'
        (self.home / "config.toml").write_text(f'[superlink]\ndefault = "test"\n\n{link}')

    @property
    def workers(self) -> list[str]:
        """What the resident workers have logged."""
        return [path.read_text() for path in self.runtime.glob("fedkseed/*.log")]

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """A process in the background; what it says goes to a file of its name."""
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def superlink(self, *options: str) -> subprocess.Popen[bytes]:
        """A SuperLink that answers."""
        security = ["--insecure"]
        if self.tls is not None:
            security = ["--ssl-ca-certfile", str(self.tls / "ca.pem")]
            security += ["--ssl-certfile", str(self.tls / "server.pem")]
            security += ["--ssl-keyfile", str(self.tls / "server.key")]
        place = ("--host", "127.0.0.1", "--port", str(self.port))
        process = self.start("superlink", "flower-superlink", *security, *place, *options)

        def answers() -> bool:
            assert process.poll() is None, (self.folder / "superlink.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS).close()
            except OSError:
                return False
            return True

        wait_for(answers, SECONDS)
        return process

    def supernode(self, number: int, certificate: Path | None = None) -> subprocess.Popen[bytes]:
        """A SuperNode, the client of that number."""
        security = ("--insecure",)
        if self.tls is not None:
            security = ("--root-certificates", str(certificate or self.tls / "ca.pem"))
        return self.start(
            f"supernode-{number}",
            *("flower-supernode", *security, "--superlink", f"127.0.0.1:{self.port}"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f"partition-id={number} num-partitions=4"),
        )

    def cli(self, *command: str) -> str:
        """What the command flwr prints."""
        found = subprocess.run(
            ["flwr", *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"
        return found.stdout

    def run(self, module: str, *options: str) -> tuple[bytes, str]:
        """Three rounds of the apps of a module, or as the options say; the ledger, and what was logged."""
        copy = self.folder / "flower-fedkseed"
        shutil.copytree(APP, copy)
        project = copy / "pyproject.toml"
        project.write_text(project.read_text().replace("my_federation:", f"{module}:"))
        text = self.cli("run", str(copy), "test", "--stream", *options)
        (run,) = json.loads(self.cli("list", "test", "--format", "json"))["runs"]
        assert run["status"] == "finished:completed", text
        return (self.folder / "ledger.safetensors").read_bytes(), text

    def processes(self) -> list[int]:
        """All that run in this home, whoever started them."""
        mark = f"FLWR_HOME={self.home}\0".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if mark in (folder / "environ").read_bytes():
                        found.append(int(folder.name))
                except OSError:
                    continue  # it ended, or is another user's
        return [pid for pid in found if pid != os.getpid() and is_running(pid)]

    def close(self) -> None:
        """Ends all of them, first in peace."""
        for kind in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
            for pid in self.processes():
                try:
                    os.kill(pid, kind)
                except ProcessLookupError:
                    continue
            try:
                wait_for(lambda: not self.processes(), 8.0)
                return
            except AssertionError:
                if kind is signal.SIGKILL:
                    continue
        assert not self.processes()


@contextmanager
def flower(folder: Path, tls: Path | None = None) -> Iterator[Flower]:
    """See `Flower`."""
    found = Flower(folder, tls)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(found.runtime)
