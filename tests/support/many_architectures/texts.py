"""What models of text read, and the options that many of their configurations share."""

from __future__ import annotations

from typing import Any

import torch

from support.many_architectures.rows import integers

VOCABULARY = 61
_NUM_ROWS, _NUM_TOKENS, _NUM_TARGETS = 3, 8, 5
_IGNORED = -100


def ids() -> dict[str, torch.Tensor]:
    """Three rows of ids above those that are special in some family; the second row ends in padding."""
    inputs = {
        "input_ids": integers(5, VOCABULARY, (_NUM_ROWS, _NUM_TOKENS), seed=12),
        "attention_mask": torch.ones(_NUM_ROWS, _NUM_TOKENS, dtype=torch.int64),
    }
    inputs["attention_mask"][1, -2:] = 0
    return inputs


def tokens() -> dict[str, torch.Tensor]:
    """Ids with themselves as labels, but for padding."""
    inputs = ids()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, _IGNORED)}


def unpadded() -> dict[str, torch.Tensor]:
    """Inputs of models that take no mask, or that give NaN with one in fp64."""
    words = ids()["input_ids"]
    return {"input_ids": words, "labels": words}


def classes() -> dict[str, torch.Tensor]:
    return {**ids(), "labels": torch.tensor([0, 1, 1])}


def sequences() -> dict[str, torch.Tensor]:
    """Ids with a shorter text as labels, one row of it padded."""
    inputs = ids()
    labels = inputs["input_ids"].flip(0)[:, :_NUM_TARGETS].clone()
    labels[1, 3:] = _IGNORED
    return {**inputs, "labels": labels}


PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE: dict[str, Any] = {**PLAIN, "intermediate_size": 24, "max_position_embeddings": 32}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
