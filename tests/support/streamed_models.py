"""Support for tests of the streamed mode: small models of several shapes, and what their g must be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fedkseed_kernels
from fedkseed import manifest_parameters

VOCABULARY, WIDTH, BATCH, LENGTH = 23, 6, 3, 5


class Block(nn.Module):
    """Reads a parameter of its own, a child, and a child's weight past the child."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.7))

    def forward(self, hidden: Tensor) -> Tensor:
        inner = torch.tanh(self.first(self.norm(hidden)))
        return hidden + self.scale * functional.linear(inner, self.second.weight)


class Stage(nn.Module):
    """Blocks within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class ScaledEmbedding(nn.Embedding):
    """Looks up other rows than it is given, and multiplies them."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2) * WIDTH**0.5


class LanguageModel(nn.Module):
    """Embeddings, blocks, a norm, and a head; ``build`` may change what stands for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class TiedModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class SubclassModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(VOCABULARY + 2, WIDTH)


class SharedModel(LanguageModel):
    """One block at two places, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = self.layers[0]

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.layers[1](self.embed(ids))
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class RootedModel(LanguageModel):
    """Parameters that the model and the list's owner read themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Stage()
        self.bias = nn.Parameter(torch.linspace(-1, 1, WIDTH))
        self.gains = nn.ParameterList([torch.full((WIDTH,), 1.25), torch.full((WIDTH,), 0.75)])

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids) * self.gains[0] + self.bias
        hidden = self.body(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden) * self.gains[1])
        return logits


class NestedModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Stage(), nn.Sequential(Block(), nn.Tanh())])


class EmbeddingsModel(LanguageModel):
    """Embeddings inside a module that contains no block, one of them shorter than what is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Embeddings()


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        found: Tensor = self.norm(self.words(ids) + self.places(places) + self.kinds(ids % 2))
        return found


class PlainModel(LanguageModel):
    """No list of blocks at all: one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Block()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layers(self.embed(ids))))
        return logits


SERVED: list[type[LanguageModel]] = [
    LanguageModel,
    TiedModel,
    SubclassModel,
    SharedModel,
    RootedModel,
    NestedModel,
    EmbeddingsModel,
    PlainModel,
]


def build(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Module:
    """A model with random weights, equal for equal arguments."""
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 4)
    return model.to(dtype)


def make_ids(seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


def both_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """What a closure of the paired modes returns: the losses of both halves of a doubled batch."""
    logits = model(torch.cat([ids, ids]))[:, :-1].double()
    return torch.stack(
        [functional.cross_entropy(half.flatten(0, 1), ids[:, 1:].flatten()) for half in logits.chunk(2)]
    )


def projected(losses: list[float], eps: float) -> float:
    """g of the losses of both sides."""
    return float(torch.tensor((losses[0] - losses[1]) / (2 * eps), dtype=torch.float64).float())


def side_losses(
    model: nn.Module,
    seed: int,
    eps: float,
    evaluate: Callable[[nn.Module], Any],
    family: str = "gaussian",
    dtype: torch.dtype | None = None,
    frozen: Sequence[str] = (),
) -> list[float]:
    """Losses of two copies of the model whose stored weights are perturbed: plus, minus."""
    losses = []
    for sign in (1, -1):
        perturbed = copy.deepcopy(model).to(dtype)
        named = manifest_parameters(perturbed)
        moved = [(stream, p) for stream, (name, p) in enumerate(named) if name not in frozen]
        with torch.no_grad():
            fedkseed_kernels.perturb_(
                [p for _, p in moved],
                seed,
                sign * eps,
                streams=[stream for stream, _ in moved],
                family=family,
            )
            losses.append(float(evaluate(perturbed)))
    return losses
