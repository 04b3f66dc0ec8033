"""`fedkseed plot`: losses, scores and bytes of a run as a PNG."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedkseed.scenarios.round_picture import LOSS, SCORES, TRAFFIC, draw_rounds
from fedkseed.simulation.round_log import read_rounds
from fedkseed.simulation.run_folder import METRICS, PICTURE, RunFolderError

#: Of the metrics: some ten thousand rounds.
_MAX_BYTES = 12 << 20


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "plot",
        parents=parents,
        help="draw a run's losses, scores and bytes",
        description="Draws losses, scores and exchanged bytes of a run over its rounds as a PNG. Needs "
        "matplotlib: pip install 'fedkseed-kernels[plot]'.",
    )
    parser.add_argument("folder", type=Path, help="folder of the run", metavar="RUN")
    parser.add_argument("--out", type=Path, help="the PNG (RUN/plot.png)", metavar="FILE")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draws it."""
    rows = read_metrics(options.folder / METRICS)
    target = options.out or options.folder / PICTURE
    draw_rounds(rows, target)
    print(f"Written: {target}")
    return 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rounds of a run, what is drawn of each.

    Raises:
        RunFolderError: no metrics there, damaged ones, more than can be drawn, or none of a complete round.
    """
    rows = []
    for row in read_rounds(path, max_bytes=_MAX_BYTES):
        found = row["evaluation"]
        kept = {name: row[name] for name in ("round", "train_loss", *TRAFFIC)}
        rows.append({**kept, "evaluation": {name: found[name] for name in (LOSS, *SCORES) if name in found}})
    if not rows:
        raise RunFolderError(f"expected at least one complete round in {path}, got none")
    return rows
