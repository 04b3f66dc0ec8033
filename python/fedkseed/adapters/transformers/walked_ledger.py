"""The ledger of a Trainer's run along a seed pool, beside the weights that it saves."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedkseed.ledger import Ledger
from fedkseed.ledger.origin import FILE as ORIGIN
from fedkseed.ledger.origin import AdapterStart, Origin, OriginError
from fedkseed.model.identity import ModelIdentity
from fedkseed.model.manifest import ModelParameters
from fedkseed.optim import FedKSeedSGD
from fedkseed.simulation.run_folder import LEDGER

logger = logging.getLogger("fedkseed")


class WalkedLedger:
    """What a walk began at, and where: taken while the model still holds it.

    Attributes:
        identity: of w0.
        frozen: manifest indices of what is not tuned.
    """

    def __init__(self, model: nn.Module, checkpoint: Path | None) -> None:
        """Reads the weights once, for their hash.

        Args:
            model: that is about to be tuned; what is frozen is frozen by now.
            checkpoint: of a run that goes on: the start is that of its ledger, for the model holds later
                weights.

        Raises:
            LedgerError, OSError: the checkpoint's ledger is not there, or damaged.
            TypeError, ValueError: as `ModelIdentity.of`.
        """
        if checkpoint is not None:
            ledger = Ledger.load(checkpoint / LEDGER)
            self.identity, self.frozen = ledger.identity, tuple(ledger.frozen)
        else:
            known = ModelParameters.of(model)
            self.identity, self.frozen = ModelIdentity.of_parameters(known), tuple(known.frozen)

    def write(self, optimizer: FedKSeedSGD, model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        """Writes the ledger of the walk so far and, if the base has a name, its origin, for `publish`.

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
        adapted = hasattr(model, "peft_config")
        config = getattr(base_of(model), "config", None)
        try:
            origin = Origin.of(
                _required(getattr(config, "_name_or_path", "")),
                getattr(config, "_commit_hash", None),
                facts=facts,
                adapter=AdapterStart() if adapted else None,
            )
        except OriginError as error:
            logger.info("%s is not written, publish asks for the base: %s", folder / ORIGIN, error)
            (folder / ORIGIN).unlink(missing_ok=True)
            return
        origin.write(folder)


def base_of(model: Any) -> Any:
    """The model without peft's adapters."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def copy_ledger(source: Path, folder: Path) -> None:
    """Copies the ledger of a checkpoint and its origin to a folder; an origin that it lacks is removed there.

    Raises:
        OSError: one cannot be read or written.
    """
    shutil.copyfile(source / LEDGER, folder / LEDGER)
    (folder / ORIGIN).unlink(missing_ok=True)
    if (source / ORIGIN).exists():
        shutil.copyfile(source / ORIGIN, folder / ORIGIN)


def _required(name: str) -> str:
    """The name of a base; an empty one would mean the built-in model.

    Raises:
        OriginError: there is none: a model that was made of a config.
    """
    if not name:
        raise OriginError("expected a base that was loaded by a name, got a model without")
    return name
