"""Data sets that come with the package, as those of a user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.instructions import CLIENT_TASKS, Example, Task, load_instruction_tasks
from fedkseed.data.templates import INPUT, INSTRUCTION, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Clients of the built-in instruction tasks.
NUM_INSTRUCTION_CLIENTS = len(CLIENT_TASKS)


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
