"""`fedkseed compare`: finished runs in one table, as a result file and as a picture."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "compare",
        parents=parents,
        help="set finished runs beside each other in one table",
        description="Sets finished runs beside each other: a row a variant with mean and spread over its "
        "seeds, and what needs no training. Runs that differ in their seed alone are one variant. All must "
        "be scored on the same rows. Runs of a sweep that are not finished are left out and named.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="folder of a run, or of a sweep with VARIANT/seed-N in it",
        metavar="RUN",
    )
    parser.add_argument(
        "--json", type=Path, help="also write all numbers and curves there, of whole sweeps", metavar="FILE"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        help="also draw scores over rounds, forward passes and bytes there, a PNG",
        metavar="FILE",
    )
    parser.add_argument(
        "--by",
        default="",
        help="also set every variant against this one: scores less its scores, costs as a share of its costs",
        metavar="VARIANT",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints it, and writes what is asked for."""
    from fedkseed._extras import require_extra
    from fedkseed.files import write_atomically
    from fedkseed.scenarios.experiments.comparison import document_of
    from fedkseed.scenarios.experiments.comparison_picture import figure_of, write_figure
    from fedkseed.scenarios.experiments.comparison_table import rendered
    from fedkseed.scenarios.experiments.gathering import gather

    # All that can be refused is, before anything is printed or written.
    for flag, target in (("--json", options.json), ("--plot", options.plot)):
        if target is not None:
            _check_target(flag, target)
    if options.plot is not None:
        require_extra("plot", "matplotlib")
        if options.json is not None and options.json.resolve() == options.plot.resolve():
            raise ValueError(f"expected different files for --json and --plot, got {options.json} for both")
    gathered = gather(options.runs)
    if options.json is not None:
        gathered.check_whole()
    document = document_of(gathered.runs, options.by)
    figure = None if options.plot is None else figure_of(document)
    print(rendered(document))
    if gathered.notes:
        print("\n" + "\n".join(gathered.notes), file=sys.stderr)
    if options.json is not None:
        write_atomically(options.json, (json.dumps(document, indent=1) + "\n").encode())
        print(f"\nWritten: {options.json}")
    if figure is not None:
        write_figure(figure, options.plot)
        print(f"\nWritten: {options.plot}")
    return 0


def _check_target(flag: str, target: Path) -> None:
    """Raises ValueError unless a file can be written there."""
    if target.is_dir():
        raise ValueError(f"expected {flag} with the name of a file, got the folder {target}")
    if not target.parent.is_dir():
        raise ValueError(
            f"expected {flag} in a folder that is there, got {target}: no folder {target.parent}"
        )
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        reason = error.strerror or "no reason is told"
        raise ValueError(
            f"expected {flag} where files can be written, got {target}: {reason} in {target.parent}"
        ) from error
