"""Twelve architectures of transformers with a few thousand random weights, and a batch with labels each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 61
_NUM_ROWS, _NUM_TOKENS, _NUM_TARGETS = 3, 7, 5
_IGNORED = -100
# Ids below are special in one family or another.
_FIRST_TOKEN = 5


def _causal(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, _IGNORED)


def _masked(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every second token is to be found again behind a mask token (id 4)."""
    labels = inputs["input_ids"].clone()
    labels[:, ::2] = _IGNORED
    inputs["input_ids"][:, 1::2] = 4
    return labels.masked_fill(inputs["attention_mask"] == 0, _IGNORED)


def _sequence_to_sequence(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = inputs["input_ids"].flip(0)[:, :_NUM_TARGETS].clone()
    labels[1, 3:] = _IGNORED
    return labels


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        name: of the classes in transformers: name + "Config" and name + head.
        second_block: the path of a block behind another.
        labels: makes the labels, and may change the inputs.
        options: of the configuration.
    """

    name: str
    head: str
    second_block: str
    labels: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    options: dict[str, Any]

    def make_model(self, dtype: torch.dtype) -> Any:
        """A model in eval mode, the same weights each time; none (no bias, no norm's scale) is 0 or 1."""
        config = getattr(transformers, f"{self.name}Config")(vocab_size=VOCABULARY, **self.options)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            model = getattr(transformers, self.name + self.head)(config).double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.to(dtype).eval()

    def make_batch(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(12)
        shape = (_NUM_ROWS, _NUM_TOKENS)
        inputs = {
            "input_ids": torch.randint(_FIRST_TOKEN, VOCABULARY, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
        }
        inputs["attention_mask"][1, -2:] = 0
        return {**inputs, "labels": self.labels(inputs)}

    def block(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.second_block)


_DECODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 1, "head_dim": 8}
_BLOCKS = "model.layers.1"

ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture(
            "GPT2",
            "LMHeadModel",
            "transformer.h.1",
            _causal,
            {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        ),
        Architecture(
            "OPT",
            "ForCausalLM",
            "model.decoder.layers.1",
            _causal,
            {
                "hidden_size": 16,
                "word_embed_proj_dim": 16,
                "ffn_dim": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 16,
            },
        ),
        Architecture("Llama", "ForCausalLM", _BLOCKS, _causal, {**_GROUPED, "tie_word_embeddings": False}),
        Architecture("Qwen3", "ForCausalLM", _BLOCKS, _causal, {**_GROUPED, "tie_word_embeddings": True}),
        Architecture("Gemma", "ForCausalLM", _BLOCKS, _causal, _GROUPED),
        Architecture("Phi", "ForCausalLM", _BLOCKS, _causal, {**_DECODER, "num_key_value_heads": 2}),
        Architecture("Mistral", "ForCausalLM", _BLOCKS, _causal, {**_GROUPED, "sliding_window": 4}),
        Architecture("Bert", "ForMaskedLM", "bert.encoder.layer.1", _masked, _DECODER),
        Architecture(
            "Roberta",
            "ForMaskedLM",
            "roberta.encoder.layer.1",
            _masked,
            {**_DECODER, "max_position_embeddings": 20},
        ),
        Architecture(
            "T5",
            "ForConditionalGeneration",
            "decoder.block.1",
            _sequence_to_sequence,
            {
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 2,
                "num_heads": 2,
                "relative_attention_num_buckets": 8,
                "decoder_start_token_id": 0,
            },
        ),
        Architecture(
            "Bart",
            "ForConditionalGeneration",
            "model.decoder.layers.1",
            _sequence_to_sequence,
            {
                "d_model": 16,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24,
                "max_position_embeddings": 16,
            },
        ),
        Architecture(
            "Mamba",
            "ForCausalLM",
            "backbone.layers.1",
            _causal,
            {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3},
        ),
    )
}
