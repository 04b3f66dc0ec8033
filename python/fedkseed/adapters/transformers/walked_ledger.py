"""The ledger of a Trainer's run along a seed pool, beside the weights that it saves."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedkseed.adapters.transformers.peft_start import base_of, is_adapted, start_of
from fedkseed.ledger import Ledger
from fedkseed.ledger.adapter import CONFIG, START, write_adapter
from fedkseed.ledger.origin import FILE as ORIGIN
from fedkseed.ledger.origin import Origin, OriginError
from fedkseed.model.identity import ModelIdentity
from fedkseed.model.manifest import ModelParameters
from fedkseed.optim import FedKSeedSGD
from fedkseed.seeds import SeedPool
from fedkseed.simulation.run_folder import LEDGER

logger = logging.getLogger("fedkseed")

#: Beside the ledger, where there is something to say.
_BESIDE = (ORIGIN, CONFIG, START)


class WalkedLedger:
    """What a walk began at, and where: taken while the model still holds it.

    Attributes:
        identity: of w0.
        frozen: manifest indices of what is not tuned.
        origin: of the base, without facts; None: the base has no name, or adapters that no card can tell.
    """

    def __init__(self, model: nn.Module, pool: SeedPool, folder: Path, checkpoint: Path | None) -> None:
        """Reads the weights once, for their hash; of LoRA it writes how the adapter began.

        Args:
            model: that is about to be tuned; what is frozen is frozen by now.
            pool: of the walk.
            folder: of the run, made if it is not there.
            checkpoint: of a run that goes on: the start is that of its ledger, for the model holds later
                weights.

        Raises:
            LedgerError, OSError: the checkpoint's ledger is not there, or damaged.
            TypeError, ValueError: as `ModelIdentity.of`.
        """
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            ledger = Ledger.load(checkpoint / LEDGER)
            self.identity, self.frozen = ledger.identity, tuple(ledger.frozen)
            copy_beside(checkpoint, folder)
            self.origin = Origin.read(checkpoint) if (checkpoint / ORIGIN).exists() else None
            return
        known = ModelParameters.of(model)
        self.identity, self.frozen = ModelIdentity.of_parameters(known), tuple(known.frozen)
        self.origin = self._origin_of(model, pool)

    def write(self, optimizer: FedKSeedSGD, folder: Path, facts: dict[str, Any]) -> None:
        """Writes the ledger of the walk so far and what `publish` needs beside it.

        Args:
            folder: of the Trainer's weights; files of a ledger in it are overwritten.
            facts: of the origin.

        Raises:
            LedgerError: a coefficient that is not finite in fp32.
            OSError: the folder cannot be written.
        """
        pool, notes = optimizer.seed_pool, {"num_steps": str(len(optimizer.history))}
        coefficients = optimizer.coefficients.astype(np.float32)
        Ledger(pool.base_seed, coefficients, self.identity, self.frozen, notes, optimizer.family).save(
            folder / LEDGER
        )
        if folder != self._folder:
            copy_beside(self._folder, folder)
        if self.origin is not None:
            Origin(**{**vars(self.origin), "facts": facts}).write(folder)

    def _origin_of(self, model: nn.Module, pool: SeedPool) -> Origin | None:
        """The origin, once the adapter's files are written; None, said, where a card could not be made."""
        config = getattr(base_of(model), "config", None)
        name, revision = getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None)
        try:
            if not name:  # which would mean the package's own model
                raise OriginError("expected a base that was loaded by a name, got a model without one")
            start = start_of(model, pool.base_seed) if is_adapted(model) else None
            if start is not None:
                write_adapter(model, start, self._folder)
            return Origin.of(name, revision, adapter=start)
        except OriginError as error:
            logger.warning("no %s is written beside the ledger, it cannot be published: %s", ORIGIN, error)
            return None


def copy_ledger(source: Path, folder: Path) -> None:
    """Copies the ledger of a checkpoint and what lies beside it.

    Raises:
        OSError: one cannot be read or written.
    """
    shutil.copyfile(source / LEDGER, folder / LEDGER)
    copy_beside(source, folder)


def copy_beside(source: Path, folder: Path) -> None:
    """Copies origin and adapter; what the source lacks is removed, as it would be of another ledger."""
    for name in _BESIDE:
        if (source / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
