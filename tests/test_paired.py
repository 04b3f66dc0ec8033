"""The losses of both halves of a batch that is run twice: for each half what the model itself gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, Architecture
from torch import nn
from transformers import (
    BatchEncoding,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import fedkseed
from fedkseed.optim.paired import doubled, paired_losses

ROWS = [pytest.param(row, id=name) for name, row in ARCHITECTURES.items()]
LLAMA = ARCHITECTURES["Llama"]


@pytest.mark.parametrize("row", ROWS)
def test_both_halves_give_the_loss_of_the_model(row: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    # Most losses of transformers are taken of logits.float(), whatever the model's dtype.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, batch = row.make_model(torch.float64), row.make_batch()
    own = model(**batch).loss
    losses = paired_losses(model, batch)
    assert own.dtype == losses.dtype == torch.float64
    torch.testing.assert_close(losses, own.expand(2), rtol=1e-12, atol=0)
    assert torch.equal(paired_losses(model, BatchEncoding(batch)), losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_each_half_has_a_loss_of_its_own(row: Architecture, dtype: torch.dtype) -> None:
    model, batch = row.make_model(dtype), row.make_batch()
    head = model.get_output_embeddings()
    assert head is not None
    expected = [model(**batch).loss]
    with head.register_forward_hook(lambda *call: 3 * call[-1]):
        expected.append(model(**batch).loss)
    assert abs(expected[0] - expected[1]) > 0.05

    def move_second_half(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        plus, minus = logits.chunk(2)
        return torch.cat([plus, 3 * minus])

    with head.register_forward_hook(move_second_half):
        losses = paired_losses(model, batch)
    assert losses.dtype == expected[0].dtype
    torch.testing.assert_close(losses, torch.stack(expected), rtol=4 * torch.finfo(losses.dtype).eps, atol=0)


def test_ignored_labels_and_reduction() -> None:
    """Rows with different numbers of labels: a mean over tokens, not over rows; or over a given number."""
    model, batch = LLAMA.make_model(torch.float64), LLAMA.make_batch()
    batch["labels"][0, :5] = -100
    torch.testing.assert_close(paired_losses(model, batch), model(**batch).loss.expand(2))
    batch["num_items_in_batch"] = torch.tensor(40)
    own = model(**batch).loss
    assert own < 2
    torch.testing.assert_close(paired_losses(model, batch), own.expand(2))


def test_loss_function_of_the_caller() -> None:
    model, batch = LLAMA.make_model(torch.float64), LLAMA.make_batch()

    def largest(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        assert len(logits) == len(labels) == len(batch["labels"])
        return logits.max()

    model.loss_function = largest
    own = model(**batch).loss
    torch.testing.assert_close(paired_losses(model, batch), own.expand(2))
    assert model.loss_function is largest


def test_heads_that_classify() -> None:
    """One of them has its own cross-entropy, the other hands pooled logits to the loss function."""
    batch = LLAMA.make_batch() | {"labels": torch.tensor([2, 0, 1])}
    options = {"num_labels": 3, "pad_token_id": 0, "problem_type": "single_label_classification"}
    torch.manual_seed(2)
    gpt2 = GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2, **options)
    llama = LlamaConfig(vocab_size=61, **LLAMA.options, **options)
    for model in (GPT2ForSequenceClassification(gpt2), LlamaForSequenceClassification(llama)):
        own = model.eval()(**batch).loss
        torch.testing.assert_close(paired_losses(model, batch), own.expand(2))


def test_the_cache_is_off_and_nothing_is_changed() -> None:
    model, batch = LLAMA.make_model(torch.float64), LLAMA.make_batch()
    batch["use_cache"] = True  # type: ignore[assignment]
    before = dict(batch)
    seen: list[dict[str, Any]] = []
    model.model.register_forward_pre_hook(lambda _, __, options: seen.append(options), with_kwargs=True)
    original = model.loss_function
    paired_losses(model, batch)
    assert [options["use_cache"] for options in seen] == [False]
    assert len(seen[0]["attention_mask"]) == 2 * len(batch["input_ids"])
    assert batch.keys() == before.keys()
    assert all(batch[key] is before[key] for key in batch)

    model.model.register_forward_hook(raise_error)
    with pytest.raises(RuntimeError, match="in the forward pass"):
        paired_losses(model, batch)
    assert model.loss_function is original


def raise_error(*_: Any) -> None:
    raise RuntimeError("in the forward pass")


def test_wrapped_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    model, batch = LLAMA.make_model(torch.float64), LLAMA.make_batch()
    seen: list[Any] = []
    model.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["use_cache"]), with_kwargs=True
    )
    assert torch.equal(paired_losses(Wrapper(model), batch), paired_losses(model, batch))
    assert seen == [False, False]


def test_doubled() -> None:
    ids = torch.arange(6).reshape(2, 3)
    batch = {"input_ids": ids, "num_items_in_batch": torch.tensor(5), "output_attentions": False, "x": None}
    twice = doubled(batch)
    assert twice.keys() == batch.keys()
    assert twice["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert all(twice[key] is batch[key] for key in ("num_items_in_batch", "output_attentions", "x"))
    assert fedkseed.paired_losses is paired_losses


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda batch: batch.pop("labels"), ValueError, "expected a batch with labels, got input_ids, att"),
        (
            lambda batch: batch.update(position_ids=torch.arange(7)[None]),
            ValueError,
            "same number of rows in dimension 0, got input_ids with 3, .* position_ids with 1",
        ),
        (
            lambda batch: batch.update(labels=batch["labels"].tolist()),
            TypeError,
            'got labels of list; with a tokenizer pass return_tensors="pt"',
        ),
        (lambda batch: [batch.pop(key) for key in list(batch)], ValueError, "dimension 0, got no tensors"),
    ],
)
def test_batch_that_cannot_be_doubled(
    change: Callable[[Any], object], error: type[Exception], message: str
) -> None:
    batch = LLAMA.make_batch()
    change(batch)
    with pytest.raises(error, match=message):
        paired_losses(LLAMA.make_model(torch.float64), batch)


def test_batch_that_is_no_mapping() -> None:
    with pytest.raises(TypeError, match="expected a batch as a mapping of names to tensors, got Tensor"):
        paired_losses(nn.Linear(2, 2), torch.zeros(3, 2))  # type: ignore[arg-type]


def test_model_without_a_head() -> None:
    with pytest.raises(ValueError, match="a model that returns loss and logits, got BaseModelOutput"):
        paired_losses(LLAMA.make_model(torch.float64).model, LLAMA.make_batch())


def test_loss_with_terms_that_cannot_be_split() -> None:
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
    )
    model = MixtralForCausalLM(config).eval()
    with pytest.raises(ValueError, match="MixtralForCausalLM to be what its loss_function returns, got"):
        paired_losses(model, LLAMA.make_batch())
    model.config.output_router_logits = False
    losses = paired_losses(model, LLAMA.make_batch())
    torch.testing.assert_close(losses, model(**LLAMA.make_batch()).loss.expand(2))


def test_loss_of_another_formula() -> None:
    class Smoothed(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share
            self.loss = partial(nn.functional.cross_entropy, label_smoothing=share)

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=logits, loss=self.loss(logits.flatten(0, 1), labels.flatten()))

    generator = torch.Generator().manual_seed(1)
    batch = {"logits": torch.randn(2, 3, 5, generator=generator), "labels": torch.tensor([[0, 1, 2]] * 2)}
    own = Smoothed(0.0)(**batch).loss
    torch.testing.assert_close(paired_losses(Smoothed(0.0), batch), own.expand(2))
    with pytest.raises(ValueError, match="expected the loss of Smoothed to be the cross-entropy"):
        paired_losses(Smoothed(0.2), batch)
    batch["logits"][0] = torch.nan  # for the optimizer to skip
    assert paired_losses(Smoothed(0.2), batch).isnan().all()


def test_loss_function_that_gets_other_rows() -> None:
    class Flattened(LlamaForCausalLM):
        def forward(self, **inputs: Any) -> Any:
            output = super().forward(**inputs)
            output.loss = self.loss_function(output.logits[0], inputs["labels"][0], vocab_size=61)
            return output

    model = Flattened(LLAMA.make_model(torch.float64).config)
    with pytest.raises(ValueError, match=r"loss function's tensors to have 6 rows, got shape \(7,"):
        paired_losses(model, LLAMA.make_batch())
