"""Processes that leave nothing behind: each leads a session and a process group, which is ended with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from benchmarks.common.places import REPOSITORY
from benchmarks.gpu.channel import SKIPPED, PartEnded

_POLL_SECONDS = 0.05
_KILL_SECONDS = 5.0  # a process that the kernel does not let go of is left to itself after so many


class Group:
    """A command as the leader of a session of its own, run in the repository.

    Args:
        output: a file that stdout and stderr go to.
        stdin: its standard input; empty if not given.
        environment: variables beside those of this process.

    Raises:
        OSError: it could not be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: IO[bytes],
        *,
        stdin: int = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )

    def has_ended(self) -> bool:
        """Whether the leader has; it stays unreaped until `end`, so that its group keeps its number."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def wait(self, seconds: float) -> bool:
        """Whether the leader has ended within so many seconds."""
        end = time.monotonic() + seconds
        while not self.has_ended():
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def end(self, grace: float = 0.0) -> int | None:
        """Ends every process of the group; returns the leader's exit status, None if it cannot be ended.

        Args:
            grace: seconds between SIGTERM and SIGKILL for a leader that still runs; 0 sends SIGKILL alone.
        """
        if self._process.returncode is not None:
            return self._process.returncode  # its number may be another's by now
        if grace and not self.has_ended():
            self._signal(signal.SIGTERM)
            self.wait(grace)
        self._signal(signal.SIGKILL)
        try:
            return self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def describe_status(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "it could not be ended"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"


def output_of(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """{"output"} of a short command that succeeds, or {"failed"} with the reason; it stays in this group."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except OSError as error:
        return {"failed": f"could not start: {error}"}
    except subprocess.TimeoutExpired:
        return {"failed": f"over {seconds:.0f} s"}
    if done.returncode != 0:
        return {
            "failed": f"{describe_status(done.returncode)}: {(done.stderr or done.stdout)[-300:].strip()}"
        }
    return {"output": done.stdout.strip()}


def stream(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit status and output lines of a command in this process's group; they are printed as they come.

    Its time is not limited here: the run ends the whole group of a part.
    """
    print(f"$ {' '.join(command)}", flush=True)
    lines = []
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line.rstrip("\n"))
    return process.returncode, lines


def find_tool(name: str) -> str:
    """A tool of the CUDA toolkit, from PATH or the toolkit's folder.

    Raises:
        PartEnded: there is none; the part is skipped.
    """
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name) or shutil.which(name, path=os.path.join(toolkit, "bin"))
    if found is None:
        raise PartEnded(SKIPPED, f"{name} is neither on PATH nor in {toolkit}/bin; install the CUDA toolkit")
    return found
