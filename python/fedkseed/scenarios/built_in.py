"""The data of a run: sets that come with the package, and those of a user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedkseed.data.errors import DataError
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.instructions import CLIENT_TASKS, Example, Task, load_instruction_tasks
from fedkseed.data.labels import HEAD, check_template, parse_words
from fedkseed.data.own import DataChoice, load_own
from fedkseed.data.sentiment import load_sentiment
from fedkseed.data.templates import INPUT, INSTRUCTION, PLAIN, Template
from fedkseed.scenarios.options import SettingsError
from fedkseed.scenarios.presets import BUILT_IN, DEFAULT_DATA, SENTIMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: What may be said of a set that comes with the package, beside its name.
_ASKED: Mapping[str, tuple[str, ...]] = {
    DEFAULT_DATA: ("data", "template"),
    SENTIMENT: ("data", "template", "template_file", "words", "classify"),
}


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
    defaults = {entry.name: entry.default for entry in dataclasses.fields(DataChoice)}
    others = [name for name, value in chosen.items() if name not in _ASKED[data] and value != defaults[name]]
    if others:
        raise SettingsError(
            f"expected the built-in data {data!r} without settings of other data, got {', '.join(others)}; "
            "name your own with --data"
        )
    return _asked(load_sentiment(), DataChoice(**chosen)) if data == SENTIMENT else None


def _asked(data: FederatedData, choice: DataChoice) -> FederatedData:
    """Sentences that are asked and answered as the choice says, by default as they come."""
    template, words = choice.given_template(), parse_words(choice.words) if choice.words else {}
    if choice.classify == HEAD:
        asked = "".join(f"{{{name}}}" for name in data.template.placeholders())
        data = dataclasses.replace(data, template=Template.custom(asked), words=())
    elif words:
        if words.keys() != set(data.labels):
            raise DataError(
                f"expected --words of the labels {', '.join(data.labels)}, got {', '.join(words)[:80]}"
            )
        data = dataclasses.replace(data, words=tuple(words[label] for label in data.labels))
    if template is not None:
        template.check_fields(data.clients[0].train[0].fields)
        data = dataclasses.replace(data, template=template)
    check_template(data.template, dict(zip(data.labels, data.words, strict=False)))
    return data


def num_clients(data: FederatedData | None) -> int:
    """How many clients train on what `load_data` gave."""
    return len(CLIENT_TASKS) if data is None else len(data.clients)


def instruction_tasks(tokenizer: PreTrainedTokenizerBase, choice: DataChoice) -> FederatedData:
    """Twenty tasks: sixteen clients with one each, four unseen. Their lengths are counted in tokens.

    Raises:
        FetchError: the archive cannot be fetched.
        DataError: its content is not what it should be, or no template or one of other fields.
    """
    template = choice.given_template() or Template.named(PLAIN)
    template.check_fields((INSTRUCTION, INPUT))
    tasks, unseen = load_instruction_tasks(tokenizer)
    return FederatedData(
        kind="instructions",
        clients=tuple(_client(task) for task in tasks),
        unseen=tuple(_client(task) for task in unseen),
        template=template,
    )


def _client(task: Task) -> ClientRows:
    return ClientRows(task.name, tuple(map(_row, task.train)), tuple(map(_row, task.test)))


def _row(example: Example) -> Row:
    return Row({INSTRUCTION: example.instruction, INPUT: example.input}, example.output)
