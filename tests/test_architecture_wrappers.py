"""What parts of a model may be wrapped in: served by streamed weights, or refused by name before a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fedkseed import ZOSGD, Streamed

LLAMA = ARCHITECTURES["Llama"]


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def two_steps(model: nn.Module) -> tuple[list[float], list[torch.Tensor]]:
    """g of two steps, and the weights after them."""
    batch = LLAMA.make_batch()
    optimizer = ZOSGD(model, 0.05, seed=5, storage=Streamed())
    gradients: list[float] = []
    for _ in range(2):
        optimizer.step(lambda: model(**batch).loss)
        gradients += optimizer.projected_grads
    return gradients, [parameter.detach().clone() for parameter in model.parameters()]


def wrap_a_block(model: Any) -> None:
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])


def wrap_within_a_block(model: Any) -> None:
    model.model.layers[0].mlp = checkpoint_wrapper(model.model.layers[0].mlp)


def checkpoint_in_train_mode(model: Any) -> None:
    # Its name from transformers 6 on, which releases of the range have beside the former one or not yet.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model.train()  # Llama has no dropout


def disable_the_compiler(model: Any) -> None:
    model.model.layers[1].forward = torch.compiler.disable(model.model.layers[1].forward)


@pytest.mark.parametrize(
    "wrap", [wrap_a_block, wrap_within_a_block, checkpoint_in_train_mode, disable_the_compiler]
)
def test_wrappers_that_change_no_bit(wrap: Callable[[Any], None]) -> None:
    model = LLAMA.make_model(torch.float64)
    wrap(model)
    gradients, weights = two_steps(model)
    expected_gradients, expected_weights = two_steps(LLAMA.make_model(torch.float64))
    assert gradients == expected_gradients
    assert all(map(torch.equal, weights, expected_weights))


def compile_a_block(model: Any) -> None:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


def compile_a_block_in_place(model: Any) -> None:
    model.model.layers[1].mlp.compile(backend="eager")


def compile_the_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compile_the_forward_of_a_block(model: Any) -> None:
    model.model.layers[1].forward = torch.compile(model.model.layers[1].forward, backend="eager")


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_frozen_block(model: Any) -> None:
    model.model.layers[1].requires_grad_(False)
    fully_shard(model.model.layers[1], mesh=init_device_mesh("cpu", (1,)))


def shard_block_the_former_way(model: Any) -> None:
    block = FullyShardedDataParallel(
        model.model.layers[1], use_orig_params=True, device_id=torch.device("cpu")
    )
    model.model.layers[1] = block


def average_gradients_of_a_block(model: Any) -> None:
    model.model.layers[1] = DistributedDataParallel(model.model.layers[1])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (compile_a_block, r"model\.layers\.1 \(OptimizedModule\): compiled code may keep"),
        (compile_a_block_in_place, r"model\.layers\.1\.mlp \(LlamaMLP\) compiled in place"),
        (compile_the_forward, r"got the model itself \(LlamaForCausalLM\) with a compiled forward"),
        (compile_the_forward_of_a_block, r"model\.layers\.1 \(LlamaDecoderLayer\) with a compiled forward"),
        (shard, r"got model\.embed_tokens\.weight of type DTensor; sharded"),
        (shard_frozen_block, r"model\.layers\.1 \(FSDPLlamaDecoderLayer\): it gathers weights on its own"),
        (shard_block_the_former_way, r"model\.layers\.1 \(FullyShardedDataParallel\): it gathers weights on"),
        (
            average_gradients_of_a_block,
            r"model\.layers\.1 \(DistributedDataParallel\): it averages gradients",
        ),
    ],
)
def test_what_keeps_weights_of_its_own_is_refused(wrap: Callable[[Any], None], message: str) -> None:
    model = LLAMA.make_model(torch.float64)
    wrap(model)
    with pytest.raises(TypeError, match=message):
        ZOSGD(model, 0.1, storage=Streamed())
