"""What an optimizer says once, and where: what would train nothing, or something else, without a word."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from fedkseed.model.randomness import active_dropout
from fedkseed.storage import SIXTEEN_BIT

logger = logging.getLogger("fedkseed")

#: After so many first steps, or so many steps in a row, whose losses were all equal on both sides.
_EQUAL_FROM_THE_START, _EQUAL_IN_A_ROW = 3, 50
#: Where frames are not the user's: this package, torch, what is installed (wrappers), context managers.
_FOLDERS = (
    os.path.dirname(sys.modules["fedkseed"].__file__ or ""),
    os.path.dirname(torch.__file__),
    sysconfig.get_path("purelib"),
    sysconfig.get_path("platlib"),
)
_LIBRARIES = (contextlib.__file__, *(os.path.join(os.path.abspath(folder), "") for folder in _FOLDERS))


class Notices:
    """Each of them once for an optimizer.

    Args:
        eps: of the optimizer, for the texts.
        max_loss_gap: of the optimizer, for the texts.
    """

    def __init__(self, eps: float, max_loss_gap: float | None) -> None:
        self._eps, self._max_loss_gap = eps, max_loss_gap
        self._said: set[str] = set()
        self._num_steps = 0  # but for those that were skipped
        self._num_equal = 0

    def of_mode(self, model: nn.Module | None) -> None:
        """Dropout at work; looked at in the first step, when the caller has chosen train or eval mode."""
        if model is None or "dropout" in self._said:
            return
        self._said.add("dropout")
        found = active_dropout(model)
        if found:
            name, p = found[0]
            warn_user(
                f"the model is in train mode with dropout: {name} (p={p}), {len(found)} in all. Both sides "
                "of a step get the same mask, so a step is sound but follows the loss of a thinned model, "
                "with more noise; to measure the model itself call model.eval() first"
            )

    def of_loss(self, loss: torch.Tensor) -> None:
        """A loss of 16 bits; one with a graph."""
        if loss.dtype in SIXTEEN_BIT:
            self._warn(
                "16 bits",
                f"the closure returns a loss of {str(loss.dtype).removeprefix('torch.')}, whose steps are "
                "mostly larger than the difference of both sides: g is 0 then, and nothing is tuned; compute "
                "the loss in fp32, functional.cross_entropy(logits.float(), labels) for example",
            )
        if loss.requires_grad:
            self._warn(
                "graph",
                "the closure returns a loss with requires_grad: it builds a graph (and runs backward, if it "
                "calls that), which costs memory and time, and of which a zeroth-order step uses nothing; "
                "compute the loss without enable_grad and backward",
            )

    def gradients(self, tensors: Sequence[torch.Tensor]) -> list[tuple[int, int] | None] | None:
        """The gradients that the weights hold before the first evaluation, for `of_backward`."""
        if "backward" in self._said:
            return None
        self._said.add("backward")
        return _gradients(tensors)

    def of_backward(
        self, before: list[tuple[int, int] | None] | None, tensors: Sequence[torch.Tensor]
    ) -> None:
        """A closure that runs backward() and returns the loss without its graph, as Lightning's own does."""
        if before is None:
            return
        num_new = sum(
            new is not None and new != old for old, new in zip(before, _gradients(tensors), strict=True)
        )
        if num_new:
            self._warn(
                "graph",
                f"the closure calls backward(): {num_new} of {len(before)} tuned weights have new gradients, "
                "at the memory and time of a backward pass for each evaluation, and a zeroth-order "
                "step uses none of them; compute the loss alone (in Lightning: manual optimization, "
                "docs/optimizer.md)",
            )

    def of_written(self, name: str) -> None:
        """A closure that writes tuned weights, which are no business of its own."""
        self._warn(
            "written",
            f"the closure writes the tuned weight {name} (a clamp, another optimizer's step, an embedding "
            "with max_norm): both sides of a step do not belong to the same weights then; write it between "
            "steps",
        )

    def of_frozen(self, name: str) -> None:
        """A parameter that was frozen after its optimizer was made."""
        self._warn(
            "frozen",
            f"{name} has requires_grad=False by now and is tuned all the same: what is frozen is read when "
            "the optimizer is made; make a new one",
        )

    def of_draws(self) -> None:
        """Sides that began with the same random numbers and left the generators in other states."""
        self._warn(
            "draws",
            "the closure took other random numbers on one side of a step than on the other, although both "
            "began with the same: it seeds a generator anew from the system (torch.seed()), or how many it "
            "draws depends on the weights; what is measured then is noise. Call model.eval(), or give it a "
            "fixed seed",
        )

    def of_skipped(self, losses: Sequence[tuple[float, float]], gs: Sequence[float | None]) -> None:
        """Directions that were skipped; the first aloud, as a run that diverges would repeat it each step."""
        for (plus, minus), g in zip(losses, gs, strict=True):
            if g is None:
                level = logging.INFO if "skipped" in self._said else logging.WARNING
                self._said.add("skipped")
                logger.log(
                    level,
                    "a direction counts as g = 0 and is skipped: losses %s and %s, max_loss_gap %s; further "
                    "ones are logged at level INFO and counted in num_skipped",
                    plus,
                    minus,
                    self._max_loss_gap,
                )

    def of_equal_losses(self, losses: Sequence[tuple[float, float]]) -> None:
        """Steps that tune nothing; called after each that was not skipped."""
        self._num_steps += 1
        self._num_equal = self._num_equal + 1 if all(plus == minus for plus, minus in losses) else 0
        if self._num_equal == _EQUAL_IN_A_ROW or self._num_equal == self._num_steps == _EQUAL_FROM_THE_START:
            self._warn(
                "equal",
                f"both sides of the weights had equal losses, to the last bit, in {self._num_equal} steps in "
                "a row: g is 0 and nothing is tuned. Likely the closure does not see the tuned weights (it "
                "runs another copy of the model, or parameters were exchanged), or its loss is rounded to 16 "
                f"bits, or eps = {self._eps:.3g} is below the rounding of the weights (take a larger one, or "
                "storage=Streamed(compute_dtype=torch.float32) for weights of 16 bits), or the loss is "
                "constant",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warn_user(message)


def _gradients(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int] | None]:
    """Which gradient each tensor has, and how often that was written."""
    grads = [tensor.grad if tensor.is_leaf else None for tensor in tensors]
    return [None if grad is None else (id(grad), grad._version) for grad in grads]


def warn_user(message: str) -> None:
    """A UserWarning at the innermost frame that is of no library; at the outermost if all are."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
