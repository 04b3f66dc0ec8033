"""What is tuned is what the model holds: moved weights go on, exchanged and resized ones are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import halves
from support.small_model import largest_difference, make_model, weights_of
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedkseed import ZOSGD, FedKSeedSGD, Inplace, ModelIdentity, SeedPool
from fedkseed.optim.paired import paired_losses
from fedkseed.storage import StorageOptions

MODES = {
    name: halves.MODES[name]
    for name in (
        "in place",
        "in place, stochastic",
        "chained",
        "streamed",
        "streamed in fp32",
        "compensated",
        "paired",
    )
}
all_modes = pytest.mark.parametrize("storage", MODES.values(), ids=MODES)
EPS, SEED = 2.0**-7, 5


def loss_of(model: nn.Module, storage: StorageOptions) -> Any:
    dtype = next(model.parameters()).dtype
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(4)).to(dtype)
    is_paired = getattr(storage, "paired", False)
    y = (model(torch.cat([x, x]) if is_paired else x).double() - 1).square()
    return [half.mean() for half in y.chunk(2)] if is_paired else y.mean()


def optimizer_of(model: nn.Module, storage: StorageOptions) -> ZOSGD:
    return ZOSGD(model, 0.05, EPS, seed=SEED, storage=storage)


def exchange_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "copied by the module": lambda model: model._apply(lambda tensor: tensor.clone()),
    "shared": lambda model: model.share_memory(),
    ".data exchanged": exchange_data,
    "one exchanged": lambda model: exchange_data(model[2]),  # type: ignore[index]
}


@pytest.mark.few
@all_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moved_weights_go_on_with_the_same_bits(
    storage: StorageOptions, dtype: torch.dtype, move: Callable[[nn.Module], Any]
) -> None:
    moved, stayed = make_model(dtype), make_model(dtype)
    optimizers = [optimizer_of(model, storage) for model in (moved, stayed)]
    for _ in range(3):
        for optimizer, model in zip(optimizers, (moved, stayed), strict=True):
            optimizer.step(lambda model=model: loss_of(model, storage))  # type: ignore[misc]
        move(moved)
    assert optimizers[0].last == optimizers[1].last
    for optimizer in optimizers:
        optimizer.flush()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(moved), weights_of(stayed), strict=True))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "compensated"])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_dtype_go_on(mode: str, to: torch.dtype) -> None:
    storage = MODES[mode]
    model, fresh = make_model(torch.float32), make_model(torch.float32)
    optimizer = optimizer_of(model, storage)
    optimizer.step(lambda: loss_of(model, storage))
    optimizer.flush()
    fresh.load_state_dict(model.state_dict())
    model.to(to)
    fresh.to(to)
    other = optimizer_of(fresh, storage)
    other.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: loss_of(model, storage))
    other.step(lambda: loss_of(fresh, storage))
    assert optimizer.last == other.last
    assert optimizer.projected_grads != (0.0,)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_chained_weights_that_move_between_steps_are_flushed_where_they_are(
    move: Callable[[nn.Module], Any],
) -> None:
    model = make_model(torch.float64)
    before, storage = weights_of(model), Inplace(chained=True)
    optimizer = ZOSGD(model, 0.0, 0.5, seed=SEED, storage=storage)
    optimizer.step(lambda: loss_of(model, storage))
    move(model)
    optimizer.flush()
    assert largest_difference(weights_of(model), before) < 1e-14


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def replaced(model: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def rebuilt(model: Any) -> None:
    model[2] = nn.Linear(9, 1, dtype=model[0].weight.dtype)


def taken_out(model: Any) -> None:
    model[2].weight = None


@pytest.mark.few
@all_modes
@pytest.mark.parametrize(
    ("exchange", "name", "found"),
    [
        (assigned, "0.weight", r"another Parameter of shape \(9, 5\), torch.float32, in its place"),
        (replaced, "2.weight", r"another Parameter of shape \(1, 9\)"),
        (rebuilt, "2.weight", r"another Parameter of shape \(1, 9\)"),
        (taken_out, "2.weight", "none of that name"),
    ],
)
def test_exchanged_parameters_are_named(
    storage: StorageOptions, exchange: Callable[[nn.Module], None], name: str, found: str
) -> None:
    model = make_model(torch.float32)
    optimizer = optimizer_of(model, storage)
    optimizer.step(lambda: loss_of(model, storage))
    optimizer.flush()
    exchange(model)
    message = rf"to hold the parameter {name} that is tuned, got {found}.*make a new optimizer"
    for call in (optimizer.step, optimizer.measure):
        with pytest.raises(RuntimeError, match=message):
            call(lambda: loss_of(model, storage))


def test_a_list_beside_its_model_is_checked_too_and_a_plain_one_warns() -> None:
    model = make_model(torch.float32)
    beside = ZOSGD(list(model.parameters()), 0.05, EPS, seed=SEED, model=model, storage=Inplace())
    alone = ZOSGD(list(model.parameters()), 0.05, EPS, seed=SEED, storage=Inplace())
    assigned(model)
    with pytest.raises(RuntimeError, match="to hold the parameter 0.weight that is tuned"):
        beside.step(lambda: loss_of(model, Inplace()))
    for _ in range(2):
        alone.step(lambda: loss_of(model, Inplace()))
    with pytest.warns(UserWarning, match="both sides of the weights had equal losses"):
        alone.step(lambda: loss_of(model, Inplace()))


@all_modes
@pytest.mark.parametrize("begins", [False, True])
def test_a_resized_embedding_is_named(storage: StorageOptions, begins: bool) -> None:
    """transformers keeps the Parameter and exchanges its data: neither its noise nor the ledger would fit."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval().bfloat16()
    w0 = copy.deepcopy(model)
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))

    def closure() -> Any:
        if getattr(storage, "paired", False):
            return paired_losses(model, {"input_ids": ids, "labels": ids}).float()
        return model(ids, labels=ids).loss.float()

    optimizer = FedKSeedSGD(model, 0.05, EPS, seed_pool=SeedPool(1, 8), storage=storage)
    if begins:
        optimizer.step(closure)
        optimizer.flush()
    model.resize_token_embeddings(48, mean_resizing=False)
    with pytest.raises(
        RuntimeError,
        match=r"transformer.wte.weight of shape \(40, 8\) as when .*, got \(48, 8\).*make a new optimizer",
    ):
        optimizer.step(closure)
    assert optimizer.ledger(w0).identity == ModelIdentity.of(w0)  # of the walk so far


class Shared(nn.Module):
    """A tuned weight, and part of its memory again: frozen, or as a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        part = self.linear.weight.data[:2]
        if kind == "parameter":
            self.part: Tensor = nn.Parameter(part, requires_grad=False)
        else:
            self.register_buffer("part", part)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x).sum() + (x @ self.part.t()).sum()
        return found


@all_modes
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_memory_shared_with_what_is_not_tuned_is_refused(storage: StorageOptions, kind: str) -> None:
    with pytest.raises(ValueError, match=r"linear.weight and part \((not tuned|a buffer)\) share memory"):
        optimizer_of(Shared(kind), storage)
    model = make_model(torch.float32)
    optimizer = optimizer_of(model, storage)
    model[1].register_buffer("part", model[2].weight.data)
    model[2].weight.data = model[2].weight.data.view(1, 9)
    exchange_data(model[0])
    with pytest.raises(ValueError, match="2.weight and 1.part"):
        optimizer.step(lambda: loss_of(model, storage))
