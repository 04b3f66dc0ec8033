"""A masked language model that answers in the place of a mask: tokens, losses, a run, asking it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_samples import make_tokenizer
from support.tiny_language_model import make_model
from support.word_tokenizer import make_word_tokenizer
from tokenizers import processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from fedkseed import cli
from fedkseed.data.architectures import is_masked
from fedkseed.data.classification import (
    Classifier,
    LabelledTokens,
    Verbalizer,
    collate_labelled,
    encode_labelled,
    mask_token_id,
)
from fedkseed.data.errors import DataError
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.models import load_any
from fedkseed.data.templates import Template
from fedkseed.ledger.ledger import Ledger
from fedkseed.scenarios.classification import ClassificationBench
from fedkseed.simulation.run_folder import LEDGER, METRICS

LABELS = ("bad", "good")
ADJECTIVES = (("dull", "poor", "flat"), ("fine", "warm", "crisp"))
TEMPLATE = Template.custom("{text} It was [MASK].")
SIZE = 180


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_masking_tokenizer() -> PreTrainedTokenizerFast:
    """Words, with a first and a last token around each text and a mask token that is spelt in another way."""
    words = " ".join(["Evening 1 was It terrible great", *(word for words in ADJECTIVES for word in words)])
    tokenizer = make_word_tokenizer([words], SIZE - 1)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def make_masked_model() -> BertForMaskedLM:
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return BertForMaskedLM(config).eval()


def decoded(tokenizer: Any, row: LabelledTokens) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(list(row.input_ids)))


# Tokens


@pytest.mark.parametrize(
    ("template", "max_length", "expected"),
    [
        ("{text} It was [MASK].", 20, "<s> dull fine It was <mask>.</s>"),
        ("{text} It was [MASK].", 7, "<s> It was <mask>.</s>"),
        ("{text} It was [MASK].", 3, "<s><mask></s>"),
        ("[MASK]:{text}", 5, "<s><mask>: dull</s>"),
        ("It was [MASK]:{text}", 5, "<s><mask>: dull</s>"),
    ],
)
def test_a_long_prompt_keeps_its_mask(template: str, max_length: int, expected: str) -> None:
    tokenizer = make_masking_tokenizer()
    rows = [Row({"text": " dull fine"}, "good")]
    (found,), num_cut = encode_labelled(tokenizer, rows, Template.custom(template), LABELS, max_length)
    assert decoded(tokenizer, found).replace(" ", "") == expected.replace(" ", "")
    assert num_cut == (max_length < 20)
    assert len(found.input_ids) <= max_length


def test_masks_that_cannot_be_asked_are_refused() -> None:
    tokenizer = make_masking_tokenizer()

    def encode(text: str, template: str, max_length: int = 20) -> None:
        encode_labelled(
            tokenizer, [Row({"text": text}, "bad")], Template.custom(template), LABELS, max_length
        )

    with pytest.raises(
        DataError, match="expected one mask token in a prompt, the template's, got 2 in '<mask> It"
    ):
        encode("<mask>", "{text} It was [MASK].")
    with pytest.raises(
        DataError, match=r"expected one \[MASK\] in a template, got 2 in '{text} \[MASK\] \[MASK\]'"
    ):
        encode("a", "{text} [MASK] [MASK]")
    with pytest.raises(DataError, match=r"expected at least 3 tokens a row \(--max-length\), got 2"):
        encode("a", "{text} [MASK]", 2)
    with pytest.raises(
        DataError, match="got one without a mask token; name such a model, or another template"
    ):
        mask_token_id(make_tokenizer(), TEMPLATE)
    assert mask_token_id(make_tokenizer(), Template.custom("{text} It was")) is None


def test_a_template_is_shown_with_the_mask_as_it_is_written() -> None:
    assert TEMPLATE.prompt(None, {"text": "Dull."}) == "Dull. It was [MASK]."
    assert TEMPLATE.prompt(make_masking_tokenizer(), {"text": "[MASK]"}) == "[MASK] It was <mask>."
    assert "MASK" not in TEMPLATE.literals


# Losses


def test_the_loss_is_the_cross_entropy_of_the_words_in_the_masks_place() -> None:
    model, tokenizer = make_masked_model(), make_masking_tokenizer()
    texts = ((" fine", 1), (" dull poor flat", 0), (" warm crisp", 1))
    words = tokenizer.convert_tokens_to_ids([" terrible", " great"])
    rows, expected = [], []
    with torch.no_grad():
        for text, label in texts:
            ids = tokenizer(f"{text} It was <mask>.").input_ids
            place = ids.index(tokenizer.mask_token_id)
            assert place != len(ids) - 1
            logits = model(torch.tensor([ids])).logits[0, place, words].double()
            expected.append(float(-torch.log_softmax(logits, 0)[label]))
            rows.append(LabelledTokens(tuple(ids), label))
    classifier = Classifier(2, Verbalizer(tuple(words)), 0, tokenizer.mask_token_id)
    losses = classifier.losses(model, collate_labelled(rows, 0))
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


# A run


def bench_of(model: Any, template: Template) -> ClassificationBench:
    rows = tuple(Row({"text": f"Evening 1 was {ADJECTIVES[i % 2][i % 3]}"}, LABELS[i % 2]) for i in range(6))
    clients = (ClientRows("one", rows[:4], rows[4:]),)
    data = FederatedData("classification", clients, (), template, LABELS, (" terrible", " great"))
    return ClassificationBench(
        model, make_masking_tokenizer(), data, round_rows=1, final_rows=5, max_length=64
    )


def test_models_and_templates_that_do_not_go_together_are_refused() -> None:
    masked, causal = make_masked_model(), make_model(torch.float32)
    assert is_masked(masked)
    assert not is_masked(causal)
    shape = bench_of(masked, TEMPLATE).batch_shapes(2)[0][0]
    assert shape.logits == shape.tokens, "the model gives those of all tokens"
    with pytest.raises(
        ValueError, match=r"expected a template with \[MASK\], in whose place BertForMaskedLM an"
    ):
        bench_of(masked, Template.custom("{text} It was"))
    with pytest.raises(
        ValueError, match=r"a masked language model for \[MASK\] in the template, got \w+, which"
    ):
        bench_of(causal, TEMPLATE)


def write_files() -> None:
    make_masked_model().save_pretrained("model")
    make_masking_tokenizer().save_pretrained("model")
    with open("evenings.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(90):
            words = ADJECTIVES[number % 2]
            text = f"Evening {number} was {words[number % 3]} {words[number // 2 % 3]}"
            writer.writerow([text, LABELS[number % 2]])


def test_a_federation_tunes_it_and_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()
    line = ["simulate", "--model", "model", "--data", "evenings.csv", "--partition", "iid:2", "--out", "run"]
    line += ["--template", "{text} It was [MASK].", "--words", "good= great,bad= terrible"]
    line += ["--num-rounds", "4", "--num-local-steps", "10", "--num-seeds", "256", "--lr", "1e-3"]
    line += ["--eps", "1e-3", "--num-threads", "1", "--held-out", "0.3"]
    assert cli.main(line) == 0, capsys.readouterr().err
    summary = json.loads(Path("run/summary.json").read_text())["scores"]["held_out"]
    assert summary["loss"][1] < 0.8 * summary["loss"][0], "it learns"
    assert len(Path("run", METRICS).read_text().splitlines()) == 4
    capsys.readouterr()
    assert cli.main(["apply", "run", "--base", "model", "--out", "tuned"]) == 0
    answers = []
    for folder in ("run", "tuned"):
        capsys.readouterr()
        assert cli.main(["ask", folder, "Evening 3 was fine", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    model, tokenizer = load_any("model")
    Ledger.load(Path("run", LEDGER)).apply_(model)
    ids = tokenizer("Evening 3 was fine It was <mask>.").input_ids
    words = tokenizer.convert_tokens_to_ids([" terrible", " great"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id), words]
    expected = dict(zip(LABELS, logits.double().softmax(0).tolist(), strict=True))
    assert answers[0]["probabilities"] == pytest.approx(expected, rel=1e-5)
    assert cli.main(["ask", "run", "Evening <mask>"]) == 2
    assert "expected one mask token in a prompt, the template's, got 2" in capsys.readouterr().err
    assert cli.main(["ask", "run", "a", "--template", "{text}!"]) == 2
    assert "expected a template with [MASK]" in capsys.readouterr().err
