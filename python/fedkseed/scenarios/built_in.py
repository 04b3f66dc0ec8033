"""The data of a run: sets that come with the package, and those of a user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.instructions import CLIENT_TASKS, Example, Task, load_instruction_tasks
from fedkseed.data.own import DataChoice, load_own
from fedkseed.data.sentiment import load_sentiment
from fedkseed.data.templates import INPUT, INSTRUCTION, Template
from fedkseed.scenarios.options import SettingsError
from fedkseed.scenarios.presets import BUILT_IN, DEFAULT_DATA, SENTIMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_data(values: Mapping[str, Any], seed: int) -> FederatedData | None:
    """The rows of a run; None for the built-in instruction tasks, which are chosen by their tokens.

    Args:
        values: the settings of a run by name, those that were given.
        seed: of partitions.

    Raises:
        SettingsError: settings of data of one's own beside a set that comes with the package.
        DataError, FetchError, MissingExtraError: the rows cannot be had.
    """
    chosen = {
        entry.name: values[entry.name] for entry in dataclasses.fields(DataChoice) if entry.name in values
    }
    data = chosen.setdefault("data", DEFAULT_DATA)
    if data not in BUILT_IN:
        return load_own(DataChoice(**chosen), seed)
    taken = ("data", "template") if data == DEFAULT_DATA else ("data",)
    defaults = {entry.name: entry.default for entry in dataclasses.fields(DataChoice)}
    others = [name for name, value in chosen.items() if name not in taken and value != defaults[name]]
    if others:
        raise SettingsError(
            f"expected the built-in data {data!r} without settings of other data, got {', '.join(others)}; "
            "name your own with --data"
        )
    return load_sentiment() if data == SENTIMENT else None


def num_clients(data: FederatedData | None) -> int:
    """How many clients train on what `load_data` gave."""
    return len(CLIENT_TASKS) if data is None else len(data.clients)


def instruction_tasks(tokenizer: PreTrainedTokenizerBase, template: str) -> FederatedData:
    """Twenty tasks: sixteen clients with one each, four unseen. Their lengths are counted in tokens.

    Raises:
        FetchError: the archive cannot be fetched.
        DataError: its content is not what it should be, or an unknown template.
    """
    tasks, unseen = load_instruction_tasks(tokenizer)
    return FederatedData(
        kind="instructions",
        clients=tuple(_client(task) for task in tasks),
        unseen=tuple(_client(task) for task in unseen),
        template=Template.named(template),
    )


def _client(task: Task) -> ClientRows:
    return ClientRows(task.name, tuple(map(_row, task.train)), tuple(map(_row, task.test)))


def _row(example: Example) -> Row:
    return Row({INSTRUCTION: example.instruction, INPUT: example.input}, example.output)
