"""What a model is recognised by: names, shapes, the tuned set, dtype and every bit of its weights."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from fedkseed.model import identity
from fedkseed.model.identity import IdentityError, ModelIdentity, content_hash, frozen_indices
from fedkseed.model.manifest import Manifest


class Tied(nn.Module):
    """An embedding that is the head as well, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2, dtype=dtype)
        self.head = nn.Linear(2, 3, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor([0.5, -2.0, 0.0], dtype=dtype))
        with torch.no_grad():
            self.embed.weight.copy_(torch.arange(6.0).reshape(3, 2))


def test_both_hashes_written_out_by_hand() -> None:
    # Own parameters come before the children's; the tied head does not appear.
    structure = b"".join(
        [
            struct.pack("<I", 5) + b"scale" + b"\1" + struct.pack("<IQ", 1, 3),
            struct.pack("<I", 12) + b"embed.weight" + b"\1" + struct.pack("<IQQ", 2, 3, 2),
        ]
    )
    content = b"".join(
        [
            struct.pack("<I", 7) + b"float32" + struct.pack("<3f", 0.5, -2.0, 0.0),
            struct.pack("<I", 7) + b"float32" + struct.pack("<6f", *range(6)),
        ]
    )
    found = ModelIdentity.of(Tied())
    assert found.structure == hashlib.sha256(structure).digest()
    assert found.content == hashlib.sha256(content).digest()
    assert found.dtype == "float32"


def test_the_same_model_is_itself_however_it_is_held() -> None:
    expected = ModelIdentity.of(Tied())
    expected.require(ModelIdentity.of(Tied()))
    assert ModelIdentity.of(torch.compile(Tied())) == expected
    strided = Tied()
    strided.embed.weight.data = strided.embed.weight.data.t().contiguous().t()
    assert not strided.embed.weight.is_contiguous()
    assert ModelIdentity.of(strided) == expected


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [("a", torch.arange(100, dtype=torch.int16)), ("b", torch.zeros(0)), ("c", torch.tensor(1.0))]
    expected = content_hash(tensors)
    monkeypatch.setattr(identity, "_PIECE", 7)
    assert content_hash(tensors) == expected


def test_every_bit_of_every_weight_counts() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = Tied(dtype)
        seen = {ModelIdentity.of(model).content}
        for parameter in (model.scale, model.embed.weight):
            stored = parameter.data.view(-1).view(torch.uint8).numpy()
            for bit in range(8 * stored.size):
                stored[bit // 8] ^= 1 << bit % 8
                seen.add(ModelIdentity.of(model).content)
                stored[bit // 8] ^= 1 << bit % 8
        assert len(seen) == 1 + 8 * 9 * dtype.itemsize


def test_bounds_between_parameters_count() -> None:
    whole, halves = torch.arange(4.0), torch.arange(4.0).split(2)
    assert content_hash([("a", whole)]) != content_hash([("a", halves[0]), ("b", halves[1])])


@pytest.mark.parametrize("difference", ["name", "shape", "frozen", "untied"])
def test_another_structure(difference: str) -> None:
    model, other = Tied(), Tied()
    if difference == "name":
        del other.scale
        other.scales = nn.Parameter(model.scale.detach().clone())
    elif difference == "shape":
        other.scale = nn.Parameter(model.scale.detach().clone().reshape(1, 3))
    elif difference == "frozen":
        other.scale.requires_grad_(False)
    else:
        other.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(IdentityError, match="expected a model of structure .* other parameter names, shapes"):
        ModelIdentity.of(model).require(ModelIdentity.of(other))


def test_another_dtype_and_another_content() -> None:
    expected = ModelIdentity.of(Tied())
    with pytest.raises(IdentityError, match="expected weights in float32, got float16; load the model in"):
        expected.require(ModelIdentity.of(Tied().half()))
    mixed = Tied()
    mixed.scale.data = mixed.scale.data.double()
    assert ModelIdentity.of(mixed).dtype == "mixed"
    other = Tied()
    other.scale.data[2] = -0.0
    with pytest.raises(IdentityError, match="expected weights of content .* the same shapes, other numbers"):
        expected.require(ModelIdentity.of(other))


def test_a_frozen_set_of_the_callers() -> None:
    frozen = Tied()
    frozen.scale.requires_grad_(False)
    assert frozen_indices(frozen) == (0,)
    assert ModelIdentity.of(Tied(), frozen=(0,)) == ModelIdentity.of(frozen)
    assert ModelIdentity.of(frozen, frozen=()) == ModelIdentity.of(Tied())


def test_weights_that_are_not_in_memory() -> None:
    with pytest.raises(ValueError, match="expected whole weights in memory, got scale as Tensor on meta"):
        ModelIdentity.of(Tied().to("meta"))
    with pytest.raises(ValueError, match="one flag for each of 2 parameters, got 1"):
        identity.structure_hash(Manifest.of(Tied()), [True])


def _sharded_rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        cpu = torch.device("cpu")
        first = FullyShardedDataParallel(nn.Linear(3, 5), device_id=cpu, use_orig_params=True)
        with pytest.raises(ValueError, match="a shard; load the full model first"):
            ModelIdentity.of(first)
        second = nn.Linear(3, 5)
        fully_shard(second, mesh=distributed.device_mesh.init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match="got weight as DTensor"):
            ModelIdentity.of(second)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    multiprocessing.spawn(_sharded_rank, args=(str(tmp_path),), nprocs=2)
