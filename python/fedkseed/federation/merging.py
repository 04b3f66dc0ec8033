"""What the replies of a round add up to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.bounds import capped_weights, clipped, median_magnitude
from fedkseed.federation.config import ServerConfig
from fedkseed.federation.messages import reply_bytes, scalars_in_parts
from fedkseed.federation.round import Round
from fedkseed.federation.significance import SeedSignificance
from fedkseed.federation.summary import RoundSummary


@dataclass(frozen=True, eq=False)
class Merged:
    """A round's replies, added up.

    Attributes:
        sums: b of the formula in `fedkseed.Server`, fp64 [K].
        significance: after the round; None with uniform sampling.
        summary: of the round.
    """

    sums: NDArray[np.float64]
    significance: SeedSignificance | None
    summary: RoundSummary


def merged(
    round: Round,
    num_seeds: int,
    config: ServerConfig,
    significance: SeedSignificance | None,
) -> Merged:
    """The sums of a round: replies in ascending order of client, steps in order, one after the other.

    Args:
        round: with the replies that were added to it.
        num_seeds: K.
        config: the federation's fixed numbers.
        significance: before the round; not changed.
    """
    replies, sizes, clients = round.replies, round.sizes, list(round.replied)
    sums = np.zeros(num_seeds)
    significance = None if significance is None else significance.copy()
    summary = RoundSummary(
        round=round.number,
        clients=round.clients,
        replied=tuple(clients),
        missing=round.missing,
        bytes_down=round.num_bytes_down,
        bytes_up=len(clients) * reply_bytes(config.num_local_steps),
    )
    if not clients:
        return Merged(sums, significance, summary)
    shares = np.array([sizes[client] if config.weighting == "data_size" else 1 for client in clients], float)
    weights, is_cut = capped_weights(shares, config.share_cap)
    raw = [replies[client] for client in clients]
    median = None
    if config.median_clip:
        median = median_magnitude(part for _, part in scalars_in_parts(raw, config.num_local_steps))
    limit = None if median is None else config.median_clip * median
    beyond: dict[int, int] = {}
    num_skipped = 0
    for part, scalars in scalars_in_parts(raw, config.num_local_steps):
        wide = scalars.astype(np.float64)
        num_skipped += wide.size - int(np.count_nonzero(wide))
        if limit is not None:
            found = (np.abs(wide) > limit).sum(axis=1).tolist()
            beyond.update({client: n for client, n in zip(clients[part], found, strict=True) if n})
            wide = clipped(wide, limit)
        indices = round.schedules(clients[part]).reshape(-1).astype(np.intp)
        if significance is not None:
            significance.record_(indices, wide.reshape(-1))
        # One after the other, unlike a bincount of each part.
        np.add.at(sums, indices, (weights[part, None] * wide).reshape(-1))
    summary = dataclasses.replace(
        summary,
        weights=dict(zip(clients, weights.tolist(), strict=True)),
        capped=tuple(client for client, cut in zip(clients, is_cut.tolist(), strict=True) if cut),
        clipped=beyond,
        median_abs_g=median,
        num_skipped=num_skipped,
    )
    return Merged(sums, significance, summary)
