"""What settings begin with, by the data: flags and files go before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkseed.data.sentiment import NUM_SCORED

#: Data of the user's own. What is left out depends on the number of clients, see `completed`.
OWN: Mapping[str, Any] = {
    "num_rounds": 10,
    "num_local_steps": 5,
    "batch_size": 8,
    "lr": 3e-5,
    "eps": 1e-3,
    "num_seeds": 1024,
    "family": "rademacher",
    "generate_rows": 0,
}

#: The twenty built-in instruction tasks; the settings of the demo of version 0.1.
INSTRUCTIONS: Mapping[str, Any] = {
    "num_rounds": 8,
    "clients_per_round": 16,
    "num_local_steps": 2,
    "batch_size": 2,
    "lr": 1e-4,
    "eps": 1e-3,
    "num_seeds": 256,
    "family": "gaussian",
    "template": "plain",
    "round_rows": 1,
    "final_rows": 16,
    "generate_rows": 2,
}

#: Sentences of four clients, the demo: docs/reproducibility.md has what it came to with which seed.
SENTENCES: Mapping[str, Any] = {
    "num_rounds": 9,
    "clients_per_round": 4,
    "num_local_steps": 3,
    "batch_size": 8,
    "lr": 1e-4,
    "eps": 1e-3,
    "num_seeds": 1024,
    "family": "rademacher",
    "weighting": "equal",
    "round_rows": 4,
    "final_rows": NUM_SCORED,
}

#: Names that --data takes beside files, folders and hub ids.
DEFAULT_DATA, SENTIMENT = "instructions", "sentiment"
BUILT_IN: Mapping[str, Mapping[str, Any]] = {DEFAULT_DATA: INSTRUCTIONS, SENTIMENT: SENTENCES}

#: What --quick changes: all parts, too short to learn much; the built-in runs take about a minute.
QUICK: Mapping[str, Any] = {"num_rounds": 2, "num_local_steps": 2, "round_rows": 1, "final_rows": 4}
_QUICK_INSTRUCTIONS: Mapping[str, Any] = {
    **QUICK,
    "clients_per_round": 2,
    "lr": 1e-5,
    "final_rows": 1,
    "generate_rows": 1,
}

_MOST_CLIENTS, _MOST_FINAL_ROWS, _MOST_ROUND_ROWS = 16, 400, 64


def preset_of(data: str) -> Mapping[str, Any]:
    """The settings that go with the data."""
    return BUILT_IN.get(data, OWN)


def quick_of(data: str) -> Mapping[str, Any]:
    """What --quick changes for the data."""
    return _QUICK_INSTRUCTIONS if data == DEFAULT_DATA else QUICK


def completed(values: Mapping[str, Any], num_clients: int) -> dict[str, Any]:
    """The values, with those filled in that depend on how many clients there are."""
    return {
        "clients_per_round": min(num_clients, _MOST_CLIENTS),
        "round_rows": max(1, min(4, _MOST_ROUND_ROWS // num_clients)),
        "final_rows": max(1, min(100, _MOST_FINAL_ROWS // num_clients)),
        **values,
    }
