"""A Trainer whose steps compare the loss on both sides of the weights: no backward pass, no gradients.

Malladi et al., arXiv 2305.17333 (MeZO). Trainer's own loop runs; what goes another way in it are steps
(`stepping`), and beginnings and checkpoints (`saving`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkseed._extras import require_extra
from fedkseed.adapters.transformers.arguments import check_arguments, check_surroundings
from fedkseed.adapters.transformers.optimizer import Settings
from fedkseed.adapters.transformers.walked_ledger import WalkedLedger
from fedkseed.seeds import SeedPool
from fedkseed.storage import StorageChoice

require_extra("hf", "transformers", "accelerate")

from transformers import Trainer, TrainingArguments

from fedkseed.adapters.transformers.saving import Saving


class ZOTrainerMixin(Saving):
    """Makes a zeroth-order Trainer of Trainer, or of a class that is derived from it.

        class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer): ...

    Loops, data, schedulers, callbacks, evaluation, checkpoints and logs are those of the class beside it;
    what becomes of each training argument stands in ``arguments.toml``. A step makes two evaluations of each
    micro-batch for a direction. The model is in eval mode during a step, without dropout, unless
    ``train_mode``. Of a model with adapters those are tuned, of any model what requires a gradient.

    Args:
        args, kwargs: of the Trainer.
        eps: scale of the perturbation, above 0; see docs/numerics.md for weights of 16 bits.
        num_directions: seeds of a step; 1 with a pool.
        seed_pool: tunes by `FedKSeedSGD` along these seeds, so that the run is a ledger as well.
        noise_seed: of `ZOSGD`; the training arguments' ``seed`` if None.
        storage, family, max_abs_g, max_loss_gap: as in `ZOSGD`.
        train_mode: keeps dropout, drawn alike for both sides of a step.

    Raises:
        ValueError: a training argument is set that is refused, or settings that exclude each other.
        TypeError: an optimizer was given that takes gradients.
        MissingExtraError: transformers or accelerate is not installed.
    """

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-3,
        num_directions: int = 1,
        seed_pool: SeedPool | None = None,
        noise_seed: int | None = None,
        storage: StorageChoice = "auto",
        family: str = "gaussian",
        max_abs_g: float | None = None,
        max_loss_gap: float | None = None,
        train_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        self._settings = Settings(
            eps, num_directions, seed_pool, noise_seed, storage, family, max_abs_g, max_loss_gap
        )
        self._train_mode = train_mode
        self._walked: WalkedLedger | None = None
        self._resumed_from: Path | None = None
        # The place of the arguments differs between Trainers.
        of_training = (value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments))
        given = next(of_training, None)
        if given is not None:  # before the Trainer acts on them
            check_arguments(given, train_mode)
        super().__init__(*args, **kwargs)
        if given is None:
            check_arguments(self.args, train_mode)
        check_surroundings(self)
        if self.optimizer is not None and (unheard := self._settings.differing(ZOTrainerMixin.__init__)):
            raise ValueError(
                f"expected no {', '.join(unheard)} beside an optimizer of your own, which was made with its "
                "own; give them to the optimizer, or leave optimizers= out"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes `ZOSGD`, or `FedKSeedSGD` with a pool, unless an optimizer was given.

        Parameters decay as in Trainer. The losses of several processes become one in each step.

        Raises:
            TypeError, ValueError: as the optimizer; weight decay with a pool.
        """
        tuned = self.model if model is None else model
        if self.optimizer is None:
            names = self.get_decay_parameter_names  # type: ignore[attr-defined]
            self.optimizer = self._settings.make(tuned, self.args, names, self.accelerator)
            self._begin_ledger(tuned)
        elif self._resumed_from is not None:
            # Where a smaller batch is tried, the weights have gone on and the optimizer's state comes again.
            self._load_from_checkpoint(str(self._resumed_from))  # type: ignore[attr-defined]
            self._begin_ledger(tuned)
        return self.optimizer  # type: ignore[no-any-return]


class ZOTrainer(ZOTrainerMixin, Trainer):  # type: ignore[misc, unused-ignore]
    """transformers' Trainer without a backward pass; see `ZOTrainerMixin`."""
