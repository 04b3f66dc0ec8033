"""How untuned prompts do on the rows that the demo is scored on: `python -m benchmarks.sentiment_prompts`.

Writes results/sentiment-prompts.json and, of the best prompt, the file that the demo prints. Accuracies do
not depend on the machine's load; seconds are CPU time of the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.common.places import REPOSITORY, RESULTS_FOLDER
from fedkseed.data import fetch, load_smollm2
from fedkseed.data.sentiment import NUM_SCORED, TEMPLATE, WORDS, load_sentiment
from fedkseed.data.templates import Template
from fedkseed.files import write_atomically
from fedkseed.scenarios.classification import ClassificationBench
from fedkseed.scenarios.untuned_prompt import FILE

RESULT = RESULTS_FOLDER / "sentiment-prompts.json"
SHIPPED = REPOSITORY / "python" / "fedkseed" / "scenarios" / FILE
#: Prompt and the words that answer "negative" and "positive"; the demo's own first.
PROMPTS = (
    (TEMPLATE.text, WORDS),
    ("Review: {text}\nSentiment:", (" negative", " positive")),
)


def measure(template: str, words: tuple[str, str], loaded: Any) -> dict[str, Any]:
    """One prompt's accuracies on the first held-out rows of every client."""
    data = dataclasses.replace(load_sentiment(), template=Template.custom(template), words=words)
    start = time.process_time()
    bench = ClassificationBench(*loaded, data, round_rows=0, final_rows=NUM_SCORED, max_length=512)
    scores = bench.scores()["held_out"]
    return {
        "template": template,
        "words": list(words),
        "accuracy": scores["accuracy"],
        "clients": {name: sum(right) / len(right) for name, right in scores["right"].items()},
        "auc": scores["auc"],
        "loss": scores["loss"],
        "rows": scores["rows"],
        "cpu_seconds": time.process_time() - start,
    }


def shipped(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the demo prints: the prompt of the largest accuracy."""
    best = max(result["prompts"], key=lambda prompt: prompt["accuracy"][0])
    chosen = {name: best[name] for name in ("template", "words", "accuracy", "clients")}
    return {**chosen, "rows_per_client": result["rows_per_client"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loaded = load_smollm2()
    result = {
        "command": f"python -m benchmarks.sentiment_prompts --threads {options.threads}",
        "environment": {
            **environment.describe(options.threads),
            "transformers": environment.version_of("transformers"),
        },
        "model": {"archive": str(fetch.SMOLLM2), "sha256": fetch.SMOLLM2.sha256, "dtype": "float32"},
        "data": {"archive": str(fetch.VADER), "sha256": fetch.VADER.sha256},
        "rows_per_client": NUM_SCORED,
        "prompts": [measure(template, words, loaded) for template, words in PROMPTS],
    }
    for prompt in result["prompts"]:
        estimate, low, high = prompt["accuracy"]
        print(f"{prompt['template']!r}: {estimate:.4f} [{low:.3f}, {high:.3f}], AUC {prompt['auc']:.3f}")
    for path, content in ((RESULT, result), (SHIPPED, shipped(result))):
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        print(f"Written: {path}")


if __name__ == "__main__":
    main()
