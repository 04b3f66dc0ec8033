"""A language model of a few thousand random weights for the tokenizer of `data_samples`, and tasks."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedkseed.data import Example, Task


def make_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_task(name: str) -> Task:
    rows = [Example(f"Say the {name} word.", f"case {i}", f"{name} {i % 2}") for i in range(9)]
    return Task(name, train=tuple(rows[:5]), validation=tuple(rows[5:6]), test=tuple(rows[6:]))
