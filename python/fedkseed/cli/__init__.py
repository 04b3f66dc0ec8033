"""The command `fedkseed`: one module a subcommand, each with ``add`` (its flags) and ``run``."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import fedkseed_kernels
from fedkseed._extras import MissingExtraError
from fedkseed._progress import bars
from fedkseed.cli import apply, ask, bench, compare, data, info, inspect, plot, publish, scenarios, simulate

_COMMANDS = (info, data, simulate, scenarios, apply, ask, publish, inspect, plot, compare, bench)

#: What a user can mend: printed as one line. Anything else is a defect and shows where it happened.
_EXPECTED = (ValueError, OSError, RuntimeError, MissingExtraError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, 1 after an unexpected error, 2 after one that it explains, 130 after Ctrl-C."""
    options = argparse.Namespace(command="", verbose=False)
    try:
        make_parser().parse_args(arguments, options)
        with bars():
            status: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left
        return 141
    except _EXPECTED as error:
        if options.verbose:
            traceback.print_exc()
        else:
            print(f"fedkseed {options.command}: {_told(error)}", file=sys.stderr)
        return 2
    return status


def _told(error: Exception) -> str:
    """The error in words; those of the system name a number and a temporary file."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = f" {os.fspath(error.filename)}" if isinstance(error.filename, (str, os.PathLike)) else ""
    return f"expected to read or write{where or ' a file'}, got: {error.strerror}"


class _Parser(argparse.ArgumentParser):
    """A parser that proposes the nearest option for one that it does not know."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        known = [flag for action in self._actions for flag in action.option_strings]
        for text in unknown:
            if text.startswith("--") and (near := difflib.get_close_matches(text.split("=")[0], known, n=1)):
                self.error(f"unrecognized option {text.split('=')[0]}; did you mean {near[0]}?")
        if unknown:  # told here, with the usage of the command that was called
            hint = "; --set takes one KEY=VALUE: repeat it for each" if "--set" in known else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="fedkseed",
        description="Federated full-parameter tuning of language models: clients exchange seeds and scalars, "
        "a tuned model is a ledger of a few kilobytes.",
        epilog="fedkseed COMMAND --help tells more of each command.",
    )
    parser.add_argument(
        "--version", action="version", version=f"fedkseed-kernels {fedkseed_kernels.__version__}"
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--verbose", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in _COMMANDS:
        command.add(commands, [shared])
    return parser
