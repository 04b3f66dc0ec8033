"""One part in a process of its own, started by the run: `python -m benchmarks.gpu.part NAME ...`.

Whatever happens here, a CUDA error that spoils the process or a hang, costs this part alone. The process ends
with the run that started it, however that ends: its standard input is a pipe that the run holds open.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.channel import FAILED, PASSED, SKIPPED, Channel, PartEnded
from benchmarks.gpu.plan import BY_NAME, Settings

_OURS = ("benchmarks", "fedkseed", "fedkseed_kernels")


def command(name: str, settings: Settings, path: Path, seconds: float) -> list[str]:
    """The command line of a part's process.

    Args:
        path: of its channel.
        seconds: after which it stops between two measurements.
    """
    line = [sys.executable, "-u", "-m", "benchmarks.gpu.part", name, str(path), f"{seconds:.1f}"]
    return [*line, "--dtypes", ",".join(settings.dtypes), *(["--dry-run"] if settings.is_dry_run else [])]


def run(name: str, settings: Settings, channel: Channel) -> None:
    """Runs a part and hands over its status, with the reason if it is not "passed"."""
    try:
        module, _, function = BY_NAME[name].run.partition(".")
        getattr(import_module(f"benchmarks.gpu.{module}"), function)(settings, channel)
    except PartEnded as ended:
        channel.note(status=ended.status, reason=ended.reason)
    except Exception as error:
        traceback.print_exc()
        # A package of others that is not installed; MissingExtraError names the extra that brings it.
        missing = type(error).__name__ == "MissingExtraError" or (
            isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in _OURS
        )
        channel.note(status=SKIPPED if missing else FAILED, reason=f"{type(error).__name__}: {error}")
    else:
        channel.note(status=PASSED)


def _end_with_the_run() -> None:
    """Waits for the end of standard input, then ends the group of this process."""
    while os.read(0, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part", description=__doc__)
    parser.add_argument("name", choices=BY_NAME, help="which part")
    parser.add_argument("path", type=Path, help="the file that its lines go to")
    parser.add_argument("seconds", type=float, help="its time")
    parser.add_argument("--dtypes", required=True, help="keys of constants.DTYPES, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the processor")
    options = parser.parse_args(arguments)
    if os.getpgrp() == os.getpid():  # not in the group of someone's shell
        threading.Thread(target=_end_with_the_run, daemon=True).start()
    settings = Settings(tuple(options.dtypes.split(",")), options.dry_run)
    run(options.name, settings, Channel(options.path, options.seconds))


if __name__ == "__main__":
    main()
