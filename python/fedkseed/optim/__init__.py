"""Zeroth-order optimizers: `ZOSGD` and, with a seed pool, `FedKSeedSGD`."""

from __future__ import annotations

from fedkseed.optim.evaluation import Loss
from fedkseed.optim.groups import decay_groups
from fedkseed.optim.optimizers import ZOSGD, FedKSeedSGD
from fedkseed.optim.paired import doubled, paired_losses
from fedkseed.optim.parameters import Params

__all__ = ["ZOSGD", "FedKSeedSGD", "Loss", "Params", "decay_groups", "doubled", "paired_losses"]
