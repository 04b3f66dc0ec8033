"""What a client does for a server at most, whatever it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fedkseed._checks import check_real
from fedkseed.federation.messages import Broadcast, ProtocolError


@dataclass(frozen=True, kw_only=True)
class ClientLimits:
    """A client's own limits; a message beyond one is refused before anything is computed. None: no limit.

    A message is small and its work is not: rebuilding the model costs time in proportion to K, steps in
    proportion to their number.

    Attributes:
        lr: largest learning rate.
        eps: largest scale of the perturbation.
        max_abs_g: largest bound of |g|.
        num_local_steps: most local steps of a round.
        num_seeds: most seeds of a pool.

    Raises:
        TypeError, ValueError: a limit that is no positive number.
    """

    lr: float | None = None
    eps: float | None = None
    max_abs_g: float | None = None
    num_local_steps: int | None = None
    num_seeds: int | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            limit = getattr(self, entry.name)
            if limit is not None and not check_real(entry.name, limit) > 0:
                raise ValueError(f"expected a limit of {entry.name} above 0, got {limit}; None for none")

    def require(self, broadcast: Broadcast) -> None:
        """Raises unless a message is within the limits.

        Raises:
            ProtocolError: it is not; says which limit, and what was asked for.
        """
        asked = {
            "lr": broadcast.lr,
            "eps": broadcast.eps,
            "max_abs_g": broadcast.max_abs_g,
            "num_local_steps": len(broadcast.schedule),
            "num_seeds": len(broadcast.coefficients),
        }
        for name, value in asked.items():
            limit = getattr(self, name)
            if limit is not None and value > limit:
                raise ProtocolError(
                    f"expected a broadcast with {name} of at most {limit}, the limit of client "
                    f"{broadcast.client}, got {value}; raise the limit if that server is trusted"
                )
