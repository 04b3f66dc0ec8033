"""`fedkseed ask`: what a tuned model answers, of which folder, and what is refused with which words."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.data_samples import make_tokenizer, save_model

from fedkseed import Ledger, SeedPool, cli
from fedkseed.data.asking import FILE, NOTE, Asking
from fedkseed.data.models import load_any, load_any_weights
from fedkseed.data.templates import Template
from fedkseed.ledger import Origin

WORDS = Asking(Template.custom("{text}\nIt was "), ("bad", "good", "so-so"), ("b", "g", "s"))
HEAD = Asking(Template.custom("{text}"), ("bad", "good", "so-so"))


def save_head(folder: Path) -> None:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=3,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_run(folder: Path, base: Path, dtype: torch.dtype, asking: Asking | None = WORDS) -> Path:
    """A run's folder with two ledgers; the best one has other coefficients."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"model": str(base)}))
    notes = {} if asking is None else {NOTE: asking.digest}
    for name, scale in (("ledger.safetensors", 0.05), ("best.safetensors", 0.2)):
        values = scale * np.ones(4, np.float32)
        Ledger.of(load_any_weights(base, dtype), SeedPool(3, 4), values, notes).save(folder / name)
    if asking is not None:
        (folder / FILE).write_text(asking.to_json())
    return folder


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    status = cli.main(["ask", *map(str, arguments)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def ranked(logits: torch.Tensor) -> str:
    pairs = sorted(
        zip(WORDS.labels, logits.double().softmax(0).tolist(), strict=True), key=lambda pair: -pair[1]
    )
    return "  ".join(f"{label} {probability:.3f}" for label, probability in pairs)


@torch.no_grad()
def expected(folder: Path, text: str, dtype: torch.dtype, ledger: Path | None = None) -> str:
    """The labels' probabilities without the code under test: one prompt, all logits."""
    model, tokenizer = load_any(folder, dtype)
    if ledger is not None:
        Ledger.load(ledger).apply_(model)
    ids = torch.tensor([tokenizer(f"{text}\nIt was ").input_ids])
    return ranked(
        model(ids).logits[0, -1, [tokenizer.convert_tokens_to_ids(word) for word in WORDS.words]].float()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_and_the_folder_made_of_it_answer_alike(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "base")
    run = make_run(tmp_path / "run", tmp_path / "base", dtype)
    last = expected(tmp_path / "base", "fine", dtype, run / "ledger.safetensors")
    best = expected(tmp_path / "base", "fine", dtype, run / "best.safetensors")
    assert last != best
    assert ask(capsys, run, "fine") == f"{last}\n"
    assert ask(capsys, run, "fine", "--best") == f"{best}\n"
    model = tmp_path / "model"
    assert (
        cli.main(
            ["apply", str(run / "ledger.safetensors"), "--base", str(tmp_path / "base"), "--out", str(model)]
        )
        == 0
    )
    assert Asking.read(model) == WORDS
    assert ask(capsys, model, "fine") == f"{last}\n"
    assert ask(capsys, model, "fine", "--template", "plain") != f"{last}\n"


def test_a_ledger_that_travels_without_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "base")
    run = make_run(tmp_path / "run", tmp_path / "base", torch.float32)
    (run / FILE).unlink()
    apply = ["apply", str(run / "ledger.safetensors"), "--base", str(tmp_path / "base"), "--out"]
    assert cli.main([*apply, str(tmp_path / "model")]) == 0
    assert "no fedkseed.json lies beside" in capsys.readouterr().err
    assert not (tmp_path / "model" / FILE).exists()
    # Another run's file beside it is no help.
    (run / FILE).write_text(HEAD.to_json())
    assert cli.main([*apply, str(tmp_path / "other")]) == 2
    assert "the one that the ledger was tuned with" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert cli.main(["ask", str(run), "fine"]) == 2
    # A ledger that names none does not take one either.
    make_run(tmp_path / "plain", tmp_path / "base", torch.float32, None)
    (tmp_path / "plain" / FILE).write_text(WORDS.to_json())
    apply[1] = str(tmp_path / "plain" / "ledger.safetensors")
    capsys.readouterr()
    assert cli.main([*apply, str(tmp_path / "third")]) == 0
    assert capsys.readouterr().err.count("fedkseed.json") == 0
    assert not (tmp_path / "third" / FILE).exists()


def test_a_head_gives_its_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_head(tmp_path / "base")
    run = make_run(tmp_path / "run", tmp_path / "base", torch.float32, HEAD)
    model, tokenizer = load_any(tmp_path / "base")
    Ledger.load(run / "ledger.safetensors").apply_(model)
    with torch.no_grad():
        logits = model(**tokenizer("fine", return_tensors="pt", return_token_type_ids=False)).logits[0]
    assert ask(capsys, run, "fine") == f"{ranked(logits)}\n"
    assert "LABEL_0" in ask(capsys, tmp_path / "base", "fine")


def test_a_decoder_with_a_head_that_knows_no_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    HEAD.write(tmp_path)
    texts = ["a long text", "short"]
    alone = [ask(capsys, tmp_path, text).strip() for text in texts]
    together = ask(capsys, tmp_path, *texts).splitlines()
    assert together == [f"{answer}  {text}" for answer, text in zip(alone, texts, strict=True)]


@pytest.mark.parametrize("chat", [True, False])
def test_an_instruction_is_answered_greedily(
    chat: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path)
    if not chat:
        make_tokenizer(None).save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    model, tokenizer = load_any(tmp_path)
    text = "<s>system say</s><s>user this</s><s>assistant " if chat else "say\nthis\n"
    ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt").input_ids
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=2
    )
    answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert ask(capsys, tmp_path, "say", "--context", "this", "--max-new-tokens", 5) == f"{answer}\n"
    both = ask(capsys, tmp_path, "say", "other", "--field", "input=this", "--max-new-tokens", 5)
    assert both.startswith(f"> say\n{answer}\n\n> other\n")


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    stream = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stream)


def test_lines_of_standard_input_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    (tmp_path / FILE).write_text(WORDS.to_json())
    texts = [f"line {number}" for number in range(40)]
    feed(monkeypatch, "\n\n".join(texts[1:]).encode())
    rows = [json.loads(line) for line in ask(capsys, tmp_path, texts[0], "-", "--json").splitlines()]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        values = list(row["probabilities"].values())
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1)
        assert row["answer"] == next(iter(row["probabilities"]))
    feed(monkeypatch, b"line 3")
    assert ask(capsys, tmp_path, "-") == f"{expected(tmp_path, 'line 3', torch.float32)}  line 3\n"


def test_a_template_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "own.txt").write_text("{text}\nIt was \n")
    (tmp_path / "model" / FILE).write_text(
        Asking(Template.named("plain"), WORDS.labels, WORDS.words).to_json()
    )
    out = ask(capsys, tmp_path / "model", "fine", "--template-file", tmp_path / "own.txt")
    assert out == f"{expected(tmp_path / 'model', 'fine', torch.float32)}\n"


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def no_change(folder: Path) -> None:
    """The model of `save_model`, as it is."""


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (no_change, [" "], "expected a text to ask, got an empty one"),
        (no_change, ["a", ""], "expected a text to ask, got an empty one"),
        (no_change, ["-", "-"], "expected standard input (-) once"),
        (no_change, ["a", "--field", "b"], "expected --field NAME=TEXT, each name once, got 'b'"),
        (no_change, ["a", "--field", "b=1", "--field", "b=2"], "each name once"),
        (no_change, ["a", "--field", "b=1"], "expected fields out of instruction, input"),
        (no_change, ["a", "--max-new-tokens", "0"], "expected --max-new-tokens of at least 1, got 0"),
        (no_change, ["a", "--template", "aplaca"], "the nearest is 'alpaca'"),
        (no_change, ["a", "--template-file", "absent"], "expected a template file"),
        (no_change, ["a", "--best"], "expected a run's folder with --best or --base"),
        (no_change, ["a", "--device", "tpu"], "expected a device, auto, cpu, cuda or cuda:N, got 'tpu'"),
        (no_change, ["a" * 3000], "expected at most 2,048 tokens, the model's positions, got 3,0"),
        (no_change, ["a", "--max-new-tokens", "2048"], "and 2048 of --max-new-tokens; ask a shorter text"),
        (no_change, ["a\udce4"], "expected text in UTF-8 for instruction, got: "),
        (write(FILE, "{"), ["a"], "expected JSON in"),
        (write(FILE, HEAD.to_json()), ["a"], "expected a classifier for labels without words, got LlamaFor"),
        (write(FILE, Asking(Template.custom("{a} {b}")).to_json()), ["x"], "give it: --field a=TEXT"),
        (
            write(FILE, Asking(WORDS.template, ("a", "b"), ("ab", "c")).to_json()),
            ["x"],
            "expected a word of one token for the label 'a'",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            ["a"],
            "expected a model's folder (config.json), a run's",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(
    change: Callable[[Path], Any],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(tmp_path)
    change(tmp_path)
    capsys.readouterr()
    assert cli.main(["ask", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert [line for line in captured.err.splitlines() if line.startswith("fedkseed ask: ")] == [
        captured.err.splitlines()[-1]
    ]
    assert captured.out == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ok\n\xff", "got other bytes in line 2"),
        (b"a" * (1 << 21), "expected lines of at most 1,048,576 bytes"),
    ],
)
def test_standard_input_that_is_no_text(
    data: bytes,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(tmp_path)
    feed(monkeypatch, data)
    assert cli.main(["ask", str(tmp_path), "-"]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(["ask", *arguments]) == 2
        return capsys.readouterr().err

    assert "got nothing there" in refused(str(tmp_path / "absent"), "a")
    (tmp_path / "file").write_text("")
    assert "got a file" in refused(str(tmp_path / "file"), "a")
    (tmp_path / "settings.json").write_text("{}")
    assert "expected a run with ledger.safetensors, got none" in refused(str(tmp_path), "a")
    save_model(tmp_path / "base")
    run = make_run(tmp_path / "run", tmp_path / "base", torch.float32)
    (run / "best.safetensors").unlink()
    assert "expected a run with best.safetensors" in refused(str(run), "a", "--best")
    for text in ('{"model": 5}', "[]"):
        (run / "settings.json").write_text(text)
        assert 'expected the base model under "model"' in refused(str(run), "a")
    (run / "settings.json").write_text("[" * 9999)
    assert "levels within each other" in refused(str(run), "a")
    (run / "settings.json").write_text(json.dumps({"model": str(tmp_path / "moved")}))
    assert "got nothing there; " in (said := refused(str(run), "a"))
    assert said.endswith("; the run's settings name this base, --base names another place\n")
    assert ask(capsys, run, "a", "--base", tmp_path / "base")
    save_model(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    assert "expected the folder's files to be whole" in refused(
        str(run), "a", "--base", str(tmp_path / "base")
    )


def test_a_masked_model_does_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert cli.main(["ask", str(tmp_path), "a"]) == 2
    assert "expected a model that writes text, got BertForMaskedLM" in capsys.readouterr().err
    (tmp_path / FILE).write_text(WORDS.to_json())
    assert cli.main(["ask", str(tmp_path), "a"]) == 2
    assert (
        "expected a template with [MASK], in whose place BertForMaskedLM answers" in capsys.readouterr().err
    )


def test_a_trainers_folder_is_the_model_in_it_whatever_lies_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Trainer's run along a pool has weights, and a ledger with its origin, in one folder."""
    save_model(tmp_path / "run")
    command = ["ask", str(tmp_path / "run"), "hello", "--max-new-tokens", "4"]
    assert cli.main(command) == 0
    before = capsys.readouterr().out
    Origin.of("owner/base").write(tmp_path / "run")
    assert cli.main(command) == 0
    assert capsys.readouterr().out == before
    assert cli.main([*command, "--base", "elsewhere"]) != 0
    assert "expected a run's folder with --best or --base" in capsys.readouterr().err
