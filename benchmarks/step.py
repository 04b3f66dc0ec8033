"""One local step of FedKSeed beside its two forward passes alone and beside the official step.

`python -m benchmarks.step --help`. SmolLM2-135M-Instruct on real text; the official step is `official.py`'s:
three perturbations and an update, each with its own noise and temporaries, around the same two forwards.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, official
from benchmarks.measure import Contestant, interleave, spread
from benchmarks.settings import DTYPES
from fedkseed import FedKSeedSGD, SeedPool
from fedkseed.data import load_instruction_tasks, load_smollm2
from fedkseed.files import write_atomically

_LR, _EPS = 1e-7, 5e-4
_BASE_SEED = 11


def token_batch(batch_size: int, num_tokens: int, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """The model, and int64 [batch_size, num_tokens]: running text of the instruction tasks, cut into rows."""
    model, tokenizer = load_smollm2(dtype)
    tasks, _ = load_instruction_tasks(tokenizer)
    text = "\n".join(
        f"{row.instruction} {row.input} {row.output}" for task in tasks for row in task.train[:8]
    )
    tokens = tokenizer(text)["input_ids"][: batch_size * num_tokens]
    if len(tokens) < batch_size * num_tokens:
        raise SystemExit(f"expected at least {batch_size * num_tokens} tokens of text, got {len(tokens)}")
    return model, torch.tensor(tokens).view(batch_size, num_tokens)


def measure(model: Any, batch: torch.Tensor, num_samples: int) -> dict[str, dict[str, float]]:
    """Seconds of a step of each kind, taken in turn; the official one walks on weights of its own."""
    theirs = copy.deepcopy(model)
    named = [(name, parameter) for name, parameter in theirs.named_parameters() if parameter.requires_grad]
    pool = SeedPool(_BASE_SEED)
    optimizer = FedKSeedSGD(model, lr=_LR, eps=_EPS, seed_pool=pool)

    def loss(walked: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = walked(input_ids=batch, labels=batch, use_cache=False).loss
        return found

    def official_step(sample: int) -> None:
        seed = int(pool.seeds[sample]) >> 1  # torch's generator takes 63 bits here
        official.perturb_(named, seed, 1, _EPS)
        plus = loss(theirs)
        official.perturb_(named, seed, -2, _EPS)
        minus = loss(theirs)
        official.perturb_(named, seed, 1, _EPS)
        official.update_(named, seed, float((plus - minus) / (2 * _EPS)), _LR)

    def our_step(_: int) -> None:
        optimizer.step(lambda: loss(model))

    def two_forwards(_: int) -> None:
        loss(model)
        loss(model)

    contestants = [
        Contestant("official step", "official", official_step, num_samples, warm_up=lambda: official_step(0)),
        Contestant(
            "inplace step",
            "ours",
            our_step,
            num_samples,
            warm_up=lambda: two_forwards(0),
        ),
        Contestant("two forwards", "forward", two_forwards, num_samples),
    ]
    samples = interleave(contestants, lambda: None)
    return {name: spread(values) for name, values in samples.items()}


def table(seconds: dict[str, dict[str, float]]) -> str:
    """One row a contestant, with its ratio to the official step and to its two forwards."""
    base, forwards = seconds["official step"]["median"], seconds["two forwards"]["median"]
    lines = [
        "| step | seconds [20th, 80th percentile] | official step takes | of its two forwards |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in seconds.items():
        median = found["median"]
        lines.append(
            f"| {name} | {median:.3g} [{found['p20']:.3g}, {found['p80']:.3g}] | {base / median:.1f}x | "
            f"{median / forwards:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs it, prints the table, writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="rows (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every contestant (%(default)s)")
    parser.add_argument("--samples", type=int, default=7, help="of each contestant (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    described = environment.describe(options.threads)
    model, batch = token_batch(options.batch_size, options.tokens, DTYPES[options.dtype])
    seconds = measure(model, batch, options.samples)
    print(table(seconds))
    if options.json is not None:
        settings = {"dtype": options.dtype, "batch_size": options.batch_size, "tokens": options.tokens}
        document = {"environment": described, "settings": settings, "seconds": seconds}
        write_atomically(options.json, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
