"""A choice of data resolved against the fields of its source: fields, template, partition, words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedkseed.data.columns import Columns, Schema, find_columns
from fedkseed.data.errors import DataError
from fedkseed.data.held_out import HeldOutClients
from fedkseed.data.labels import WORDS, check_template, parse_words, words_of
from fedkseed.data.partition import Partition
from fedkseed.data.sources import Source
from fedkseed.data.templates import ALPACA, CUSTOM, INPUT, INSTRUCTION, Template

if TYPE_CHECKING:
    from fedkseed.data.own import DataChoice


class Plan:
    """What is read, asked and divided; every field that it names is one of the source.

    Attributes:
        notes: what was guessed or taken by default, a line each.
        columns: fields by what they are for.
        template: makes the prompts.
        asked: the source's field of each placeholder.
        partition: the named one, or that of a known schema; None: even parts, once the rows are counted.
        held_out: share of each client's rows.
        held_out_clients: those held out whole.
        words: of --words, by label; None if there are none.
        grouped_by: field by which rows are shown; or empty.

    Raises:
        DataError: the choice does not fit the source.
    """

    def __init__(self, choice: DataChoice, source: Source) -> None:
        self.notes: list[str] = []
        fields = source.fields
        template = choice.given_template()
        given = Columns(choice.input, choice.context, choice.output, choice.label)
        names_fields = template is not None and template.name == CUSTOM
        self.columns, schema = find_columns(given, fields, needs_input=not names_fields)
        if schema is not None:
            self.notes.append(f"fields, guessed ({schema.name}): {self.columns.described()}")
        self.template = template or self._default_template(choice, schema)
        self.asked = self._asked(fields)
        self.partition = self._partition(choice, fields, schema)
        self.held_out = choice.held_out
        self.held_out_clients = HeldOutClients.parse(choice.held_out_clients)
        self.held_out_clients.check(fields)
        self.words = parse_words(choice.words) if choice.words else None
        if self.words is not None and not self.columns.label:
            raise DataError("expected --words with --label alone, got instructions")
        self.speaks = bool(self.columns.label) and choice.classify == WORDS
        self.grouped_by = self.columns.label or (self.partition.field if self.partition is not None else "")

    def _default_template(self, choice: DataChoice, schema: Schema | None) -> Template:
        if not self.columns.label:
            name = schema.template if schema is not None and schema.template else ALPACA
            self.notes.append(f"template, none was named: {name}")
            return Template.named(name)
        asked = "\n".join(f"{{{name}}}" for name in (self.columns.context, self.columns.input) if name)
        template = Template.custom(asked + ("\nLabel:" if choice.classify == WORDS else ""))
        self.notes.append(f"template, none was named: {template.text!r}")
        return template

    def _asked(self, fields: Sequence[str]) -> dict[str, str]:
        """The source's field of each placeholder."""
        if self.template.name == CUSTOM:
            self.template.check_fields(fields)
            asked = {name: name for name in self.template.placeholders()}
        else:
            asked = {INSTRUCTION: self.columns.input, INPUT: self.columns.context}
        for role in ("input", "context"):
            name = getattr(self.columns, role)
            if name and name not in asked.values():
                raise DataError(
                    f"expected --{role} as a placeholder of the template, got {name!r}, which is none"
                )
        if self.columns.response in asked.values():
            raise DataError(
                f"expected prompts without their answers, got the field {self.columns.response} as both; "
                "name another one"
            )
        return {placeholder: name for placeholder, name in asked.items() if name}

    def _partition(
        self, choice: DataChoice, fields: Sequence[str], schema: Schema | None
    ) -> Partition | None:
        if choice.partition:
            partition = Partition.parse(choice.partition)
            partition.check_field(fields)
            return partition
        if schema is not None and schema.category in fields:
            self.notes.append(f"partition, none was named: by:{schema.category}")
            return Partition("by", schema.category)
        return None

    def fields(self) -> list[str]:
        """All that has to be read."""
        named = (
            *self.asked.values(),
            self.columns.response,
            self.grouped_by,
            self.partition.field if self.partition is not None else "",
            self.held_out_clients.field,
        )
        return [name for name in dict.fromkeys(named) if name]

    def words_by_label(self, labels: Sequence[str]) -> dict[str, str]:
        """What answers each label; empty with a head, or for instructions."""
        if not self.speaks:
            return {}
        words = self.words or words_of(labels)
        check_template(self.template, words)
        return {label: words[label] for label in labels}
