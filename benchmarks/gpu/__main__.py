"""What only a GPU can show, in one command of seven minutes: `python -m benchmarks.gpu`.

Bits first, then times, then what tools say; docs/gpu.md has the parts, what to carry along and how to read
the result. Each part is a process of its own with a bound; the result is written as it comes.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.constants import DTYPES
from benchmarks.common.environment import COMMIT_VARIABLE
from benchmarks.common.places import RESULTS_FOLDER
from benchmarks.gpu import machine, plan
from benchmarks.gpu.run import Run


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"The variable {COMMIT_VARIABLE} names the commit in a tree without git.",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the result is written; logs are written beside it "
        "(default: benchmarks/results/gpu-<name of the GPU>.json, in a dry run a new temporary folder)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=plan.SECONDS,
        metavar="N",
        help="seconds that the whole run may take; a part that does not fit in what is left is not begun "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--parts",
        type=_names,
        default=plan.DEFAULT,
        metavar="NAME,...",
        help=f"parts to run, in the order of their value: {', '.join(plan.BY_NAME)}; or all "
        f"(default: {','.join(plan.DEFAULT)})",
    )
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        default=plan.Settings.dtypes,
        metavar="NAME,...",
        help=f"dtypes of the weights that passes are timed over, out of {', '.join(DTYPES)}; the first one "
        f"in the part passes, the others in other-dtypes (default: {','.join(plan.Settings.dtypes)})",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run the same parts with tiny sizes on the processor to see that they work; "
        "their figures mean nothing",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; 0 if each of them said what it has to say, 1 if not."""
    begin = time.monotonic()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error(
            "expected a GPU, got none that torch can use; this benchmark has nothing to say without one "
            "(--dry-run tries its parts)"
        )
    parts = [part for part in plan.PARTS if part.name in options.parts]
    if options.dry_run:
        print(plan.table())
    expected = plan.estimate(options.parts)
    print(f"Expected to take {expected} s of at most {options.seconds:.0f} s", flush=True)
    environment = machine.describe()
    path = options.json or _default_path(environment, options.dry_run)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = plan.Settings(options.dtypes, options.dry_run)
    run = Run(parts, settings, path, environment, options.seconds, begin)
    is_good = run.do()
    for name, found in run.document["parts"].items():
        print(f"{name:16} {found['status']:10} {found.get('reason', '')}")
    print(f"Written: {path}")
    return 0 if is_good else 1


def _default_path(environment: dict[str, Any], is_dry_run: bool) -> Path:
    if is_dry_run:
        return Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) / "gpu.json"
    name = re.sub(r"[^a-z0-9._-]+", "-", machine.gpu_name(environment).lower()).strip("-")
    return RESULTS_FOLDER / f"gpu-{name}.json"


def _names(text: str) -> tuple[str, ...]:
    return tuple(plan.BY_NAME) if text == "all" else _known(text, plan.BY_NAME, "parts")


def _dtypes(text: str) -> tuple[str, ...]:
    return _known(text, DTYPES, "dtypes")


def _known(text: str, known: Sequence[str] | dict[str, Any], what: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(
            f"expected {what} out of {', '.join(known)}, got {', '.join(map(repr, unknown))}"
        )
    return tuple(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
