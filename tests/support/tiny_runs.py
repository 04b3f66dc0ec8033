"""Runs of a second: a language model of random weights in a folder, rows in known schemas."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedkseed.scenarios import instructions
from support.word_tokenizer import make_word_tokenizer

#: Settings that make it so.
SHORT = {"num_rounds": 2, "num_local_steps": 2, "num_seeds": 16, "num_threads": 1}
#: Those of Dolly-15K, sorted.
CATEGORIES = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
)
_VOCABULARY = 160


def write_llama(
    folder: Path, num_layers: int = 1, dtype: torch.dtype = torch.float32, words: Iterable[str] = ()
) -> None:
    """A Llama with a tokenizer of characters and of words, with the space before them."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    make_word_tokenizer(words, _VOCABULARY).save_pretrained(folder)


def dolly_rows(number: int, categories: Sequence[str] = CATEGORIES) -> list[dict[str, str]]:
    """Rows in Dolly's schema, no two alike, every third without a context."""
    return [
        {
            "instruction": f"What is {row}?",
            "context": f"It is {row % 7}." if row % 3 else "",
            "response": f"a number, {row % 7}",
            "category": categories[row % len(categories)],
        }
        for row in range(number)
    ]


def write_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_natural_instructions(folder: Path, train: Mapping[str, int], test: Mapping[str, int]) -> None:
    """A folder in the layout of Natural Instructions: so many instances of each task, no two alike."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for split, tasks in (("train", train), ("test", test)):
        names = "".join(f"{name}\n" for name in tasks)
        (folder / "splits" / "default" / f"{split}_tasks.txt").write_text(names)
        for name, number in tasks.items():
            instances = [
                {"id": f"{name}-{row}", "input": f"case {row} of {name}", "output": [str(row % 4)]}
                for row in range(number)
            ]
            task = {"Definition": [f"Count as in {name}."], "Instances": instances}
            (folder / "tasks" / f"{name}.json").write_text(json.dumps(task))


def leave_out_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves more than half of such a run."""
    monkeypatch.setattr(instructions, "draw_rounds", lambda *_: None)
