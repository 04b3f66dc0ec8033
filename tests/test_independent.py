"""Local steps, aggregation and rebuild against an independent float64 implementation of the paper's formulas.

Written from Qin et al., arXiv 2312.06353, and the noise contract page; nothing of the package is used but
z (`fedkseed_kernels.normal`). It keeps clean weights, evaluates both sides out of place, and models the
contract's stated roundings: eps to fp32, each g to fp32, the sums once to fp32 for the model a round starts
from. Seeds, schedules and client samples come from a Philox of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

import fedkseed_kernels
from fedkseed import Client, SeedPool, Server, ServerConfig, WorkingCopy

BASE_SEED, NUM_SEEDS, NUM_CLIENTS, PER_ROUND, NUM_STEPS, NUM_ROUNDS = 2024, 48, 6, 4, 6, 3
LR, EPS = 3e-3, 1e-3
TOLERANCE = 1e-9  # of max |w|

TEXTS = (
    "Rivers carry what the hills let go, and the sea keeps an account of every grain that arrives.",
    "She counted the stairs twice, because the first count had come out odd and the second would settle it.",
    "To make bread you need flour, water, salt, and more patience than the recipe is willing to admit.",
    "The clock in the station ran four minutes fast, which was why nobody there had ever missed a train.",
    "Two ravens argued about a piece of bread until a third one, who had said nothing, flew away with it.",
    "Snow fell all night on the harbour, and in the morning the boats looked like beds that nobody had made.",
)


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.mix(self.norm(x)).chunk(3, dim=-1)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


class LanguageModel(nn.Module):
    """Two layers over bytes; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.position = nn.Parameter(0.02 * torch.randn(32, 16))
        self.blocks = nn.Sequential(Block(16, 2), Block(16, 2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 128, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def make_model() -> LanguageModel:
    torch.manual_seed(17)
    return LanguageModel().double()


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def batch_of(client: int, round: int, step: int) -> torch.Tensor:
    """Two windows of 24 bytes from the client's text."""
    data = TEXTS[client].encode("ascii")
    starts = [(7 * round + 5 * step + 31 * row) % (len(data) - 24) for row in range(2)]
    return torch.tensor([list(data[start : start + 24]) for start in starts])


# The independent implementation.


def philox(key: int, index: int, purpose: int) -> tuple[int, int, int, int]:
    """Contract, sections 2, 3 and 9: Philox4x32-10 of derived values, in Python integers."""
    low32 = 2**32 - 1
    c0, c1, c2, c3 = index & low32, purpose, index >> 32, 4
    k0, k1 = key & low32, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low32, (p0 >> 32) ^ c3 ^ k1, p0 & low32
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return c0, c1, c2, c3


def uniform(index: int, purpose: int) -> float:
    word0, word1, _, _ = philox(BASE_SEED, index, purpose)
    return ((word0 >> 5) * 2**26 + (word1 >> 6)) * 2.0**-53


def draw_schedule(round: int, client: int) -> list[int]:
    schedule = []
    for step in range(NUM_STEPS):
        u, running, drawn = uniform(round * 2**40 + client * 2**16 + step, 1), 0.0, NUM_SEEDS - 1
        for index in range(NUM_SEEDS):
            running += 1.0 / NUM_SEEDS
            if running > u:
                drawn = index
                break
        schedule.append(drawn)
    return schedule


def draw_clients(round: int) -> list[int]:
    clients = list(range(NUM_CLIENTS))
    for position in range(PER_ROUND):
        other = position + int(uniform(round * 2**40 + position, 2) * (NUM_CLIENTS - position))
        clients[position], clients[other] = clients[other], clients[position]
    return sorted(clients[:PER_ROUND])


Weights = dict[str, torch.Tensor]


def moved(weights: Weights, seed: int, distance: float) -> Weights:
    """w + distance z(seed), out of place; the stream of a parameter is its position."""
    result = {}
    for stream, (name, weight) in enumerate(weights.items()):
        z = fedkseed_kernels.normal(weight.shape, seed, stream=stream, dtype=torch.float64)
        result[name] = weight + distance * z
    return result


def local_steps(
    model: nn.Module, weights: Weights, seeds: list[int], batches: Iterable[torch.Tensor]
) -> tuple[Weights, list[float]]:
    eps = float(np.float32(EPS))
    scalars = []
    for seed, tokens in zip(seeds, batches, strict=True):
        losses = [
            float(
                next_token_loss(functional_call(model, moved(weights, seed, side * eps), (tokens,)), tokens)
            )
            for side in (1.0, -1.0)
        ]
        g = float(np.float32((losses[0] - losses[1]) / (2 * eps)))
        weights = moved(weights, seed, -LR * g)
        scalars.append(g)
    return weights, scalars


def largest_difference(weights: Weights, model: nn.Module) -> float:
    return max(float((weights[name] - parameter).abs().max()) for name, parameter in model.named_parameters())


@torch.no_grad()
def test_three_rounds_of_four_clients_agree() -> None:
    model = make_model()
    w0 = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert "head.weight" not in w0
    limit = TOLERANCE * max(float(weight.abs().max()) for weight in w0.values())
    candidates = []
    for k in range(NUM_SEEDS):
        word0, word1, _, _ = philox(BASE_SEED, k, 0)
        candidates.append(word0 + word1 * 2**32)
    sums = [0.0] * NUM_SEEDS

    pool = SeedPool(BASE_SEED, NUM_SEEDS)
    working = WorkingCopy(make_model(), round_model="own")
    config = ServerConfig(
        num_clients=NUM_CLIENTS, clients_per_round=PER_ROUND, num_local_steps=NUM_STEPS, lr=LR, eps=EPS
    )
    server = Server(working.identity, pool, config)
    clients = [
        Client(
            client,
            working,
            pool,
            loss=lambda model, tokens: next_token_loss(model(tokens), tokens),
            batches=lambda round, num_steps, client=client: [
                batch_of(client, round, step) for step in range(num_steps)
            ],
            data_size=len(TEXTS[client]),
        )
        for client in range(NUM_CLIENTS)
    ]

    for round in range(NUM_ROUNDS):
        members = draw_clients(round)
        assert list(server.clients) == members
        start = w0
        for k in range(NUM_SEEDS):
            start = moved(start, candidates[k], float(np.float32(sums[k])))
        working.load(pool, server.wire_coefficients)
        assert largest_difference(start, working.model) <= limit

        replies, additions = [], [0.0] * NUM_SEEDS
        total = sum(len(TEXTS[client]) for client in members)
        for client in members:
            replies.append((client, clients[client].step(server.broadcast(client))))
            schedule = draw_schedule(round, client)
            walked, scalars = local_steps(
                model,
                start,
                [candidates[k] for k in schedule],
                [batch_of(client, round, step) for step in range(NUM_STEPS)],
            )
            assert largest_difference(walked, working.model) <= limit
            assert largest_difference(start, working.model) > 1e4 * limit
            for k, g in zip(schedule, scalars, strict=True):
                additions[k] -= LR * (len(TEXTS[client]) / total) * g
        server.merge(replies)
        sums = [a + b for a, b in zip(sums, additions, strict=True)]
        differences = np.abs(server.coefficients - np.array(sums))
        assert differences.max() <= 1e-12 * np.abs(sums).max()

    final = w0
    for k in range(NUM_SEEDS):
        final = moved(final, candidates[k], float(np.float32(sums[k])))
    working.load(pool, server.wire_coefficients)
    assert largest_difference(final, working.model) <= limit
    assert largest_difference(w0, working.model) > 1e5 * limit
