"""A node's client for this measurement, and a process of it: `python -m benchmarks.resident.node`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from fedkseed import Client, RoundModelFile, WorkingCopy
from fedkseed.data import load_smollm2

#: Rows and tokens of a step's batch: the step is to be small beside the rest.
_BATCH = (1, 32)


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The language model's loss on some tokens."""
    found: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return found


def make_client(folder: Path | None) -> Client[torch.Tensor]:
    """A client with SmolLM2-135M-Instruct that answers as whoever is addressed.

    Args:
        folder: keeps the round's model in a file there; None: in memory.
    """
    model, _ = load_smollm2(torch.float32)
    round_model = "own" if folder is None else RoundModelFile(folder)
    tokens = torch.arange(_BATCH[0] * _BATCH[1]).reshape(_BATCH)
    return Client(
        None,
        WorkingCopy(model, round_model=round_model),  # type: ignore[arg-type]
        loss=loss,
        batches=lambda _, num_steps: [tokens] * num_steps,
        data_size=1,
    )


def main() -> None:
    """Answers the message in one file into another; the trace, in JSON, on stdout.

    Arguments: the message's file, the reply's, and the folder of the round's model or "".
    """
    message, reply, folder = sys.argv[1:]
    start = perf_counter()
    client = make_client(Path(folder) if folder else None)
    seconds_load = perf_counter() - start
    Path(reply).write_bytes(client.handle(Path(message).read_bytes()))
    rebuild = client.working.seconds_rebuild
    print(json.dumps({"loads": 1, "seconds_load": seconds_load, "rebuilds": int(rebuild > 0)}))


if __name__ == "__main__":
    main()
