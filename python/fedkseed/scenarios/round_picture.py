"""A picture of a run of any kind: its losses, scores and bytes, round by round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed._extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What is drawn of a round: of its evaluation, and of its messages.
LOSS, SCORES = "held_out_loss", ("accuracy", "rouge_l", "exact_match")
TRAFFIC = ("bytes_down", "bytes_up")
_WIDTH, _HEIGHT = 4, 3.6


def draw_rounds(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Writes losses, scores and bytes over the rounds as a PNG.

    Args:
        rows: the metrics of at least one round.
        target: the file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_of(rows).savefig(target, dpi=120, format="png")


def figure_of(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The picture before it is written; panels of what no round has are left out. See `draw_rounds`."""
    require_extra("plot", "matplotlib")
    from matplotlib.figure import Figure

    panels = {
        "loss, nats": {"train": [row["train_loss"] for row in rows], **_scores(rows, (LOSS,))},
        "scores, mean over rows": _scores(rows, SCORES),
        "KiB exchanged so far": {
            name.removeprefix("bytes_"): [total / 1024 for total in accumulate(row[name] for row in rows)]
            for name in TRAFFIC
            if any(row[name] for row in rows)  # a central method has none
        },
    }
    drawn = {
        title: lines
        for title, lines in panels.items()
        if any(value is not None for values in lines.values() for value in values)
    }
    figure = Figure(figsize=(_WIDTH * max(1, len(drawn)), _HEIGHT), layout="constrained")
    rounds = [row["round"] + 1 for row in rows]
    for axes, (title, lines) in zip(
        figure.subplots(1, len(drawn), squeeze=False)[0] if drawn else (), drawn.items(), strict=True
    ):
        for label, values in lines.items():
            _line(axes, rounds, values, label)
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.ticklabel_format(style="plain", useOffset=False)
        axes.legend()
    return figure


def _scores(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, list[float | None]]:
    return {name.replace("_", " "): [row["evaluation"].get(name) for row in rows] for name in names}


def _line(axes: Axes, rounds: Sequence[int], values: Sequence[float | None], label: str) -> None:
    known = [(x, y) for x, y in zip(rounds, values, strict=True) if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker="o", markersize=3, label=label)
