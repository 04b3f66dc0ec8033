"""docs/experiments.md and results/traffic.json: the page shows the committed results, the bytes count."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.run_folders import write_run
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import traffic
from benchmarks.experiments import page
from fedkseed.scenarios.experiments.comparison import compare

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_shows_the_committed_results() -> None:
    text = page.PAGE.read_text("utf-8")
    assert page.with_results(text) == text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert all((page.PAGE.parent / picture).is_file() for picture in pictures)


def test_no_result_names_a_folder() -> None:
    found = [
        (name, value)
        for name, document in page.measured().items()
        for value in (document["data"]["name"], document["settings"].get("model", ""))
        if str(value).startswith("/")
    ]
    assert not found


def test_a_section_has_tables_and_remarks_and_the_rest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant, loss in (("ours", 2.5), ("theirs", 2.0)):
        write_run(tmp_path / "sweep" / variant / "seed-1", seed=1, losses=(3.0, loss), lr=loss)
    (tmp_path / "sweep" / "scenario.toml").write_text('[variants.ours]\ntitle = "Ours"\n')
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(compare([tmp_path / "sweep"])))
    (tmp_path / "small.md").write_text("Said of it.\n")
    part = page.scenarios_part(page.measured(), {"small": "A small one", "large": "A large one"})
    assert part.startswith("### small\n\nA small one. Model: tiny, 1,000 parameters.")
    assert "beside those in its file: `num_rounds` 2, `num_seeds` 4096, " in part
    assert "* `ours`: Ours; `lr` 2.5\n* `theirs`: `lr` 2.0\n\n**Scores" in part
    assert "| ours | 1 | 2.500 |" in part
    assert "\n\nSaid of it.\n\n![Scores of small" in part
    assert part.endswith("nobody has committed a result:\n\n* `large`: A large one")
    assert page.scenarios_part({}, {}) == "Nothing has been measured yet."


def small_model(dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


#: Weights of that model, tied ones once: embeddings, per layer attention, perceptron and two norms, a norm.
SMALL_WEIGHTS = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
#: Of rank 8 on seven projections of each layer.
SMALL_ADAPTERS = 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))


def test_the_committed_bytes_are_those_of_the_claims() -> None:
    result = json.loads(traffic.RESULT.read_bytes())
    assert (result["num_seeds"], result["num_local_steps"]) == (4096, 200)
    shares: dict[str, list[float]] = {}
    for row, share in zip(result["rows"], traffic.saved(result["rows"]), strict=True):
        shares.setdefault(row["method"], []).append(share)
    assert min(shares["fedit"]) > 0.99
    assert min(shares["fedavg"]) > 0.9999
    assert len(shares["fedavg"]) == 2


def test_bytes_are_counted_anew_on_a_small_model() -> None:
    ours, adapters, in_32, in_16 = traffic.measure(small_model, traffic.NUM_SEEDS, traffic.NUM_STEPS)
    committed = json.loads(traffic.RESULT.read_bytes())["rows"]
    assert ours == committed[0], "what FedKSeed sends does not depend on the model"
    for row, count, width in (
        (adapters, SMALL_ADAPTERS, 4),
        (in_32, SMALL_WEIGHTS, 4),
        (in_16, SMALL_WEIGHTS, 2),
    ):
        assert row["num_values"] == count
        assert 0 < row["bytes"] - 2 * width * count < 2 * 10_000  # heads of the files
    for row, width in zip(committed[1:], (4, 4, 2), strict=True):
        assert 0 < row["bytes"] - 2 * width * row["num_values"] < 0.01 * row["bytes"]
