"""A Trainer whose steps compare the loss on both sides of the weights: no backward pass, no gradients.

Trainer's own loop runs: each micro-batch is a `measure` of the optimizer, and where Trainer calls the
optimizer's `step`, that makes the step of what was measured. Malladi et al., arXiv 2305.17333 (MeZO).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkseed._extras import require_extra
from fedkseed.adapters.transformers.arguments import check_arguments
from fedkseed.adapters.transformers.optimizer import Settings
from fedkseed.adapters.transformers.walked_ledger import WalkedLedger, copy_ledger
from fedkseed.optim import FedKSeedSGD, paired_losses
from fedkseed.optim.base import ZerothOrderOptimizer
from fedkseed.seeds import SeedPool
from fedkseed.storage import StorageChoice, Streamed

require_extra("hf", "transformers", "accelerate")

from transformers import Trainer, TrainingArguments

from fedkseed.adapters.transformers.checkpoint import checkpoint_of


class ZOTrainerMixin:
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

    args: Any
    model: Any
    optimizer: Any
    accelerator: Any

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
        self._check_surroundings()

    @property
    def zeroth_order(self) -> ZerothOrderOptimizer:
        """The optimizer itself, without accelerate's wrapper: `last`, `ledger`, `discard` and the like."""
        optimizer: ZerothOrderOptimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer

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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Measures both sides on a micro-batch.

        Args:
            model: what runs forward: the model, or its wrapper.
            inputs: of `compute_loss`; a copy of the mapping goes to each evaluation.
            num_items_in_batch: labels in all micro-batches of the step, or None.

        Returns:
            The mean of the sides' losses, fp32, divided so that those of a step's micro-batches add up to
            the step's loss.

        Raises:
            ValueError, RuntimeError, TypeError: as `measure` and `compute_loss`.
        """
        self._set_mode(model)
        prepared = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        share = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        # Losses that are divided by the labels of all micro-batches add up; a step takes their mean.
        scale = share if self._adds_up(num_items_in_batch) else 1
        loss_of = self._paired_loss if self._is_paired() else self._loss

        def closure() -> torch.Tensor:
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                loss = loss_of(model, prepared, num_items_in_batch)
            return loss if scale == 1 else loss.double() * scale

        loss = self.zeroth_order.measure(closure)
        return torch.tensor(loss / share, dtype=torch.float32, device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as Trainer does, with ``projected_grad`` in place of a gradient's norm.

        That is the mean |g| of the last step's directions. ``num_skipped``, the directions that were skipped
        so far, joins it as soon as there are any.
        """
        if logs.pop("grad_norm", None) is not None and (last := self.zeroth_order.last) is not None:
            logs["projected_grad"] = sum(map(abs, last.projected_grads)) / len(last.projected_grads)
            if self.zeroth_order.num_skipped:
                logs["num_skipped"] = self.zeroth_order.num_skipped
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does.

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
        finally:  # a callback may end the loop, or raise, amid a step
            if self.optimizer is not None:
                self.zeroth_order.discard()

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

    def _check_surroundings(self) -> None:
        """Refuses what launchers bring, and arguments of other optimizers.

        Raises:
            ValueError, TypeError: see the class.
        """
        if getattr(self, "optimizer_cls_and_kwargs", None) is not None:
            raise ValueError(
                "expected no optimizer_cls_and_kwargs, got some: the Trainer makes its optimizer"
            )
        if self.optimizer is not None and not isinstance(self.zeroth_order, ZerothOrderOptimizer):
            raise TypeError(
                f"expected ZOSGD or FedKSeedSGD, or no optimizer at all, got {type(self.optimizer).__name__}"
            )
        if self.accelerator.scaler is not None:
            raise ValueError("expected no GradScaler, got mixed precision fp16 from the launcher; take bf16")
        if getattr(self, "is_deepspeed_enabled", False) or getattr(self, "is_fsdp_enabled", False):
            raise ValueError(
                "expected data parallel processes, got deepspeed or FSDP from the launcher: sharded weights "
                "cannot be perturbed yet"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"expected one GPU a process, got {self.args.n_gpu}; start with torchrun, or let "
                "CUDA_VISIBLE_DEVICES name one"
            )

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

    def _set_mode(self, model: nn.Module) -> None:
        if self._train_mode:
            model.train()
            return
        model.eval()
        # TRL tells the metrics of training from those of evaluation by this flag of the outermost module;
        # dropout asks its own.
        self.model.training = any(kind.__module__.startswith("trl.") for kind in type(self).__mro__)

    def _adds_up(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether losses of micro-batches add up to the step's, by Trainer's own rule."""
        if self.loss_is_scaled_for_ga is not None:  # type: ignore[attr-defined]
            return bool(self.loss_is_scaled_for_ga)  # type: ignore[attr-defined]
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
        return bool(accepts or self.compute_loss_func is not None)  # type: ignore[attr-defined]

    def _loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        # compute_loss takes labels out of the mapping, or puts options in.
        loss: torch.Tensor = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items)  # type: ignore[attr-defined]
        return loss

    def _is_paired(self) -> bool:
        storage = self.zeroth_order.storage
        return isinstance(storage, Streamed) and storage.paired

    def _paired_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """Trainer's own loss, of each half of the batch run twice."""
        own = type(self).compute_loss is Trainer.compute_loss  # type: ignore[attr-defined]
        if not own or self.compute_loss_func is not None or self.label_smoother is not None:  # type: ignore[attr-defined]
            raise ValueError(
                "expected the model's own loss with a paired storage mode, got another compute_loss, "
                "compute_loss_func or label smoothing, which returns one loss for both sides; take "
                "Streamed() without paired"
            )
        counts = num_items is not None and self.model_accepts_loss_kwargs  # type: ignore[attr-defined]
        losses = paired_losses(model, {**inputs, **({"num_items_in_batch": num_items} if counts else {})})
        if counts and self.args.average_tokens_across_devices:
            losses = losses * self.accelerator.num_processes
        return losses


class ZOTrainer(ZOTrainerMixin, Trainer):  # type: ignore[misc, unused-ignore]
    """transformers' Trainer without a backward pass; see `ZOTrainerMixin`."""
