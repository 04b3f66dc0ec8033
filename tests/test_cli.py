"""The command line on a tiny random model and tasks written here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.data_samples import make_tokenizer
from support.tiny_language_model import make_model, make_task

from fedkseed import Inplace, Ledger, ModelIdentity, Streamed, cli
from fedkseed.data import FetchError, ModelError
from fedkseed.data.models import load_causal_lm_weights
from fedkseed.scenarios import built_in
from fedkseed.scenarios import run as scenario
from fedkseed.scenarios.instructions import InstructionBench
from fedkseed.scenarios.presets import QUICK, quick_of
from fedkseed.scenarios.settings import RunSettings, SettingsError, given_values, values_of_file
from fedkseed.simulation.run_folder import CLIENTS, LEDGER, METRICS, TIMINGS
from fedkseed.storage import STORAGE_MODES, StorageOptions

# Two names of version 0.1 among them, which are still taken.
SMALL = ["--rounds", "2", "--clients-per-round", "2", "--num-seeds", "16", "--threads", "1"]
IN_FP32 = Streamed(compute_dtype=torch.float32)
FEW_ROWS = ["--round-rows", "1", "--final-rows", "2", "--generate-rows", "1"]


@pytest.fixture(autouse=True)
def _same_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    make_model(torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [make_task(name) for name in ("red", "blue", "green")], [make_task("grey")]
    monkeypatch.setattr(built_in, "load_instruction_tasks", lambda tokenizer: tasks)


def simulate(base: Path, out: Path, *more: str) -> int:
    return cli.main(["simulate", *SMALL, *FEW_ROWS, "--model", str(base), "--out", str(out), *more])


@pytest.mark.usefixtures("_tasks")
def test_simulate_then_apply_inspect_and_plot(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "first"
    assert simulate(base, out, "--rouge-every", "2") == 0
    printed = capsys.readouterr().out
    summary = json.loads((out / scenario.SUMMARY).read_text("utf-8"))
    rows = [json.loads(line) for line in (out / METRICS).read_text("utf-8").splitlines()]
    assert [row["round"] for row in rows] == [0, 1]
    assert all("seconds" not in name for row in rows for name in row)
    assert set(rows[0]["evaluation"]) == {"held_out_loss"}
    assert set(rows[1]["evaluation"]) == {"held_out_loss", "rouge_l", "exact_match"}
    assert len((out / TIMINGS).read_text("utf-8").splitlines()) == 2
    assert summary["bytes"]["down"] == sum(row["bytes_down"] for row in rows)
    num_parameters = sum(parameter.numel() for parameter in make_model(torch.float32).parameters())
    assert summary["bytes"]["by_weights"] == 2 * 2 * 2 * 4 * num_parameters
    assert summary["scores"]["before"]["held_out_loss"] != summary["scores"]["after"]["held_out_loss"]
    for name in ("before", "after", "majority answer"):
        assert any(line.startswith(name) for line in printed.splitlines())
    assert f"apply {out / LEDGER} --base {base}" in printed
    assert f"ask {out / 'model'}" in printed

    assert cli.main(["inspect", str(out / LEDGER)]) == 0
    assert "16" in capsys.readouterr().out

    tuned = tmp_path / "tuned"
    assert cli.main(["apply", str(out / LEDGER), "--base", str(base), "--out", str(tuned)]) == 0
    assert (tuned / "config.json").is_file()
    assert cli.main(["apply", str(out / LEDGER), "--base", str(tuned), "--out", str(tmp_path / "twice")]) == 2
    assert "expected weights of content" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()

    assert cli.main(["plot", str(out)]) == 0
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_tasks")
def test_an_interrupted_run_resumes_to_the_same_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(base, tmp_path / "whole") == 0
    steps = 0
    walk = InstructionBench.train_loss

    def interrupted(self: object, *arguments: object) -> float:
        nonlocal steps
        steps += 1
        if steps > 9:  # two evaluations a step, eight in the first round
            raise KeyboardInterrupt
        return walk(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(InstructionBench, "train_loss", interrupted)
        assert simulate(base, tmp_path / "cut") == 130
    said = capsys.readouterr().err
    assert "Interrupted" in said
    assert said.endswith(f"fedkseed simulate --resume {tmp_path / 'cut'}\n")
    assert len((tmp_path / "cut" / METRICS).read_text("utf-8").splitlines()) == 1
    assert cli.main(["simulate", "--resume", str(tmp_path / "cut")]) == 0
    assert "after 1 round\n" in capsys.readouterr().out
    for name in (LEDGER, METRICS, "server.state"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.usefixtures("_tasks")
def test_tensorboard_gets_every_round(base: Path, tmp_path: Path) -> None:
    assert simulate(base, tmp_path / "run", "--tensorboard") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("held_out_loss")] == [1, 2]


@pytest.mark.usefixtures("_tasks")
def test_a_folder_with_something_in_it_is_left_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert simulate(base, tmp_path / "full") == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [FetchError("no index"), OSError("disk full"), ModelError("damaged")])
def test_an_expected_error_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(scenario, "make_bench", fail)
    assert cli.main(["simulate", *SMALL[:-2], "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"fedkseed simulate: {error}\n"
    assert cli.main(["simulate", *SMALL[:-2], "--out", str(tmp_path / "again"), "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "--lr", "-1"], "finite lr of at least 0"),
        (["simulate", "--eps", "0"], "expected eps in"),
        (["simulate", "--rounds", "-1"], "num_rounds"),
        (["simulate", "--clients-per-round", "0"], "clients_per_round"),
        (["simulate", "--num-seeds", "70000"], "num_seeds"),
        (["simulate", "--final-rows", "0"], "expected final_rows in [1, "),
        (["simulate", "--threads", "-1"], "num_threads in"),
        (["simulate", "--resume", "absent"], "expected the folder of a run"),
        (["simulate", "--resume", "absent", "--lr", "1"], "without other settings"),
        (["simulate", "--config", "absent.toml"], "expected a TOML file"),
        (["inspect", "absent"], "absent"),
        (["apply", "absent", "--base", "x", "--out", "y"], "absent"),
        (["plot", "absent"], "expected a line a round in absent"),
        (["bench", "--repeats", "0"], "--repeats of at least 1"),
    ],
)
def test_bad_arguments_are_refused_with_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_names_the_file_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent.safetensors"
    assert cli.main(["apply", str(absent), "--base", "x", "--out", "y"]) == 2
    expected = f"fedkseed apply: expected to read or write {absent}, got: No such file or directory\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "arguments", [["simulate", "--dtype", "int8"], ["simulate", "--colour"], ["unknown"], []]
)
def test_what_argparse_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: fedkseed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["", "info", "data", "data show", "simulate", "apply", "ask", "inspect", "plot", "bench"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert "usage: fedkseed" in capsys.readouterr().out


def test_info_names_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "contract_version" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_bench_prints_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--megaparameters", "1", "--num-seeds", "2", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "perturb" in printed
    assert "rebuild, K = 2" in printed


@pytest.mark.usefixtures("_tasks")
def test_a_run_of_signs_on_streamed_weights(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = {"family": "rademacher", "storage": "streamed-fp32", "dtype": "bfloat16"}
    flags = [text for name, value in chosen.items() for text in (f"--{name}", value)]
    assert simulate(base, run, *flags) == 0
    assert chosen.items() <= json.loads((run / "settings.json").read_text("utf-8")).items()
    assert Ledger.load(run / LEDGER).family == "rademacher"
    summary = json.loads((run / scenario.SUMMARY).read_text("utf-8"))
    assert cli.main(["apply", str(run / LEDGER), "--base", str(base), "--out", str(tmp_path / "tuned")]) == 0
    tuned = load_causal_lm_weights(tmp_path / "tuned", torch.bfloat16)
    assert ModelIdentity.of(tuned).content.hex() == summary["content"]


@pytest.mark.usefixtures("_tasks")
@pytest.mark.parametrize(("dtype", "mode"), [("float32", Inplace()), ("bfloat16", IN_FP32)])
def test_the_storage_mode_is_chosen_said_and_kept(
    dtype: str, mode: StorageOptions, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, explicit = tmp_path / "run", tmp_path / "explicit"
    assert simulate(base, run, "--dtype", dtype) == 0
    said = f"Storage mode (auto): {mode}"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    assert json.loads((run / "settings.json").read_text("utf-8"))["storage"] == "auto"
    assert json.loads((run / CLIENTS).read_text("utf-8"))["storage"] == repr(mode)
    (name,) = [name for name, options in STORAGE_MODES.items() if options == mode]
    assert simulate(base, explicit, "--dtype", dtype, "--storage", name) == 0
    assert f"Storage mode: {mode}" in capsys.readouterr().out
    for file in (LEDGER, METRICS, CLIENTS, "server.state"):
        assert (run / file).read_bytes() == (explicit / file).read_bytes(), file
    assert cli.main(["simulate", "--resume", str(run)]) == 0
    assert said in capsys.readouterr().out
    assert simulate(base, tmp_path / "named", "--storage", "auto", "--rounds", "0") == 0


def test_toml_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('rounds = 5\nlr = 1\nsampling = "pro"\n')
    values = given_values({"num_rounds": None, "seed": 9}, quick=True, toml=path)
    assert values == {**quick_of("instructions"), "num_rounds": 5, "lr": 1.0, "sampling": "pro", "seed": 9}
    assert given_values({"data": "rows.jsonl"}, quick=True, toml=None) == {**QUICK, "data": "rows.jsonl"}
    assert given_values({"num_rounds": 3}, quick=False, toml=path)["num_rounds"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "got 'colour'; known are data"),
        ("batch_sise = 1", "did you mean batch_size"),
        ("rounds = 1\nnum_rounds = 2", "expected num_rounds in .* once"),
        ('rounds = "two"', "expected num_rounds"),
        ("rounds = true", "expected num_rounds"),
        ('sampling = "none"', "to be one of uniform, pro"),
        ("rounds =", "expected a TOML file"),
        ("[run]\nrounds = 1", "got 'run'"),
    ],
)
def test_bad_toml_names_the_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        values_of_file(path)


def test_settings_are_checked_when_made() -> None:
    with pytest.raises(SettingsError, match="expected workers in"):
        RunSettings.of({"workers": 0}, num_clients=16)
