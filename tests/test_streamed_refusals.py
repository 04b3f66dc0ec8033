"""What streamed weights refuse, by name, before a step or in its first evaluation; nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.small_model import make_model, same_bytes, weights_of
from support.streamed_models import SERVED, WIDTH, Block, LanguageModel, TiedModel, build, loss_of, make_ids
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fedkseed import ZOSGD, Streamed
from fedkseed.storage.streamed.units import partition


class ReadsHeadWeight(LanguageModel):
    """A head that is another unit's weight."""

    def forward(self, ids: Tensor) -> Tensor:
        super().forward(ids)
        return functional.linear(self.norm(self.layers[0](self.embed(ids))), self.embed.weight)


class ReadsNorm(LanguageModel):
    """A block's weight, read where no unit runs, after harmless looks at others."""

    def forward(self, ids: Tensor) -> Tensor:
        assert self.norm.weight.shape == (WIDTH,)
        torch.zeros_like(self.norm.weight)
        self.norm.weight.new_ones(3)
        self.head.weight.t().detach()
        return super().forward(ids) + self.layers[1].scale.sum()


class ReadsFromAnotherUnit(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        first = self.layers[0]
        self.layers[2] = Reader(lambda: first.first.bias)


class Reader(Block):
    def __init__(self, read: Callable[[], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * self.read().mean()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            ReadsHeadWeight,
            r"embed.weight .* embed \(Embedding\) alone, .* while no unit runs; use storage=Inplace",
        ),
        (ReadsNorm, r"layers.1.scale .* layers.1 \(Block\) alone, .*sum.* while no unit runs"),
        (
            ReadsFromAnotherUnit,
            r"layers.0.first.bias .* layers.0 \(Block\) .* while layers.2 \(Reader\) runs",
        ),
    ],
)
def test_a_weight_that_is_read_outside_of_its_unit_is_named(kind: type[LanguageModel], message: str) -> None:
    model, ids = build(kind), make_ids()
    before, places = weights_of(model), [p.data_ptr() for p in model.parameters()]
    optimizer = ZOSGD(model, 0.1, storage=Streamed())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step(lambda: loss_of(model, ids))
    assert same_bytes(before, weights_of(model))
    assert [p.data_ptr() for p in model.parameters()] == places


def test_a_closure_that_reads_weights_itself_is_refused() -> None:
    model, ids = build(LanguageModel), make_ids()
    optimizer = ZOSGD(model, 0.1, storage=Streamed())
    with pytest.raises(RuntimeError, match="expected embed.weight to be read by the forward of embed"):
        optimizer.step(lambda: loss_of(model, ids) + sum(p.square().sum() for p in model.parameters()))


def test_a_read_that_comes_later_gives_nan_and_then_the_name() -> None:
    model, ids = build(LanguageModel), make_ids()
    before = weights_of(model)
    optimizer = ZOSGD(model, 0.0, storage=Streamed())
    optimizer.step(lambda: loss_of(model, ids))
    closure = lambda: loss_of(model, ids) + model.layers[0].scale.sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="expected layers.0.scale to be read"):
        optimizer.step(closure)
    assert same_bytes(before, weights_of(model))


def test_tensors_without_a_model() -> None:
    model = make_model()
    for params in (list(model.parameters()), model.named_parameters(), [torch.zeros(3)]):
        with pytest.raises(TypeError, match="expected the model whose forward pass is perturbed"):
            ZOSGD(params, 0.1, storage=Streamed())


def wrapped(name: str) -> nn.Module:
    model = make_model()
    if name == "compiled":
        return torch.compile(model)
    if name == "compiled inside":
        model[2] = torch.compile(model[2])
    elif name == "compiled in place":
        model[2].compile()
    else:
        return nn.DataParallel(model)
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("compiled", r"got the model itself \(OptimizedModule\): compiled code"),
        ("compiled inside", r"got 2 \(OptimizedModule\): compiled code"),
        ("compiled in place", r"got 2 \(Linear\) compiled in place"),
        ("data parallel", r"got the model itself \(DataParallel\): .* give its .module"),
    ],
)
def test_wrappers_that_keep_weights_of_their_own(name: str, message: str) -> None:
    model = wrapped(name)
    with pytest.raises(TypeError, match=message):
        ZOSGD(model, 0.1, storage=Streamed())


@pytest.fixture
def _one_process() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DDP", r"got the model itself \(DistributedDataParallel\): .* give its .module"),
        ("FSDP", r"got 2 \(FullyShardedDataParallel\): it gathers weights on its own; use storage=Inplace"),
        ("FSDP2", r"got 2 \(FSDPLinear\): it gathers weights on its own"),
        ("FSDP2, tuned", "expected ordinary tensors, got 2.weight of type DTensor"),
    ],
)
def test_distributed_models(name: str, message: str) -> None:
    model: nn.Module = make_model()
    if name == "DDP":
        model = DistributedDataParallel(model)
    elif name == "FSDP":
        cpu = torch.device("cpu")
        model[2] = FullyShardedDataParallel(model[2], device_id=cpu, use_orig_params=True)
    else:
        model[2].requires_grad_(name != "FSDP2")
        fully_shard(model[2], mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=message):
        ZOSGD(model, 0.1, storage=Streamed())


def test_lazy_parameters() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.LazyLinear(2))
    with pytest.raises((TypeError, ValueError), match="uninitialized"):
        ZOSGD(model, 0.1, storage=Streamed())


def test_an_embedding_that_renormalises() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"embeddings without max_norm, got 0 \(Embedding\)"):
        ZOSGD(model, 0.1, storage=Streamed())


def test_a_parameter_that_no_forward_reads() -> None:
    model = nn.ModuleList([nn.Linear(2, 2)])
    model.register_parameter("alone", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="in the forward of a module, got alone in none"):
        ZOSGD(model, 0.1, storage=Streamed())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding 'nearest' or 'stochastic', got 'up'"),
        ({"compute_dtype": torch.float64}, "compute_dtype None or torch.float32, got torch.float64"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Streamed(**options)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_state_of_another_kind(rounding: str) -> None:
    model = make_model()
    optimizer = ZOSGD(model, 0.1, storage=Streamed(rounding=rounding))
    for damaged in ({"residuals": 1}, {"num_passes": -1}, {"num_passes": "many"}):
        state = optimizer.state_dict()
        state["fedkseed"]["storage_state"] = damaged
        with pytest.raises(ValueError, match="storage state|num_passes"):
            optimizer.load_state_dict(state)
    assert optimizer.state_dict()["fedkseed"]["storage_state"] == (
        {} if rounding == "nearest" else {"num_passes": 0}
    )


def test_activation_checkpointing_is_served() -> None:
    model, plain, ids = build(TiedModel), build(TiedModel), make_ids()
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    gradients = []
    for walked in (model, plain):
        optimizer = ZOSGD(walked, 0.0, seed=3, storage=Streamed())
        optimizer.step(lambda walked=walked: loss_of(walked, ids))
        gradients.append(optimizer.projected_grads)
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("kind", SERVED)
def test_units_cover_every_parameter(kind: type[LanguageModel]) -> None:
    model = build(kind)
    covered: dict[int, list[str]] = {}
    for unit in partition(model, list(model.parameters())):
        for parameter in (*unit.parameters, *([] if unit.gathered is None else [unit.gathered])):
            covered.setdefault(id(parameter), []).append(unit.name)
    assert set(covered) == {id(parameter) for parameter in model.parameters()}
    if kind is TiedModel:
        assert covered[id(model.head.weight)] == ["embed", "head"]


def test_units_of_a_small_tree() -> None:
    model = nn.Sequential(nn.Sequential(nn.Embedding(3, 2), nn.Tanh()), nn.Linear(2, 2), nn.Embedding(2, 2))
    units = partition(model, [p for p in model.parameters() if p is not model[1].bias])
    assert [str(unit) for unit in units] == ["0 (Sequential)", "1 (Linear)", "2 (Embedding)"]
    assert [len(unit.parameters) for unit in units] == [1, 1, 0]
    assert units[2].gathered is model[2].weight
