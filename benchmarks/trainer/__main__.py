"""Memory and time of a zeroth-order Trainer beside Trainer's own fine-tuning, on SmolLM2-135M (Linux).

`python -m benchmarks.trainer` measures each way in `NUM_TURNS` processes of its own, by turns, takes medians,
writes `benchmarks/results/trainer.json` and the table of `docs/transformers.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.common import environment, memory, pages
from benchmarks.common.places import REPOSITORY, RESULTS_FOLDER
from benchmarks.trainer.ways import NUM_ROWS, NUM_STEPS, NUM_TOKENS, WAYS
from fedkseed.files import write_atomically

MARK = "<!-- made by benchmarks.trainer from results/trainer.json -->"
PAGE = REPOSITORY / "docs" / "transformers.md"
RESULT = RESULTS_FOLDER / "trainer.json"
NUM_TURNS = 3


def table(document: dict[str, Any]) -> str:
    """Bytes and seconds of each way, and both as multiples of the evaluation's."""
    rows = {row["way"]: row for row in document["rows"]}
    base = rows["evaluate"]
    machine = f"{document['environment']['cpu']}, {document['environment']['num_threads']} threads"
    lines = [f"| {machine} | peak memory | | seconds a step | |", "|---|---|---|---|---|"]
    for name, way in WAYS.items():
        peak, seconds = rows[name]["peak_bytes"], rows[name]["seconds"]
        lines.append(
            f"| {way.title} | {peak / 1e6:,.0f} MB | {peak / base['peak_bytes']:.2f} "
            f"| {seconds:.2f} | {seconds / base['seconds']:.1f} |"
        )
    return "\n".join(lines)


def with_result(page: str) -> str:
    """The page with its table made from the committed result."""
    return pages.with_part(page, MARK, table(json.loads(RESULT.read_bytes())))


def measured(num_threads: int, num_turns: int) -> list[dict[str, Any]]:
    """Medians of each way over the turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for turn in range(num_turns):
        for name in WAYS:
            command = [sys.executable, "-m", "benchmarks.trainer.ways", name, "--threads", str(num_threads)]
            done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            found[name].append(row)
            print(
                f"turn {turn + 1} of {num_turns}, {name}: {row['peak_bytes'] / 1e6:,.0f} MB, "
                f"{row['seconds']:.2f} s a step",
                flush=True,
            )
    return [
        {
            "way": name,
            "title": WAYS[name].title,
            "peak_bytes": int(statistics.median(row["peak_bytes"] for row in rows)),
            "seconds": statistics.median(row["seconds"] for row in rows),
            "seconds_of_turns": [row["seconds"] for row in rows],
            "transformers": rows[0]["transformers"],
        }
        for name, rows in found.items()
    ]


def main() -> None:
    """Measures, writes the result and the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=NUM_TURNS)
    parser.add_argument("--page", action="store_true", help="write the page from the result that is there")
    options = parser.parse_args()
    if not options.page:
        if not memory.can_measure():
            parser.error(
                "expected a Linux that counts the peak of resident memory; measure on another machine"
            )
        described = environment.describe(options.threads)
        rows = measured(options.threads, options.turns)
        document = {
            "command": "python -m benchmarks.trainer",
            "environment": {**described, "load_average_after": environment.load_average()},
            "model": "SmolLM2-135M-Instruct",
            "rows_a_step": NUM_ROWS,
            "tokens_a_row": NUM_TOKENS,
            "steps": NUM_STEPS,
            "rows": rows,
        }
        write_atomically(RESULT, (json.dumps(document, indent=2) + "\n").encode())
    write_atomically(PAGE, with_result(PAGE.read_text("utf-8")).encode())


if __name__ == "__main__":
    main()
