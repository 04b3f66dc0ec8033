"""An optimizer that nobody holds any more gives its memory back at once, not when garbage is collected."""

from __future__ import annotations

import gc
import weakref

import pytest
from support import halves
from support.streamed_models import LanguageModel, both_losses, build, loss_of, make_ids

from fedkseed import FedKSeedSGD, SeedPool


@pytest.mark.parametrize("mode", ["in place", "chained", "streamed", "streamed in fp32", "paired"])
def test_an_optimizer_leaves_no_cycle(mode: str) -> None:
    """A client makes one each round: a scratch that waited for the collector would stand beside the next."""
    storage = halves.MODES[mode]
    model, ids = build(LanguageModel), make_ids()

    def tuned() -> list[weakref.ref[object]]:
        optimizer = FedKSeedSGD(
            model, lr=1e-3, eps=1e-3, seed_pool=SeedPool(1, 8), storage=storage, reduce=False
        )
        losses = both_losses if getattr(storage, "paired", False) else loss_of
        optimizer.step(lambda: losses(model, ids))
        optimizer.flush()
        opened = optimizer._storage
        return [weakref.ref(part) for part in (optimizer, opened, getattr(opened, "_model", opened))]

    tuned()  # what torch imports at the first step keeps its frames
    gc.collect()
    gc.disable()
    try:
        assert [part() for part in tuned()] == [None] * 3
    finally:
        gc.enable()
