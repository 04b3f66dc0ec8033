"""Peak memory of a simulation in one process, from loading the model on, beside the plan's figure (Linux).

`python -m benchmarks.memory` measures SmolLM2-135M in fp32 and bf16, each with two batch sizes, and writes
`benchmarks/results/memory-<cpu>.json`. Each case is a process of its own, which imports what it needs, resets
the kernel's peak counter, loads the model, and runs two rounds of two clients with an evaluation after each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.llama.modeling_llama
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import environment, memory
from benchmarks.common.constants import DTYPES
from benchmarks.common.places import REPOSITORY, RESULTS_FOLDER
from fedkseed import Simulation, SimulationConfig, Task
from fedkseed.data.models import load_causal_lm, smollm2_folder
from fedkseed.data.prompts import Batch, Encoded, collate, iterate_batches
from fedkseed.data.scores import response_loss, response_nll
from fedkseed.simulation.memory_plan import BatchShape, RunPlan, plan

NUM_TOKENS, NUM_RESPONSE, EVALUATION_ROWS = 96, 16, 8
CASES = [(dtype, rows) for dtype in ("fp32", "bf16") for rows in (2, 8)]


def planned(folder: Path, dtype: torch.dtype, batch_size: int) -> RunPlan:
    """What is planned before anything is loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)

    def shape(rows: int) -> BatchShape:
        return BatchShape(rows, NUM_TOKENS, logits=NUM_RESPONSE, scored=NUM_RESPONSE)

    return plan(
        model,
        "auto",
        device=torch.device("cpu"),
        train=[shape(batch_size)],
        evaluations=[shape(EVALUATION_ROWS)],
        file_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


def run(folder: Path, dtype: torch.dtype, batch_size: int) -> None:
    """The simulation: rows of random tokens, all of one length."""
    model, _ = load_causal_lm(folder, dtype)
    generator = np.random.default_rng(0)
    shape = (2, 2 * EVALUATION_ROWS, NUM_TOKENS)
    tokens = generator.integers(5, model.config.vocab_size, shape).tolist()
    rows = [[Encoded(tuple(row), NUM_TOKENS - NUM_RESPONSE) for row in client] for client in tokens]

    def loss(model: torch.nn.Module, batch: Batch) -> float:
        nll, num_tokens = response_nll(model, batch)
        return nll / num_tokens

    def evaluate(model: torch.nn.Module, _: int) -> dict[str, float]:
        chosen = iterate_batches(rows[0][:EVALUATION_ROWS], EVALUATION_ROWS, 0)
        return {"held_out_loss": response_loss(model, chosen)}

    config = SimulationConfig(
        num_rounds=2, clients_per_round=2, num_local_steps=2, batch_size=batch_size, lr=1e-5, eps=1e-3
    )
    task = Task(model, rows, lambda chosen: collate(chosen, 0), loss, evaluate=evaluate)
    with Simulation(task, config) as simulation:
        for _ in simulation.rounds():
            pass


def measure(dtype: str, batch_size: int) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(1)
    folder = smollm2_folder()
    place = planned(folder, DTYPES[dtype], batch_size).places[-1]
    growth = memory.peak_growth(lambda: run(folder, DTYPES[dtype], batch_size))
    return {
        "dtype": dtype,
        "batch_size": batch_size,
        "measured_bytes": growth,
        "planned_bytes": place.total,
        "planned_parts": dict(place.parts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--case", nargs=2, metavar=("DTYPE", "ROWS"), help="measure one case, in this process"
    )
    options = parser.parse_args()
    if not memory.can_measure():
        parser.error("expected a Linux that counts the peak of resident memory; measure on another machine")
    if options.case:
        print(json.dumps(measure(options.case[0], int(options.case[1]))))
        return
    described = environment.describe(1)
    rows = []
    for dtype, batch_size in CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--case", dtype, str(batch_size)]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        measured, wanted = rows[-1]["measured_bytes"], rows[-1]["planned_bytes"]
        print(
            f"{dtype}, batch {batch_size}: {measured / 1e6:,.0f} MB measured, {wanted / 1e6:,.0f} MB planned "
            f"({wanted / measured - 1:+.1%})",
            flush=True,
        )
    versions = {"transformers": transformers.__version__}
    result = {
        "command": "python -m benchmarks.memory",
        "environment": {**described, **versions, "load_average_after": environment.load_average()},
        "model": "SmolLM2-135M-Instruct",
        "num_tokens": NUM_TOKENS,
        "num_response": NUM_RESPONSE,
        "rows": rows,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", environment.cpu_model().lower()).strip("-")
    path = RESULTS_FOLDER / f"memory-{slug}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
