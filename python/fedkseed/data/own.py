"""A user's own data as a federation: which file, which fields, which clients, what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkseed._progress import counted
from fedkseed.data.columns import label_of, text_of
from fedkseed.data.errors import DataError, choose_from, printable
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.held_out import divide_rows
from fedkseed.data.labels import HEAD, WORDS, check_labels
from fedkseed.data.natural_instructions import is_natural_instructions, read_tasks
from fedkseed.data.partition import Partition
from fedkseed.data.plan import Plan
from fedkseed.data.sources import Source, open_source
from fedkseed.data.templates import INPUT, INSTRUCTION, NATURAL_INSTRUCTIONS, Template, read_template

#: Clients of the partition that is taken if none is named and no field suggests itself.
DEFAULT_CLIENTS = 8


def _setting(default: Any, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"metavar": metavar, "choices": choices})


@dataclass(frozen=True)
class DataChoice:
    """What a user says of their data; each field is a flag of the command line, shown as its metadata says.

    Attributes:
        data: *.jsonl, *.csv, *.parquet, a folder with tasks/ and splits/, hub:NAME[:CONFIG]@REVISION,
            sentiment or instructions
        partition: who holds which rows: by:FIELD, iid:N or dirichlet:FIELD:ALPHA:N; by default a known
            schema's field, else iid:8
        input: field of what is asked
        context: field of a text beside it, which may be empty
        output: field of the response (instructions)
        label: field of the label (classification)
        template: makes prompts: plain, alpaca, chat, fedkseed-ni, fedkseed-dolly, or a text with field names
            in braces; \\n is a newline
        template_file: text file with field names in braces, in place of --template
        words: what answers each label: LABEL=WORD,...; a word as it is, with the space before it
        classify: what answers a classification: words of the language model, or a head of a classifier
        held_out: share of each client's rows that is not trained on
        held_out_clients: clients that are not trained on: FIELD=VALUE,... or a share of the clients

    Raises:
        DataError: choices that cannot stand together.
    """

    data: str = field(metadata={"metavar": "SOURCE"})
    partition: str = _setting("", "HOW")
    input: str = _setting("", "FIELD")
    context: str = _setting("", "FIELD")
    output: str = _setting("", "FIELD")
    label: str = _setting("", "FIELD")
    template: str = _setting("", "NAME_OR_TEXT")
    template_file: str = _setting("", "FILE")
    words: str = _setting("", "LABEL=WORD,...")
    classify: str = _setting(WORDS, choices=(WORDS, HEAD))
    held_out: float = _setting(0.1, "FRACTION")
    held_out_clients: str = _setting("", "WHICH")

    def __post_init__(self) -> None:
        if not self.data:
            raise DataError("expected --data, got none")
        if self.classify not in (WORDS, HEAD):
            raise DataError(choose_from("--classify", self.classify, (WORDS, HEAD)))
        if self.template and self.template_file:
            raise DataError("expected either --template or --template-file, got both")
        if self.words and self.classify == HEAD:
            raise DataError("expected no --words with --classify head, which has a row for each label")
        if not 0 <= self.held_out < 1:
            raise DataError(f"expected --held-out in [0, 1), got {self.held_out}")

    def given_template(self) -> Template | None:
        """The template that is named, written out or read from its file; None if there is none.

        Raises:
            DataError: an unknown name, or a text that is no template.
        """
        if self.template_file:
            return read_template(Path(self.template_file))
        return Template.of(self.template) if self.template else None


@dataclass(frozen=True)
class Division:
    """A federation's data and how its rows divide into groups.

    Attributes:
        data: the rows.
        grouped_by: the field of the groups: the label, or the partition's field, or empty.
        groups: of each client (unseen ones too), how many rows each group has.
    """

    data: FederatedData
    grouped_by: str
    groups: Mapping[str, Counter[str]]


def load_own(choice: DataChoice, seed: int) -> FederatedData:
    """The rows of a user's data, divided among clients.

    Args:
        choice: what the user says.
        seed: of every draw; the same seed and data give the same division.

    Raises:
        DataError: the data is not what it should be, or the choice does not fit it; one line.
        MissingExtraError: Parquet or the hub without the extra ``data``.
    """
    return load_division(choice, seed).data


def load_division(choice: DataChoice, seed: int) -> Division:
    """The rows of `load_own`, with the groups that they fall into."""
    folder = Path(choice.data)
    if is_natural_instructions(folder):
        return _natural_instructions(choice, folder, seed)
    source = open_source(choice.data)
    plan = Plan(choice, source)
    table = _read(source, plan)
    clients, unseen = _assign(plan, table, seed)
    names = _names([*clients, *unseen])
    client_names, unseen_names = names[: len(clients)], names[len(clients) :]
    data = FederatedData(
        kind="classification" if plan.columns.label else "instructions",
        clients=tuple(
            ClientRows(name, table.at(rows), table.at(out))
            for name, (rows, out) in zip(client_names, clients.values(), strict=True)
        ),
        unseen=tuple(
            ClientRows(name, (), table.at(rows))
            for name, rows in zip(unseen_names, unseen.values(), strict=True)
        ),
        template=plan.template,
        labels=tuple(table.labels),
        words=tuple(plan.words_by_label(table.labels).values()),
        notes=tuple(map(printable, plan.notes)),
    )
    grouped = [*(rows + out for rows, out in clients.values()), *unseen.values()]
    groups = {
        name: Counter(table.groups[row] for row in rows) for name, rows in zip(names, grouped, strict=True)
    }
    return Division(data, plan.grouped_by, groups)


def _names(values: Sequence[str]) -> list[str]:
    """A printable name of each, no two alike: what differs may look the same, or be held out by its value."""
    found: dict[str, None] = {}
    for value in values:
        name = first = printable(value)
        number = 1
        while name in found:
            number += 1
            name = f"{first} ({number})"
        found[name] = None
    return list(found)


@dataclass
class _Table:
    """Rows that are kept, with what they are divided by.

    Attributes:
        rows: prompts' fields and answers.
        prompts: of each row, what no row of the other side may have.
        groups, held: of each row, the value of the groups' field and of the held-out clients' field.
        values: of the partition's field.
        labels: of a classification, sorted; those that --words lists, too.
    """

    rows: list[Row] = field(default_factory=list)
    prompts: list[tuple[str, ...]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    labels: tuple[str, ...] = ()

    def at(self, indices: Sequence[int]) -> tuple[Row, ...]:
        """The rows at indices."""
        return tuple(self.rows[index] for index in indices)


def _read(source: Source, plan: Plan) -> _Table:
    """All rows of a source that are not empty, each once."""
    table = _Table()
    counts: Counter[str] = Counter()
    seen: dict[tuple[str, ...], set[str]] = {}
    partition_field = plan.partition.field if plan.partition is not None else ""
    for record in counted(source.records(plan.fields()), "reading", "row"):
        fields = {placeholder: text_of(record, name) for placeholder, name in plan.asked.items()}
        answer = (label_of if plan.columns.label else text_of)(record, plan.columns.response)
        if plan.words is not None and answer and answer not in plan.words:
            raise DataError(f"{choose_from('a label of --words', answer, plan.words)} in {record.where}")
        others = [
            label_of(record, name) if name else ""
            for name in (plan.grouped_by, plan.held_out_clients.field, partition_field)
        ]
        counts["read"] += 1
        prompt = tuple(fields[placeholder] for placeholder in sorted(fields))
        if not answer.strip() or not any(text.strip() for text in prompt):
            counts["empty"] += 1
            continue
        answers = seen.setdefault(prompt, set())
        if answer in answers:
            counts["twice"] += 1
            continue
        counts["other"] += bool(answers)
        answers.add(answer)
        table.rows.append(Row(fields, answer))
        table.prompts.append(prompt)
        for values, value in zip((table.groups, table.held, table.values), others, strict=True):
            values.append(value)
    if not table.rows:
        raise DataError(f"expected at least one row with a prompt and an answer in {source.name}, got none")
    if plan.columns.label:
        found = {row.response for row in table.rows}
        check_labels(sorted(found))
        table.labels = tuple(sorted(found | set(plan.words or ())))
    plan.notes.append(f"{counts['read']:,} rows read")
    for name, meaning in (
        ("empty", "left out: no prompt or no answer"),
        ("twice", "left out: the same prompt and answer as an earlier row"),
        ("other", "with another answer to an earlier row's prompt: kept on the side of that row"),
    ):
        if counts[name]:
            plan.notes.append(f"{counts[name]:,} rows {meaning}")
    if plan.columns.label and (rowless := sorted(set(table.labels) - found)):
        plan.notes.append(f"labels of --words without a row: {', '.join(rowless)}")
    return table


def _assign(
    plan: Plan, table: _Table, seed: int
) -> tuple[dict[str, tuple[list[int], list[int]]], dict[str, list[int]]]:
    """Training and held-out rows of each client, and the rows of those that are held out whole."""
    unseen = plan.held_out_clients.by_value(table.held)
    gone = {row for rows in unseen.values() for row in rows}
    left = [row for row in range(len(table.rows)) if row not in gone]
    partition = plan.partition
    if partition is None:
        partition = Partition("iid", num_clients=max(1, min(DEFAULT_CLIENTS, len(left) // 2)))
        plan.notes.append(f"partition, none was named: iid:{partition.num_clients}")
    parts = partition.divide(len(left), [table.values[row] for row in left], seed)
    clients = {name: [left[index] for index in part] for name, part in parts.items()}
    for name in plan.held_out_clients.drawn(list(clients), seed):
        unseen[name] = clients.pop(name)
    divided = divide_rows(clients, table.prompts, plan.held_out, seed)
    trained = {table.prompts[row] for rows, _ in divided.values() for row in rows}
    kept = {name: [row for row in rows if table.prompts[row] not in trained] for name, rows in unseen.items()}
    _note_held_out(plan.notes, divided, unseen, kept)
    return divided, {name: rows for name, rows in kept.items() if rows}


def _note_held_out(
    notes: list[str],
    divided: Mapping[str, tuple[list[int], list[int]]],
    unseen: Mapping[str, list[int]],
    kept: Mapping[str, list[int]],
) -> None:
    if lost := sum(len(rows) - len(kept[name]) for name, rows in unseen.items()):
        notes.append(f"{lost:,} rows of held-out clients left out: their prompts stand in training rows")
    for name, rows in kept.items():
        if not rows:
            notes.append(f"held-out client {name} has no rows left")
    without = [name for name, (_, out) in divided.items() if not out]
    if len(without) == len(divided) and not any(kept.values()):
        raise DataError(
            f"expected held-out rows, got none from {len(divided):,} clients; raise --held-out, take fewer "
            "clients or name --held-out-clients"
        )
    if without:
        names = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        notes.append(f"{len(without):,} clients without held-out rows: {names}")


def _natural_instructions(choice: DataChoice, folder: Path, seed: int) -> Division:
    given = {
        "--input": choice.input,
        "--context": choice.context,
        "--output": choice.output,
        "--label": choice.label,
        "--words": choice.words,
        "--held-out-clients": choice.held_out_clients,
    }
    if named := [flag for flag, value in given.items() if value]:
        raise DataError(f"expected no {named[0]} with a folder of Natural Instructions, whose files say it")
    if choice.partition not in ("", "by:task"):
        raise DataError(
            f"expected by:task as the partition of Natural Instructions, got {choice.partition[:80]!r}"
        )
    given_template = choice.given_template()
    template = given_template or Template.named(NATURAL_INSTRUCTIONS)
    template.check_fields((INSTRUCTION, INPUT))
    tasks = read_tasks(folder, choice.held_out, seed)
    if not tasks.unseen and not any(client.held_out for client in tasks.clients):
        raise DataError(f"expected held-out rows in {folder}, got none; raise --held-out")
    notes = tasks.notes
    if given_template is None:
        notes = (f"template, none was named: {template.name}", *notes)
    data = FederatedData("instructions", tasks.clients, tasks.unseen, template, notes=notes)
    return Division(data, "", {})
