"""Losses against float64 by hand, Rouge-L against hand-computed values, generation against a plain loop."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedkseed._means import mean
from fedkseed.data import scores
from fedkseed.data.federated import ClientRows, Row
from fedkseed.data.prompts import IGNORED, Encoded, collate, iterate_batches

VOCABULARY = 40


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def rows(count: int = 7) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    encoded = []
    for index in range(count):
        length = 4 + index
        tokens = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        encoded.append(Encoded(tuple(tokens), 1 + index % 3))
    return encoded


def loss_by_hand(model: torch.nn.Module, encoded: list[Encoded]) -> float:
    """One row at a time, no padding, log-softmax in float64."""
    total, count = 0.0, 0
    for row in encoded:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0].double()
        for position in range(row.num_prompt, len(row.input_ids)):
            total -= logits[position - 1].log_softmax(-1)[row.input_ids[position]].item()
            count += 1
    return total / count


def test_response_loss_is_the_token_mean(model: GPT2LMHeadModel) -> None:
    expected = loss_by_hand(model, rows())
    for batch_size in (1, 3, 7):
        found = scores.response_loss(model, iterate_batches(rows(), batch_size, pad_id=0))
        assert found == pytest.approx(expected, rel=1e-6)


def test_losses_of_rows_are_their_own_means_and_rows_without_a_response_have_none(
    model: GPT2LMHeadModel,
) -> None:
    encoded = rows()
    gone = Encoded(encoded[4].input_ids, len(encoded[4].input_ids))
    batches = [collate([encoded[0], gone, encoded[1]], 0), collate([gone, *encoded[2:], gone], 0)]
    found = scores.response_row_losses(model, batches)
    assert found == pytest.approx([loss_by_hand(model, [row]) for row in encoded], rel=1e-6)
    assert scores.response_row_losses(model, []) == []
    with pytest.raises(ValueError, match="expected at least one response token"):
        scores.response_row_losses(model, [collate([gone], 0)])


class FullLogits(torch.nn.Module):
    """The same model behind a forward without ``logits_to_keep`` and ``use_cache``."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids, attention_mask=attention_mask).logits)


def test_model_without_logits_to_keep(model: GPT2LMHeadModel) -> None:
    batch = collate(rows(), pad_id=0)
    kept, full = scores.response_nll(model, batch), scores.response_nll(FullLogits(model), batch)
    assert kept[1] == full[1] == int((batch.labels != IGNORED).sum())
    assert kept[0] == pytest.approx(full[0], rel=1e-6)


@pytest.mark.parametrize("shared", [1, 3, 9])
def test_shared_prefix_is_the_same_loss(model: GPT2LMHeadModel, shared: int) -> None:
    encoded = [
        Encoded(tuple(range(5, 5 + shared)) + row.input_ids, shared + row.num_prompt) for row in rows()
    ]
    expected = loss_by_hand(model, encoded)
    for batch_size in (1, 3, 7):
        batches = iterate_batches(encoded, batch_size, pad_id=0)
        assert scores.response_loss(model, batches, share_prefix=True) == pytest.approx(expected, rel=1e-6)
    equal_prompts = [Encoded((5, 6, 7, answer), 3) for answer in (8, 9)]
    found = scores.response_loss(model, [collate(equal_prompts, pad_id=0)], share_prefix=True)
    assert found == pytest.approx(loss_by_hand(model, equal_prompts), rel=1e-6)


def test_shared_prefix_runs_once(model: GPT2LMHeadModel) -> None:
    widths: list[tuple[int, ...]] = []
    handle = model.transformer.wte.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
    try:
        encoded = [Encoded((5, 6, 7, 8, last, 9), 5) for last in (10, 11, 12)]
        scores.response_nll(model, collate(encoded, pad_id=0), share_prefix=True)
    finally:
        handle.remove()
    assert widths == [(1, 4), (3, 2)]


CACHE_NAMES = ("past_key_values", "cache")


class OlderName(FullLogits):
    """The same model with the cache under the name of transformers before 5.24."""

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any
    ) -> SimpleNamespace:
        return self._forward(input_ids, past_key_values, options, "past_key_values")

    def _forward(
        self, input_ids: torch.Tensor, cache: Any, options: dict[str, Any], name: str
    ) -> SimpleNamespace:
        own = CACHE_NAMES["cache" in inspect.signature(self.model.forward).parameters]
        output = self.model(input_ids, **{own: cache}, **options)
        return SimpleNamespace(logits=output.logits, **{name: getattr(output, own)})


class NewerName(OlderName):
    """With that of 5.24 and later."""

    def forward(self, input_ids: torch.Tensor, cache: Any = None, **options: Any) -> SimpleNamespace:
        return self._forward(input_ids, cache, options, "cache")


@pytest.mark.parametrize("named", [OlderName, NewerName])
def test_shared_prefix_by_either_name(model: GPT2LMHeadModel, named: type[OlderName]) -> None:
    batch = collate([Encoded((5, 6, 7, 8, last, 9), 5) for last in (10, 11, 12)], pad_id=0)
    wrapped = named(model)
    expected = scores.response_nll(model, batch, share_prefix=True)
    widths: list[int] = []
    wrapped.register_forward_pre_hook(
        lambda _, __, options: widths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    assert scores.response_nll(wrapped, batch, share_prefix=True) == pytest.approx(expected, rel=1e-6)
    assert widths == [4, 2]


class NoCache(FullLogits):
    """A forward that takes ``use_cache`` and gives no cache."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids).logits, past_key_values=None)


def test_shared_prefix_without_a_cache(model: GPT2LMHeadModel) -> None:
    batch = collate([Encoded((5, 6, 7), 2), Encoded((5, 6, 8), 2)], pad_id=0)
    with pytest.raises(ValueError, match="got NoneType from NoCache; use share_prefix=False"):
        scores.response_nll(NoCache(model), batch, share_prefix=True)


def test_padding_content_does_not_matter(model: GPT2LMHeadModel) -> None:
    losses = {scores.response_nll(model, collate(rows(), pad_id=pad))[0] for pad in (0, 1, 17)}
    assert len(losses) == 1


def test_nothing_to_score(model: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match="at least one response token"):
        scores.response_nll(model, collate([Encoded((3, 4), 2)], pad_id=0))
    with pytest.raises(ValueError, match="at least one batch"):
        scores.response_loss(model, [])


class Numbers:
    """A tokenizer that writes ids as numbers; id 1 ends the text."""

    pad_token_id = None
    eos_token_id = 1

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(token) for token in tokens.tolist() if token != 1) + " "


NUMBERS: Any = Numbers()


def test_generation_equals_a_plain_loop(model: GPT2LMHeadModel) -> None:
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15], [20, 21]]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 1:
                break
        expected.append(" ".join(str(token) for token in tokens[len(prompt) :] if token != 1))
    for batch_size in (1, 3, 8):
        found = scores.generate_greedy(model, NUMBERS, prompts, max_new_tokens=6, batch_size=batch_size)
        assert found == expected
    found = scores.generate_greedy(model, NUMBERS, prompts, max_new_tokens=6, strip=False)
    assert found == [f"{text} " for text in expected]


def test_generation_errors(model: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match="prompts of at least one token"):
        scores.generate_greedy(model, NUMBERS, [[3], []], max_new_tokens=1)
    with pytest.raises(ValueError, match="expected max_new_tokens of at least 1, got 0"):
        scores.generate_greedy(model, NUMBERS, [[3]], max_new_tokens=0)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "a dog ran", 0.0),
        ("police killed the gunman", "police kill the gunman", 0.75),  # 3 of 4 on both sides
        ("the gunman kill police", "police kill the gunman", 0.5),  # "the gunman": order counts
        ("a b c d e", "a c e", 0.75),  # 3 common: 2 * 3 / (5 + 3)
        ("Yes.", "yes", 1.0),
        ("", "yes", 0.0),
        ("yes", "", 0.0),
        ("", "", 1.0),
        ("+", " + ", 1.0),
        ("+", "-", 0.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, expected: float) -> None:
    assert scores.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_exact_match() -> None:
    assert scores.exact_match(" Yes. ", "Yes.") == 1.0
    assert scores.exact_match("yes.", "Yes.") == 0.0


def client(train: list[str], held_out: list[str]) -> ClientRows:
    return ClientRows("c", tuple(Row({}, text) for text in train), tuple(Row({}, text) for text in held_out))


def test_majority_answer() -> None:
    (score,) = scores.majority_answer_scores([client(["b", "a b", "a b", "b c"], ["a b", "a", "c", "a b"])])
    assert score.answer == "a b"
    assert score.exact_match == 0.5
    assert score.rouge_l == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    (tie,) = scores.majority_answer_scores([client(["z", "a"], ["z"])])
    assert tie.answer == "z"
    assert scores.majority_answer_scores([client(["a"], [])]) == []
    (first,) = scores.majority_answer_scores([client(["b"], ["b", "a"])], num_rows=1)
    assert first.exact_match == 1.0


def test_mean() -> None:
    """Every partial sum is rounded: sum() of Python 3.12 and newer would keep the two ones."""
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert mean([1.0, 1e100, 1.0, -1e100]) == 0.0
    with pytest.raises(ValueError, match="at least one value"):
        mean([])
