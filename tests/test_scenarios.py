"""Scenarios as files: what one may say, what is refused, which runs follow, what the command lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedkseed import cli
from fedkseed.scenarios.experiments.scenario import Scenario, library
from fedkseed.scenarios.options import SettingsError
from fedkseed.scenarios.wording import amount, counted, duration

TEXT = """
title = "Two ways"
about = \"\"\"
"Quoted", and a second line.\"\"\"
needs = "rows"
seeds = [3, 1]

[settings]
num_rounds = 2
lr = 3e-7
template = "Review: {text}\\nMood:"

[variants.fedkseed]

[variants."pro-0.5"]
title = "Pro"
sampling = "pro"
lr = 1

[shape]
architecture = "LlamaForCausalLM"
hidden_size = 64
"""


def written(folder: Path, text: str = TEXT) -> Path:
    path = folder / "two-ways.toml"
    path.write_text(text)
    return path


def test_a_file_says_which_runs_there_are(tmp_path: Path) -> None:
    scenario = Scenario.read(written(tmp_path))
    assert (scenario.name, scenario.title, scenario.needs) == ("two-ways", "Two ways", "rows")
    assert [variant.title for variant in scenario.variants.values()] == ["fedkseed", "Pro"]
    runs = [(run.variant, run.seed, run.values["lr"]) for run in scenario.runs()]
    assert runs == [("fedkseed", 3, 3e-7), ("pro-0.5", 3, 1.0), ("fedkseed", 1, 3e-7), ("pro-0.5", 1, 1.0)]
    assert all(run.values["seed"] == run.seed for run in scenario.runs())
    assert scenario.shape is not None
    assert (scenario.shape.architecture, scenario.shape.config) == ("LlamaForCausalLM", {"hidden_size": 64})


def test_the_text_of_a_scenario_says_the_same(tmp_path: Path) -> None:
    scenario = Scenario.read(written(tmp_path))
    again = Scenario.read(written(tmp_path, scenario.text()))
    assert again == scenario


def test_settings_of_a_call_go_before_those_of_variants_and_paths_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    scenario = Scenario.read(written(tmp_path)).changed({"lr": 0.5, "data": "rows.jsonl", "device": "cpu"})
    assert {run.values["lr"] for run in scenario.runs()} == {0.5}
    assert {run.values["data"] for run in scenario.runs()} == {str(tmp_path.resolve() / "rows.jsonl")}
    assert "device" not in scenario.text(), "free to differ from call to call"


def test_a_scenario_is_limited_to_variants_and_seeds(tmp_path: Path) -> None:
    scenario = Scenario.read(written(tmp_path))
    limited = scenario.limited(["pro-0.5"], [7])
    assert [(run.variant, run.seed) for run in limited.runs()] == [("pro-0.5", 7)]
    assert scenario.limited() == scenario
    with pytest.raises(SettingsError, match="did you mean pro-0.5"):
        scenario.limited(["pro-5"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Two ways"', "", 'expected a title = "..." in two-ways.toml'),
        ("seeds = [3, 1]", "seeds = [3, 3]", "seeds in two-ways.toml as different integers"),
        ("seeds = [3, 1]", "seeds = []", "seeds in two-ways.toml as a list of one integer or more, got []"),
        ("seeds = [3, 1]", "seeds = 3", "seeds in two-ways.toml as a list of one integer or more, got 3"),
        ("seeds = [3, 1]", "seeds = [true]", "seeds in two-ways.toml as different integers"),
        ("needs", "need", "got 'need'; settings of runs stand under [settings]; did you mean needs?"),
        ("num_rounds", "num_round", "[settings] of two-ways.toml, got 'num_round'; did you mean num_rounds?"),
        ("num_rounds = 2", "num_rounds = 2.5", "expected num_rounds in [settings] of two-ways.toml as int"),
        ("num_rounds = 2", "seed = 2", "expected seeds = [...] at the top"),
        (
            'sampling = "pro"',
            'sampling = "pr"',
            "[variants.pro-0.5] of two-ways.toml to be one of",
        ),
        ("lr = 1\n", "lr = -1\n", "variant pro-0.5: expected"),
        ('[variants."pro-0.5"]', '[variants."Pro/1"]', "expected a variant's name of small letters"),
        ('architecture = "LlamaForCausalLM"', "", "expected architecture in [shape]"),
        ("hidden_size = 64", "rope = { a = 1 }", "expected plain values in [shape]"),
        ("seeds", "seeds =", "expected TOML in "),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(SettingsError) as caught:
        Scenario.read(written(tmp_path, TEXT.replace(old, new)))
    assert message in str(caught.value)
    assert str(caught.value).count("expected") == 1


def test_every_scenario_of_the_package_is_whole_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scenarios"]) == 0
    *listed, empty, hint = capsys.readouterr().out.splitlines()
    assert (empty, hint[:31]) == ("", "fedkseed scenarios show NAME pr")
    assert len(listed) == len(library()) >= 1
    for line, (name, path) in zip(listed, library().items(), strict=True):
        scenario = Scenario.read(path)
        assert line.split()[0] == name
        assert scenario.title in line
        assert ("(needs --data)" in line) == bool(scenario.needs)
        assert bool(scenario.needs) == (not all("data" in run.values for run in scenario.runs()))


def test_a_scenario_is_shown_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scenarios", "show", str(written(tmp_path))]) == 0
    assert capsys.readouterr().out == TEXT
    assert cli.main(["scenarios", "show", "instructions"]) == 0
    assert capsys.readouterr().out == library()["instructions"].read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "instruction"], "did you mean instructions?"),
        (["show", "none.toml"], "expected a scenario's file at none.toml, got: No such file or directory"),
        (["run", "two-ways.toml"], "expected --data with the scenario two-ways: rows"),
        (["run", "two-ways.toml", "--set", "lr"], "expected --set KEY=VALUE, got 'lr'"),
        (["run", "two-ways.toml", "--set", "num_round=1"], "got 'num_round'; did you mean num_rounds?"),
        (
            ["run", "two-ways.toml", "--set", "num_rounds=1.5"],
            "expected num_rounds in --set as int, got '1.5'",
        ),
        (["run", "two-ways.toml", "--set", "paper-rouge=yes"], "expected paper_rouge in --set as bool"),
        (["run", "two-ways.toml", "--set", "lr=1", "--set", "lr=2"], "expected --set lr once"),
        (["run", "two-ways.toml", "--set", "seed=1"], "expected --seeds in place of --set seed"),
        (["run", "two-ways.toml", "--seeds", "1,a", "--data", "x"], "expected --seeds as integers"),
        (["run", "two-ways.toml", "--seeds", "-1"], "expected --seeds as different integers in [0, 2^63)"),
        (["run", "two-ways.toml", "--seeds", ""], "expected --seeds as integers, got ''"),
        (["run", "two-ways.toml", "--only", ""], "expected variants out of fedkseed, pro-0.5, got ''"),
        (
            ["run", "two-ways.toml", "--only", "x", "--data", "x"],
            "expected variants out of fedkseed, pro-0.5",
        ),
    ],
)
def test_a_call_that_cannot_stand_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    assert cli.main(["scenarios", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not Path("runs").exists()


def test_a_second_setting_without_its_flag_is_told_with_the_usage_of_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["scenarios", "run", "instructions", "--set", "lr=1", "eps=1"])
    told = capsys.readouterr().err
    assert told.startswith("usage: fedkseed scenarios run ")
    assert told.endswith("unrecognized arguments: eps=1; --set takes one KEY=VALUE: repeat it for each\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (90, "1.5 min"),
        (7200, "2 h"),
        (86400, "1 day"),
        (3e5, "3.47 days"),
        (7.69e3 * 86400, "21.1 years"),
        (1e12, "31,688 years"),
    ],
)
def test_times_are_told_in_the_largest_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_and_amounts_are_told_in_plain_digits() -> None:
    assert [counted(number, "round") for number in (0, 1, 1000)] == ["0 rounds", "1 round", "1,000 rounds"]
    assert [amount(number) for number in (0.0123, 0.5, 42.42, 1234.5)] == ["0.0123", "0.5", "42.4", "1,234"]


def test_the_file_on_the_page_is_a_scenario(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "scenarios.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    scenario = Scenario.read(written(tmp_path, text))
    assert len(scenario.runs()) == 9
