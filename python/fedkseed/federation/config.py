"""The numbers of a federation, each declared once: those of a round, and what a server has beside them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from fedkseed._checks import (
    check_count,
    check_eps,
    check_kind,
    check_learning_rate,
    check_max_abs_g,
    check_real,
)
from fedkseed.federation.bounds import Bounds
from fedkseed.federation.messages import RUN_ID_BYTES, moves_within_fp32
from fedkseed.federation.significance import DEFAULT_CLIP, DEFAULT_START
from fedkseed.seeds import MAX_CLIENTS, MAX_STEPS
from fedkseed_kernels import FAMILIES

Weighting = Literal["data_size", "equal"]
Sampling = Literal["uniform", "pro"]

#: No |g| is larger: it travels in fp32.
_LARGEST_G = float(np.finfo(np.float32).max)
#: A smaller multiple of a median could round to 0, which means off.
_LEAST_MULTIPLE = 1e-3


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """The numbers of a round, the same for a server and for a simulation of it.

    Attributes:
        clients_per_round: clients that are invited to a round.
        num_local_steps: tau, steps of a client in a round.
        lr: learning rate of the local steps; the more clients share a round, the larger it may be.
        eps: scale of the perturbation, rounded to fp32.
        max_abs_g: bound of |g|, rounded to fp32; clients clip to it, and a reply beyond it is refused. So a
            round moves the coefficients by at most lr tau max_abs_g in all, whoever replies.
        weighting: of the replies, "data_size" (as the clients state it) or "equal".
        sampling: of the seeds of a schedule, "uniform" or "pro" (by significance, FedKSeed-Pro).
        family: of the noise, "gaussian" or "rademacher" (signs, the cheaper to make).
        pro_clip: what a |g| counts at most for the probabilities of sampling "pro".
        pro_start: the |g| that the history of every seed begins with, for sampling "pro".
        median_clip: a |g| counts up to this multiple of the median |g| of its round; 0 for no such clip.
        share_cap: a reply weighs at most this multiple of 1 / n among n replies, at least 1; 0 for no cap.

    Raises:
        TypeError, ValueError: a field of another type or out of range.
    """

    clients_per_round: int
    num_local_steps: int
    lr: float
    eps: float
    max_abs_g: float = 1000.0
    weighting: Weighting = "data_size"
    sampling: Sampling = "uniform"
    family: str = field(default="gaussian", metadata={"choices": FAMILIES})
    pro_clip: float = DEFAULT_CLIP
    pro_start: float = DEFAULT_START
    median_clip: float = 0.0
    share_cap: float = 0.0

    def __post_init__(self) -> None:
        check_count("clients_per_round", self.clients_per_round, 1, MAX_CLIENTS)
        check_count("num_local_steps", self.num_local_steps, 1, MAX_STEPS - 1)
        object.__setattr__(self, "lr", check_learning_rate(self.lr))
        object.__setattr__(self, "eps", check_eps(self.eps))
        object.__setattr__(self, "max_abs_g", check_max_abs_g(self.max_abs_g))
        for name, low in (("pro_clip", float(np.finfo(np.float32).tiny)), ("pro_start", 0.0)):
            g = check_real(name, getattr(self, name))
            if not low <= g <= _LARGEST_G:
                raise ValueError(f"expected {name} in [{low:.3g}, {_LARGEST_G:.3g}], got {g}")
            object.__setattr__(self, name, g)
        for name, least in (("median_clip", 0.0), ("share_cap", 1.0)):
            object.__setattr__(self, name, _check_multiple(name, getattr(self, name), least))
        if not moves_within_fp32(self.lr, self.eps, self.max_abs_g):
            raise ValueError(
                f"expected lr, eps and max_abs_g whose steps lie within fp32 (2 eps + lr max_abs_g), "
                f"got {self.lr}, {self.eps}, {self.max_abs_g}; lower them"
            )
        for name, value, choices in (
            ("weighting", self.weighting, get_args(Weighting)),
            ("sampling", self.sampling, get_args(Sampling)),
            ("family", self.family, FAMILIES),
        ):
            if value not in choices:
                raise ValueError(f"expected a {name} out of {list(choices)}, got {value!r}")

    def round_numbers(self) -> dict[str, Any]:
        """The fields of `RoundConfig` alone, as arguments by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(RoundConfig)}


@dataclass(frozen=True)
class ServerConfig(RoundConfig):
    """What a server is told once, at its start; a resumed server must be told the same.

    Attributes:
        num_clients: registered clients, 0 .. num_clients - 1.
        run_id: 16 bytes that tell this run from others, so that replies recorded in an earlier run are
            refused; if None, a new `Server` draws them from the system, and a resumed one keeps its run's.

    The other fields are those of `RoundConfig`, given by name.

    Raises:
        TypeError, ValueError: a field of another type or out of range.
    """

    num_clients: int
    run_id: bytes | None = None

    def __post_init__(self) -> None:
        check_count("num_clients", self.num_clients, 1, MAX_CLIENTS)
        super().__post_init__()
        check_count("clients_per_round", self.clients_per_round, 1, self.num_clients)
        if self.run_id is not None and (
            not isinstance(self.run_id, bytes) or len(self.run_id) != RUN_ID_BYTES
        ):
            raise ValueError(f"expected a run_id of {RUN_ID_BYTES} bytes or None, got {self.run_id!r}")

    def check_min_replies(self, min_replies: int, num_available: int | None = None) -> int:
        """The number, if a round can have so many replies.

        Args:
            num_available: clients that there are; those that are registered if None.

        Raises:
            TypeError, ValueError: it is no count, or more than a round invites.
        """
        known = self.num_clients if num_available is None else num_available
        most = min(self.clients_per_round, known)
        if check_count("min_replies", min_replies, 0, MAX_CLIENTS) > most:
            raise ValueError(
                f"expected min_replies of at most {most}, as many clients as a round invites "
                f"(clients_per_round {self.clients_per_round}, {known} clients), got {min_replies}: no round "
                "could be closed; lower it, or invite more"
            )
        return int(min_replies)

    def with_bounds(self, bounds: Bounds) -> ServerConfig:
        """This with the two bounds where it has 0 for them.

        Raises:
            TypeError, ValueError: no bounds, or one that is out of range.
        """
        check_kind("bounds", bounds, Bounds, "Bounds(median_clip, share_cap) makes them, Bounds(0, 0) none")
        return replace(
            self,
            median_clip=self.median_clip or bounds.median_clip,
            share_cap=self.share_cap or bounds.share_cap,
        )


def check_server_config(config: object) -> ServerConfig:
    """The config, if it is a server's.

    Raises:
        TypeError: another's; says how a simulation's gives the server's.
    """
    return check_kind(
        "config",
        config,
        ServerConfig,
        "config.server_config(num_clients) of a SimulationConfig makes one, and so does Task.server",
    )


def _check_multiple(name: str, given: float, least: float) -> float:
    multiple = check_real(name, given)
    if multiple and not max(least, _LEAST_MULTIPLE) <= multiple <= _LARGEST_G:
        raise ValueError(
            f"expected {name} of 0 (off) or in [{max(least, _LEAST_MULTIPLE):.3g}, {_LARGEST_G:.3g}], "
            f"got {multiple}"
        )
    return multiple
