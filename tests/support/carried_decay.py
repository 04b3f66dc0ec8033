"""Weight decay as the optimizer applies it: alpha is fp32, and what that leaves out is carried on."""

from __future__ import annotations

import numpy as np


class CarriedDecay:
    """alpha of one step after the other, for a constant lr times weight decay.

    Attributes:
        alpha: of the coming step.
    """

    def __init__(self, decay: float) -> None:
        self._decay, self._carried = decay, 0.0
        self.alpha = float(np.float32(1 - decay))

    def advance(self) -> None:
        """A step was made."""
        self._carried += self._decay - (1 - self.alpha)
        self.alpha = float(np.float32(1 - (self._decay + self._carried)))
