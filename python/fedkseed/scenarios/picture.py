"""A picture of a run on labelled rows: its losses, its accuracies before and after, and its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed._extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Of the axis of accuracies: room for a legend above 1.
_TOP = 1.2
_MOST_LEVEL_NAMES = 8  # more would run into each other


def draw(
    target: Path,
    rounds: Sequence[Mapping[str, Any]],
    compared: Mapping[str, Any],
    weight_bytes: int,
    prompt_accuracy: float | None = None,
) -> None:
    """Writes the picture as a PNG.

    Args:
        target: the file.
        rounds: the run's metrics, at least one round.
        compared: "held_out" of `ClassificationBench.summary`.
        weight_bytes: of all weights, what FedAvg sends each way for every client and round.
        prompt_accuracy: of an untuned prompt on all rows.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_of(rounds, compared, weight_bytes, prompt_accuracy).savefig(target, dpi=120, format="png")


def figure_of(
    rounds: Sequence[Mapping[str, Any]],
    compared: Mapping[str, Any],
    weight_bytes: int,
    prompt_accuracy: float | None = None,
) -> Figure:
    """The picture before it is written; see `draw`."""
    require_extra("plot", "matplotlib")
    from matplotlib.figure import Figure

    # A central method sends nothing: no panel of bytes.
    has_traffic = any(row["bytes_down"] or row["bytes_up"] for row in rounds)
    widths = (3, 5, 3) if has_traffic else (3, 5)
    figure = Figure(figsize=(13 / 11 * sum(widths), 3.8), layout="constrained")
    losses, accuracies, *traffic = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_losses(losses, rounds, compared["loss"])
    _draw_accuracies(accuracies, compared, prompt_accuracy)
    for axes in traffic:
        _draw_traffic(axes, rounds, weight_bytes)
    for axes in (losses, *traffic):
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure


def _draw_losses(axes: Axes, rounds: Sequence[Mapping[str, Any]], ends: Sequence[float]) -> None:
    axes.set_title("loss, nats a row")
    train = [(row["round"] + 1, row["train_loss"]) for row in rounds if row["train_loss"] is not None]
    seen = [
        (row["round"] + 1, loss)
        for row in rounds
        if (loss := row["evaluation"].get("held_out_loss")) is not None
    ]
    for points, label in ((train, "train"), (seen, "held out, few rows")):
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.plot((0, rounds[-1]["round"] + 1), ends, "kD", markersize=5, label="held out, all rows")
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.legend()


def _draw_accuracies(axes: Axes, compared: Mapping[str, Any], prompt_accuracy: float | None) -> None:
    axes.set_title("accuracy on held-out rows, 95 % intervals")
    groups = {**compared["clients"], **({"all": compared["all"]} if len(compared["clients"]) > 1 else {})}
    places = range(len(groups))
    for side, shift, colour in (("before", -0.15, "tab:gray"), ("after", 0.15, "tab:blue")):
        values, low, high = zip(*(group[side] for group in groups.values()), strict=True)
        reach = [
            [value - end for value, end in zip(values, low, strict=True)],
            [end - value for value, end in zip(values, high, strict=True)],
        ]
        axes.errorbar(
            [place + shift for place in places],
            values,
            yerr=reach,
            fmt="o",
            capsize=3,
            color=colour,
            label=side,
        )
    majority = [group["majority"] for group in groups.values()]
    axes.plot(places, majority, "_", markersize=26, color="tab:orange", label="majority answer")
    if prompt_accuracy is not None:
        axes.axhline(prompt_accuracy, linestyle="--", color="tab:green", label="best untuned prompt, all")
    axes.set_xticks(list(places), list(groups), rotation=90 if len(groups) > _MOST_LEVEL_NAMES else 0)
    axes.set_ylim(0, _TOP)
    axes.set_yticks([tenth / 10 for tenth in range(0, 11, 2)])
    axes.legend(loc="upper center", ncols=4, fontsize="small")  # above all that can be drawn


def _draw_traffic(axes: Axes, rounds: Sequence[Mapping[str, Any]], weight_bytes: int) -> None:
    axes.set_title("bytes exchanged so far")
    numbers = [row["round"] + 1 for row in rounds]
    exchanged = accumulate(row["bytes_down"] + row["bytes_up"] for row in rounds)
    by_weights = accumulate(2 * weight_bytes * len(row["clients"]) for row in rounds)
    for totals, label in ((by_weights, "weights (FedAvg)"), (exchanged, "this run")):
        axes.plot(numbers, list(totals), marker="o", markersize=3, label=label)
    axes.set_yscale("log")
    axes.legend()
