"""Twenty instruction tasks from the `evals` package: sixteen clients with one task each, four tasks unseen.

The archive's rows are read where they lie (a zip member of JSON lines); nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedkseed.data import fetch
from fedkseed.data.errors import DataError
from fedkseed.documents import DocumentError, json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROMPT_TOKENS = 84
MAX_ANSWER_TOKENS = 24
NUM_TEST = 16
NUM_VALIDATION = 8
MAX_TRAIN = 88
#: Of a member of the archive; the largest that is read has 6.9 MB.
MAX_MEMBER_BYTES = 8 << 20

_ROOT = "evals/registry/data"

#: Task name -> file of its rows, in client order.
CLIENT_TASKS = {
    "compare-countries-area": "samples.jsonl",
    "partially_solved_crossword_clues": "samples.jsonl",
    "imperial_date_to_string": "samples.jsonl",
    "event_categories": "samples.jsonl",
    "food": "samples.jsonl",
    "which_is_heavier": "which_is_heavier.jsonl",
    "largest_country": "samples.jsonl",
    "last_word_nth": "samples.jsonl",
    "rectangles": "samples.jsonl",
    "regex-match": "samples.jsonl",
    "sarcasm": "samples.jsonl",
    "soc_codes": "samples.jsonl",
    "swap-words": "samples.jsonl",
    "syllables_long_words": "long_word_samples.jsonl",
    "logical_counting": "samples.jsonl",
    "missing_operators": "samples.jsonl",
}
UNSEEN_TASKS = {
    "ambiguous-sentences": "samples.jsonl",
    "anagrams": "samples.jsonl",
    "born_first": "born_first.jsonl",
    "first-letters": "samples.jsonl",
}


@dataclass(frozen=True)
class Example:
    """One question and its answer; ``input`` may be empty."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """One task's rows, split; no prompt stands in two splits."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def parse_row(row: Any, where: str) -> Example:
    """An `evals` row as an `Example`: system messages are the instruction, user messages the input, the first
    ideal answer (white space around it removed) the output.

    Raises:
        DataError: a row of another form; the message names ``where``.
    """
    try:
        messages = [(message["role"], message["content"]) for message in row["input"]]
        ideal = row["ideal"] if isinstance(row["ideal"], str) else row["ideal"][0]
        return Example(
            instruction="\n".join(content for role, content in messages if role == "system"),
            input="\n".join(content for role, content in messages if role == "user"),
            output=ideal.strip(),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f'{where}: expected {{"input": [{{"role", "content"}}, ...], "ideal": str or list of str}}, '
            f"got {str(row)[:120]!r} ({type(error).__name__}: {error})"
        ) from error


def read_rows(archive: Path, member: str) -> list[Example]:
    """All rows of one JSON-lines member of a zip archive, in file order.

    Raises:
        DataError: no such archive or member, more than `MAX_MEMBER_BYTES`, or a line that is not a row.
    """
    what = f"{archive.name}: expected a zip archive with {member}"
    rows = []
    try:
        with zipfile.ZipFile(archive) as opened, fetch.open_member(opened, member) as file:
            lines = io.BufferedReader(cast(io.RawIOBase, file))
            for number, row in json_lines(lines, member, max_bytes=MAX_MEMBER_BYTES):
                rows.append(parse_row(row, f"{member} line {number}"))
    except DataError:
        raise
    except DocumentError as error:
        where = archive.name if error.line is None else f"{member} line {error.line}"
        raise DataError(f"{where}: expected one JSON object a line; {error}") from error
    except fetch.ARCHIVE_ERRORS as error:
        raise DataError(f"{what}, got {error}") from error
    return rows


def split_rows(name: str, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Task:
    """Split a task's rows: 16 test, the next 8 validation, the next up to 88 training.

    Of rows with one prompt the first is kept; the order is that of the SHA-256 of the rows' canonical text.
    Rows over `MAX_PROMPT_TOKENS` (instruction, line feed, input; without a template) or `MAX_ANSWER_TOKENS`,
    and those with an empty answer, are left out.

    Raises:
        DataError: too few rows for one training row.
    """
    unique: dict[tuple[str, str], Example] = {}
    for row in rows:
        unique.setdefault((row.instruction, row.input), row)
    ordered = sorted(unique.values(), key=_order)
    wanted = NUM_TEST + NUM_VALIDATION + MAX_TRAIN
    kept: list[Example] = []
    for row in ordered:
        if len(kept) == wanted:
            break
        prompt = f"{row.instruction}\n{row.input}"
        if (
            _num_tokens(tokenizer, prompt) <= MAX_PROMPT_TOKENS
            and 0 < _num_tokens(tokenizer, row.output) <= MAX_ANSWER_TOKENS
        ):
            kept.append(row)
    first_train = NUM_TEST + NUM_VALIDATION
    if len(kept) <= first_train:
        raise DataError(
            f"task {name}: expected more than {first_train} rows of at most {MAX_PROMPT_TOKENS} prompt and "
            f"{MAX_ANSWER_TOKENS} answer tokens, got {len(kept)} of {len(rows)}"
        )
    return Task(
        name=name,
        train=tuple(kept[first_train:]),
        validation=tuple(kept[NUM_TEST:first_train]),
        test=tuple(kept[:NUM_TEST]),
    )


def load_tasks(
    archive: Path, files: dict[str, str], tokenizer: PreTrainedTokenizerBase, root: str = _ROOT
) -> list[Task]:
    """The tasks of ``files`` (name -> file under ``root``/name in ``archive``), in that order, split.

    Raises:
        DataError: see `read_rows` and `split_rows`.
    """
    return [
        split_rows(name, read_rows(archive, f"{root}/{name}/{file}"), tokenizer)
        for name, file in files.items()
    ]


def load_instruction_tasks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[Task], list[Task]]:
    """The sixteen client tasks and the four unseen ones; the first call fetches the pinned `evals` archive.

    Raises:
        FetchError: the archive cannot be fetched.
        DataError: its content is not what it should be.
    """
    archive = fetch.fetch(fetch.EVALS)
    return load_tasks(archive, CLIENT_TASKS, tokenizer), load_tasks(archive, UNSEEN_TASKS, tokenizer)


def _order(row: Example) -> str:
    text = json.dumps([row.instruction, row.input, row.output], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
