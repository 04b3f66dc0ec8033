"""A comparison as tables: aligned text for a terminal, Markdown for a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedkseed.scenarios.experiments.comparison import Document

Style = Literal["text", "markdown"]

_NONE = "-"
#: Characters of a line on a terminal: notes are broken there, wider tables parted if they can be.
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
#: Tables of costs, with those that each has.
_COST_TABLES: Mapping[str, tuple[str, ...]] = {
    "Costs: passes and messages": (
        "forward_passes",
        "bytes_down",
        "bytes_up",
        "bytes_per_client",
        "num_skipped",
        "num_failed",
    ),
    "Costs: seconds and memory": (
        "seconds_set_up",
        "seconds_local",
        "seconds_rebuild",
        "seconds_reset",
        "seconds_evaluation",
        "memory_process",
        "memory_device",
    ),
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
#: Smaller shares are written as one part of so many.
_LEAST_PERCENT = 0.01
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
    found = [*_scores_tables(document), *_costs_tables(document)]
    if "differences" in document:
        found += _difference_tables(document)
    return found


def rendered(document: Document, style: Style = "text") -> str:
    """All tables with their notes.

    Args:
        document: of `comparison.compare`.
        style: for a terminal, or for a page.
    """
    parts = [render(table, style) for table in tables(document)]
    titles = [f"{entry['name']}: {entry['title']}" for entry in document["variants"] if entry["title"]]
    if style == "text" and titles:  # a page has them with the settings in which variants differ
        parts.append("\n".join(("Variants", *titles)))
    return "\n\n".join(parts)


def render(table: Table, style: Style = "text") -> str:
    """One table with its title and notes."""
    if style == "markdown":
        lines = [f"**{table.title}**", "", _row(table.head), _row(["---", *["---:"] * (len(table.head) - 1)])]
        lines += [_row(row) for row in table.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])
    widths = _widths(table)
    lines = [table.title, _aligned(table.head, widths), "  ".join("-" * width for width in widths)]
    notes = (textwrap.fill(note, _WIDTH, break_on_hyphens=False) for note in table.notes)
    return "\n".join([*lines, *(_aligned(row, widths) for row in table.rows), *notes])


def _widths(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]


def _fits(table: Table) -> bool:
    """Whether its lines fit on a terminal, two blanks between columns."""
    widths = _widths(table)
    return sum(widths) + 2 * (len(widths) - 1) <= _WIDTH


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
    known = [name for name in _SCORES if any(name in entry["scores"] for entry in _entries(document))]
    unseen = [name for name in known if name.startswith("unseen_")]
    held_out = "Scores on held-out rows after the last round"
    if document["kind"] == "instructions":
        parts = [(held_out, known)]
    else:
        others = [name for name in known if name not in unseen]
        parts = [(held_out, others), ("Scores on rows of unseen clients", unseen)]
    found = [table for title, columns in parts if columns for table in _part_tables(document, title, columns)]
    found[-1] = replace(found[-1], notes=tuple(_score_notes(document, known)))
    return found


def _entries(document: Document) -> list[Document]:
    """All rows of a table of scores: what needs no training, then the variants."""
    return [*document["untuned"], *document["variants"]]


def _part_tables(document: Document, title: str, columns: Sequence[str]) -> list[Table]:
    """The scores with their intervals; these in tables of their own for several seeds or want of room."""
    entries = _entries(document)
    if all(len(entry["seeds"]) == 1 for entry in entries):
        table = _scores_table(entries, title, columns, has_intervals=True)
        if _fits(table):
            return [table]
    table = _scores_table(entries, title, columns, has_intervals=False)
    found = [table]
    if not _fits(table):
        levels, paired = _parted(columns)
        found = [
            _scores_table(entries, title, levels, has_intervals=False),
            _scores_table(entries, f"{title}: differences", paired, has_intervals=False),
        ]
    with_intervals = [name for name in columns if any(entry["intervals"].get(name) for entry in entries)]
    intervals = _intervals_table(entries, title, with_intervals)
    if _fits(intervals):
        return [*found, intervals] if with_intervals else found
    return [*found, *(_intervals_table(entries, title, names) for names in _parted(with_intervals) if names)]


def _parted(columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Scores themselves, and differences, which have a sign."""
    paired = [name for name in columns if _SCORES[name][2]]
    return [name for name in columns if name not in paired], paired


def _scores_table(
    entries: Sequence[Document], title: str, columns: Sequence[str], *, has_intervals: bool
) -> Table:
    def cell(entry: Document, name: str) -> str:
        if name not in entry["scores"]:
            return _NONE
        if has_intervals and entry["intervals"].get(name):
            return _bounds(entry["intervals"][name][0], name)
        return _mean(entry["scores"][name], *_SCORES[name][1:])

    shown = [entry for entry in entries if any(name in entry["scores"] for name in columns)]
    rows = ((entry["name"], _seeds(entry), *(cell(entry, name) for name in columns)) for entry in shown)
    return Table(title, ("", "seeds", *(_SCORES[name][0] for name in columns)), tuple(rows))


def _intervals_table(entries: Sequence[Document], title: str, columns: Sequence[str]) -> Table:
    """A row a seed: the estimate with its interval."""
    rows = []
    for entry in entries:
        for number, seed in enumerate(entry["seeds"]):
            found = [entry["intervals"].get(name) for name in columns]
            cells = [
                _bounds(bounds[number], name) if bounds else _NONE
                for name, bounds in zip(columns, found, strict=True)
            ]
            if any(found):
                rows.append((entry["name"], str(seed), *cells))
    head = ("", "seed", *(f"{_SCORES[name][0]} [low, high]" for name in columns))
    return Table(f"{title}: 95 % intervals over rows", head, tuple(rows))


def _bounds(bounds: Sequence[float], name: str) -> str:
    estimate, low, high = (_number(value, *_SCORES[name][1:]) for value in bounds)
    return f"{estimate} [{low}, {high}]"


def _seeds(entry: Mapping[str, Any]) -> str:
    return str(len(entry["seeds"]))


def _mean(spread: Mapping[str, Any], digits: int, signed: bool = False) -> str:
    """Mean and, if it varies in these digits, standard deviation."""
    text, deviation = _number(spread["mean"], digits, signed), round(spread["sd"] or 0.0, digits)
    return f"{text} ± {deviation:.{digits}f}" if deviation else text


def _number(value: float, digits: int, signed: bool) -> str:
    value = round(value, digits) or 0.0  # no negative zero
    return f"{value:{'+' if signed else ''}.{digits}f}"


def _score_notes(document: Document, columns: Sequence[str]) -> list[str]:
    data, entries = document["data"], _entries(document)
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
        notes.append("Mean ± standard deviation over seeds; without ± where all seeds agree in these digits.")
    if len({tuple(entry["seeds"]) for entry in document["variants"]}) > 1:
        each = "; ".join(f"{entry['name']}: {_numbers(entry['seeds'])}" for entry in document["variants"])
        notes.append(f"Not all variants have the same seeds: {each}.")
    notes += [
        f"Not finite: {_SCORES[name][0]} of {entry['name']}, seed {_numbers(seeds)}."
        for entry in document["variants"]
        for name, seeds in entry["not_finite"].items()
    ]
    if any("difference" in name for name in columns):
        notes.append("Less untuned: the mean difference to the untuned model's loss on the same rows.")
    if any(name in columns for name in ("gain", "unseen_gain")):
        notes.append("Gain: the paired difference to the untuned model's accuracy on the same rows.")
    if any("shifted" in name for name in columns):
        notes.append(
            "Shifted: the threshold between both labels lies where it fits training rows best, not at 0; "
            "gain on shifted: paired difference of the tuned model as it is to the untuned one with that."
        )
    if any(entry["intervals"] for entry in entries):
        notes.append("In brackets: low and high end of 95 % intervals over the rows of one seed.")
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


def _costs_tables(document: Document) -> list[Table]:
    entries = document["variants"]
    found = []
    for title, names in _COST_TABLES.items():
        columns = [
            name
            for name in names
            if any(name in entry["costs"] for entry in entries)
            and (name not in _ONLY_IF_ANY or any(entry["costs"][name]["mean"] for entry in entries))
        ]
        rows = tuple(
            (entry["name"], str(entry["rounds"]), *(_cost(entry["costs"], name) for name in columns))
            for entry in entries
        )
        found.append(Table(title, ("", "rounds", *(_COSTS[name][0] for name in columns)), rows))
    messages, machine = found
    several = "Means over seeds. " if any(len(entry["seeds"]) > 1 for entry in entries) else ""
    of_messages = [
        f"{several}Bytes of all messages of a run, and both ways of one client in one round.",
        *(f"Counted {text}." for text in document["conventions"]),
    ]
    of_machine = (
        f"Wall-clock time, added up over clients, on "
        f"{'; '.join(document['environment']['processors'])}; memory is that of the process."
    )
    return [replace(messages, notes=tuple(of_messages)), replace(machine, notes=(of_machine,))]


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
    note = "Differences of runs from the same seed."
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
    if 0 < percent < _LEAST_PERCENT:
        parts = 100 / percent
        digits = 2 - math.floor(math.log10(parts))  # three that count
        return f"1 / {round(parts, digits):,.0f}"
    return f"{percent:,.0f} %" if percent >= 100 else f"{percent:.3g} %"
