"""How many bytes travel between server and a client in one round: `python -m benchmarks.traffic`.

Counted on files: everything that a method sends is written into a file by whoever sends it, and read back by
whoever gets it, both ways, with the code of the runs themselves; the sizes of the files are the result,
results/traffic.json. At the paper's numbers, 4,096 seeds and 200 local steps, with SmolLM2-135M-Instruct. No
step is made: what a message weighs does not depend on the values in it.

The largest files (538 MB) lie in a temporary folder, one at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import environment
from benchmarks.common.constants import LEARNING_RATE, ZO_EPS
from benchmarks.common.places import RESULTS_FOLDER
from fedkseed import Broadcast, ModelIdentity, Reply, SeedPool, Server, ServerConfig
from fedkseed.data import load_smollm2
from fedkseed.federation.messages import broadcast_digest
from fedkseed.files import write_atomically
from fedkseed.model.manifest import manifest_parameters
from fedkseed.scenarios.baselines.lora import add_adapters
from fedkseed.scenarios.baselines.settings import BaselineSettings
from fedkseed.scenarios.baselines.tensor_files import read_into, write_tensors

RESULT = RESULTS_FOLDER / "traffic.json"
NUM_SEEDS, NUM_STEPS = 4096, 200
#: Of the model's weights: 16 bits halve what FedAvg sends. FedIT's adapters are fp32 beside either.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SEED = 1

Row = dict[str, Any]


def fedkseed_row(model: nn.Module, folder: Path, num_seeds: int, num_steps: int) -> Row:
    """Broadcast and reply of the second round, whose model is no longer the first one.

    Args:
        model: whose identity the messages carry.
        folder: for the files.
        num_seeds: K.
        num_steps: local steps of a client.
    """
    config = ServerConfig(
        num_clients=10, clients_per_round=2, num_local_steps=num_steps, lr=LEARNING_RATE, eps=ZO_EPS
    )
    server = Server(ModelIdentity.of(model), SeedPool(_SEED, num_seeds), config)
    generator = np.random.default_rng(_SEED)
    sizes: list[tuple[int, int]] = []
    for _ in range(2):
        replies = []
        for client in server.clients:
            down, up = folder / "broadcast", folder / "reply"
            down.write_bytes(server.broadcast(client))
            received = down.read_bytes()
            broadcast = Broadcast.from_bytes(received)
            scalars = generator.normal(scale=30, size=len(broadcast.schedule)).astype(np.float32)
            reply = Reply(broadcast.round, client, 1, broadcast_digest(received), scalars)
            up.write_bytes(reply.to_bytes())
            replies.append((client, up.read_bytes()))
            sizes.append((down.stat().st_size, up.stat().st_size))
        server.merge(replies)
    return {"method": "fedkseed", "num_values": num_seeds + num_steps, **_both_ways(*sizes[-1])}


def adapter_row(model: nn.Module, folder: Path) -> Row:
    """FedIT's adapters with its settings; they are added to the model."""
    parameters = add_adapters(model, BaselineSettings(method="fedit"), _SEED).parameters
    return {"method": "fedit", **_tensors_both_ways(parameters, folder)}


def weights_row(model: nn.Module, folder: Path) -> Row:
    """All weights, as FedAvg sends them; tied ones once."""
    return {"method": "fedavg", **_tensors_both_ways(dict(manifest_parameters(model)), folder)}


def _tensors_both_ways(parameters: Mapping[str, torch.Tensor], folder: Path) -> Row:
    sizes = []
    for _ in ("down", "up"):
        path = folder / "tensors.safetensors"
        sizes.append(write_tensors(path, parameters, {}))
        read_into(path, parameters)
        path.unlink()
    return {"num_values": sum(tensor.numel() for tensor in parameters.values()), **_both_ways(*sizes)}


def _both_ways(down: int, up: int) -> Row:
    return {"bytes_down": down, "bytes_up": up, "bytes": down + up}


def measure(load: Callable[[torch.dtype], nn.Module], num_seeds: int, num_steps: int) -> list[Row]:
    """A row of FedKSeed, of FedIT, and of FedAvg in each dtype of the weights.

    Args:
        load: gives the model in a dtype.
        num_seeds: K.
        num_steps: local steps of a client.
    """
    weights = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype_name, dtype in DTYPES.items():
            weights.append({**weights_row(load(dtype), folder), "dtype": dtype_name})
        model = load(torch.float32)
        seeds = fedkseed_row(model, folder, num_seeds, num_steps)
        return [seeds, adapter_row(model, folder), *weights]


def saved(rows: list[Row]) -> list[float]:
    """The share of the bytes of each row that FedKSeed does without."""
    (ours,) = (row["bytes"] for row in rows if row["method"] == "fedkseed")
    return [1 - ours / row["bytes"] for row in rows]


def main() -> None:
    """Measures, prints and writes the result."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.traffic", description=(__doc__ or "").splitlines()[0]
    ).parse_args()
    rows = measure(lambda dtype: load_smollm2(dtype)[0], NUM_SEEDS, NUM_STEPS)
    document = {
        "command": "python -m benchmarks.traffic",
        "environment": environment.describe(torch.get_num_threads()),
        "model": "SmolLM2-135M-Instruct",
        "num_seeds": NUM_SEEDS,
        "num_local_steps": NUM_STEPS,
        "rows": rows,
    }
    for row, share in zip(rows, saved(rows), strict=True):
        name = f"{row['method']} {row.get('dtype', '')}"
        print(
            f"{name:17} {row['num_values']:>12,} values {row['bytes']:>14,} bytes, of which FedKSeed does "
            f"without {100 * share:.4f} %"
        )
    write_atomically(RESULT, (json.dumps(document, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
