"""What becomes of each field of `transformers.TrainingArguments`: ``arguments.toml``, read and held to.

And of what launchers and other arguments of a Trainer bring.
"""

from __future__ import annotations

import dataclasses
import logging
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fedkseed.optim.base import ZerothOrderOptimizer

logger = logging.getLogger("fedkseed")

SERVED, IGNORED, REFUSED = "served", "ignored", "refused"
#: Fields whose noise is drawn in train mode.
_OF_TRAIN_MODE = frozenset({"neftune_noise_alpha"})


def table() -> dict[str, dict[str, Any]]:
    """The tables of ``arguments.toml``.

    A text for each field, by what becomes of it; "unset" values and "former" names.
    """
    return tomllib.loads((files(__package__) / "arguments.toml").read_text("utf-8"))


def check_arguments(args: Any, train_mode: bool) -> None:
    """Refuses what a zeroth-order Trainer cannot do, and says in one line each what has no effect.

    Args:
        args: `transformers.TrainingArguments`, or what is derived from it.
        train_mode: whether modules are in train mode during a step.

    Raises:
        ValueError: a field is set that is refused; names it and says what to do.
    """
    known = table()
    given = _given(args, known["unset"], known["former"])
    for name, value in given.items():
        if reason := known[REFUSED].get(name):
            raise ValueError(f"expected no {name} in a zeroth-order Trainer, got {value!r}: {reason}")
    for name, value in given.items():
        if (reason := known[IGNORED].get(name)) and not (train_mode and name in _OF_TRAIN_MODE):
            logger.warning("%s=%r has no effect in a zeroth-order Trainer: %s", name, value, reason)


def check_surroundings(trainer: Any) -> None:
    """Refuses what launchers bring, and arguments of other optimizers.

    Raises:
        ValueError, TypeError: as `ZOTrainerMixin`.
    """
    if getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
        raise ValueError("expected no optimizer_cls_and_kwargs, got some: the Trainer makes its optimizer")
    if trainer.optimizer is not None and not isinstance(trainer.zeroth_order, ZerothOrderOptimizer):
        raise TypeError(
            f"expected ZOSGD or FedKSeedSGD, or no optimizer at all, got {type(trainer.optimizer).__name__}"
        )
    if trainer.accelerator.scaler is not None:
        raise ValueError("expected no GradScaler, got mixed precision fp16 from the launcher; take bf16")
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        raise ValueError(
            "expected data parallel processes, got deepspeed or FSDP from the launcher: sharded weights "
            "cannot be perturbed yet"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"expected one GPU a process, got {trainer.args.n_gpu}; start with torchrun, or let "
            "CUDA_VISIBLE_DEVICES name one"
        )


def _given(args: Any, unset: Mapping[str, list[Any]], former: Mapping[str, str]) -> dict[str, Any]:
    """The fields that are neither what their class begins with, nor what it makes of that, nor empty.

    A former name whose field holds what that of the new one does is left out.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    not_set = {name: [default, *unset.get(name, ())] for name, default in defaults.items()}
    for old, new in former.items():
        if old in defaults and new in defaults:
            not_set[new].append(defaults[old])
            not_set[old].append(getattr(args, new))
    values = {name: getattr(args, name) for name in defaults}
    return {name: value for name, value in values.items() if value and value not in not_set[name]}
