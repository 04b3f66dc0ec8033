"""`fedkseed compare`: finished runs in one table, as a result file and as a picture."""

from __future__ import annotations

import argparse
import json
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
        "be scored on the same rows.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="folder of a run, or of a sweep with VARIANT/seed-N in it",
        metavar="RUN",
    )
    parser.add_argument("--json", type=Path, help="also write all numbers and curves there", metavar="FILE")
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
    from fedkseed.scenarios.experiments.comparison import compare
    from fedkseed.scenarios.experiments.comparison_picture import draw_comparison
    from fedkseed.scenarios.experiments.comparison_table import rendered

    if options.plot is not None:
        require_extra("plot", "matplotlib")  # before anything is written
    document = compare(options.runs, options.by)
    print(rendered(document))
    if options.json is not None:
        write_atomically(options.json, (json.dumps(document, indent=1) + "\n").encode())
        print(f"\nWritten: {options.json}")
    if options.plot is not None:
        draw_comparison(document, options.plot)
        print(f"\nWritten: {options.plot}")
    return 0
