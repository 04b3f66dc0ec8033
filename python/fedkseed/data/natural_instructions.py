"""A folder of Natural Instructions: one client a training task, the test tasks held out whole.

Files, filter and numbers of rows are those of the paper's experiments (github.com/zhenqincn/FedKSeed at
commit ebf8216, utils_data/natural_instruction_loader); which rows are drawn is not, since the original
draws depend on NumPy's global state. Held-out rows of the training tasks are an addition: they come from the
instances that are not trained on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedkseed.data.errors import DataError
from fedkseed.data.federated import ClientRows, Row
from fedkseed.data.partition import generator
from fedkseed.data.templates import INPUT, INSTRUCTION
from fedkseed.documents import MAX_JSON_BYTES, DocumentError, read_json

#: An instance is taken if its input has fewer characters than this.
MAX_INPUT_CHARACTERS = 1024
#: A training task with fewer instances is left out; a test task keeps at least as many.
MIN_INSTANCES = 20
TRAIN_SHARE = 0.2
TEST_SHARE = 0.02

#: Bytes of a task's file; those of the release have at most 6,500 instances.
MAX_TASK_BYTES = 1 << 26

_SPLITS = ("splits", "default")
_PURPOSE = "natural instructions"  # of the draws, among others with the same seed


@dataclass(frozen=True)
class Tasks:
    """What a folder holds, drawn.

    Attributes:
        clients: one for each training task.
        unseen: one for each test task, all rows held out.
        notes: what was left out, a line each.
    """

    clients: tuple[ClientRows, ...]
    unseen: tuple[ClientRows, ...]
    notes: tuple[str, ...]


def is_natural_instructions(folder: Path) -> bool:
    """Whether a folder has the layout of Natural Instructions."""
    return all(os.path.isdir(folder / name) for name in ("tasks", "splits"))


def read_tasks(folder: Path, held_out: float, seed: int) -> Tasks:
    """Draws clients and unseen tasks of a folder.

    Args:
        folder: with ``tasks/*.json`` and ``splits/default/train_tasks.txt`` and ``test_tasks.txt``.
        held_out: held-out rows of a training task, as a share of its training rows.
        seed: of the draws; each task has draws of its own.

    Raises:
        DataError: a file is missing or of another form, or no training task is left.
    """
    counts = {"long": 0, "empty": 0, "small": 0, "twice": 0}
    clients = []
    for name in _task_names(folder, "train"):
        rows = _instances(folder, name, counts)
        if len(rows) < MIN_INSTANCES:
            counts["small"] += 1
            continue
        clients.append(_divided(name, rows, held_out, generator(seed, _PURPOSE, name)))
    if not clients:
        raise DataError(
            f"expected a training task with at least {MIN_INSTANCES} instances of under "
            f"{MAX_INPUT_CHARACTERS} characters in {folder}, got none"
        )
    trained = {_prompt(row) for client in clients for row in client.train}
    unseen = []
    for name in _task_names(folder, "test"):
        drawn = _drawn_test_rows(_instances(folder, name, counts), generator(seed, _PURPOSE, name))
        kept = tuple(row for row in drawn if _prompt(row) not in trained)
        counts["twice"] += len(drawn) - len(kept)
        if kept:
            unseen.append(ClientRows(name, (), kept))
    meanings = {
        "long": f"instances of {MAX_INPUT_CHARACTERS} characters or more left out",
        "empty": "instances without an answer left out",
        "small": f"training tasks of under {MIN_INSTANCES} instances left out",
        "twice": "rows of test tasks left out: their prompts stand in training rows",
    }
    notes = tuple(f"{counts[name]:,} {meaning}" for name, meaning in meanings.items() if counts[name])
    return Tasks(tuple(clients), tuple(unseen), notes)


def _divided(name: str, rows: Sequence[Row], held_out: float, generator: np.random.Generator) -> ClientRows:
    order = generator.permutation(len(rows)).tolist()
    num_train = int(TRAIN_SHARE * len(rows))
    train = [rows[index] for index in order[:num_train]]
    trained = {_prompt(row) for row in train}
    others = [rows[index] for index in order[num_train:] if _prompt(rows[index]) not in trained]
    num_held_out = max(1, round(held_out * num_train)) if held_out else 0
    return ClientRows(name, tuple(train), tuple(others[:num_held_out]))


def _drawn_test_rows(rows: Sequence[Row], generator: np.random.Generator) -> Sequence[Row]:
    if len(rows) <= MIN_INSTANCES:
        return rows
    number = max(MIN_INSTANCES, int(TEST_SHARE * len(rows)))
    return [rows[index] for index in generator.permutation(len(rows))[:number].tolist()]


def _prompt(row: Row) -> tuple[str, str]:
    return row.fields[INSTRUCTION], row.fields[INPUT]


def _task_names(folder: Path, split: str) -> list[str]:
    path = folder.joinpath(*_SPLITS, f"{split}_tasks.txt")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        names = [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected a list of tasks, one a line, at {path}, got: {error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"expected a list of at most {MAX_JSON_BYTES:,} bytes at {path}, got more")
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise DataError(f"expected names of tasks in {path}, got {name[:80]!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"expected each task once in {path}, got {twice[:80]!r} twice")
    return names


def _instances(folder: Path, name: str, counts: dict[str, int]) -> list[Row]:
    """The rows of a task that may be drawn."""
    path = folder / "tasks" / f"{name}.json"
    try:
        # Not the bound alone: a read of so many bytes takes the memory before it sees how few there are.
        task = read_json(path, max_bytes=min(MAX_TASK_BYTES, path.stat().st_size))
    except (DocumentError, OSError) as error:
        raise DataError(f"expected a task's file, got: {error}") from error
    definition = _first_text(task, "Definition", str(path))
    instances = task.get("Instances")
    if not isinstance(instances, list):
        raise DataError(f'expected "Instances" as a list in {path}, got {str(instances)[:80]!r}')
    rows = []
    for number, instance in enumerate(instances, 1):
        where = f"instance {number} of {path}"
        output = _first_text(instance, "output", where)
        text = instance.get("input")
        if not isinstance(text, str):
            raise DataError(f'expected "input" as text in {where}, got {str(text)[:80]!r}')
        if len(text) >= MAX_INPUT_CHARACTERS:
            counts["long"] += 1
        elif not output.strip():
            counts["empty"] += 1
        else:
            rows.append(Row({INSTRUCTION: definition, INPUT: text}, output))
    return rows


def _first_text(value: Any, key: str, where: str) -> str:
    texts = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise DataError(
            f'expected "{key}" as a list that begins with a text in {where}, got {str(texts)[:80]!r}'
        )
    return texts[0]
