"""A run: parts one after the other, each a process with a bound, and the document that grows as they go.

The document is written whenever something came, at most twice a second, whole or not at all: whatever ends
the run, what was found until then is there. A signal that asks to stop ends the part's process group first.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.places import REPOSITORY
from benchmarks.gpu import part as gpu_part
from benchmarks.gpu.channel import (
    FAILED,
    NOT_BEGUN,
    OVER_TIME,
    PASSED,
    REFUSED,
    RUNNING,
    SKIPPED,
    STOPPED,
    LineReader,
)
from benchmarks.gpu.plan import Part, Settings, estimate
from benchmarks.gpu.processes import Group, describe_status
from fedkseed.files import write_atomically

_POLL_SECONDS = 0.1
_WRITE_SECONDS = 0.5
#: Seconds that a part has to stop by itself before its bound, and its processes after SIGTERM.
_GRACE_SECONDS = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TAIL_LINES = 15
#: Of a run that says something about every part that it was asked for.
GOOD = (PASSED, SKIPPED, REFUSED)


class _StopAskedFor(BaseException):
    """A signal that asks the run to stop."""


class Run:
    """One run.

    Args:
        parts: in their order.
        settings: of all parts.
        path: of the document; logs are written beside it.
        environment: of the document; parts add what they know of the GPU.
        seconds: of the whole run.
        begin: `time.monotonic()` of its begin; now if not given.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        settings: Settings,
        path: Path,
        environment: dict[str, Any],
        seconds: float,
        begin: float | None = None,
    ) -> None:
        self._parts = parts
        self._settings = settings
        self._path = path
        self._begin = time.monotonic() if begin is None else begin
        self._seconds = seconds
        self._written, self._has_news = 0.0, False
        self.document: dict[str, Any] = {
            "environment": environment,
            "seconds": seconds,
            "expected_seconds": estimate(part.name for part in parts),
        }
        if settings.is_dry_run:
            self.document["dry_run"] = "tiny sizes on the processor, to try the parts: figures mean nothing"
        self.document["parts"] = {
            part.name: {
                "status": NOT_BEGUN,
                "reason": "the run did not come to it",
                "estimate": part.estimate,
                "bound": part.bound,
            }
            for part in parts
        }

    def do(self) -> bool:
        """Runs the parts; returns whether every one of them said what it has to say.

        Raises:
            OSError: the document cannot be written.
        """
        self._write()
        for log in {self._log_of(part) for part in self._parts}:
            log.unlink(missing_ok=True)
        # What Triton compiles for one part serves the others, and a home folder is not needed.
        scratch = tempfile.TemporaryDirectory(prefix="benchmarks-gpu-", ignore_cleanup_errors=True)
        with scratch, _signals_stop():
            try:
                for part in self._parts:
                    self._do(part, Path(scratch.name))
            except _StopAskedFor as stop:
                self.document["stopped"] = str(stop)
            self._write()
        found = {name: kept["status"] for name, kept in self.document["parts"].items()}
        return all(status in GOOD for status in found.values()) and "stopped" not in self.document

    def _left(self) -> float:
        return self._seconds - (time.monotonic() - self._begin)

    def _log_of(self, part: Part) -> Path:
        return self._path.with_name(f"{self._path.stem}-{part.log}.log")

    def _do(self, part: Part, scratch: Path) -> None:
        kept = self.document["parts"][part.name]
        left = self._left()
        if part.estimate > left:
            kept["reason"] = f"it takes about {part.estimate} s, {max(left, 0):.0f} s were left"
            _say(f"\n===== {part.name}: not begun: {kept['reason']}")
            return
        bound = min(part.bound, left)
        _say(f"\n===== {part.name}: {part.shows} (at most {bound:.0f} s)")
        del kept["reason"]
        kept |= {"status": RUNNING, "begun_at": round(self._seconds - left, 1), "rows": []}
        start = time.monotonic()
        try:
            self._write()
            self._watch(part, kept, scratch, bound)
        except _StopAskedFor as stop:
            kept |= {"status": STOPPED, "reason": f"the run was stopped by {stop}"}
            raise
        finally:
            kept["seconds"] = round(time.monotonic() - start, 1)
            self._write()
        reason = f": {kept['reason']}" if "reason" in kept else ""
        _say(f"===== {part.name}: {kept['status']} after {kept['seconds']} s{reason}")
        if kept["status"] not in GOOD:
            _say(f"(the end of {self._log_of(part).name})\n{_tail(self._log_of(part))}")

    def _watch(self, part: Part, kept: dict[str, Any], scratch: Path, bound: float) -> None:
        """Starts a part's process and folds what it finds into the document until it ends or has to."""
        lines = scratch / f"{part.name}.jsonl"
        reader = LineReader(lines)
        keys: dict[str, int] = {}
        command = gpu_part.command(part.name, self._settings, lines, max(bound - _GRACE_SECONDS, 1.0))
        # A self-test that is wrong must not take a backend out of the other parts: smoke has its verdict.
        variables = {"PYTHONUNBUFFERED": "1", "FEDKSEED_SELF_TEST": "0"}
        if "TRITON_CACHE_DIR" not in os.environ:
            variables["TRITON_CACHE_DIR"] = str(scratch / "triton")
        ours, theirs = os.pipe()[::-1]
        with self._log_of(part).open("ab") as log:
            log.write(f"\n===== {part.name}\n".encode())
            log.flush()
            try:
                group = Group(command, log, stdin=theirs, environment=variables)
            finally:
                os.close(theirs)
        try:
            end = time.monotonic() + bound
            while not group.has_ended() and time.monotonic() < end:
                self._fold(reader.new(), kept, keys)
                time.sleep(_POLL_SECONDS)
            in_time = group.has_ended()
            status = group.end(_GRACE_SECONDS)
        finally:
            group.end()
            os.close(ours)
            self._fold(reader.new(), kept, keys)
        result = "without a result" if kept["status"] == RUNNING else f"after its result, {kept['status']!r}"
        if not in_time:
            kept |= {"status": OVER_TIME, "reason": f"its process was ended after {bound:.0f} s, {result}"}
        elif kept["status"] == RUNNING or status != 0:
            kept |= {"status": FAILED, "reason": f"its process ended {result}: {describe_status(status)}"}

    def _fold(self, lines: list[dict[str, Any]], kept: dict[str, Any], keys: dict[str, int]) -> None:
        for line in lines:
            kept |= line.get("note", {})
            self.document["environment"] |= line.get("facts", {})
            if "text" in line:
                _say(line["text"])
            if "row" not in line:
                continue
            position = keys.setdefault(line.get("key", f"row {len(kept['rows'])}"), len(kept["rows"]))
            kept["rows"][position : position + 1] = [line["row"]]
        self._has_news |= bool(lines)
        if self._has_news and time.monotonic() - self._written > _WRITE_SECONDS:
            self._write()

    def _write(self) -> None:
        # Reasons name files; where the repository lies is this machine's affair.
        text = json.dumps(self.document, indent=1).replace(json.dumps(f"{REPOSITORY}/")[1:-1], "")
        write_atomically(self._path, (text + "\n").encode())
        self._written, self._has_news = time.monotonic(), False


def _say(text: str) -> None:
    """Prints a line, if anyone still reads: a terminal that was closed must not end the run."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    """A block in which the first of the signals raises; later ones are ignored until its end."""

    def stop(number: int, _: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _StopAskedFor(signal.Signals(number).name)

    # What is ignored, as nohup and a shell's background jobs have it, stays ignored.
    wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
