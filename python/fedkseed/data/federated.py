"""Rows of a federation, whatever file they came from: who holds which, and how a row becomes a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedkseed.data.templates import Template

#: "instructions": the loss is that of the response's tokens. "classification": of one label among the labels.
Kind = Literal["instructions", "classification"]


@dataclass(frozen=True)
class Row:
    """One question and its answer.

    Attributes:
        fields: texts by the names that the template has as placeholders.
        response: what the model is to answer; for a classification the row's label.
    """

    fields: Mapping[str, str]
    response: str


@dataclass(frozen=True)
class ClientRows:
    """One client's rows; no row of any client's ``train`` stands in any ``held_out``.

    Attributes:
        name: for tables and plots.
        train: rows of its local steps.
        held_out: rows that nobody trains on.
    """

    name: str
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


@dataclass(frozen=True)
class FederatedData:
    """A data set, divided among clients.

    Attributes:
        kind: how a row is scored.
        clients: those that train, at least one row each.
        unseen: held out whole; their rows stand in ``held_out``.
        template: makes prompts of the rows' fields.
        labels: of a classification, sorted; else empty.
        words: of a classification over words, the text that answers each label; empty with a classifier head.
        notes: what was dropped or is empty, a line each, ready to be printed.
    """

    kind: Kind
    clients: tuple[ClientRows, ...]
    unseen: tuple[ClientRows, ...]
    template: Template
    labels: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
