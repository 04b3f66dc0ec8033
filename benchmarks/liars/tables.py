"""The tables of results/liars.json, as docs/protocol.md shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def tables(document: Mapping[str, Any]) -> str:
    """Markdown: liars, the window in which the recommended values lie, and honest clients."""
    return "\n\n".join((_attacks(document), _window(document), _honest(document)))


def _attacks(document: Mapping[str, Any]) -> str:
    rows = []
    for row in document["attacks"]:
        if not row["num_liars"] and not row["median_clip"]:
            continue  # what the others are held against
        rows.append((_told(row), str(row["num_liars"]), "1000", *_moved(row)))
    rows += [
        ("data_size, bounds", str(row["num_liars"]), "1e-6", *_moved(row)) for row in document["shrinking"]
    ]
    heads = (
        "weighting",
        "liars of 16",
        "their g",
        "rms of the move",
        "times the honest one",
        "19 of 20 draws below",
        "cosine",
    )
    return _table(heads, rows)


def _told(row: Row) -> str:
    return f"{row['weighting']}, {'bounds' if row['median_clip'] else 'none'}"


def _moved(row: Row) -> tuple[str, ...]:
    times = (f"{row[name]:.3g}" for name in ("times_honest", "p95_times_honest"))
    return (f"{row['rms']:.3g}", *times, f"{round(row['cosine'], 2) + 0.0:.2f}")  # no -0.00


def _window(document: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{row['median_clip']:g}",
            f"{row['share_cap']:g}",
            *(f"{row[f'times_honest_{n}']:.2f} ({row[f'p95_times_honest_{n}']:.2f})" for n in (1, 4)),
            *_lost(row),
            " / ".join(f"{100 * change:.1f} %" for change in row["measured_mean_change"].values()),
        )
        for row in document["window"]
    ]
    measured = "of real models, mean: " + " / ".join(document["window"][0]["measured_mean_change"])
    return _table(
        ("median_clip", "share_cap", "one liar: times (19 of 20 below)", "four", *_LOST, measured), rows
    )


def _honest(document: Mapping[str, Any]) -> str:
    rows = [
        (
            row["g"],
            str(row["num_clients"]),
            str(row["num_local_steps"]),
            str(row["num_rounds"]),
            *_lost(row),
            f"{row['cosine']:.3f}",
        )
        for row in document["honest"]
    ]
    return _table(("g", "clients", "tau", "rounds", *_LOST, "cosine"), rows)


_LOST = ("honest update changes by, mean", "rms", "at most", "rounds it changes in")


def _lost(row: Row) -> tuple[str, ...]:
    changes = (row[name] for name in ("mean_change", "rms_change", "most_change"))
    return (*(f"{100 * change:.2f} %" for change in changes), f"{100 * row['changed_rounds']:.0f} %")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))
