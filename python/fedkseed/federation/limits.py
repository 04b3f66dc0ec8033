"""What a client does for a server at most, whatever it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedkseed._checks import check_count, check_eps, check_learning_rate, check_max_abs_g
from fedkseed.federation.messages import Broadcast, ProtocolError
from fedkseed.seeds import MAX_SEEDS, MAX_STEPS

_CHECKS: Mapping[str, Callable[[Any], float]] = {
    "lr": check_learning_rate,
    "eps": check_eps,
    "max_abs_g": check_max_abs_g,
    "num_local_steps": lambda limit: check_count("num_local_steps", limit, 1, MAX_STEPS - 1),
    "num_seeds": lambda limit: check_count("num_seeds", limit, 1, MAX_SEEDS),
}


@dataclass(frozen=True, kw_only=True)
class ClientLimits:
    """A client's own limits; a message beyond one is refused before anything is computed. None: no limit.

    A message is small and its work is not: rebuilding the model costs time in proportion to K, steps in
    proportion to their number.

    Attributes:
        lr: largest learning rate.
        eps: largest scale of the perturbation, rounded to fp32, as it travels.
        max_abs_g: largest bound of |g|, rounded to fp32 too.
        num_local_steps: most local steps of a round.
        num_seeds: most seeds of a pool.

    Raises:
        TypeError, ValueError: a limit that is no such number itself, as where a server is told it.
    """

    lr: float | None = None
    eps: float | None = None
    max_abs_g: float | None = None
    num_local_steps: int | None = None
    num_seeds: int | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            limit = getattr(self, name)
            if limit is not None:
                object.__setattr__(self, name, check(limit))

    def require(self, broadcast: Broadcast) -> None:
        """Raises unless a message is within the limits.

        Raises:
            ProtocolError: it is not; says every limit that is exceeded, and what was asked for.
        """
        asked = {
            "lr": broadcast.lr,
            "eps": broadcast.eps,
            "max_abs_g": broadcast.max_abs_g,
            "num_local_steps": len(broadcast.schedule),
            "num_seeds": len(broadcast.coefficients),
        }
        beyond = {
            name: (value, limit)
            for name, value in asked.items()
            if (limit := getattr(self, name)) is not None and value > limit
        }
        if beyond:
            wanted = " and ".join(f"{name} of at most {limit:.7g}" for name, (_, limit) in beyond.items())
            got = " and ".join(f"{value:.7g}" for value, _ in beyond.values())
            one, them = ("the limit", "it") if len(beyond) == 1 else ("the limits", "them")
            raise ProtocolError(
                f"expected a broadcast with {wanted}, {one} of client {broadcast.client}, got {got}; raise "
                f"{them} if that server is trusted"
            )
