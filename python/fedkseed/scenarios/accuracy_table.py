"""Accuracies before and after by client as text, with what needs no tuning beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedkseed.scenarios.paired_difference import Interval

_COLUMNS = ("rows", "majority answer", "before", "after", "after less before, 95 %")
_WIDTHS = (5, 20, 7, 7, 24)


def accuracy_table(title: str, found: Mapping[str, Any]) -> str:
    """The table of one kind of rows.

    Args:
        title: of the rows.
        found: what `ClassificationBench.summary` says of them.
    """
    width = max(len(title), *(len(name) for name in (*found["clients"], "all")))
    lines = [_line(title, _COLUMNS, width)]
    compared = list(found["clients"].items())
    if len(compared) > 1:
        compared.append(("all", found["all"]))  # a client may have this name, too
    for name, client in compared:
        label = client.get("majority_label")
        majority = f"{client['majority']:.3f}" + (f" ({label[:12]})" if label else "")
        estimate, low, high = client["difference"]
        cells = (
            str(client["rows"]),
            majority,
            f"{client['before'][0]:.3f}",
            f"{client['after'][0]:.3f}",
            f"{estimate:+.3f} [{low:+.3f}, {high:+.3f}]",
        )
        lines.append(_line(name, cells, width))
    losses = " -> ".join(f"{loss:.3f}" for loss in found["loss"])
    last = f"Loss {losses} nats a row"
    if all(value is not None for value in found.get("auc", (None,))):
        last += ", AUC " + " -> ".join(f"{value:.3f}" for value in found["auc"])
    lines.append(last)
    if "threshold" in found:
        lines.append(_threshold_line(found["threshold"]))
    return "\n".join(lines)


def _threshold_line(found: Mapping[str, Any]) -> str:
    then, now = (str(Interval(*accuracy)) for accuracy in found["accuracy"])
    estimate, low, high = found["difference"]
    return (
        f"A shifted threshold alone, fitted on {found['rows']:,} training rows: {then} untuned ({now} tuned)"
        f"; tuned without it less untuned with it {estimate:+.3f} [{low:+.3f}, {high:+.3f}]"
    )


def _line(name: str, cells: Sequence[str], width: int) -> str:
    return "  ".join([name.ljust(width), *(cell.rjust(w) for cell, w in zip(cells, _WIDTHS, strict=True))])
