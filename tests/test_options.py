"""The chain of settings: every number of a run is declared once, and can be set wherever settings are."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedkseed import ServerConfig, SimulationConfig, cli
from fedkseed.data.own import DataChoice
from fedkseed.federation.config import RoundConfig
from fedkseed.scenarios import report
from fedkseed.scenarios.baselines.settings import LEARNING_RATES, BaselineSettings
from fedkseed.scenarios.options import SettingsError, checked_values
from fedkseed.scenarios.settings import OLD_NAMES, OPTIONS, RunSettings, values_of_file

#: Another value than the default for each field of `ServerConfig` but those that no user sets.
OTHERS: dict[str, Any] = {
    "clients_per_round": 3,
    "num_local_steps": 7,
    "lr": 0.25,
    "eps": 0.125,
    "max_abs_g": 8.0,
    "weighting": "equal",
    "sampling": "pro",
    "family": "rademacher",
    "pro_clip": 2.5,
    "pro_start": 0.5,
    "median_clip": 4.0,
    "share_cap": 2.0,
}
NOT_SET = {"num_clients", "run_id"}


def flags_of(values: dict[str, Any]) -> list[str]:
    return [text for name, value in values.items() for text in ("--" + name.replace("_", "-"), str(value))]


def parsed(*arguments: str) -> dict[str, Any]:
    options = cli.make_parser().parse_args(["simulate", *arguments])
    return {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}


def test_every_field_of_the_server_can_be_set_from_flags_and_files(tmp_path: Path) -> None:
    fields = {entry.name for entry in dataclasses.fields(ServerConfig)}
    assert fields - NOT_SET == set(OTHERS), "a field of ServerConfig that this test does not set"
    (tmp_path / "run.toml").write_text(
        "".join(f"{name} = {json.dumps(value)}\n" for name, value in OTHERS.items())
    )
    for values in (parsed(*flags_of(OTHERS)), values_of_file(tmp_path / "run.toml")):
        config = RunSettings.of(values, num_clients=16).federation.server_config(16)
        assert {name: getattr(config, name) for name in OTHERS} == OTHERS
        assert config.num_clients == 16


@pytest.mark.parametrize("name", OPTIONS)
def test_every_setting_has_a_flag_and_a_meaning(name: str) -> None:
    option = OPTIONS[name]
    assert option.meaning
    text = next(iter(option.choices), {int: "1", float: "0.5", str: "text", bool: ""}[option.type])
    for spelled in (name, *option.old_names):
        arguments = ["--" + spelled.replace("_", "-"), *([text] if text else [])]
        assert parsed(*arguments) == {name: option.type(text) if text else True}


def test_a_number_of_a_run_is_declared_by_one_class() -> None:
    declared = [
        name
        for cls in (RoundConfig, ServerConfig, SimulationConfig, BaselineSettings, RunSettings, DataChoice)
        for name in inspect.get_annotations(cls)
    ]
    assert len(declared) == len(set(declared))
    assert set(OPTIONS) == set(declared) - NOT_SET - {"federation", "choice", "baseline"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "fedit", "sampling": "pro"}, "expected sampling uniform with method fedit, got pro"),
        ({"method": "fedavg", "directions": 4}, "expected directions 1 with method fedavg, got 4"),
        ({"directions": 2}, "expected directions 1 with method fedkseed, got 2"),
        ({"method": "fedzo", "optimizer": "adam"}, "expected optimizer auto with method fedzo, got adam"),
        ({"local_epochs": 1}, "expected local_epochs 0 with method fedkseed, got 1"),
    ],
)
def test_a_setting_that_its_method_has_no_use_for_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        RunSettings.of(values, num_clients=16)


def test_a_first_order_method_begins_with_a_learning_rate_of_its_own() -> None:
    for method, lr in LEARNING_RATES.items():
        assert RunSettings.of({"method": method}, num_clients=16).federation.lr == lr
        assert RunSettings.of({"method": method, "lr": 0.5}, num_clients=16).federation.lr == 0.5
    zeroth = [
        RunSettings.of({"method": method}, num_clients=16).federation.lr for method in ("fedzo", "fedkseed")
    ]
    assert zeroth[0] == zeroth[1]


def test_settings_come_back_from_their_values() -> None:
    given = {"data": "rows.jsonl", "label": "mood", "storage": "chained", "num_rounds": 3, "workers": 2}
    settings = RunSettings.of(given, num_clients=5)
    values = json.loads(json.dumps(settings.values()))
    assert given.items() <= values.items()
    assert RunSettings.of(checked_values(values, OPTIONS, "settings.json"), num_clients=5) == settings
    assert (settings.federation.clients_per_round, settings.final_rows) == (5, 80)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"num_round": 1}, "expected only known keys in there, got 'num_round'; did you mean num_rounds?"),
        ({"rounds": 1, "num_rounds": 1}, "expected num_rounds in there once, got it as num_rounds too"),
        ({"model": 5}, "expected model in there as str, got 5"),
        ({"final_rows": 1.5}, "expected final_rows in there as int, got 1.5"),
        ({"workers": True}, "expected workers in there as int, got True"),
        ({"dtype": "int8"}, "expected dtype in there to be one of float32, .*, got 'int8'"),
        ({"sampling": "pr"}, "to be one of uniform, pro, got 'pr'; did you mean pro?"),
        ({"lr": 10**400}, "expected lr in there as float, got 1000"),
        ({"model": ["x" * 1000]}, r"expected model in there as str, got \['x{75}\.\.\.$"),
    ],
)
def test_a_wrong_setting_names_the_key_and_the_nearest_right_one(found: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        checked_values(found, OPTIONS, "there")


def test_old_names_are_taken() -> None:
    assert checked_values({old: 1 for old in ("rounds", "local_steps", "threads")}, OPTIONS, "there") == {
        "num_rounds": 1,
        "num_local_steps": 1,
        "num_threads": 1,
    }
    assert set(OLD_NAMES.values()) <= set(OPTIONS)


def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["simulate", "--batch-sise", "3"])
    assert caught.value.code == 2
    assert "unrecognized option --batch-sise; did you mean --batch-size?" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_says_amx_where_it_is(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that began on a processor with it may go on elsewhere."""
    monkeypatch.setattr(report, "has_amx", lambda: is_there)
    bench: Any = SimpleNamespace(model=torch.nn.Linear(2, 2), names=["a"], notes=[])
    text = report.start_text(RunSettings.of({"autocast": "bfloat16"}, num_clients=16), bench)
    assert "forward passes in bfloat16 by autocast" in text
    assert ("autocast (AMX)" in text) == is_there
    assert "AMX" not in report.start_text(RunSettings.of({"autocast": "off"}, num_clients=16), bench)
