"""A comparison as a picture: scores over rounds, over forward passes and over bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed._extras import require_extra
from fedkseed.files import write_atomically
from fedkseed.scenarios.experiments.comparison import Document
from fedkseed.scenarios.experiments.entries import ComparisonError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES: Mapping[str, str] = {
    "round": "round",
    "forward_passes": "forward passes of local steps",
    "bytes": "bytes exchanged so far",
}
#: Scores that may be drawn, the first that there is of each row of the picture.
_ROWS: tuple[Mapping[str, str], ...] = (
    {"held_out_loss": "held-out loss of a round, nats", "train_loss": "training loss of a round, nats"},
    {"unseen_loss": "unseen loss of a round, nats"},
    {
        "accuracy": "accuracy of a round",
        "rouge_l": "Rouge-L of a round",
        "exact_match": "exact match of a round",
    },
)
_MARKERS = "osD^vP*X<>"
_HEIGHT, _WIDTH = 3.1, 4.2
_LEGEND_COLUMNS = 4


def draw_comparison(document: Document, target: Path) -> None:
    """Writes the picture as a PNG.

    Args:
        document: of `comparison.compare`.
        target: the file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ComparisonError: no variant has a round that was scored.
    """
    write_figure(figure_of(document), target)


def write_figure(figure: Figure, target: Path) -> None:
    """Writes a picture that `figure_of` made as a PNG, whatever the file is called."""
    written = BytesIO()
    figure.savefig(written, dpi=110, format="png")
    write_atomically(target, written.getvalue())


def figure_of(document: Document) -> Figure:
    """The picture before it is written; see `draw_comparison`."""
    require_extra("plot", "matplotlib")
    from matplotlib.figure import Figure

    curves = _curves(document)
    rows = _rows(curves)
    axes_names = [name for name in _AXES if any(_points(curve, name, rows) for curve in curves.values())]
    if not axes_names:
        raise ComparisonError(
            "expected runs with rounds that were scored, got none: there is nothing to draw"
        )
    size = (_WIDTH * len(axes_names), _HEIGHT * len(rows) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(axes_names), squeeze=False, sharey="row")
    for (score, title), line in zip(rows, grid, strict=True):
        line[0].set_ylabel(title)
        for axis, axes in zip(axes_names, line, strict=True):
            for number, (name, curve) in enumerate(curves.items()):
                _draw(axes, curve, axis, score, name, number)
            axes.set_xlabel(_AXES[axis])
            if axis == "bytes":
                axes.set_xscale("log")
            elif axis == "round":
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(_LEGEND_COLUMNS, len(labels)))
    return figure


def can_be_drawn(document: Document) -> bool:
    """Whether any variant has a round that was scored."""
    return bool(_rows(_curves(document)))


def _curves(document: Document) -> dict[str, Any]:
    return {entry["name"]: entry["curve"] for entry in document["variants"]}


def _rows(curves: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The score of each row of the picture, and its title."""
    return [found for choice in _ROWS for found in _first_drawn(choice, curves)]


def _first_drawn(choice: Mapping[str, str], curves: Mapping[str, Any]) -> list[tuple[str, str]]:
    for name, title in choice.items():
        if any(name in curve for curve in curves.values()):
            return [(name, title)]
    return []


def _points(curve: Mapping[str, Any], axis: str, rows: Sequence[tuple[str, str]]) -> bool:
    """Whether the curve has something over this axis."""
    return any(curve.get(axis, ())) and any(name in curve for name, _ in rows)


def _draw(axes: Axes, curve: Mapping[str, Any], axis: str, score: str, name: str, number: int) -> None:
    """A line of means with a band of one standard deviation; nothing over bytes of who sends none."""
    colour, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
    found = curve.get(score, {"mean": (), "sd": ()})
    known = [
        (x, mean, sd or 0.0)
        for x, mean, sd in zip(curve.get(axis, ()), found["mean"], found["sd"], strict=False)
        if mean is not None and (x or axis != "bytes")
    ]
    if not known:
        return
    xs, means, spreads = ([point[part] for point in known] for part in range(3))
    axes.plot(xs, means, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=name)
    if any(spreads):
        low = [mean - sd for mean, sd in zip(means, spreads, strict=True)]
        high = [mean + sd for mean, sd in zip(means, spreads, strict=True)]
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
