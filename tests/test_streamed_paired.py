"""Paired evaluation: g of one forward pass over a doubled batch, and what cannot be split in halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.kernel_calls import watch_calls
from support.small_model import same_bytes, weights_of
from support.streamed_models import (
    BATCH,
    LENGTH,
    SERVED,
    WIDTH,
    Block,
    EmbeddingsModel,
    LanguageModel,
    RootedModel,
    TiedModel,
    both_losses,
    build,
    loss_of,
    make_ids,
    projected,
    side_losses,
)
from torch import Tensor, nn
from torch.nn import functional

from fedkseed import ZOSGD, SeedPool, Streamed

SEED, EPS = 7, 1e-2
SEEDS = [int(seed) for seed in SeedPool(SEED, 4).seeds]
PAIRED = Streamed(paired=True)


@pytest.mark.few
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", SERVED)
def test_g_is_that_of_perturbed_copies(kind: type[LanguageModel], dtype: torch.dtype, family: str) -> None:
    model, ids = build(kind, dtype), make_ids()
    before = weights_of(model)
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, num_directions=2, storage=PAIRED, family=family)
    optimizer.step(lambda: both_losses(model, ids))
    for seed, g in zip(SEEDS, optimizer.projected_grads, strict=False):
        losses = side_losses(model, seed, optimizer.eps, lambda m: loss_of(m, ids), family)
        assert losses[0] != losses[1]
        assert g == projected(losses, optimizer.eps)
    assert same_bytes(before, weights_of(model))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", [TiedModel, EmbeddingsModel, RootedModel])
def test_computing_in_fp32(kind: type[LanguageModel]) -> None:
    model, ids = build(kind, torch.float16), make_ids()
    storage = Streamed(paired=True, compute_dtype=torch.float32)
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=storage)
    optimizer.step(lambda: both_losses(model, ids))
    losses = side_losses(model, SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids), dtype=torch.float32)
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)


def test_outside_of_a_step_both_halves_see_the_same_weights() -> None:
    model, ids = build(TiedModel), make_ids()
    plus, minus = both_losses(model, ids)
    assert plus == minus


def test_a_paired_step_moves_the_weights_as_an_unpaired_one() -> None:
    ids = make_ids()
    model, other = build(TiedModel, torch.bfloat16), build(TiedModel, torch.bfloat16)
    paired = ZOSGD(model, 0.5, EPS, seed=SEED, storage=PAIRED)
    unpaired = ZOSGD(other, 0.5, EPS, seed=SEED, storage=Streamed())
    for _ in range(3):
        assert paired.step(lambda: both_losses(model, ids)) == unpaired.step(lambda: loss_of(other, ids))
    assert same_bytes(weights_of(model), weights_of(other))


def test_the_noise_of_a_block_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(LanguageModel), make_ids()
    calls = watch_calls(monkeypatch)
    ZOSGD(model, 0.0, EPS, storage=PAIRED).step(lambda: both_losses(model, ids))
    whole = [call for call, _ in calls if call.rows is None and call.outs is not call.inputs]
    dense = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed"))
    assert sum(sum(call.outs.numels) for call in whole) == dense
    assert all(call.outs_minus is not None for call in whole)


class Point(NamedTuple):
    hidden: Tensor
    note: str


@dataclasses.dataclass
class Output:
    hidden: Tensor
    scale: Tensor
    extra: dict[str, Any]


class TalkativeBlock(Block):
    """Takes and returns tensors within structures."""

    def forward(self, point: Point, *, options: dict[str, Any]) -> Output:
        hidden = super().forward(point.hidden + options["shift"]) * options["factor"]
        return Output(
            hidden, options["shift"], {"list": [hidden.sum((1, 2)), None, 3], "same": options["table"]}
        )


class StructuresModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TalkativeBlock(), TalkativeBlock()])
        self.places = nn.Embedding(LENGTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        # A row for all: each side has its own.
        hidden = self.embed(ids) + self.places(torch.arange(LENGTH)[None])
        table = torch.linspace(0, 1, 2, dtype=hidden.dtype)
        for layer in self.layers:
            options = {"shift": hidden.mean(1, keepdim=True), "factor": 0.5, "table": table}
            output = layer(Point(hidden, "first"), options=options)
            assert isinstance(output, Output)
            assert output.extra["list"][0].shape == ids.shape[:1]
            assert output.extra["list"][1:] == [None, 3]
            assert output.extra["same"] is table
            hidden = output.hidden + output.scale + output.extra["list"][0][:, None, None]
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def test_structures_are_taken_apart_and_put_together() -> None:
    model, ids = build(StructuresModel), make_ids()
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=PAIRED)
    optimizer.step(lambda: both_losses(model, ids))
    losses = side_losses(model, SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids))
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)


class Accident(LanguageModel):
    """Gives a block a table that has as many rows as the doubled batch, or gets one with B rows back."""

    given, returned = 2 * BATCH, 1

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TableBlock(type(self).returned)])

    def forward(self, ids: Tensor) -> Tensor:
        table = torch.linspace(0, 1, self.given * 2, dtype=torch.float64).view(self.given, 2)
        hidden, _ = self.layers[0](self.embed(ids), table)
        return self.head(self.norm(hidden))


class TableBlock(Block):
    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows

    def forward(self, hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(hidden) * table.mean(), self.scale[: self.num_rows, None] * torch.ones(2)


class ReturnedAccident(Accident):
    given, returned = 1, BATCH


class SequenceFirst(LanguageModel):
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids).transpose(0, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden.transpose(0, 1)))


class FunctionalDropout(LanguageModel):
    def forward(self, ids: Tensor) -> Tensor:
        return functional.dropout(super().forward(ids), 0.5, training=self.training)


class ReusedBuffer(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([BufferedBlock()])


class BufferedBlock(Block):
    """Returns the same tensor each time, with other numbers."""

    def forward(self, hidden: Tensor) -> Tensor:
        result = super().forward(hidden)
        if not hasattr(self, "kept"):
            self.kept = torch.empty_like(result)
        return self.kept.copy_(result)


class WithCache(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CachingBlock()])

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers[0](self.embed(ids), KeyValueCache())))


class KeyValueCache:
    pass


class CachingBlock(Block):
    def forward(self, hidden: Tensor, cache: KeyValueCache) -> Tensor:
        return super().forward(hidden)


class DrawnMask(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.25)

    def forward(self, ids: Tensor) -> Tensor:
        return self.drop(super().forward(ids))


@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            Accident,
            ValueError,
            r"6 doubled rows, and layers.0 \(TableBlock\) is given a tensor of shape \(6, 2\)",
        ),
        (
            ReturnedAccident,
            ValueError,
            r"layers.0 \(TableBlock\) returns a tensor of shape \(3, 2\) that does not",
        ),
        (
            SequenceFirst,
            ValueError,
            r"results of layers.0 \(Block\) with the rows of the batch in dimension 0",
        ),
        (FunctionalDropout, RuntimeError, r"without random numbers .* different ones; call model.eval\(\)"),
        (DrawnMask, RuntimeError, r"\(dropout in train mode: drop, 1 in all\); call model.eval\(\)"),
        (ReusedBuffer, ValueError, r"got one tensor of shape \(3, 5, 6\) for both, written twice"),
        (
            WithCache,
            TypeError,
            r"got KeyValueCache for layers.0 \(CachingBlock\); call the model with use_cache",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(
    kind: type[LanguageModel], error: type[Exception], message: str
) -> None:
    model, ids = build(kind), make_ids()
    before, places = weights_of(model), [p.data_ptr() for p in model.parameters()]
    optimizer = ZOSGD(model, 0.1, EPS, storage=PAIRED)
    for _ in range(2):
        with pytest.raises(error, match=message):
            optimizer.step(lambda: both_losses(model.train(), ids))
    assert same_bytes(before, weights_of(model))
    assert [p.data_ptr() for p in model.parameters()] == places


def test_dropout_in_eval_mode_is_served() -> None:
    model, ids = build(DrawnMask).eval(), make_ids()
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=PAIRED)
    optimizer.step(lambda: both_losses(model, ids))
    losses = side_losses(model, SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids))
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(3, 4).long()), ValueError, r"a batch doubled .*, got shape \(3, 4\)"),
        (lambda m: m(torch.zeros(4, 4).long()), ValueError, r"4 doubled rows and a tensor of shape \(4, 4\)"),
        (lambda m: m(torch.zeros(8, 4).long()), ValueError, r"8 doubled rows and a tensor of shape \(8, 4\)"),
        (lambda m: m(torch.zeros(4).long()), ValueError, "got no tensor of two dimensions or more"),
        (lambda m: m.norm(torch.zeros(4, WIDTH)), RuntimeError, "got a call of norm"),
        (
            lambda m: m(torch.zeros(4, 7).long()).mean(),
            ValueError,
            r"return two.*shape \(\); .*paired_losses",
        ),
        (lambda m: (1.0, 2.0, 3.0), ValueError, "got tuple of 3; "),
        (lambda m: {"loss": 1.0}, ValueError, "got dict; "),
    ],
)
def test_closures_that_are_not_of_a_doubled_batch(
    call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    model = build(LanguageModel, torch.float32)
    before = weights_of(model)
    optimizer = ZOSGD(model, 0.1, EPS, storage=PAIRED)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: call(model))
    assert same_bytes(before, weights_of(model))


def test_an_exception_between_the_halves_leaves_everything_in_place() -> None:
    model, ids = build(TiedModel, torch.bfloat16), make_ids()
    before, places = weights_of(model), [p.data_ptr() for p in model.parameters()]
    optimizer = ZOSGD(model, 0.1, EPS, seed=SEED, storage=PAIRED)
    num_calls = 0

    def raising(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise KeyError("between")

    handle = model.layers[1].norm.register_forward_hook(raising)
    with pytest.raises(KeyError, match="between"):
        optimizer.step(lambda: both_losses(model, ids))
    handle.remove()
    assert same_bytes(before, weights_of(model))
    assert [p.data_ptr() for p in model.parameters()] == places
    optimizer.step(lambda: both_losses(model, ids))
    losses = side_losses(build(TiedModel, torch.bfloat16), SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids))
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)


def test_rows_of_either_half_are_looked_up() -> None:
    """The halves may hold other ids: each gets its own rows."""
    model, first, second = build(LanguageModel), make_ids(2), make_ids(5)
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=PAIRED)

    def closure() -> Tensor:
        logits = model(torch.cat([first, second]))
        return torch.stack([half.square().mean() for half in logits.chunk(2)])

    optimizer.step(closure)
    plus, _ = side_losses(model, SEEDS[0], optimizer.eps, lambda m: m(first).square().mean())
    _, minus = side_losses(model, SEEDS[0], optimizer.eps, lambda m: m(second).square().mean())
    assert optimizer.projected_grads == (projected([plus, minus], optimizer.eps),)


class VectorModel(LanguageModel):
    """Gives a block a vector with as many elements as the doubled batch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([WithVector()])

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.layers[0](self.embed(ids), torch.linspace(0.5, 1.5, 2 * BATCH))
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class WithVector(Block):
    def forward(self, hidden: Tensor, vector: Tensor) -> Tensor:
        return super().forward(hidden) * vector.square().sum()


def test_a_vector_has_no_rows_of_the_batch() -> None:
    model, ids = build(VectorModel), make_ids()
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=PAIRED)
    optimizer.step(lambda: both_losses(model, ids))
    losses = side_losses(model, SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids))
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)
