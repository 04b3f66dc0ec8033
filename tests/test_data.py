"""Instruction tasks, prompts and batches, and the real model and tasks."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.data_samples import make_tokenizer, make_wheel

from fedkseed.data import instructions, prompts
from fedkseed.data import models as data_models
from fedkseed.data.instructions import DataError, Example

# Instruction tasks


def row(number: int, answer: str = "yes", text: str = "question") -> dict[str, Any]:
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": f"{text} {number}"}]
    return {"input": messages, "ideal": answer}


def wheel_of(index: Path, rows: list[dict[str, Any]]) -> Path:
    content = "\n".join(json.dumps(entry) for entry in rows).encode()
    return index / make_wheel(index, content=content).filename


def prompts_of(task: instructions.Task) -> set[tuple[str, str]]:
    """The different prompts of all splits."""
    return {(entry.instruction, entry.input) for entry in (*task.train, *task.validation, *task.test)}


def test_split_sizes_and_disjointness(index: Path) -> None:
    duplicates = [row(number, "no") for number in range(40)]
    too_long = [row(900, text="q" * 80), row(901, "a" * 25), row(902, "")]
    archive = wheel_of(index, [row(number) for number in range(200)] + duplicates + too_long)
    task = instructions.split_rows(
        "tiny", instructions.read_rows(archive, "tinydata/rows.jsonl"), make_tokenizer()
    )
    assert (len(task.test), len(task.validation), len(task.train)) == (16, 8, 88)
    assert len(prompts_of(task)) == 112
    assert all(entry.output == "yes" for entry in (*task.test, *task.validation, *task.train))


def test_split_ignores_file_order(index: Path) -> None:
    rows = [instructions.parse_row(row(number), "row") for number in range(50)]
    tokenizer = make_tokenizer()
    task = instructions.split_rows("tiny", rows, tokenizer)
    assert task == instructions.split_rows("tiny", rows[::-1], tokenizer)
    assert len(task.train) == 50 - 24
    texts = [f'["Answer.","question {number}","yes"]' for number in range(50)]
    order = sorted(range(50), key=lambda number: hashlib.sha256(texts[number].encode()).digest())
    assert [entry.input for entry in task.test] == [f"question {number}" for number in order[:16]]


def test_too_few_rows() -> None:
    rows = [instructions.parse_row(row(number), "row") for number in range(24)]
    with pytest.raises(DataError, match="task tiny: expected more than 24 rows .* got 24 of 24"):
        instructions.split_rows("tiny", rows, make_tokenizer())


def test_load_tasks(tmp_path: Path) -> None:
    archive = tmp_path / "rows.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("b", "a"):
            file.writestr(
                f"root/{name}/{name}.jsonl", "\n".join(json.dumps(row(n, name)) for n in range(30)) + "\n\n"
            )
    tasks = instructions.load_tasks(archive, {"b": "b.jsonl", "a": "a.jsonl"}, make_tokenizer(), root="root")
    assert [(task.name, task.test[0].output) for task in tasks] == [("b", "b"), ("a", "a")]


def test_parse_row() -> None:
    messages = [
        {"role": "system", "content": "One."},
        {"role": "system", "content": "Two."},
        {"role": "user", "content": "x"},
    ]
    assert instructions.parse_row({"input": messages, "ideal": [" a ", "b"]}, "here") == Example(
        "One.\nTwo.", "x", "a"
    )
    for bad in (
        {},
        {"input": "text", "ideal": "a"},
        {"input": [], "ideal": []},
        {"input": [], "ideal": 3},
        [],
        None,
    ):
        with pytest.raises(DataError, match="^here: expected "):
            instructions.parse_row(bad, "here")


def test_read_rows_errors(index: Path, tmp_path: Path) -> None:
    artifact = make_wheel(index, content=json.dumps(row(0)).encode() + b"\n{broken\n")
    with pytest.raises(DataError, match="tinydata/rows.jsonl line 2: expected one JSON object a line"):
        instructions.read_rows(index / artifact.filename, "tinydata/rows.jsonl")
    with pytest.raises(DataError, match="expected a zip archive with absent"):
        instructions.read_rows(index / artifact.filename, "absent")
    with pytest.raises(DataError, match="expected a zip archive"):
        instructions.read_rows(tmp_path / "absent.whl", "x")


def test_sixteen_clients_four_unseen() -> None:
    assert len(instructions.CLIENT_TASKS) == 16
    assert len(instructions.UNSEEN_TASKS) == 4
    assert not set(instructions.CLIENT_TASKS) & set(instructions.UNSEEN_TASKS)


# Prompts and batches


@pytest.mark.parametrize("style", get_args(prompts.PromptStyle))
@pytest.mark.parametrize("text", ["", "in"])
def test_labels_cover_the_response_only(style: prompts.PromptStyle, text: str) -> None:
    tokenizer = make_tokenizer()
    example = Example("do it", text, "out")
    encoded = prompts.encode_example(tokenizer, example, style)
    batch = prompts.collate([encoded, prompts.Encoded((5, 6), 1)], pad_id=2)
    labelled = batch.labels[0] != prompts.IGNORED
    assert tokenizer.decode(batch.labels[0][labelled]).replace(" ", "") == "out</s>"
    assert labelled.nonzero().flatten().tolist() == list(range(encoded.num_prompt, len(encoded.input_ids)))
    prompt = tokenizer.decode(batch.input_ids[0][: encoded.num_prompt]).replace(" ", "")
    assert "doit" in prompt
    assert ("in" in prompt.replace("instruction", "").replace("Instruction", "")) or not text
    assert encoded.input_ids[: encoded.num_prompt] == tuple(prompts.encode_prompt(tokenizer, example, style))
    assert batch.labels[1].tolist() == [prompts.IGNORED, 6] + [prompts.IGNORED] * (len(encoded.input_ids) - 2)
    assert batch.attention_mask.sum(1).tolist() == [len(encoded.input_ids), 2]
    assert batch.input_ids[1, 2:].eq(2).all()
    assert all(
        tensor.dtype == torch.int64 for tensor in (batch.input_ids, batch.attention_mask, batch.labels)
    )


def test_long_prompt_loses_its_beginning() -> None:
    tokenizer = make_tokenizer()
    example = Example("instruction", "text", "out")
    whole = prompts.encode_example(tokenizer, example)
    cut = prompts.encode_example(tokenizer, example, max_length=10)
    assert cut.input_ids == whole.input_ids[-10:]
    assert cut.num_prompt == 6
    with pytest.raises(ValueError, match="response of at most 2 tokens .*, got 3"):
        prompts.encode_example(tokenizer, example, max_length=4)


def test_prompt_errors() -> None:
    with pytest.raises(ValueError, match=r"out of \['chat', 'alpaca', 'plain'\], got 'other'"):
        prompts.format_prompt(make_tokenizer(), "a", "b", "other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        prompts.format_prompt(make_tokenizer(None), "a", "b", "chat")


def test_batches() -> None:
    rows = [prompts.Encoded(tuple(range(3, 3 + length)), 1) for length in (5, 2, 4, 2, 3)]
    batches = list(prompts.iterate_batches(rows, 2, pad_id=0))
    assert [batch.attention_mask.sum(1).tolist() for batch in batches] == [[2, 2], [3, 4], [5]]
    assert [batch.input_ids.shape[1] for batch in batches] == [2, 4, 5]
    twice = prompts.batch_at(rows, [4, 4], pad_id=0)
    assert torch.equal(twice.input_ids[0], twice.input_ids[1])
    state = torch.get_rng_state()
    prompts.batch_at(rows, [0, 1], pad_id=0)
    assert torch.equal(state, torch.get_rng_state())
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=rf"expected row indices in \[0, 5\), got {wrong}"):
            prompts.batch_at(rows, [0, wrong], pad_id=0)
    with pytest.raises(ValueError, match="at least one example"):
        prompts.collate([], pad_id=0)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        next(prompts.iterate_batches(rows, 0, pad_id=0))


# The real artifacts


@pytest.mark.model
def test_real_model_and_tasks() -> None:
    model, tokenizer = data_models.load_smollm2()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    clients, unseen = instructions.load_instruction_tasks(tokenizer)
    assert [task.name for task in clients] == list(instructions.CLIENT_TASKS)
    assert [task.name for task in unseen] == list(instructions.UNSEEN_TASKS)
    assert all((len(task.test), len(task.validation)) == (16, 8) for task in (*clients, *unseen))
    assert sum(len(task.train) + len(task.validation) for task in clients) == 1477
    for task in clients:
        assert len(prompts_of(task)) == len(task.train) + len(task.validation) + len(task.test)
