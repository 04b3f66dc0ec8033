"""The README's commands for a model and data of one's own, run as they stand on tiny models."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_runs import dolly_rows, write_lines, write_llama, write_natural_instructions
from support.word_tokenizer import make_word_tokenizer
from transformers import BertConfig, LlamaForCausalLM

from fedkseed import Ledger, cli
from fedkseed.simulation.run_folder import BEST, LEDGER, METRICS

ROOT = Path(__file__).resolve().parent.parent
MOODS = {"good": " great", "bad": " terrible"}
CATEGORIES = ("closed_qa", "open_qa", "summarization")
#: What makes them runs of a second: the README's own lines say nothing of rounds.
SHORT = ["--num-rounds", "2", "--num-local-steps", "2", "--num-seeds", "16", "--num-threads", "1"]


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def commands() -> list[list[str]]:
    """The lines of the README's section that begin with the command."""
    section = (ROOT / "README.md").read_text().split("## Your model, your data, your device\n")[1]
    section = section.split("\n## ")[0]
    return [shlex.split(line)[1:] for line in re.findall(r"^    (fedkseed .*)$", section, re.M)]


def write_model(folder: Path, dtype: torch.dtype) -> None:
    write_llama(folder, dtype=dtype, words=MOODS.values())


def write_dolly() -> None:
    write_lines(Path("dolly.jsonl"), dolly_rows(300, CATEGORIES))


def write_sentences(
    moods: Sequence[str] = ("bad", "good"), adjectives: Sequence[str] = ("dull", "fine")
) -> None:
    with open("sentences.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "mood"])
        for number in range(120):
            writer.writerow([f"Evening {number} was {adjectives[number % 2]}", moods[number % 2]])


def test_the_commands_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    write_model(Path("my-model-bf16"), torch.bfloat16)
    write_dolly()
    write_sentences()
    train = {f"task{number}_count": 30 for number in range(3)}
    write_natural_instructions(Path("natural-instructions"), train, {"task3_count": 30})
    lines = commands()
    assert [line[0] for line in lines] == ["simulate"] * 3 + ["apply", "ask", "publish", "ask"]
    for line in lines:
        is_run = line[0] == "simulate"
        assert cli.main([*line, *(SHORT if is_run else [])]) == 0, (line, capsys.readouterr().err)
        printed = capsys.readouterr().out
        assert ("To rebuild it" in printed) == is_run
    assert re.match(r"(good|bad) 0\.\d+  (good|bad) 0\.\d+\n", printed), "the label's probabilities"
    for name, num_clients in (("dolly", 3), ("mood", 8), ("ni", 3)):
        run = tmp_path / "runs" / name
        assert len((run / METRICS).read_text().splitlines()) == 2
        assert json.loads((run / "settings.json").read_text())["clients_per_round"] == num_clients
        assert Ledger.load(run / LEDGER).family == Ledger.load(run / BEST).family == "rademacher"
    assert (tmp_path / "tuned" / "config.json").is_file()
    assert (tmp_path / "published" / "README.md").is_file()
    # The README applies one of them and asks two: so it goes with each.
    for name, base in (("dolly", "my-model"), ("mood", "my-model-bf16"), ("ni", "my-model")):
        ledger = str(tmp_path / "runs" / name / LEDGER)
        assert cli.main(["apply", ledger, "--base", base, "--out", f"applied-{name}"]) == 0
        content = json.loads((tmp_path / "runs" / name / "summary.json").read_text())["content"]
        assert f"content {content}" in capsys.readouterr().out
        answers = []
        for folder in (f"runs/{name}", f"applied-{name}"):
            assert cli.main(["ask", folder, "Evening 3 was fine", "--max-new-tokens", "4"]) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("kind", ["instructions", "classification"])
def test_a_paired_mode_trains_as_the_unpaired_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    write_dolly()
    write_sentences()
    own = {
        "instructions": ["--data", "dolly.jsonl"],
        "classification": [
            "--data",
            "sentences.csv",
            "--label",
            "mood",
            "--words",
            "good= great,bad= terrible",
        ],
    }[kind]
    losses = []
    for mode in ("streamed", "paired"):
        line = ["simulate", "--model", "my-model", *own, "--storage", mode, "--out", mode, *SHORT]
        assert cli.main(line) == 0
        rows = [json.loads(text) for text in (tmp_path / mode / METRICS).read_text().splitlines()]
        assert not any(row["num_skipped"] or row["failed"] for row in rows)
        losses.append([(row["train_loss"], row["evaluation"]["held_out_loss"]) for row in rows])
        assert json.loads((tmp_path / mode / "settings.json").read_text())["storage"] == mode
    for unpaired, paired in zip(*losses, strict=True):
        assert paired == pytest.approx(unpaired, rel=1e-5)


@pytest.mark.parametrize("change", [{"adjectives": ("grey", "fine")}, {"moods": ("awful", "great")}])
def test_a_run_goes_on_with_its_own_rows_alone(
    change: dict[str, Sequence[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    make_word_tokenizer([" bad good awful great grey"], 160).save_pretrained("my-model")
    write_sentences()
    line = ["simulate", "--model", "my-model", "--data", "sentences.csv", "--label", "mood", "--out", "run"]
    assert cli.main([*line, *SHORT]) == 0
    kept = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    write_sentences(**change)
    assert cli.main(["simulate", "--resume", "run"]) == 2
    assert "which the run in" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == kept
    write_sentences()
    assert cli.main(["simulate", "--resume", "run"]) == 0


def write_encoder(folder: Path, kind: str) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=160,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
    )
    getattr(transformers, kind)(config).save_pretrained(folder)
    make_word_tokenizer([], 160).save_pretrained(folder)


def test_rows_are_cut_at_the_positions_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_encoder(Path("encoder"), "BertForSequenceClassification")
    write_sentences()
    line = [
        "simulate",
        "--model",
        "encoder",
        "--data",
        "sentences.csv",
        "--label",
        "mood",
        "--classify",
        "head",
    ]
    assert cli.main([*line, *SHORT]) == 0, capsys.readouterr().err
    assert "prompts lost their beginning: over 6 tokens" in capsys.readouterr().out


def test_a_model_that_does_not_write_is_not_tuned_for_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_encoder(Path("encoder"), "BertForMaskedLM")
    write_dolly()
    assert cli.main(["simulate", "--model", "encoder", "--data", "dolly.jsonl", "--out", "run"]) == 2
    assert "expected a causal language model for instructions, got BertForMaskedLM" in capsys.readouterr().err
    assert not Path("run").exists()


def test_code_that_a_folder_names_is_not_trusted_since_its_settings_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    write_dolly()
    flags = ["--model", "my-model", "--data", "dolly.jsonl", "--out", "run", "--trust-remote-code"]
    threads = torch.get_num_threads()
    try:
        assert cli.main(["simulate", *flags, *SHORT]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    for command in ("simulate --resume", "fedkseed apply", "fedkseed ask"):
        (line,) = [line for line in printed if command in line]
        assert line.endswith(" --trust-remote-code")
    config = json.loads(Path("my-model/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
    Path("my-model/config.json").write_text(json.dumps(config))
    assert cli.main(["simulate", "--resume", "run"]) == 2
    assert "read that code, then pass --trust-remote-code" in capsys.readouterr().err


@pytest.mark.parametrize("scored", ["held-out rows", "unseen clients alone"])
def test_weights_that_hold_nan_are_named_before_anything_is_tuned(
    scored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    model = LlamaForCausalLM.from_pretrained("my-model")
    model.lm_head.weight.data[3, 2] = float("nan")
    model.save_pretrained("my-model")
    write_dolly()
    flags = ["--model", "my-model", "--data", "dolly.jsonl", "--out", "run", *SHORT]
    if scored == "unseen clients alone":
        flags += ["--held-out", "0", "--held-out-clients", "category=open_qa"]
    assert cli.main(["simulate", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected a finite loss before tuning, got nan; lm_head.weight hold NaN or infinity" in error
    assert not Path("run").exists()


def test_a_run_goes_on_where_its_model_and_data_lie_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    write_dolly()
    line = ["simulate", "--model", "my-model", "--data", "dolly.jsonl", "--out"]
    assert cli.main([*line, "whole", *SHORT]) == 0
    assert cli.main([*line, "moved", *SHORT, "--num-rounds", "0"]) == 0
    settings = json.loads(Path("moved/settings.json").read_text())
    Path("moved/settings.json").write_text(json.dumps({**settings, "num_rounds": 2}))
    Path("my-model").rename("elsewhere")
    Path("dolly.jsonl").rename("rows.jsonl")
    capsys.readouterr()
    assert cli.main(["simulate", "--resume", "moved"]) == 2
    assert "dolly.jsonl" in capsys.readouterr().err
    assert cli.main(["simulate", "--resume", "moved", "--data", "rows.jsonl"]) == 2
    assert f"expected a model folder at {tmp_path / 'my-model'}, got nothing there" in capsys.readouterr().err
    now = ["--model", "elsewhere", "--data", "rows.jsonl"]
    assert cli.main(["simulate", "--resume", "moved", *now]) == 0
    told = (
        f"--resume {tmp_path / 'moved'} --data {tmp_path / 'rows.jsonl'} --model {tmp_path / 'elsewhere'}\n"
    )
    assert told in capsys.readouterr().out
    for name in (LEDGER, METRICS):
        assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_last_line_asks_with_every_field_of_a_template_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    write_dolly()
    Path("prompt.txt").write_text("{category}: {instruction}")
    own = ["--data", "dolly.jsonl", "--template-file", "prompt.txt", "--output", "response"]
    assert cli.main(["simulate", "--model", "my-model", *own, "--out", "run", *SHORT]) == 0
    (line,) = re.findall(r"fedkseed (ask .*)$", capsys.readouterr().out, re.M)
    assert line == f"ask {tmp_path / 'run' / 'model'} TEXT --field category=TEXT"
    assert cli.main(["apply", "run", "--base", "my-model", "--out", "run/model"]) == 0
    assert cli.main(shlex.split(line)) == 0
