"""Folders of finished runs as `fedkseed simulate` leaves them, written without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS = {
    "data": "/somewhere/rows.jsonl",
    "model": "/somewhere/tiny",
    "template": "",
    "words": "",
    "classify": "words",
    "dtype": "float32",
    "autocast": "off",
    "trust_remote_code": False,
    "round_rows": 1,
    "final_rows": 8,
    "generate_rows": 2,
    "held_out_mean": "tokens",
    "lr": 1e-3,
    "sampling": "uniform",
    "method": "fedkseed",
    "num_threads": 1,
}
INSTRUCTIONS = {
    "before": {"held_out_loss": 3.5, "unseen_loss": None, "rouge_l": 0.125, "exact_match": 0.0},
    "after": {"held_out_loss": 2.5, "unseen_loss": None, "rouge_l": 0.25, "exact_match": 0.0},
    "majority answer": {"held_out_loss": None, "unseen_loss": None, "rouge_l": 0.5, "exact_match": 0.25},
}
CONVENTION = "forward passes of a batch: two a direction"


def classification(loss: float, gain: float, *parts: str) -> dict[str, Any]:
    """The scores of a classification that began at an accuracy of a half."""
    rows = {
        "rows": 100,
        "before": [0.5, 0.4, 0.6],
        "after": [0.5 + gain, 0.4 + gain, 0.6 + gain],
        "difference": [gain, gain - 0.0625, gain + 0.0625],
        "majority": 0.625,
    }
    part = {"loss": [0.75, loss], "auc": [0.5, 0.75], "clients": {"a": rows}, "all": rows}
    return dict.fromkeys(parts or ("held_out",), part)


def write_run(
    folder: Path,
    *,
    seed: int,
    scores: Mapping[str, Any] = INSTRUCTIONS,
    rows: str = "0" * 64,
    losses: Sequence[float | None] = (3.0, 2.5),
    bytes_down: int = 600,
    **settings: Any,
) -> Path:
    """A finished run of a round a loss, of two clients each.

    Args:
        folder: made.
        seed: of the run.
        scores: as its summary has them.
        rows: digest of its rows.
        losses: held-out loss of each round; None: not scored in that round.
        bytes_down: of a round.
        settings: others than `SETTINGS`.
    """
    values = {**SETTINGS, **settings, "seed": seed, "num_rounds": len(losses)}
    folder.mkdir(parents=True)
    metrics = [
        {
            "round": number,
            "clients": [0, 1],
            "failed": [],
            "train_loss": 4.0 - number,
            "evaluation": {} if loss is None else {"held_out_loss": loss},
            "bytes_down": bytes_down,
            "bytes_up": 400,
            "num_skipped": 0,
        }
        for number, loss in enumerate(losses)
    ]
    phases = {"rebuild": 0.5, "reset": 0.25, "local": 10.0, "evaluation": 2.0}
    timings = [
        {"round": number, "seconds": 13.0, **{f"seconds_{name}": value for name, value in phases.items()}}
        for number, _ in enumerate(losses)
    ]
    summary = {
        "settings": values,
        "data": {"name": Path(values["data"]).name, "rows": rows},
        "processor": "a processor, 1 threads",
        "model": {"num_parameters": 1000, "weight_bytes": 4000},
        "forward_passes": {"rounds": [8] * len(losses), "convention": CONVENTION},
        "scores": scores,
        "peak_memory": {"process": 123_456_789, "device": None},
        "seconds": {"set_up": 1.5, "run": 30.0},
    }
    (folder / "settings.json").write_text(json.dumps(values))
    (folder / "summary.json").write_text(json.dumps(summary))
    for name, lines in (("metrics", metrics), ("timings", timings)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
