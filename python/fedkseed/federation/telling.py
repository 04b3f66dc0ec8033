"""What a log is told of a round or an evaluation: what bounds cut, and who outweighs all others."""

from __future__ import annotations

import logging

from fedkseed.federation.collecting import some
from fedkseed.federation.config import ServerConfig
from fedkseed.federation.summary import EvaluationSummary, RoundSummary

logger = logging.getLogger("fedkseed")

#: A weight above this, among more than two replies, is told: the others hardly count.
_OUTSIZED_WEIGHT = 0.5


def tell(summary: RoundSummary, config: ServerConfig) -> None:
    """Logs what a round's bounds cut, and a reply that outweighs all others together."""
    if summary.clipped:
        logger.warning(
            "round %d: clipped %d g of clients %s to %g times the median |g| of %.4g",
            summary.round,
            sum(summary.clipped.values()),
            some(tuple(summary.clipped)),
            config.median_clip,
            summary.median_abs_g,
        )
    tell_weights(summary, config.share_cap)


def tell_weights(summary: RoundSummary | EvaluationSummary, share_cap: float) -> None:
    """Logs whose weights were cut, and one above those of all others together."""
    what, by = "round", "data size"
    if isinstance(summary, EvaluationSummary):
        what, by = "evaluation of round", "number of examples"
    if summary.capped:
        logger.warning(
            "%s %d: cut the weights of clients %s to %g / %d",
            what,
            summary.round,
            some(summary.capped),
            share_cap,
            len(summary.replied),
        )
    for client, weight in summary.weights.items():
        if weight > _OUTSIZED_WEIGHT and len(summary.replied) > 2:
            logger.warning(
                "%s %d: client %d weighs %.3f (by its %s), more than the %d others together",
                what,
                summary.round,
                client,
                weight,
                by,
                len(summary.replied) - 1,
            )
