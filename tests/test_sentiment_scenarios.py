"""The scenarios of sentences: what their variants have in common, and a short run of each on stand-ins."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.word_tokenizer import make_word_tokenizer
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fedkseed import cli
from fedkseed.data import built_in_models
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.sentiment import FILES, LABELS, TEMPLATE, WORDS
from fedkseed.scenarios import built_in
from fedkseed.scenarios.baselines.costs import forward_passes
from fedkseed.scenarios.experiments.scenario import Scenario, library
from fedkseed.scenarios.settings import RunSettings

#: Settings that a central variant of the ablation has to change with its method.
CENTRAL = {"method", "lr", "directions", "num_local_steps"}
SIZE = 160


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings_of(name: str) -> dict[str, RunSettings]:
    scenario = Scenario.read(library()[name])
    return {run.variant: RunSettings.of(run.values, len(FILES)) for run in scenario.runs()}


def test_each_cell_of_the_ablation_differs_in_one_factor() -> None:
    scenario = Scenario.read(library()["ablation"])
    changed = {name: set(variant.settings) for name, variant in scenario.variants.items()}
    assert changed.pop("base") == set()
    central = [name for name in changed if name.startswith("directions")]
    assert all(changed.pop(name) <= CENTRAL for name in central)
    assert all(len(keys) == 1 for keys in changed.values())
    assert {"num_seeds", "sampling", "family"} == set().union(*changed.values())


def test_central_cells_have_as_many_forward_passes_in_each_round() -> None:
    rounds = [{"clients": [0, 1, 2, 3]}]
    found = {
        name: (settings.federation.num_rounds, forward_passes(settings, [100] * 4, rounds))
        for name, settings in settings_of("ablation").items()
    }
    assert len({repr(value) for value in found.values()}) == 1, found


def test_sentences_are_tuned_in_few_client_steps_and_scored_on_many_rows() -> None:
    for name, most_steps, rows in (("sentiment-small", 450, 200), ("bert-sentiment", 450, 300)):
        for settings in settings_of(name).values():
            config = settings.federation
            assert config.num_rounds * config.clients_per_round * config.num_local_steps <= most_steps
            assert settings.final_rows >= rows
            assert (settings.dtype, settings.autocast) == ("float32", "off")


def sentences() -> FederatedData:
    def rows(client: str, count: int) -> tuple[Row, ...]:
        return tuple(Row({"text": f"{client} {index}"}, LABELS[index % 2]) for index in range(count))

    clients = tuple(ClientRows(name, rows(name, 9), rows(f"held {name}", 3)) for name in FILES)
    return FederatedData("classification", clients, (), TEMPLATE, LABELS, WORDS)


def save_stand_in(folder: Path, kind: type[PreTrainedModel]) -> None:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {
        "vocab_size": SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    kind(kind.config_class(**sizes)).save_pretrained(folder)
    tokenizer = make_word_tokenizer([" terrible great positive negative"], SIZE - 1)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)


def shortened(folder: Path, name: str) -> str:
    """A file of the scenario with one round of one step of two rows; a variant without rounds has none."""
    short = Scenario.read(library()[name]).changed(
        {"num_local_steps": 1, "batch_size": 2, "num_seeds": 8, "num_threads": 1, "final_rows": 3}
    )
    path = folder / "short.toml"
    path.write_text(short.text().replace(f"num_rounds = {short.settings['num_rounds']}", "num_rounds = 1"))
    return str(path)


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("sentiment-small", ("fedkseed", "first-order", "review")),
        ("bert-sentiment", ("fedkseed", "first-order")),
        ("ablation", ("base", "pro", "directions-4")),
    ],
)
def test_a_scenario_of_sentences_runs(
    name: str,
    variants: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(built_in, "load_sentiment", sentences)
    save_stand_in(
        tmp_path / "model", LlamaForCausalLM if name == "sentiment-small" else BertForSequenceClassification
    )
    for model in built_in_models.BUILT_IN_MODELS:
        monkeypatch.setitem(built_in_models._FOLDERS, model, lambda: tmp_path / "model")  # type: ignore[index]
    line = ["scenarios", "run", shortened(tmp_path, name), "--out", "out", "--seeds", "0"]
    line += ["--only", ",".join(variants)]
    assert cli.main(line) == 0, capsys.readouterr()
    summaries = {
        variant: json.loads((tmp_path / "out" / variant / "seed-0" / "summary.json").read_text())
        for variant in variants
    }
    assert len({summary["data"]["rows"] for summary in summaries.values()}) == 1
    for variant, summary in summaries.items():
        held_out = summary["scores"]["held_out"]
        assert held_out["all"]["rows"] == 12
        assert (held_out["loss"][0] == held_out["loss"][1]) == (variant == "review")
        assert ("threshold" in held_out) == (name == "sentiment-small")
    capsys.readouterr()
    assert cli.main(["compare", "out"]) == 0, capsys.readouterr().err
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert set(variants) <= set(rows)


def test_a_masked_language_model_takes_the_classifiers_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the scenario's own text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(built_in, "load_sentiment", sentences)
    save_stand_in(tmp_path / "model", BertForMaskedLM)
    about = Scenario.read(library()["bert-sentiment"]).about
    (command,) = (line for line in about.splitlines() if line.startswith("    fedkseed "))
    _, *line = shlex.split(command)
    line = [
        {"bert-sentiment": shortened(tmp_path, "bert-sentiment"), "MODEL": "model"}.get(word, word)
        for word in line
    ]
    assert cli.main([*line, "--out", "out", "--only", "fedkseed", "--seeds", "0"]) == 0, capsys.readouterr()
    asking = json.loads((tmp_path / "out" / "fedkseed" / "seed-0" / "fedkseed.json").read_text())
    assert asking["template"]["text"] == "{text} It was [MASK]."
    assert asking["words"] == list(WORDS)
