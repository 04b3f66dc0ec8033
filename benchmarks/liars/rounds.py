"""One round with liars among its clients, as messages: what it moves in a tensor, beside the honest round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedkseed import ModelIdentity, Reply, SeedPool, Server, ServerConfig
from fedkseed.federation.bounds import Bounds
from fedkseed.federation.config import Weighting
from fedkseed.federation.messages import broadcast_digest

LEARNING_RATE, ZO_EPS = 1e-4, 1e-3
NUM_STEPS, NUM_SEEDS = 20, 256
#: Of an honest g that is drawn.
SCALE = 20.0
#: What an honest client counts, and the most that a liar can say.
ROWS, MOST_ROWS = 1000, 2**32 - 1
OFF = Bounds(median_clip=0.0, share_cap=0.0)

Scalars = NDArray[np.float32]
#: The g of one client, from a generator and the number of steps.
Draw = Callable[[np.random.Generator, int], Scalars]


def normal(generator: np.random.Generator, num_steps: int) -> Scalars:
    """Normal g."""
    return generator.normal(scale=SCALE, size=num_steps).astype(np.float32)


def student(generator: np.random.Generator, num_steps: int) -> Scalars:
    """Student's t with three degrees of freedom, of the same standard deviation."""
    return (SCALE * generator.standard_t(3, size=num_steps) / np.sqrt(3)).astype(np.float32)


@dataclass(frozen=True)
class Replies:
    """What the clients of a round say.

    Attributes:
        scalars: g of each client, [n, tau].
        data_sizes: of each client.
    """

    scalars: Scalars
    data_sizes: tuple[int, ...]

    @classmethod
    def honest(cls, draw: Draw, seed: int, data_sizes: Sequence[int]) -> Replies:
        """Clients of these sizes whose g are drawn."""
        generator = np.random.default_rng(seed)
        return cls(np.stack([draw(generator, NUM_STEPS) for _ in data_sizes]), tuple(data_sizes))

    def with_liars(self, lies: Scalars) -> Replies:
        """The same with the first clients' g replaced, and their sizes by the largest."""
        num_liars = len(lies)
        scalars = np.concatenate((lies, self.scalars[num_liars:]))
        return Replies(scalars, (MOST_ROWS,) * num_liars + self.data_sizes[num_liars:])


class Arena:
    """A model of one tensor, and rounds on it.

    Args:
        num_weights: of the tensor; the more, the less the rms of a move depends on the noise in them.
    """

    def __init__(self, num_weights: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._before = 0.02 * torch.randn(1, num_weights, generator=generator)
        self._model = nn.Linear(num_weights, 1, bias=False)
        self._model.weight.data.copy_(self._before)
        self._identity = ModelIdentity.of(self._model)

    def move(
        self, replies: Replies, bounds: Bounds, *, seed: int, weighting: Weighting = "data_size"
    ) -> NDArray[np.float64]:
        """What a round of these replies adds to the weights.

        The replies travel as bytes, answers to the broadcasts of a new server, which merges them; the ledger
        of the round then goes onto the tensor.

        Args:
            replies: of all invited clients.
            bounds: of the server.
            seed: of the seed pool, from which the schedules are drawn too.
            weighting: of the replies.
        """
        num_clients, num_steps = replies.scalars.shape
        config = ServerConfig(
            num_clients=num_clients,
            clients_per_round=num_clients,
            num_local_steps=num_steps,
            lr=LEARNING_RATE,
            eps=ZO_EPS,
            weighting=weighting,
            median_clip=bounds.median_clip,
            share_cap=bounds.share_cap,
        )
        server = Server(self._identity, SeedPool(seed, NUM_SEEDS), config)
        opened = server.open()
        for client, message in opened.messages.items():
            reply = Reply(
                opened.number,
                client,
                replies.data_sizes[client],
                broadcast_digest(message),
                replies.scalars[client],
            )
            opened.add(client, reply.to_bytes())
        opened.close()
        weights = self._model.weight.data
        weights.copy_(self._before)
        server.ledger().apply_(self._model)
        return (weights.double() - self._before.double()).flatten().numpy()


def rms(move: NDArray[np.float64]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(move))))


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Cosine of the angle between two moves."""
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def lies_at_the_bound(num_liars: int, num_steps: int) -> Scalars:
    """Liars who all say the largest g that a reply may hold, with one sign: where schedules meet, it adds."""
    return np.full((num_liars, num_steps), ServerConfig.max_abs_g, np.float32)
