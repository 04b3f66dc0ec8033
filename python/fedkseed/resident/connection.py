"""The caller's side of a resident worker: found by its socket, or started."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedkseed._checks import check_real
from fedkseed.federation.messages import MAX_BROADCAST_BYTES, MessageBytes, as_bytes
from fedkseed.resident import environment, worker
from fedkseed.resident.frames import (
    KEY_BYTES,
    Answered,
    Asked,
    ResidentError,
    error_of,
    is_own,
    receive,
    receive_exactly,
    send,
)
from fedkseed.resident.leftovers import NAME_LENGTH, SUFFIX, accepts, alone, remove_abandoned, writers
from fedkseed_kernels import __version__

#: Of a socket's name on Linux (sun_path), its end included.
_MAX_PATH = 108
_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_CONNECT = 20.0
#: Workers that may end, one after the other, before they take a message that waits for them.
_MOST_WORKERS = 20
#: The longest wait that a socket takes, about.
_MOST_SECONDS = 1e9


class Resident:
    """A worker of this user on this machine that holds what ``make_client`` makes; see `connect`.

    Args: as of `connect`.

    Attributes:
        path: of its socket; a log is beside it.
    """

    def __init__(
        self,
        make_client: Callable[[], worker.Handler],
        folder: Path,
        idle_timeout: float,
        start_timeout: float,
        name: str,
    ) -> None:
        function = _function_of(make_client)
        if getattr(function, "__module__", None) == "__main__":
            raise ResidentError(
                f"expected a function of a module that another process can import, got {function!r} of the "
                "program itself; move it to a file of its own"
            )
        try:
            self._pickled = pickle.dumps(make_client)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ResidentError(
                "expected a function at the top level of a module, or a functools.partial of one, got "
                f"{make_client!r}, which another process cannot find: {error}"
            ) from error
        self._idle_timeout = idle_timeout
        self._start_timeout = start_timeout
        parts = (__version__, sys.executable, name, _source_stamp(make_client), environment.stamp())
        self._key = hashlib.sha256("\0".join(parts).encode() + self._pickled).digest()
        self.path = folder / (self._key.hex()[:NAME_LENGTH] + SUFFIX)
        if not _is_short(folder):
            raise ResidentError(
                f"expected a folder for sockets whose names stay below {_MAX_PATH} bytes, got {folder}; "
                "name a shorter one"
            )

    def handle(self, message: MessageBytes) -> bytes:
        """The client's answer to a message of the server.

        Where no worker is there, or it dies over the message, one is started, once.

        Raises:
            MessageError, ProtocolError, IdentityError: as `fedkseed.Client.handle`; the worker lives on.
            ResidentError: the client raised another error, or no worker could be started or lived.
        """
        request = as_bytes("message", message, 0, MAX_BROADCAST_BYTES)
        for is_last in (False, True):
            with self._reached() as connection:
                try:
                    return _answer(connection, Asked.HANDLE, request)
                except ConnectionError as error:
                    if is_last:
                        raise ResidentError(
                            f"expected the worker to live through a message, got its end twice ({error}), "
                            f"as where memory runs out; its log is {self._log}"
                        ) from error
        raise AssertionError("one of the two attempts returns or raises")

    def start(self) -> None:
        """Starts the worker if none answers; returns when one does.

        Raises:
            ResidentError: it could not be started; says why.
        """
        if accepts(self.path):
            return
        with alone(self.path.with_suffix(".lock")):
            if accepts(self.path):  # somebody else started it meanwhile
                return
            self.path.unlink(missing_ok=True)  # of a worker that was killed
            remove_abandoned(self.path.parent)
            process = self._started()
            end = time.monotonic() + self._start_timeout
            while not accepts(self.path):
                if process.poll() is not None:
                    raise ResidentError(
                        f"expected a worker to start, got its end with exit status {process.returncode}: "
                        f"{self._last_words()}; its log is {self._log}"
                    )
                if time.monotonic() > end:
                    process.kill()
                    process.wait()
                    raise ResidentError(
                        f"expected a worker to be ready within {self._start_timeout:g} s, got none; its "
                        f"log is {self._log}"
                    )
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def info(self) -> dict[str, Any]:
        """What the running worker has done, `worker.Trace` by name.

        Raises:
            ResidentError: none runs.
        """
        try:
            with self._connected(_SECONDS_TO_CONNECT) as connection:
                found: dict[str, Any] = json.loads(_answer(connection, Asked.INFO, b""))
        except OSError as error:
            raise ResidentError(f"expected a running worker at {self.path}, got none: {error}") from error
        return found

    def stop(self) -> None:
        """Ends the worker when it has answered what came before; harmless where none runs.

        One that still loads its model is ended at once, whoever waits for it.
        """
        try:
            with self._connected(None) as connection:
                pid = json.loads(_answer(connection, Asked.STOP, b""))["pid"]
        except OSError:
            self._end_loading()
            return
        end = time.monotonic() + _SECONDS_TO_CONNECT
        while self.path.exists() and Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _end_loading(self) -> None:
        """Ends workers that have no socket as yet, which nobody can reach but by a signal."""
        end = time.monotonic() + _SECONDS_TO_CONNECT
        for pid in writers(self._log):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while writers(self._log) and time.monotonic() < end:
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    @property
    def _log(self) -> Path:
        return self.path.with_suffix(".log")

    def _reached(self) -> socket.socket:
        """A connection to a worker that has greeted, and so takes a message; one is started if none is there.

        Raises:
            ResidentError: none could be started, or none lived so long.
        """
        for _ in range(_MOST_WORKERS):
            self.start()
            try:
                return self._connected(None)
            except (ConnectionError, FileNotFoundError) as error:
                # It was idle for too long, or was killed over another caller's message.
                ended = error
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise ResidentError(
            f"expected a worker to take a message, got the end of {_MOST_WORKERS} before they did ({ended}); "
            f"the log is {self._log}"
        )

    def _connected(self, timeout: float | None) -> socket.socket:
        """A connection to the worker that runs; it has greeted.

        Raises:
            ResidentError: it is another one's.
            OSError: none runs, or it ended meanwhile.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(str(self.path))
            self._greeted(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _greeted(self, connection: socket.socket) -> None:
        if not is_own(connection):
            raise ResidentError(
                f"expected a worker of this user at {self.path}, got one of another; remove it"
            )
        if receive_exactly(connection, KEY_BYTES) != self._key:
            raise ResidentError(f"expected this client's worker at {self.path}, got another one's; remove it")

    def _started(self) -> subprocess.Popen[bytes]:
        # As in this process: what is no text is not looked at, and "" is the folder where it is.
        python_path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        orders = worker.Orders(
            str(self.path), self._key, self._idle_timeout, self._pickled, tuple(python_path)
        )
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            process = subprocess.Popen(
                # -P: not what lies where it is started.
                [sys.executable, "-P", "-c", f"from {worker.__name__} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,  # it outlives the caller
                env={**os.environ, "PYTHONPATH": os.pathsep.join(python_path)},
            )
        finally:
            os.close(descriptor)
        assert process.stdin is not None, "it is a pipe"
        with suppress(BrokenPipeError), process.stdin:  # one that has ended already is seen in `start`
            process.stdin.write(pickle.dumps(orders))
        return process

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def connect(
    make_client: Callable[[], worker.Handler],
    folder: str | os.PathLike[str] | None = None,
    *,
    idle_timeout: float = 600.0,
    start_timeout: float = 600.0,
    name: str = "",
) -> Resident:
    """The worker that holds the client of ``make_client``; it runs already, or the first message starts it.

    It is the same one for every process of this user on this machine that asks for the same ``make_client``
    (with the same arguments, from an unchanged file), with the same Python and release of this package, under
    the same environment as far as answers depend on it (`fedkseed.resident.environment`). It goes on when the
    caller ends, and ends when no message came for a while. Its socket has mode 0600, in a folder of mode
    0700.

    Args:
        make_client: makes the client, with its model; at the top level of a module, or a functools.partial of
            such a function. A client whose working copy has ``round_model="own"`` keeps the round's model.
        folder: for socket, lock and log; None: one of this user's below XDG_RUNTIME_DIR or the temporary one.
        idle_timeout: seconds without a message after which the worker ends.
        start_timeout: seconds that loading the model may take.
        name: tells workers of one ``make_client`` apart.

    Raises:
        ResidentError: a ``make_client`` that no other process can find, or a folder that is not this user's
            alone.
        TypeError, ValueError: a time that is no positive number.
        OSError: the folder cannot be made.
    """
    for what, seconds in (("idle_timeout", idle_timeout), ("start_timeout", start_timeout)):
        if not 0 < check_real(what, seconds) < _MOST_SECONDS:
            raise ValueError(f"expected {what} in seconds above 0, got {seconds}")
    place = _default_folder() if folder is None else Path(folder).absolute()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ResidentError(
            f"expected a folder of this user alone (mode 0700), got {place} with mode "
            f"{stat.S_IMODE(found.st_mode):04o} of user {found.st_uid}; name another one"
        )
    return Resident(make_client, place, float(idle_timeout), float(start_timeout), name)


def _answer(connection: socket.socket, asked: Asked, message: bytes) -> bytes:
    """What the worker answers to one request.

    Raises:
        MessageError, ProtocolError, IdentityError, ResidentError: it failed.
        OSError: the worker ended, or takes longer than the connection's time limit.
    """
    send(connection, asked, message)
    answered, data = receive(connection)
    if answered == Answered.FAILED:
        raise error_of(data)
    return data


def _source_stamp(make_client: object) -> str:
    """When the file that makes the client was changed last: a worker that holds older code is another one."""
    module = getattr(_function_of(make_client), "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None)
    return f"{file} {os.stat(file).st_mtime_ns}" if file and os.path.exists(file) else ""


def _function_of(make_client: object) -> object:
    """What a functools.partial calls in the end."""
    while isinstance(make_client, functools.partial):
        make_client = make_client.func
    return make_client


def _default_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # What another user's session is called is in the environment of a process that changed its user.
    if runtime and os.path.isdir(runtime) and os.stat(runtime).st_uid == os.getuid():
        place = Path(runtime) / "fedkseed"
        if _is_short(place):
            return place
    name = f"fedkseed-{os.getuid()}"
    place = Path(tempfile.gettempdir()) / name
    return place if _is_short(place) else Path("/tmp") / name


def _is_short(folder: Path) -> bool:
    """Whether the name of a socket in a folder may be the name of one."""
    return len(os.fsencode(folder)) + 1 + NAME_LENGTH + len(SUFFIX) < _MAX_PATH
