"""What stands beside a run's own accuracies: the committed figure of an untuned prompt, and the picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_samples import make_tokenizer
from support.tiny_language_model import make_model

from benchmarks import sentiment_prompts
from benchmarks.common.places import RESULTS_FOLDER
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.sentiment import LABELS, NUM_SCORED
from fedkseed.data.templates import Template
from fedkseed.scenarios import picture
from fedkseed.scenarios.paired_difference import accuracy_interval
from fedkseed.scenarios.presets import SENTENCES
from fedkseed.scenarios.untuned_prompt import best_untuned_prompt

# The untuned prompt


def test_what_the_demo_prints_is_the_committed_result() -> None:
    result = json.loads(sentiment_prompts.RESULT.read_text())
    assert json.loads(sentiment_prompts.SHIPPED.read_text()) == sentiment_prompts.shipped(result)
    found = best_untuned_prompt()
    best = max(result["prompts"], key=lambda prompt: prompt["accuracy"][0])
    assert (found.template, list(found.words)) == (best["template"], best["words"])
    assert found.clients == best["clients"]
    assert found.rows_per_client == NUM_SCORED
    assert found.accuracy[0] == pytest.approx(sum(found.clients.values()) / 4)
    interval = accuracy_interval(round(found.accuracy[0] * best["rows"]), best["rows"])
    assert found.accuracy == pytest.approx((interval.estimate, interval.low, interval.high))


def test_the_committed_result_says_where_it_was_made_and_covers_the_prompts() -> None:
    result = json.loads(sentiment_prompts.RESULT.read_text())
    assert [(p["template"], tuple(p["words"])) for p in result["prompts"]] == list(sentiment_prompts.PROMPTS)
    assert {"cpu", "commit", "date", "torch", "transformers"} <= set(result["environment"])
    assert result["data"]["sha256"] == sentiment_prompts.fetch.VADER.sha256
    assert result["model"]["sha256"] == sentiment_prompts.fetch.SMOLLM2.sha256


def test_a_prompt_is_measured_on_the_first_held_out_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(Row({"text": f"t{index}"}, LABELS[index % 2]) for index in range(NUM_SCORED + 20))
    data = FederatedData(
        "classification", (ClientRows("a", rows[:3], rows),), (), Template.custom("{text}"), LABELS
    )
    monkeypatch.setattr(sentiment_prompts, "load_sentiment", lambda: data)
    found = sentiment_prompts.measure("{text}?", ("-", "+"), (make_model(torch.float32), make_tokenizer()))
    assert found["rows"] == NUM_SCORED
    assert found["accuracy"][0] == found["clients"]["a"]


# The picture


def metrics(num_rounds: int) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "train_loss": 0.9 - 0.1 * number,
            "evaluation": {"held_out_loss": 0.8} if number else {},
            "bytes_down": 1000,
            "bytes_up": 24,
            "clients": [0, 1],
        }
        for number in range(num_rounds)
    ]


def compared(*names: str) -> dict[str, Any]:
    group = {"before": [0.5, 0.4, 0.6], "after": [0.7, 0.6, 0.75], "majority": 0.55, "rows": 10}
    return {"loss": [0.8, 0.5], "clients": {name: group for name in names}, "all": group}


def test_the_picture_shows_losses_accuracies_and_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    losses, accuracies, traffic = picture.figure_of(
        metrics(3), compared("a", "b"), weight_bytes=10**6, prompt_accuracy=0.9
    ).axes
    shown = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert shown["train"] == pytest.approx([0.9, 0.8, 0.7])
    assert shown["held out, few rows"] == [0.8, 0.8]
    assert shown["held out, all rows"] == [0.8, 0.5]
    assert [text.get_text() for text in accuracies.get_xticklabels()] == ["a", "b", "all"]
    lines = {line.get_label(): list(line.get_ydata()) for line in accuracies.get_lines()}
    assert lines["majority answer"] == [0.55] * 3
    assert lines["best untuned prompt, all"] == [0.9, 0.9]
    assert traffic.get_yscale() == "log"
    totals = {line.get_label(): list(line.get_ydata()) for line in traffic.get_lines()}
    assert totals["this run"] == [1024, 2048, 3072]
    assert totals["weights (FedAvg)"] == [4e6, 8e6, 12e6]
    target = tmp_path / "run.png"
    picture.draw(target, metrics(3), compared("a", "b"), 10**6)
    assert target.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_run_without_losses_of_rounds_or_with_one_client_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = metrics(1)
    rows[0]["train_loss"] = None
    picture.draw(tmp_path / "run.png", rows, compared("alone"), 10**6)
    assert (tmp_path / "run.png").stat().st_size > 0


def test_a_method_that_sends_nothing_has_no_panel_of_bytes() -> None:
    pytest.importorskip("matplotlib")
    rows = [{**row, "bytes_down": 0, "bytes_up": 0} for row in metrics(2)]
    _, accuracies = picture.figure_of(rows, compared("a", "b"), weight_bytes=10**6).axes
    assert accuracies.get_ylim()[1] > 1.1, "room for the legend above all points"


# The tuned runs


def test_the_page_shows_the_committed_runs_of_the_demo() -> None:
    result = json.loads((RESULTS_FOLDER / "demo-amd-epyc.json").read_text())
    page = (RESULTS_FOLDER.parent.parent / "docs" / "reproducibility.md").read_text()
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    for run in result["runs"]:
        assert SENTENCES.items() <= {**run["settings"], "eps": SENTENCES["eps"]}.items()
        assert run["settings"]["eps"] == pytest.approx(SENTENCES["eps"])
        found = run["scores"]["held_out"]
        estimate, low, high = found["all"]["difference"]
        assert low > 0
        then, now = (f"{found['all'][side][0]:.3f}" for side in ("before", "after"))
        losses = " -> ".join(f"{loss:.3f}" for loss in found["loss"])
        cells = [f"+{estimate:.3f} [{low:.3f}, {high:.3f}]", losses, f"| {then} [", f"| {now} ["]
        (row,) = re.findall(rf"^\| {run['seed']} \|.*$", page, re.M)
        for cell in cells:
            assert cell in row
        assert run["bytes"]["down"] + run["bytes"]["up"] == 155_016
