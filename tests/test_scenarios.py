"""Scenarios as files: what one may say, what is refused, which runs follow, what the command lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedkseed import cli
from fedkseed.scenarios.experiments.scenario import Scenario, library
from fedkseed.scenarios.options import SettingsError

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
        ("seeds = [3, 1]", "seeds = [3, 3]", "seeds as different integers"),
        ("seeds = [3, 1]", "seeds = []", "seeds as different integers"),
        ("seeds = [3, 1]", "seeds = [true]", "seeds as different integers"),
        ("needs", "need", "got 'need'; did you mean needs?; settings of runs stand under [settings]"),
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
        ("seeds", "seeds =", "got: expected TOML"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(SettingsError) as caught:
        Scenario.read(written(tmp_path, TEXT.replace(old, new)))
    assert message in str(caught.value)


def test_every_scenario_of_the_package_is_whole_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scenarios"]) == 0
    listed = capsys.readouterr().out.splitlines()
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
        (["show", "none.toml"], "expected a scenario, got: [Errno 2]"),
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


def test_the_file_on_the_page_is_a_scenario(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "scenarios.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    scenario = Scenario.read(written(tmp_path, text))
    assert len(scenario.runs()) == 9
