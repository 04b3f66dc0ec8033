"""A comparison as a picture: scores over rounds, over forward passes and over bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed._extras import require_extra
from fedkseed.documents import shown
from fedkseed.files import write_atomically
from fedkseed.scenarios.experiments.comparison import Document
from fedkseed.scenarios.experiments.entries import ComparisonError
from fedkseed.scenarios.experiments.finished_runs import ZERO_SHOT

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
#: Numbers of passes are long.
_MOST_TICKS = {"round": 10, "forward_passes": 6}
#: Parts of a decade of bytes that are marked; the locator leaves some out where decades are many.
_LOG_TICKS = (1.0, 2.0, 5.0)
#: Characters of a line above a panel.
_NOTE_WIDTH = 60


def draw_comparison(document: Document, target: Path, title: str = "") -> None:
    """Writes the picture as a PNG.

    Args:
        document: of `comparison.compare`.
        target: the file.
        title: see `figure_of`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ComparisonError: no variant has a round that was scored.
    """
    write_figure(figure_of(document, title), target)


def write_figure(figure: Figure, target: Path) -> None:
    """Writes a picture that `figure_of` made as a PNG, whatever the file is called."""
    written = BytesIO()
    figure.savefig(written, dpi=110, format="png")
    write_atomically(target, written.getvalue())


def figure_of(document: Document, title: str = "") -> Figure:
    """The picture before it is written; see `draw_comparison`.

    Args:
        document: of `comparison.compare`.
        title: above all of it; the names of data and model if empty.
    """
    require_extra("plot", "matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    curves = _curves(document)
    rows = _rows(curves)
    axes_names = [name for name in _AXES if any(_points(curve, name, rows) for curve in curves.values())]
    if not axes_names:
        raise ComparisonError(
            "expected runs with rounds that were scored, got none: there is nothing to draw"
        )
    size = (_WIDTH * len(axes_names), _HEIGHT * len(rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title or _title(document))
    grid = figure.subplots(len(rows), len(axes_names), squeeze=False, sharey="row")
    for (score, score_title), line in zip(rows, grid, strict=True):
        line[0].set_ylabel(score_title)
        for axis, axes in zip(axes_names, line, strict=True):
            for number, (name, curve) in enumerate(curves.items()):
                _draw(axes, curve, axis, score, name, number)
            untuned = _untuned(document, score)
            if untuned is not None and axis != "bytes":  # no 0 on a logarithmic axis
                axes.plot((0,), (untuned,), "k*", markersize=9, linestyle="none", label="untuned")
            _set_axes(axes, axis)
    if "bytes" in axes_names:
        _tell_silent(grid[0][axes_names.index("bytes")], curves)
    named = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if any(axes.collections for axes in figure.axes):
        band = "band: ± 1 standard deviation over seeds"
        named[band] = Patch(facecolor="gray", alpha=0.3, label=band)
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=min(_LEGEND_COLUMNS, len(named))
    )
    return figure


def _title(document: Document) -> str:
    names = (document["data"]["name"], document["settings"].get("model"))
    return ", ".join(shown(name) for name in names if name)


def _untuned(document: Document, score: str) -> float | None:
    """The untuned model's score, where it belongs on the curves: round 0 of all of them."""
    settings = document["settings"]
    # A round scores the first of the rows that are scored before and after. Unless these are all of them, the
    # untuned model's loss is of other rows and no point of the curves: left out, as are accuracies.
    if score != "held_out_loss" or settings.get("round_rows", 0) < settings.get("final_rows", 1):
        return None
    found = [
        entry["scores"][score]["mean"]
        for entry in document["untuned"]
        if entry["name"] == ZERO_SHOT and score in entry["scores"]
    ]
    return found[0] if found else None


def _set_axes(axes: Axes, axis: str) -> None:
    axes.set_xlabel(_AXES[axis])
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    if axis == "bytes":
        axes.set_xscale("log")
        require_extra("plot", "matplotlib")
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        axes.xaxis.set_major_locator(LogLocator(subs=_LOG_TICKS))
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelrotation=30)
    else:
        axes.locator_params(axis="x", nbins=_MOST_TICKS[axis], integer=True, min_n_ticks=1)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)


def _tell_silent(axes: Axes, curves: Mapping[str, Any]) -> None:
    """Names those that send nothing: they have no place on a logarithmic axis."""
    silent = [name for name, curve in curves.items() if not any(curve.get("bytes", ()))]
    if silent:
        text = textwrap.fill(f"no bytes are sent by {', '.join(silent)}", _NOTE_WIDTH)
        axes.set_title(text, fontsize="small", loc="left")


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
