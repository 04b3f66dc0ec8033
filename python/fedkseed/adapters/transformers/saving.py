"""What a zeroth-order Trainer goes on from, and what it saves beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fedkseed.adapters.transformers.checkpoint import checkpoint_of
from fedkseed.adapters.transformers.optimizer import Settings
from fedkseed.adapters.transformers.stepping import Stepping
from fedkseed.adapters.transformers.walked_ledger import WalkedLedger, copy_ledger
from fedkseed.optim import FedKSeedSGD


class Saving(Stepping):
    """The part of `ZOTrainerMixin` that begins runs, and saves them."""

    _settings: Settings
    _walked: WalkedLedger | None
    _resumed_from: Path | None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does; however it ends, the weights are those after its last whole step.

        Raises:
            ValueError: a checkpoint without the optimizer's state, or with that of another optimizer: the
                seeds of the steps before would come again; one without a ledger for a run along a pool; none
                after such a run that ended with its best weights.
            LedgerError, OSError: a ledger in the checkpoint that is damaged.
        """
        is_walk = self._settings.seed_pool is not None
        self._resumed_from = checkpoint_of(resume_from_checkpoint, self.args.output_dir, is_walk)
        goes_on = self._resumed_from is None and self.model_init is None  # type: ignore[attr-defined]
        if goes_on and self._walked is not None and self._holds_best():
            raise ValueError(
                "expected a checkpoint to resume from, got none after a run along a pool that ended with its "
                "best weights: its ledger goes on after them; give train() the best checkpoint, "
                f"{self.state.best_model_checkpoint}, or make a new Trainer"  # type: ignore[attr-defined]
            )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:  # a callback may end the loop, or raise, amid a step; a chained side may stand
            if self.optimizer is not None:
                self.zeroth_order.discard()
                self.zeroth_order.flush()

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves as Trainer does; of a run along a pool the ledger too.

        Where Trainer has loaded the best checkpoint at the end, that is the best checkpoint's.

        Raises:
            OSError: the folder cannot be written.
            LedgerError: a coefficient that is not finite in fp32.
        """
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if self._walked is None:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self._holds_best():
            copy_ledger(Path(self.state.best_model_checkpoint), folder)  # type: ignore[attr-defined]
            return
        optimizer = self.zeroth_order
        assert isinstance(optimizer, FedKSeedSGD)
        facts = {
            "num_steps": len(optimizer.history),
            "batch_size": self._rows_a_step(),
            "lr": self.args.learning_rate,
            "eps": self._settings.eps,
        }
        self._walked.write(optimizer, folder, facts)

    def _begin_ledger(self, model: nn.Module) -> None:
        pool = self._settings.seed_pool
        if pool is not None and self.args.should_save:
            self._walked = WalkedLedger(model, pool, Path(self.args.output_dir), self._resumed_from)

    def _holds_best(self) -> bool:
        """Whether the weights are those of the best checkpoint, which Trainer loads when a run has ended."""
        has_ended, best = not self.is_in_train, self.state.best_model_checkpoint  # type: ignore[attr-defined]
        return bool(has_ended and self.args.load_best_model_at_end and best is not None)

    def _rows_a_step(self) -> int:
        rows: int = self._train_batch_size  # type: ignore[attr-defined]
        return rows * int(self.args.gradient_accumulation_steps * self.args.world_size)
