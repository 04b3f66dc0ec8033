"""The demo from the command line, on a tiny random model and tasks written here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedkseed.data import Example, FetchError, ModelError, Task
from fedkseed.scenarios import demo
from fedkseed.simulation import RoundResult

SMALL = [
    "--rounds",
    "2",
    "--clients-per-round",
    "2",
    "--local-steps",
    "2",
    "--num-seeds",
    "16",
    "--threads",
    "1",
]
FEW_ROWS = ["--round-rows", "1", "--final-rows", "2", "--generate-rows", "1"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=98,
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


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load_smollm2", lambda dtype: (make_model(dtype), make_tokenizer()))
    tasks = [make_task(name) for name in ("red", "blue", "green")], [make_task("grey")]
    monkeypatch.setattr(demo, "load_instruction_tasks", lambda tokenizer: tasks)


@pytest.mark.usefixtures("_tiny")
def test_a_run_prints_its_tables_and_writes_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        status = demo.main([*SMALL, *FEW_ROWS, "--out", str(tmp_path / "new" / "run")])
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "new" / "run" / "demo.json").read_text("utf-8"))

    assert len(record["rounds"]) == 2
    down, up = 2 * (132 + 4 * 16 + 2 * 2), 2 * (60 + 4 * 2)
    assert [(row["bytes_down"], row["bytes_up"]) for row in record["rounds"]] == [(down, up)] * 2
    assert record["bytes"]["down"] == 2 * down
    num_parameters = sum(parameter.numel() for parameter in make_model(torch.float32).parameters())
    assert record["model"]["num_parameters"] == num_parameters
    assert record["bytes"]["by_weights"] == 2 * 2 * 2 * 4 * num_parameters
    assert record["config"]["num_seeds"] == 16
    scores = record["scores"]
    assert set(scores) == {"before", "after", "majority answer"}
    assert scores["before"]["held_out_loss"] != scores["after"]["held_out_loss"]
    assert scores["majority answer"]["held_out_loss"] is None

    lines = printed.splitlines()
    header = next(i for i, line in enumerate(lines) if line == demo.round_header())
    assert lines[header + 1 : header + 3] == [
        demo.round_row(RoundResult(**{**row, "clients": tuple(row["clients"])})) for row in record["rounds"]
    ]
    for name in ("before", "after", "majority answer"):
        assert any(line.startswith(name) for line in lines)
    assert f"{2 * down:,} down and {2 * up:,} up" in printed


@pytest.mark.usefixtures("_tiny")
def test_ctrl_c_ends_it_cleanly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Workbench, "train_loss", interrupt)
    assert (
        demo.main([*SMALL, *FEW_ROWS, "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)])
        == 130
    )
    captured = capsys.readouterr()
    assert captured.err.endswith("Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("error", [FetchError("no index"), OSError("disk full"), ModelError("damaged")])
def test_an_expected_error_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: torch.dtype) -> None:
        raise error

    monkeypatch.setattr(demo, "load_smollm2", fail)
    assert demo.main(SMALL[:-2]) == 2
    assert capsys.readouterr().err == f"demo: {error}\n"


def test_a_model_folder_that_is_not_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert demo.main(["--model", str(tmp_path / "absent")]) == 2
    assert "expected a model folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "finite lr of at least 0"),
        (["--eps", "0"], "expected eps in"),
        (["--rounds", "-1"], "num_rounds"),
        (["--clients-per-round", "0"], "clients_per_round"),
        (["--num-seeds", "70000"], "num_seeds"),
        (["--final-rows", "0"], "--final-rows: expected at least 1, got 0"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--dtype", "int8"], "invalid choice"),
        (["--prompt", "none"], "invalid choice"),
        (["--colour"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_fetched(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_quick_replaces_only_what_is_left_open() -> None:
    options = demo.parse_arguments(["--quick", "--rounds", "5"])
    assert options.config.num_rounds == 5
    assert (options.config.num_local_steps, options.config.lr) == (demo.QUICK.local_steps, demo.QUICK.lr)
    full = demo.parse_arguments(["--lr", "3e-6"]).config
    assert (full.num_rounds, full.lr) == (demo.FULL.rounds, 3e-6)


def test_the_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["--help"])
    assert caught.value.code == 0
    assert "a run of about a minute" in capsys.readouterr().out
