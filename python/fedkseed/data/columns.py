"""Columns of a user's data: which field is asked, which is answered, and what a value must be."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from fedkseed.data.errors import DataError, choose_from
from fedkseed.data.sources import MAX_ROW_BYTES, Record
from fedkseed.data.templates import ALPACA, DOLLY


@dataclass(frozen=True)
class Columns:
    """Names of fields by what they are for; empty where there is none.

    Attributes:
        input: what is asked.
        context: what stands beside it; its texts may be empty.
        output: the response of an instruction.
        label: of a classification.
    """

    input: str = ""
    context: str = ""
    output: str = ""
    label: str = ""

    @property
    def response(self) -> str:
        """The field of the answer."""
        return self.label or self.output

    def named(self) -> dict[str, str]:
        """Those that have a name."""
        return {role: name for role, name in vars(self).items() if name}

    def described(self) -> str:
        """Roles and names, for a note."""
        return ", ".join(f"{role} {name}" for role, name in self.named().items())


@dataclass(frozen=True)
class Schema:
    """Fields that many data sets have.

    Attributes:
        name: for notes.
        columns: what they are for.
        template: the one of the package that suits them; empty for the default.
        category: a field that makes sensible clients, if it is there.
    """

    name: str
    columns: Columns
    template: str = ""
    category: str = ""


#: Characters of a label, or of another value that rows are told apart by.
MAX_LABEL_CHARACTERS = 200

#: The first one that fits counts.
SCHEMAS = (
    Schema("Dolly", Columns("instruction", "context", "response"), DOLLY, "category"),
    Schema("Alpaca", Columns("instruction", "input", "output"), ALPACA),
    Schema("prompt and completion", Columns("prompt", output="completion")),
    Schema("text and label", Columns("text", label="label")),
    Schema("sentence and label", Columns("sentence", label="label")),
)


def find_columns(given: Columns, fields: Collection[str], needs_input: bool) -> tuple[Columns, Schema | None]:
    """The columns that a user names, the others out of the first known schema that fits; and that schema.

    Args:
        given: what the user names.
        fields: of the source.
        needs_input: whether the prompt takes the input's field (not with a template that names its own).

    Raises:
        DataError: a named field that is not there, or one that is missing and cannot be guessed.
    """
    for role, name in given.named().items():
        if name not in fields:
            raise DataError(f"--{role}: {choose_from('a field', name, fields)}")
    if given.label and given.output:
        raise DataError("expected either --label (a classification) or --output (instructions), got both")
    if given.response and (given.input or not needs_input):
        return given, None
    for schema in SCHEMAS:
        kind = "label" if schema.columns.label else "output"
        if given.response and not getattr(given, kind):
            continue
        columns = replace(schema.columns, **given.named())
        if not needs_input:
            columns = replace(columns, input=given.input, context=given.context)
        if all(name in fields for name in columns.named().values()):
            return columns, schema
    raise DataError(
        f"expected --input and either --output or --label to name fields, got the fields "
        f"{', '.join(list(fields)[:20])}, which are of no schema that is known "
        f"({'; '.join(schema.columns.described() for schema in SCHEMAS)})"
    )


def text_of(record: Record, field: str) -> str:
    """The text in a field.

    Raises:
        DataError: none, null, NaN, another type, or too long a text.
    """
    value = _value(record, field)
    if not isinstance(value, str):
        raise DataError(
            f"expected text in the field {field}, got {str(value)[:80]} ({type(value).__name__}) in "
            f"{record.where}"
        )
    return _bounded(value, record, field)


def label_of(record: Record, field: str) -> str:
    """The text of a label or of another value that rows are told apart by: text without white space around
    it, a number or a boolean.

    Raises:
        DataError: none, null, NaN, another type, or over `MAX_LABEL_CHARACTERS`.
    """
    value = _value(record, field)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(
            f"expected a text, number or boolean in the field {field}, got {str(value)[:80]} "
            f"({type(value).__name__}) in {record.where}"
        )
    label = value.strip()
    if len(label) > MAX_LABEL_CHARACTERS:
        raise DataError(
            f"expected at most {MAX_LABEL_CHARACTERS} characters in the field {field}, which tells rows "
            f"apart, got {len(label):,} in {record.where}"
        )
    return _bounded(label, record, field)


def _value(record: Record, field: str) -> Any:
    if field not in record.values:
        raise DataError(f"expected the field {field} in every row, got none in {record.where}")
    value = record.values[field]
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        got = "null" if value is None else str(value)
        raise DataError(
            f"expected a value in the field {field}, got {got} in {record.where}; write an empty text or "
            "leave the row out"
        )
    return value


def _bounded(text: str, record: Record, field: str) -> str:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(
            f"expected text in the field {field}, got a lone surrogate in {record.where}"
        ) from error
    if size > MAX_ROW_BYTES:
        raise DataError(
            f"expected texts of at most {MAX_ROW_BYTES:,} bytes, got more in the field {field} of "
            f"{record.where}"
        )
    return text
