"""What a log is told of a round: what its bounds cut, and who outweighs all others."""

from __future__ import annotations

import logging

from fedkseed.federation.collecting import some
from fedkseed.federation.config import ServerConfig
from fedkseed.federation.summary import RoundSummary

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
    if summary.capped:
        logger.warning(
            "round %d: cut the weights of clients %s to %g / %d",
            summary.round,
            some(summary.capped),
            config.share_cap,
            len(summary.replied),
        )
    for client, weight in summary.weights.items():
        if weight > _OUTSIZED_WEIGHT and len(summary.replied) > 2:
            logger.warning(
                "round %d: client %d weighs %.3f (by its data size), more than the %d others together",
                summary.round,
                client,
                weight,
                len(summary.replied) - 1,
            )
