"""A model whose forward passes need next to no memory: what a step on it takes is the step's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 1024
NUM_BLOCKS, NUM_ROWS, VOCABULARY = 3, 8192, 16384
#: Elements of the largest unit, a block; the embedding, of which rows are gathered, has twice as many.
UNIT_NUMEL = NUM_ROWS * WIDTH
NUMEL = NUM_BLOCKS * UNIT_NUMEL + VOCABULARY * WIDTH


class BareModel(nn.Module):
    """An embedding and blocks that read one row of their weight each; called as models of transformers are.

    Args:
        num_rows: of a block's weight.
        vocabulary: rows of the embedding.
        dtype, device: of the weights.
    """

    def __init__(self, num_rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        with torch.device(device):
            self.embed = nn.Embedding(vocabulary, WIDTH, dtype=dtype)
            self.layers = nn.ModuleList([_Block(num_rows, dtype) for _ in range(NUM_BLOCKS)])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embed.weight.dtype

    def loss_function(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Not the likelihood of anything: a mean in fp32."""
        return logits.float().mean()

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(loss=self.loss_function(hidden, labels), logits=hidden)


class _Block(nn.Module):
    def __init__(self, num_rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_rows, WIDTH), 0.5, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.weight[0]
