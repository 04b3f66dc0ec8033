"""A picture of a run of any kind: its losses, scores and bytes, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkseed._extras import require_extra

#: What is drawn of a round: of its evaluation, and of its messages.
LOSS, SCORES = "held_out_loss", ("accuracy", "rouge_l", "exact_match")
TRAFFIC = ("bytes_down", "bytes_up")


def draw_rounds(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Writes losses, scores and bytes over the rounds as a PNG.

    Args:
        rows: the metrics of at least one round.
        target: the file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_extra("plot", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, scores, traffic = figure.subplots(1, 3)
    rounds = [row["round"] + 1 for row in rows]
    _line(losses, rounds, [row["train_loss"] for row in rows], "train")
    for name, axes in ((LOSS, losses), *((name, scores) for name in SCORES)):
        _line(axes, rounds, [row["evaluation"].get(name) for row in rows], name.replace("_", " "))
    for name in TRAFFIC:
        total, sums = 0, []
        for row in rows:
            total += row[name]
            sums.append(total / 1024)
        _line(traffic, rounds, sums, name.replace("bytes_", ""))
    titles = ("loss, nats", "scores, mean over rows", "KiB exchanged so far")
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
