"""What the benchmarks of whole steps run on: a model, and rows of text for it.

Shapes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.models import bare
from fedkseed._extras import require_extra
from fedkseed.data import load_instruction_tasks, load_smollm2
from fedkseed.model.manifest import manifest_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The pretrained model of the demo on its instruction text; random models and the bare one on random tokens.
MODELS = ("smollm2", "random-1b", "random-tiny", "bare", "bare-tiny")
#: Rows of a block's weight and vocabulary of `bare.BareModel`.
_BARE = {"bare": (bare.NUM_ROWS, bare.VOCABULARY), "bare-tiny": (2, 16)}

#: Randomly initialised Llama models, head tied. 1b: 1,235,814,400 parameters, the sizes of Llama 3.2 1B.
_RANDOM: dict[str, dict[str, Any]] = {
    "random-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
    "random-tiny": {
        "vocab_size": 120,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    },
}
_SEED = 11


@dataclass(frozen=True)
class Workload:
    """A causal language model in evaluation mode, and int64 rows [number of rows, T] on its device."""

    model: Any
    train: torch.Tensor
    held_out: torch.Tensor


def load(
    name: str,
    dtype: torch.dtype,
    *,
    num_rows: int,
    num_tokens: int,
    num_held_out: int = 0,
    device: str = "cpu",
) -> Workload:
    """A model of `MODELS` with weights in dtype, ``num_rows`` training rows and ``num_held_out`` others.

    Rows of "smollm2" are running text of the instruction tasks' training and test rows, cut every
    ``num_tokens`` tokens. Random models get the same values and tokens for the same dtype and device.

    Raises:
        ValueError: an unknown name, or more rows than there is text for.
        FetchError, ModelError, DataError: the pretrained model or the text cannot be had.
    """
    if name not in MODELS:
        raise ValueError(f"expected a model out of {', '.join(MODELS)}, got {name!r}")
    shape = (num_rows + num_held_out, num_tokens)
    if name == "smollm2":
        model, tokenizer = load_smollm2(dtype)
        train, held_out = _text_rows(tokenizer, num_rows, num_held_out, num_tokens)
    else:
        if name in _BARE:
            model, vocabulary = bare.BareModel(*_BARE[name], dtype, device), _BARE[name][1]
        else:
            model, vocabulary = _random_llama(name, dtype, device), _RANDOM[name]["vocab_size"]
        generator = torch.Generator().manual_seed(_SEED)
        tokens = torch.randint(vocabulary, shape, generator=generator)
        train, held_out = tokens[:num_rows], tokens[num_rows:]
    return Workload(model.to(device), train.to(device), held_out.to(device))


def tiny(name: str) -> str:
    """The smallest model that runs through the same code as one of `MODELS`."""
    return "bare-tiny" if name in _BARE else "random-tiny"


@torch.no_grad()
def mean_loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats a token of int64 rows [B, T], each token after the first."""
    loss: torch.Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
    return loss


@torch.no_grad()
def assign_(model: torch.nn.Module, values: Iterable[torch.Tensor]) -> None:
    """Sets a model's parameters, in the order of its manifest, to values rounded to their dtypes."""
    for (_, parameter), value in zip(manifest_parameters(model), values, strict=True):
        parameter.copy_(value)


def _text_rows(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, num_held_out: int, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    tasks, _ = load_instruction_tasks(tokenizer)

    def rows(split: str, count: int) -> torch.Tensor:
        examples = [example for task in tasks for example in getattr(task, split)]
        text = "\n".join(f"{row.instruction} {row.input} {row.output}" for row in examples)
        tokens = torch.tensor(tokenizer(text)["input_ids"])
        if len(tokens) < count * num_tokens:
            raise ValueError(
                f"expected at least {count * num_tokens} tokens of {split} text, got {len(tokens)}; "
                "take fewer rows"
            )
        # Tasks follow one another in the text: rows from all over it, not of the first tasks alone.
        found = tokens[: len(tokens) // num_tokens * num_tokens].view(-1, num_tokens)
        return found[torch.linspace(0, len(found) - 1, count).long()] if count else found[:0]

    return rows("train", num_rows), rows("test", num_held_out)


def _random_llama(name: str, dtype: torch.dtype, device: str) -> Any:
    require_extra("hf", "transformers")
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**_RANDOM[name], tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(_SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
