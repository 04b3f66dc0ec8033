"""The manifest is the same list however the model is wrapped, tied, frozen or sharded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fedkseed import FedKSeedSGD, Manifest, SeedPool, manifest_parameters


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.down = nn.Linear(2 * width, width)


class Model(nn.Module):
    """Tied head, a parameter of the root's own declared after a child, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.temperature = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


NAMES = (
    "temperature",
    "embed.weight",
    "blocks.0.scale",
    "blocks.0.up.weight",
    "blocks.0.down.weight",
    "blocks.0.down.bias",
    "blocks.1.scale",
    "blocks.1.up.weight",
    "blocks.1.down.weight",
    "blocks.1.down.bias",
)
SHAPES = ((1,), (7, 4), (4,), (8, 4), (4, 8), (4,), (4,), (8, 4), (4, 8), (4,))


@pytest.fixture
def process_group() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_plain_model_with_a_tied_head() -> None:
    manifest = Manifest.of(Model())
    assert manifest == Manifest(NAMES, SHAPES)
    assert len(manifest) == 10
    assert manifest.numel == 1 + 28 + 2 * (4 + 32 + 32 + 4)
    assert manifest.stream("temperature") == 0
    assert manifest.stream("blocks.1.up.weight") == 7


def test_order_and_objects_are_those_of_named_parameters() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16)
    ours = manifest_parameters(model)
    theirs = list(model.named_parameters())
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_tied_module_and_tied_parameter_stand_once_under_the_first_name() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(3, 3))
    model[3].weight = shared.weight
    assert Manifest.of(model).names == ("0.weight", "0.bias", "3.bias")


def test_freezing_does_not_renumber() -> None:
    model = Model()
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    assert Manifest.of(model) == Manifest(NAMES, SHAPES)


def test_compiled_and_checkpointed_at_any_depth() -> None:
    model = Model()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1].up = torch.compile(model.blocks[1].up)
    model.blocks[1] = torch.compile(checkpoint_wrapper(model.blocks[1]))
    wrapped = torch.compile(checkpoint_wrapper(checkpoint_wrapper(model)))
    assert Manifest.of(wrapped) == Manifest(NAMES, SHAPES)


def test_an_unknown_wrapper_is_part_of_the_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    assert Manifest.of(Wrapper(nn.Linear(2, 2))).names == ("module.weight", "module.bias")


@pytest.mark.usefixtures("process_group")
def test_data_parallel_and_sharded_by_one_process() -> None:
    expected = Manifest(NAMES, SHAPES)
    assert Manifest.of(torch.compile(DistributedDataParallel(Model()))) == expected
    cpu = torch.device("cpu")
    model = Model()
    model.blocks[0] = FullyShardedDataParallel(model.blocks[0], device_id=cpu, use_orig_params=True)
    assert Manifest.of(FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)) == expected


@pytest.mark.usefixtures("process_group")
def test_a_flat_fsdp_parameter_is_refused() -> None:
    model = FullyShardedDataParallel(nn.Linear(2, 3), device_id=torch.device("cpu"), use_orig_params=False)
    with pytest.raises(ValueError, match="use_orig_params=True"):
        Manifest.of(model)


def _sharded_rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        cpu = torch.device("cpu")
        expected = Manifest.of(nn.Sequential(nn.Linear(3, 5), Block(4)))
        first = nn.Sequential(nn.Linear(3, 5), Block(4))
        first[1] = FullyShardedDataParallel(first[1], device_id=cpu, use_orig_params=True)
        first = FullyShardedDataParallel(first, device_id=cpu, use_orig_params=True)
        assert Manifest.of(first) == expected
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
        second = nn.Sequential(nn.Linear(3, 5), Block(4))
        fully_shard(second[1], mesh=mesh)
        fully_shard(second, mesh=mesh)
        assert Manifest.of(second) == expected
        with pytest.raises(ValueError, match="sharded models are not supported"):
            FedKSeedSGD(first, lr=0.1, eps=0.1, seed_pool=SeedPool(0, 4))
        with pytest.raises(TypeError, match="DTensor"):
            FedKSeedSGD(second, lr=0.1, eps=0.1, seed_pool=SeedPool(0, 4))
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path: Path) -> None:
    multiprocessing.spawn(_sharded_rank, args=(str(tmp_path),), nprocs=2)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.ReLU(), ValueError, "without any"),
        (nn.LazyLinear(3), ValueError, "weight uninitialized; run one forward pass"),
        ([torch.zeros(2)], TypeError, "expected a torch.nn.Module, got list"),
    ],
)
def test_refusals(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Manifest.of(model)


def test_an_unknown_name_and_a_malformed_manifest() -> None:
    with pytest.raises(ValueError, match=r"got 'head.weight'; a tied parameter has its first name"):
        Manifest.of(Model()).stream("head.weight")
    with pytest.raises(ValueError, match="2 names and 1 shapes"):
        Manifest(("a", "b"), ((),))
    with pytest.raises(ValueError, match="a name twice"):
        Manifest(("a", "a"), ((), ()))
