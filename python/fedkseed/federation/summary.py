"""What a round, or an evaluation of its model, came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoundSummary:
    """What a server merged in one round.

    Attributes:
        round: its number.
        clients: who was invited, ascending.
        replied: those of them whose replies were merged.
        missing: the others.
        weights: of each reply in the merge, by client; their sum is 1 up to rounding.
        capped: whose weights were cut to ``share_cap`` / n.
        clipped: how many g of a client were clipped to ``median_clip`` times the median; clients without one
            are left out.
        median_abs_g: the median over the replies of each one's median |g|, without skipped steps; None if all
            were, if nobody replied, or if ``median_clip`` is off, which alone asks for it.
        num_skipped: steps that clients skipped (g = 0).
        bytes_down: of the broadcasts to all that were invited.
        bytes_up: of the replies that were merged.
    """

    round: int
    clients: tuple[int, ...]
    replied: tuple[int, ...]
    missing: tuple[int, ...]
    weights: Mapping[int, float] = field(default_factory=dict)
    capped: tuple[int, ...] = ()
    clipped: Mapping[int, int] = field(default_factory=dict)
    median_abs_g: float | None = None
    num_skipped: int = 0
    bytes_down: int = 0
    bytes_up: int = 0

    def metrics(self) -> dict[str, float]:
        """Numbers by name, for a framework's records; what is not known is left out."""
        found = {
            "round": self.round,
            "num_clients": len(self.clients),
            "num_replied": len(self.replied),
            "num_missing": len(self.missing),
            "num_capped": len(self.capped),
            "num_clipped": sum(self.clipped.values()),
            "num_skipped": self.num_skipped,
            "largest_weight": max(self.weights.values(), default=None),
            "median_abs_g": self.median_abs_g,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
        }
        return {name: float(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class EvaluationSummary:
    """What clients found about the model that a round starts from.

    Attributes:
        round: that the model is of: of the rounds before it.
        clients: who was asked, ascending.
        replied: those of them who answered.
        missing: the others.
        num_examples: of all answers together.
        scores: by name, the mean over answers that have it, weighted by their number of examples.
        by_client: the scores of each client that answered.
        weights: of each answer in a mean of a score that all have, by client; their sum is 1 up to rounding.
        capped: whose weights were cut there to ``share_cap`` / n.
    """

    round: int
    clients: tuple[int, ...]
    replied: tuple[int, ...]
    missing: tuple[int, ...]
    num_examples: int
    scores: Mapping[str, float]
    by_client: Mapping[int, Mapping[str, float]]
    weights: Mapping[int, float] = field(default_factory=dict)
    capped: tuple[int, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Numbers by name, for a framework's records."""
        counts = {
            "round": float(self.round),
            "num_clients": float(len(self.clients)),
            "num_replied": float(len(self.replied)),
            "num_examples": float(self.num_examples),
            "num_capped": float(len(self.capped)),
        }
        return {**counts, **self.scores}
