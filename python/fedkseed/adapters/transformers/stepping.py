"""The step of a zeroth-order Trainer: each micro-batch is a `measure` of the optimizer.

Where Trainer's loop calls the optimizer's `step`, that makes the step of what was measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedkseed._extras import require_extra
from fedkseed.optim import paired_losses
from fedkseed.optim.base import ZerothOrderOptimizer
from fedkseed.storage import Streamed

require_extra("hf", "transformers", "accelerate")

from transformers import Trainer


class Stepping:
    """The part of `ZOTrainerMixin` that a step goes through."""

    args: Any
    model: Any
    optimizer: Any
    accelerator: Any
    _train_mode: bool

    @property
    def zeroth_order(self) -> ZerothOrderOptimizer:
        """The optimizer itself, without accelerate's wrapper: `last`, `ledger`, `discard` and the like."""
        optimizer: ZerothOrderOptimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer

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
