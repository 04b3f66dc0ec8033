"""A comparison as tables: aligned text for a terminal, Markdown for a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedkseed.scenarios.experiments.comparison import Document

Style = Literal["text", "markdown"]

_NONE = "-"
#: Characters of a line of a note on a terminal.
_WIDTH = 110
#: Scores: title, digits, whether a sign is shown.
_SCORES: Mapping[str, tuple[str, int, bool]] = {
    "held_out_loss": ("held-out loss", 3, False),
    "held_out_difference": ("less untuned", 3, True),
    "unseen_loss": ("unseen loss", 3, False),
    "unseen_difference": ("less untuned", 3, True),
    "rouge_l": ("Rouge-L", 3, False),
    "paper_rouge": ("Rouge-L (rouge 1.0.1)", 3, False),
    "exact_match": ("exact match", 3, False),
    "accuracy": ("accuracy", 3, False),
    "gain": ("gain", 3, True),
    "shifted_accuracy": ("accuracy, shifted", 3, False),
    "gain_on_shifted": ("gain on shifted", 3, True),
    "auc": ("AUC", 3, False),
    "unseen_accuracy": ("accuracy", 3, False),
    "unseen_gain": ("gain", 3, True),
    "unseen_shifted_accuracy": ("accuracy, shifted", 3, False),
    "unseen_gain_on_shifted": ("gain on shifted", 3, True),
    "unseen_auc": ("AUC", 3, False),
}
#: Costs: title and how a number of it is written.
_COSTS: Mapping[str, tuple[str, str]] = {
    "forward_passes": ("forward passes", "count"),
    "bytes_down": ("bytes down", "bytes"),
    "bytes_up": ("bytes up", "bytes"),
    "bytes_per_client": ("a client, a round", "bytes"),
    "seconds_set_up": ("set-up s", "seconds"),
    "seconds_local": ("local steps s", "seconds"),
    "seconds_rebuild": ("rebuild s", "seconds"),
    "seconds_reset": ("reset s", "seconds"),
    "seconds_evaluation": ("evaluation s", "seconds"),
    "memory_process": ("peak memory", "bytes"),
    "memory_device": ("peak on the device", "bytes"),
    "num_skipped": ("skipped steps", "count"),
    "num_failed": ("failed clients", "count"),
}
#: Costs that are left out where nobody has any.
_ONLY_IF_ANY = ("num_skipped", "num_failed")
#: Scores and costs that are set against another variant's.
_LESS = ("held_out_loss", "unseen_loss", "rouge_l", "paper_rouge", "exact_match", "accuracy", "auc")
_SHARES = {
    "bytes_down": "bytes down",
    "bytes_up": "bytes up",
    "bytes_per_client": "a client, a round",
    "forward_passes": "forward passes",
    "seconds_local": "local steps s",
    "memory_process": "peak memory",
}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Table:
    """Cells in rows under a head; the first column is of names.

    Attributes:
        title: what it shows.
        head: names of the columns.
        rows: as many cells each.
        notes: sentences that belong below it.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables(document: Document) -> list[Table]:
    """The tables of a comparison: scores, costs and, if asked for, what sets each variant against one."""
    found = [*_scores_tables(document), _costs_table(document)]
    if "differences" in document:
        found += _difference_tables(document)
    return found


def rendered(document: Document, style: Style = "text") -> str:
    """All tables with their notes.

    Args:
        document: of `comparison.compare`.
        style: for a terminal, or for a page.
    """
    return "\n\n".join(render(table, style) for table in tables(document))


def render(table: Table, style: Style = "text") -> str:
    """One table with its title and notes."""
    if style == "markdown":
        lines = [f"**{table.title}**", "", _row(table.head), _row(["---", *["---:"] * (len(table.head) - 1)])]
        lines += [_row(row) for row in table.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])
    widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
    lines = [table.title, _aligned(table.head, widths), "  ".join("-" * width for width in widths)]
    notes = (textwrap.fill(note, _WIDTH, break_on_hyphens=False) for note in table.notes)
    return "\n".join([*lines, *(_aligned(row, widths) for row in table.rows), *notes])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = cells
    row = [
        first.ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
    ]
    return "  ".join(row).rstrip()


def _scores_tables(document: Document) -> list[Table]:
    """The scores of the clients' held-out rows; a classification's on unseen clients' rows have their own."""
    entries = [*document["untuned"], *document["variants"]]
    known = [name for name in _SCORES if any(name in entry["scores"] for entry in entries)]
    unseen = [name for name in known if name.startswith("unseen_")]
    if document["kind"] == "instructions":
        parts = [("Scores on held-out rows after the last round", known)]
    else:
        parts = [
            ("Scores on held-out rows after the last round", [name for name in known if name not in unseen]),
            ("Scores on rows of unseen clients", unseen),
        ]
    found = []
    for title, columns in parts:
        if columns:
            rows = tuple(
                (entry["name"], _seeds(entry), *(_score(entry, name) for name in columns))
                for entry in entries
            )
            found.append(Table(title, ("", "seeds", *(_SCORES[name][0] for name in columns)), rows))
    found[-1] = replace(found[-1], notes=tuple(_score_notes(document, known)))
    return found


def _seeds(entry: Mapping[str, Any]) -> str:
    return str(len(entry["seeds"]))


def _score(entry: Mapping[str, Any], name: str) -> str:
    if name not in entry["scores"]:
        return _NONE
    _, digits, signed = _SCORES[name]
    text = _mean(entry["scores"][name], digits, signed)
    if bounds := entry["intervals"].get(name):
        low, high = min(low for _, low, _ in bounds), max(high for _, _, high in bounds)
        text += f" [{_number(low, digits, signed)}, {_number(high, digits, signed)}]"
    return text


def _mean(spread: Mapping[str, Any], digits: int, signed: bool = False) -> str:
    text = _number(spread["mean"], digits, signed)
    return text if spread["sd"] is None else f"{text} ± {spread['sd']:.{digits}f}"


def _number(value: float, digits: int, signed: bool) -> str:
    value = round(value, digits) or 0.0  # no negative zero
    return f"{value:{'+' if signed else ''}.{digits}f}"


def _score_notes(document: Document, columns: Sequence[str]) -> list[str]:
    data, entries = document["data"], [*document["untuned"], *document["variants"]]
    digests = sorted(set(data["rows"].values()))
    unit = "a response token" if document["kind"] == "instructions" else "a row"
    if document["settings"].get("held_out_mean") == "rows":
        unit += ", mean over rows"
    rows = f"rows {digests[0][:12]}"
    if len(digests) > 1:
        each = ", ".join(f"{seed}: {rows[:12]}" for seed, rows in data["rows"].items())
        rows = f"which each seed divides and holds out anew (rows of seed {each})"
    notes = [f"Data: {data['name']}, {rows}. {_scored_rows(document)} Losses in nats {unit}."]
    if any(len(entry["seeds"]) > 1 for entry in entries):
        notes.append("Mean ± standard deviation over seeds.")
    if len({tuple(entry["seeds"]) for entry in document["variants"]}) > 1:
        each = "; ".join(f"{entry['name']}: {_numbers(entry['seeds'])}" for entry in document["variants"])
        notes.append(f"Not all variants have the same seeds: {each}.")
    notes += [
        f"Not finite: {_SCORES[name][0]} of {entry['name']}, seed {_numbers(seeds)}."
        for entry in document["variants"]
        for name, seeds in entry["not_finite"].items()
    ]
    if any("difference" in name for name in columns):
        notes.append(
            "Less untuned: the mean difference to the untuned model's loss on the same rows, with its 95 % "
            "interval over rows; of several seeds the lowest low end and the highest high end."
        )
    if any("shifted" in name for name in columns):
        notes.append(
            "Shifted: the threshold between both labels lies where it fits training rows best, not at 0; "
            "gain on shifted: paired difference of the tuned model as it is to the untuned one with that."
        )
    if any(name in columns for name in ("accuracy", "unseen_accuracy")):
        notes.append(
            "In brackets: 95 % intervals over rows, of an accuracy and of its paired difference to the "
            "untuned model's on the same rows; of several seeds the lowest low end and the highest high end."
        )
    return notes


def _scored_rows(document: Document) -> str:
    """How many rows the scores are of."""
    settings, counts = document["settings"], document["num_rows"]
    text = f"Scored: up to {settings.get('final_rows', 0):,} held-out rows of each client"
    if counts:
        named = {"held_out": "of the clients that train", "unseen": "of unseen ones"}
        text += f", {' and '.join(f'{count:,} {named[part]}' for part, count in counts.items())}"
    elif settings.get("generate_rows"):
        text += f", answers to {settings['generate_rows']:,} of each"
    return text + "."


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _costs_table(document: Document) -> Table:
    entries = document["variants"]
    columns = [
        name
        for name in _COSTS
        if any(name in entry["costs"] for entry in entries)
        and (name not in _ONLY_IF_ANY or any(entry["costs"][name]["mean"] for entry in entries))
    ]
    rows = tuple(
        (entry["name"], str(entry["rounds"]), *(_cost(entry["costs"], name) for name in columns))
        for entry in entries
    )
    processors = "; ".join(document["environment"]["processors"])
    notes = [
        "Means over seeds. Bytes of all messages of a run, and both ways of one client in one round. Seconds "
        f"are wall-clock time, added up over clients, on {processors}; memory is that of the process."
    ]
    notes += [f"Counted {text}." for text in document["conventions"]]
    return Table("Costs", ("", "rounds", *(_COSTS[name][0] for name in columns)), rows, tuple(notes))


def _cost(costs: Mapping[str, Any], name: str) -> str:
    if name not in costs:
        return _NONE
    return written(costs[name]["mean"], _COSTS[name][1])


def written(value: float, unit: str) -> str:
    """A cost as a table has it.

    Args:
        value: of it.
        unit: "count", "bytes" or "seconds".
    """
    if unit == "bytes":
        return bytes_text(value)
    if unit == "count":
        return f"{value:,.0f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bytes_text(value: float) -> str:
    """Bytes in decimal units with three digits."""
    scale = 0
    while value >= 999.5 and scale + 1 < len(_UNITS):
        value /= 1000
        scale += 1
    return f"{value:.0f} B" if not scale else f"{value:#.3g} {_UNITS[scale]}".replace(". ", " ")


def _difference_tables(document: Document) -> list[Table]:
    entries, by = document["differences"], document["by"]
    if not entries:
        return []
    scores = [name for name in _LESS if any(name in entry["scores"] for entry in entries)]
    rows = tuple(
        (
            entry["name"],
            _seeds(entry),
            *(
                _mean(entry["scores"][name], _SCORES[name][1], True) if name in entry["scores"] else _NONE
                for name in scores
            ),
        )
        for entry in entries
    )
    note = "Differences of runs from the same seed; mean ± standard deviation over seeds."
    less = Table(
        f"Scores less those of {by}", ("", "seeds", *(_SCORES[name][0] for name in scores)), rows, (note,)
    )
    costs = [name for name in _SHARES if any(name in entry["costs"] for entry in entries)]
    rows = tuple((entry["name"], *(_share(entry["costs"].get(name)) for name in costs)) for entry in entries)
    return [less, Table(f"Costs as a share of those of {by}", ("", *(_SHARES[name] for name in costs)), rows)]


def _share(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return _NONE
    percent = 100 * spread["mean"]
    return f"{percent:,.0f} %" if percent >= 100 else f"{percent:.3g} %"
