"""The parameter list that all contestants work on, and the way back to its first state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

# SmolLM2-135M: Llama architecture, head tied to the embedding. Names and shapes in `named_parameters` order.
HIDDEN_SIZE = 576
INTERMEDIATE_SIZE = 1536
NUM_LAYERS = 30
NUM_HEADS = 9
NUM_KV_HEADS = 3
VOCAB_SIZE = 49152

Shapes = list[tuple[str, tuple[int, ...]]]


def smollm2_shapes() -> Shapes:
    """(name, shape) of every parameter of SmolLM2-135M; a test compares them with the model itself."""
    kv_size = HIDDEN_SIZE // NUM_HEADS * NUM_KV_HEADS
    layer: Shapes = [
        ("self_attn.q_proj.weight", (HIDDEN_SIZE, HIDDEN_SIZE)),
        ("self_attn.k_proj.weight", (kv_size, HIDDEN_SIZE)),
        ("self_attn.v_proj.weight", (kv_size, HIDDEN_SIZE)),
        ("self_attn.o_proj.weight", (HIDDEN_SIZE, HIDDEN_SIZE)),
        ("mlp.gate_proj.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE)),
        ("mlp.up_proj.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE)),
        ("mlp.down_proj.weight", (HIDDEN_SIZE, INTERMEDIATE_SIZE)),
        ("input_layernorm.weight", (HIDDEN_SIZE,)),
        ("post_attention_layernorm.weight", (HIDDEN_SIZE,)),
    ]
    shapes: Shapes = [("model.embed_tokens.weight", (VOCAB_SIZE, HIDDEN_SIZE))]
    for index in range(NUM_LAYERS):
        shapes += [(f"model.layers.{index}.{name}", shape) for name, shape in layer]
    return [*shapes, ("model.norm.weight", (HIDDEN_SIZE,))]


def tiny_shapes() -> Shapes:
    """A few thousand elements in odd shapes, with names of each kind that the official update tells apart."""
    return [
        ("embed.weight", (129, 24)),
        ("layers.0.mlp.weight", (33, 24)),
        ("layers.0.mlp.bias", (33,)),
        ("layers.0.input_layernorm.weight", (24,)),
        ("norm.weight", (7,)),
    ]


def shapes_of(model: str) -> Shapes:
    """The parameters of "smollm2" or "tiny"."""
    return smollm2_shapes() if model == "smollm2" else tiny_shapes()


def num_parameters(model: str) -> int:
    """Elements of all parameters: 134,515,008 for "smollm2"."""
    return sum(math.prod(shape) for _, shape in shapes_of(model))


@dataclass
class Weights:
    """Named parameters whose values and storage can be put back after a contestant has changed them."""

    names: list[str]
    parameters: list[torch.nn.Parameter]
    _home: list[torch.Tensor] = field(init=False)
    _pristine: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._home = [parameter.data for parameter in self.parameters]
        self._pristine = [data.clone() for data in self._home]

    @property
    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(zip(self.names, self.parameters, strict=True))

    @property
    def num_elements(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def num_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)

    @property
    def pristine(self) -> list[torch.Tensor]:
        """The first values, not to be written."""
        return self._pristine

    def reset_(self) -> None:
        """Puts back the first values, in the first storage: some contestants rebind `.data`."""
        for parameter, home, pristine in zip(self.parameters, self._home, self._pristine, strict=True):
            home.copy_(pristine)
            parameter.data = home


def make_weights(model: str, dtype: torch.dtype) -> Weights:
    """The parameters of "smollm2" or "tiny" with N(0, 0.02) values: no pass depends on them in time."""
    shapes = shapes_of(model)
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.empty(shape).normal_(0, 0.02, generator=generator).to(dtype))
        for _, shape in shapes
    ]
    return Weights([name for name, _ in shapes], parameters)
