"""transformers' Trainer, and what is derived from it, without a backward pass."""

from __future__ import annotations

from fedkseed.adapters.transformers.trainer import ZOTrainer, ZOTrainerMixin

__all__ = ["ZOTrainer", "ZOTrainerMixin"]
