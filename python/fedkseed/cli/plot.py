"""`fedkseed plot`: losses, scores and bytes of a run as a PNG."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkseed._extras import require_extra
from fedkseed.simulation.round_log import read_rounds
from fedkseed.simulation.run_folder import METRICS, RunFolderError

_LOSS = "held_out_loss"
_SCORES = ("rouge_l", "exact_match")
_TRAFFIC = ("bytes_down", "bytes_up")
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
        description="Draws loss, Rouge-L and exchanged bytes of a run over its rounds as a PNG. Needs "
        "matplotlib: pip install 'fedkseed-kernels[plot]'.",
    )
    parser.add_argument("folder", type=Path, help="folder of the run", metavar="RUN")
    parser.add_argument("--out", type=Path, help="the PNG (RUN/plot.png)", metavar="FILE")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draws it."""
    rows = read_metrics(options.folder / METRICS)
    target = options.out or options.folder / "plot.png"
    draw(rows, target)
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
        kept = {name: row[name] for name in ("round", "train_loss", *_TRAFFIC)}
        rows.append(
            {**kept, "evaluation": {name: found[name] for name in (_LOSS, *_SCORES) if name in found}}
        )
    if not rows:
        raise RunFolderError(f"expected at least one complete round in {path}, got none")
    return rows


def draw(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Writes the PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_extra("plot", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, scores, traffic = figure.subplots(1, 3)
    rounds = [row["round"] + 1 for row in rows]
    _line(losses, rounds, [row["train_loss"] for row in rows], "train")
    for name, axes in ((_LOSS, losses), *((name, scores) for name in _SCORES)):
        _line(axes, rounds, [row["evaluation"].get(name) for row in rows], name.replace("_", " "))
    for name in _TRAFFIC:
        total, sums = 0, []
        for row in rows:
            total += row[name]
            sums.append(total / 1024)
        _line(traffic, rounds, sums, name.replace("bytes_", ""))
    titles = ("loss, nats a token", "answers, mean over rows", "KiB exchanged so far")
    for axes, title in zip((losses, scores, traffic), titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("round")
        if axes.has_data():
            axes.legend()
    figure.savefig(target, dpi=120)


def _line(axes: Any, rounds: Sequence[int], values: Sequence[float | None], label: str) -> None:
    known = [(x, y) for x, y in zip(rounds, values, strict=True) if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker="o", markersize=3, label=label)
