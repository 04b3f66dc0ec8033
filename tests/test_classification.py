"""Labels answered by words or by a head: tokens, losses against a hand-made cross-entropy, and the bench."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from support.data_samples import make_tokenizer
from support.tiny_language_model import make_model
from tokenizers import processors
from transformers import LlamaConfig, LlamaForSequenceClassification

from fedkseed import Simulation, SimulationConfig
from fedkseed.data import load_smollm2, sentiment
from fedkseed.data.classification import (
    Classifier,
    LabelledBatch,
    LabelledTokens,
    Verbalizer,
    area_under_curve,
    collate_labelled,
    encode_labelled,
    score_rows,
)
from fedkseed.data.errors import DataError
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.templates import Template
from fedkseed.scenarios.classification import ClassificationBench
from fedkseed.scenarios.threshold import best_threshold, drawn_rows

LABELS = ("bad", "good")
TEMPLATE = Template.custom("{text}:")


def labelled(client: str, count: int, num_good: int) -> tuple[Row, ...]:
    return tuple(
        Row({"text": f"{client} {'x' * (index % 5)}{index}"}, LABELS[index < num_good])
        for index in range(count)
    )


def federated(words: tuple[str, ...] = ("-", "+")) -> FederatedData:
    clients = (
        ClientRows("first", labelled("first", 8, 6), labelled("held out", 6, 3)),
        ClientRows("second", labelled("second", 5, 1), labelled("kept", 4, 1)),
    )
    unseen = (ClientRows("third", (), labelled("third", 3, 2)),)
    return FederatedData("classification", clients, unseen, TEMPLATE, LABELS, words)


def make_head(num_labels: int = 2) -> LlamaForSequenceClassification:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=num_labels,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).eval()


def bench_of(model: Any, data: FederatedData, **changes: Any) -> ClassificationBench:
    numbers = {"round_rows": 2, "final_rows": 5, "max_length": 64, **changes}
    return ClassificationBench(model, make_tokenizer(), data, **numbers)


def rows() -> list[LabelledTokens]:
    return [LabelledTokens((5, 6, 7, 8), 0), LabelledTokens((9, 4), 1), LabelledTokens((11,), 1)]


# Words


def test_words_are_the_tokens_that_answer() -> None:
    tokenizer = make_tokenizer()
    found = Verbalizer.of(tokenizer, {"bad": "-", "good": "+"})
    assert tokenizer.convert_ids_to_tokens(list(found.token_ids)) == ["-", "+"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"bad": "no", "good": "+"}, "word of one token for the label 'bad', got 2 for 'no'; name another"),
        ({"bad": "-", "good": ""}, "word of one token for the label 'good', got none for ''"),
        ({"bad": "-", "good": "\u00e9"}, "for the label 'good', got an unknown one"),
        ({"bad": "-", "good": "-"}, "another token for each label, got one for 'bad' and 'good'"),
        ({"bad": "-"}, "at least two labels, got 1"),
    ],
)
def test_words_that_cannot_answer(words: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Verbalizer.of(make_tokenizer(), words)
    assert "\n" not in str(caught.value)


# Tokens and batches


def test_long_prompts_lose_their_beginning_and_are_counted() -> None:
    tokenizer = make_tokenizer()
    given = [Row({"text": "abcdef"}, "good"), Row({"text": "a"}, "bad")]
    found, num_cut = encode_labelled(tokenizer, given, TEMPLATE, LABELS, 4)
    assert [tokenizer.decode(list(row.input_ids)).replace(" ", "") for row in found] == ["def:", "a:"]
    assert [row.label for row in found] == [1, 0]
    assert num_cut == 1


def test_special_tokens_of_a_long_prompt_stay() -> None:
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (found,), num_cut = encode_labelled(tokenizer, [Row({"text": "abcdef"}, "good")], TEMPLATE, LABELS, 5)
    assert tokenizer.decode(list(found.input_ids)).replace(" ", "") == "<s>ef:</s>"
    assert num_cut == 1
    assert tokenizer.truncation_side == "right"
    assert len(tokenizer("abcdefgh").input_ids) == 10, "nothing of it is left behind"


def test_a_label_outside_the_list() -> None:
    with pytest.raises(DataError, match=r"label out of \['bad', 'good'\], got 'fair'"):
        encode_labelled(make_tokenizer(), [Row({"text": "a"}, "fair")], TEMPLATE, LABELS, 4)


def test_batches_are_padded_on_the_right() -> None:
    batch = collate_labelled(rows()[:2], 3)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 3, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [0, 1]
    moved = batch.to("meta")
    assert isinstance(moved, LabelledBatch)
    assert {moved.input_ids.device.type, moved.attention_mask.device.type, moved.labels.device.type} == {
        "meta"
    }
    with pytest.raises(ValueError, match="at least one row"):
        collate_labelled([], 3)


# Losses


class NoKeeping(torch.nn.Module):
    """The same model with all logits always: it has no ``logits_to_keep``."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("keeps", [True, False], ids=["kept logits", "all logits"])
def test_loss_over_words_is_the_cross_entropy_of_single_rows(keeps: bool) -> None:
    model = make_model(torch.float32)
    words = (20, 30, 40)
    expected = []
    with torch.no_grad():
        for row in rows():
            logits = model(torch.tensor([row.input_ids])).logits[0, -1].double()
            chosen = [math.exp(float(logits[word])) for word in words]
            expected.append(-math.log(chosen[row.label] / sum(chosen)))
    classifier = Classifier(3, Verbalizer(words))
    batch = collate_labelled(rows(), 0)
    used = model if keeps else NoKeeping(model)
    losses = classifier.losses(used, batch)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert classifier.loss(used, batch) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_loss_of_a_head_is_the_cross_entropy_of_single_rows() -> None:
    model = make_head()
    expected = []
    with torch.no_grad():
        for row in rows():
            logits = model(torch.tensor([row.input_ids])).logits[0].double()
            expected.append(float(-torch.log_softmax(logits, 0)[row.label]))
    found = Classifier(2).losses(model, collate_labelled(rows(), 0))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_head_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"3 rows and 2 labels, got \[3, 3\] from LlamaForSequence"):
        Classifier(2).logits(make_head(3), collate_labelled(rows(), 0))


def test_losses_are_in_fp32_under_autocast() -> None:
    model, batch = make_model(torch.float32), collate_labelled(rows(), 0)
    classifier = Classifier(2, Verbalizer((20, 30)))
    exact = classifier.logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = classifier.logits(model, batch)
        assert classifier.losses(model, batch).dtype == torch.float64
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.02)


def test_rows_are_scored_in_their_order() -> None:
    model, classifier = make_model(torch.float32), Classifier(2, Verbalizer((20, 30)))
    single = torch.cat([classifier.logits(model, collate_labelled([row], 0)) for row in rows()])
    found = score_rows(classifier, model, rows(), 0, batch_size=2)
    torch.testing.assert_close(found, single)


def test_area_under_curve() -> None:
    assert area_under_curve([3.0, 2.0, 1.0, 2.0], [True, False, False, True]) == 3.5 / 4
    assert area_under_curve([1.0, 2.0], [True, True]) is None


# Bench


@pytest.mark.parametrize("kind", ["words", "head"])
def test_bench_runs_a_federation_and_compares_the_same_rows(kind: str) -> None:
    model = make_model(torch.float32) if kind == "words" else make_head()
    bench = bench_of(model, federated(("-", "+") if kind == "words" else ()))
    assert bench.names == ["first", "second"]
    before = bench.scores()
    assert before == bench.scores()
    assert {name: len(right) for name, right in before["held_out"]["right"].items()} == {
        "first": 5,
        "second": 4,
    }
    task = bench.task()
    assert [len(rows) for rows in task.datasets] == [8, 5]
    config = SimulationConfig(
        num_rounds=1, clients_per_round=2, num_local_steps=2, batch_size=4, lr=1e-2, eps=1e-3, num_seeds=16
    )
    with Simulation(task, config) as simulation:
        result = next(simulation.rounds())
    assert set(result.evaluation) == {"held_out_loss", "accuracy"}
    after = bench.scores()
    assert after["held_out"]["loss"] != before["held_out"]["loss"]
    summary = bench.summary(before, after)
    compared = summary["held_out"]["clients"]
    assert compared["first"]["majority_label"] == "good"  # 6 of 8 training rows
    assert compared["first"]["majority"] == 3 / 5
    assert compared["second"]["majority"] == 3 / 4
    assert summary["held_out"]["all"]["rows"] == 9
    then, now = summary["held_out"]["loss"]
    estimate, low, high = summary["held_out"]["loss_difference"]
    assert estimate == pytest.approx(now - then, rel=1e-9)
    assert low < estimate < high
    assert summary["unseen"]["clients"]["third"]["majority"] == 2 / 3  # "good": 7 of all 13 training rows
    table = bench.table(before, after)
    assert "first         5" in table
    assert "0.600 (good)" in table
    assert "AUC" in table


def test_round_scores_are_those_of_the_first_rows() -> None:
    bench = bench_of(make_model(torch.float32), federated(), round_rows=5)
    before = bench.scores()["held_out"]
    found = bench.round_scores(0)
    assert found["accuracy"] == before["accuracy"][0]
    assert found["held_out_loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert bench_of(make_model(torch.float32), federated(), round_rows=0).round_scores(0) == {}


def test_table_shows_what_changed() -> None:
    bench = bench_of(make_model(torch.float32), federated())
    before = bench.scores()
    after = {**before, "held_out": {**before["held_out"]}}
    before["held_out"]["right"] = {"first": [0, 0, 0, 0, 1], "second": [0, 0, 1, 1]}
    after["held_out"]["right"] = {"first": [1, 1, 1, 1, 1], "second": [0, 0, 1, 1]}
    found = bench.summary(before, after)["held_out"]
    assert found["clients"]["first"]["difference"][0] == 0.8
    assert found["clients"]["first"]["difference"][1] > 0
    assert found["clients"]["second"]["difference"][0] == 0.0
    assert found["all"]["difference"][0] == pytest.approx(4 / 9)
    assert "0.200    1.000   +0.800 [" in bench.table(before, after)


@pytest.mark.parametrize(
    ("margins", "is_positive", "threshold"),
    [
        ([3.0, 2.0, 1.0, 0.5], [True, True, False, False], 1.5),
        ([3.0, 2.0], [True, True], 1.0),
        ([3.0, 2.0], [False, False], 4.0),
        ([1.0, 1.0, 1.0, -1.0], [False, True, False, False], 2.0),  # equal margins stay together
        ([-3.0, -2.0, -1.0, 5.0, 6.0], [False, True, False, True, True], 2.0),  # -2.5 is as good
    ],
)
def test_the_best_threshold(margins: list[float], is_positive: list[bool], threshold: float) -> None:
    assert best_threshold(margins, is_positive) == threshold


def test_the_best_threshold_of_random_margins_is_as_good_as_any() -> None:
    generator = random.Random(1)
    for _ in range(100):
        margins = [generator.randrange(-4, 5) / 2 for _ in range(generator.randrange(1, 9))]
        is_positive = [generator.random() < 0.5 for _ in margins]
        right = [
            sum((margin > at) == positive for margin, positive in zip(margins, is_positive, strict=True))
            for at in (best_threshold(margins, is_positive), *(value / 4 for value in range(-12, 13)))
        ]
        assert right[0] == max(right)


def test_rows_of_a_threshold_are_drawn_of_each_client() -> None:
    rows = [range(10), range(10, 13)]
    drawn = drawn_rows(rows, 5, 7)
    assert drawn == drawn_rows(rows, 5, 7) != drawn_rows(rows, 5, 8)
    assert len(set(drawn[:5])) == 5
    assert max(drawn[:5]) < 10
    assert sorted(drawn[5:]) == [10, 11, 12]


def test_a_threshold_alone_is_shown_beside_the_tuned_model() -> None:
    model = make_model(torch.float32)
    bench = bench_of(model, federated(), threshold_rows=6, seed=3)
    before = bench.scores()
    found = before["held_out"]["threshold"]
    assert found["rows"] == 6 + 5
    assert before["unseen"]["threshold"]["value"] == found["value"]
    rows = drawn_rows(bench.task().datasets, 6, 3)
    margins = [float(difference) for difference in bench._logits(rows, "").double().diff(dim=1)]
    assert found["value"] == best_threshold(margins, [row.label == 1 for row in rows])
    held_out = [row for part in bench._parts for row in part.rows]
    shifted = bench._logits(held_out, "").double().diff(dim=1)[:, 0] > found["value"]
    right = [bool(one) == (row.label == 1) for one, row in zip(shifted, held_out, strict=True)]
    assert found["right"] == {
        "first": [int(one) for one in right[:5]],
        "second": [int(one) for one in right[5:]],
    }
    assert found["accuracy"][0] == sum(right) / 9
    after = {**before, "held_out": {**before["held_out"], "right": {"first": [1] * 5, "second": [1] * 4}}}
    summary = bench.summary(before, after)["held_out"]["threshold"]
    assert summary["difference"][0] == pytest.approx(1 - sum(right) / 9)
    assert summary["value"] == [found["value"]] * 2
    assert "A shifted threshold alone, fitted on 11 training rows: " in bench.table(before, after)
    plain = bench_of(model, federated())
    assert "threshold" not in plain.scores()["held_out"]
    assert "threshold" not in plain.table(plain.scores(), plain.scores())


def test_a_threshold_is_one_of_two_labels() -> None:
    data = dataclasses.replace(federated(()), labels=("bad", "good", "so-so"))
    with pytest.raises(ValueError, match="two labels for a threshold between them, got 3; leave out --thr"):
        bench_of(make_head(3), data, threshold_rows=1)


def test_a_client_may_be_called_all() -> None:
    data = federated()
    clients = (dataclasses.replace(data.clients[0], name="all"), data.clients[1])
    bench = bench_of(make_model(torch.float32), dataclasses.replace(data, clients=clients))
    scores = bench.scores()
    lines = [line.split()[:2] for line in bench.table(scores, scores).splitlines()]
    assert [line for line in lines if line[:1] in (["all"], ["second"])] == [
        ["all", "5"],
        ["second", "4"],
        ["all", "9"],
    ]


def test_bench_says_how_many_prompts_were_cut() -> None:
    assert bench_of(make_model(torch.float32), federated()).notes == []
    bench = bench_of(make_model(torch.float32), federated(), max_length=8)
    assert bench.batch_shapes(2)[0][0].tokens == 8
    assert "prompts lost their beginning: over 8 tokens" in bench.notes[0]


def test_bench_refuses_a_head_of_another_size_and_rows_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="logit for each of 2 labels, got 3 from LlamaForSequence"):
        bench_of(make_head(3), federated(()))
    empty = FederatedData("classification", (ClientRows("a", labelled("a", 2, 1), ()),), (), TEMPLATE, LABELS)
    with pytest.raises(ValueError, match="held-out rows of at least one client, got none"):
        bench_of(make_head(), empty)


@pytest.mark.parametrize("pad_id", [None, 0])
def test_a_head_is_told_what_fills_up_rows(pad_id: int | None) -> None:
    bench = bench_of(make_head(), federated(()))
    model = make_head()  # the one with its weights takes the place of the one of shapes
    model.config.pad_token_id = pad_id
    bench.model = model  # type: ignore[assignment]
    rows = [row for part in bench._parts for row in part.rows]
    alone = torch.cat([bench._logits([row], "") for row in rows])
    torch.testing.assert_close(bench._logits(rows, ""), alone)


# The real model and sentences


@pytest.mark.model
@pytest.mark.slow
def test_the_sentences_on_the_real_model() -> None:
    model, tokenizer = load_smollm2()
    data = sentiment.load_sentiment()
    bench = ClassificationBench(model, tokenizer, data, round_rows=1, final_rows=3, max_length=128)
    assert bench.notes == list(data.notes)
    assert bench.batch_shapes(2)[0][0].tokens < 128
    task = bench.task()
    batch = task.collate([task.datasets[0][index] for index in (0, 1)])
    single = [task.loss(model, task.collate([task.datasets[0][index]])) for index in (0, 1)]
    assert task.loss(model, batch) == pytest.approx(sum(single) / 2, rel=1e-4)  # type: ignore[arg-type]
    assert all(0 < loss < 3 for loss in single)  # type: ignore[operator]
    scores = bench.scores()["held_out"]
    assert scores["rows"] == 12
    assert 0.5 < scores["loss"] < 1.5
