"""How far the peak of resident memory rises during a zeroth-order step, beside its forward passes (Linux).

By itself: `python -m benchmarks.memory_step --storage streamed`. The model's forward passes need next to
nothing themselves: an embedding larger than a block, blocks that read a row of their weight each, bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch
from torch import Tensor, nn

from benchmarks.environment import REPOSITORY
from benchmarks.memory import peak_growth
from fedkseed import ZOSGD, Inplace, Streamed
from fedkseed.storage import StorageOptions

STORAGES: dict[str, StorageOptions] = {
    "inplace": Inplace(),
    "streamed": Streamed(),
    "streamed in fp32": Streamed(compute_dtype=torch.float32),
    "paired": Streamed(paired=True),
    "compensated": Streamed(compensated=True),
    "compensated in fp32": Streamed(compensated=True, compute_dtype=torch.float32),
}

NUM_BLOCKS, NUM_ROWS, WIDTH, VOCABULARY = 3, 8192, 1024, 16384
#: Bytes of a block's weights in bf16; the embedding has twice as many.
UNIT_BYTES = 2 * NUM_ROWS * WIDTH
NUM_PARAMETERS = (NUM_BLOCKS * NUM_ROWS + VOCABULARY) * WIDTH


class _Block(nn.Module):
    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_rows, WIDTH), 0.5))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.weight[0]


class _Model(nn.Module):
    def __init__(self, num_rows: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList([_Block(num_rows) for _ in range(NUM_BLOCKS)])

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def measure(storage: str, num_threads: int = 2) -> int:
    """Growth of peak resident memory, in bytes, of an optimizer and its first step in a process of its own.

    Args:
        storage: a key of STORAGES.
    Raises:
        RuntimeError: the process failed; its output is in the message.
    """
    command = [sys.executable, "-m", "benchmarks.memory_step", "--storage", storage]
    command += ["--threads", str(num_threads)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"expected the measurement of {storage} to succeed, got: {done.stderr.strip()}")
    return int(json.loads(done.stdout)["growth_bytes"])


def _step(model: nn.Module, storage: StorageOptions) -> ZOSGD:
    """The optimizer too, for what it keeps counts as well."""
    ids = torch.arange(6).view(2, 3)
    is_paired = isinstance(storage, Streamed) and storage.paired

    def losses() -> Tensor:
        found = model(ids).float().mean((1, 2))
        return found if is_paired else found.mean()

    optimizer = ZOSGD(model, 1e-6, storage=storage)
    optimizer.step(losses)
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", choices=STORAGES, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    storage = STORAGES[arguments.storage]
    _step(_Model(2, 8).bfloat16(), storage)
    model = _Model(NUM_ROWS, VOCABULARY).bfloat16()
    growth = peak_growth(lambda: _step(model, storage))
    print(json.dumps({**vars(arguments), "growth_bytes": growth}))


if __name__ == "__main__":
    main()
