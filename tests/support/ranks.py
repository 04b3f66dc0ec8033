"""One rank of a group of processes that accelerate prepares an optimizer in: `test_accelerate.py`.

    python -m support.ranks FOLDER

with the environment of ``torch.distributed.run``. Writes what came out as FOLDER/RANK.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn

from fedkseed import ZOSGD, Inplace, Streamed
from fedkseed.storage import StorageOptions

MODES: dict[str, StorageOptions] = {
    "in place": Inplace(),
    "chained": Inplace(chained=True),
    "streamed": Streamed(),
}
NUM_STEPS, NUM_ROWS = 20, 8


def made(mode: str, reduce: Any = None) -> tuple[nn.Module, ZOSGD]:
    """A model and its optimizer, the same in every process."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    return model, ZOSGD(model, 1e-2, 1e-3, seed=7, storage=MODES[mode], reduce=reduce)


def walk(model: nn.Module, optimizer: Any, rank: int = 0, num_ranks: int = 1) -> list[list[float]]:
    """NUM_STEPS steps of a rank on its share of the rows, by turns as a whole and in two halves.

    Returns:
        Of each step the loss and g.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(NUM_STEPS, NUM_ROWS, 5, generator=generator, dtype=torch.float64)
    shares = rows.chunk(num_ranks, dim=1)[rank]
    found = []
    for number, share in enumerate(shares):
        if number % 2:
            optimizer.step(lambda share=share: (model(share) - 1).square().mean())
        else:
            for half in share.chunk(2):
                inner.measure(lambda half=half: (model(half) - 1).square().mean())
            optimizer.step()
        found.append([inner.last.loss, *inner.last.projected_grads])
    inner.flush()
    return found


def digest(model: nn.Module) -> str:
    """SHA-256 over the bytes of all weights."""
    content = hashlib.sha256()
    for parameter in model.parameters():
        content.update(parameter.detach().numpy().tobytes())
    return content.hexdigest()


def mean_over_ranks(losses: torch.Tensor) -> None:
    """What `docs/optimizer.md` shows."""
    distributed.all_reduce(losses)
    losses /= distributed.get_world_size()


def main() -> None:
    accelerator = Accelerator(cpu=True)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    found: dict[str, Any] = {"num_ranks": num_ranks, "backend": distributed.get_backend()}
    for mode in MODES:
        model, optimizer = made(mode, mean_over_ranks)
        places = [parameter.data_ptr() for parameter in model.parameters()]
        wrapped, prepared = accelerator.prepare(model, optimizer)
        found[mode] = {
            "model": type(wrapped).__name__,
            "optimizer": type(prepared).__name__,
            "moved": places != [parameter.data_ptr() for parameter in model.parameters()],
            "steps": walk(wrapped, prepared, rank, num_ranks),
            "digest": digest(model),
        }
    wrapped, prepared = accelerator.prepare(*made("in place"))
    before = digest(wrapped.module)
    for name, call in (("step", prepared.step), ("measure", prepared.optimizer.measure)):
        try:
            call(lambda: wrapped(torch.ones(1, 5).double()).sum())
        except RuntimeError as error:
            found[f"{name} without reduce"] = str(error)
    found["left alone"] = digest(wrapped.module) == before
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
