"""Parameter groups without decay on biases and norms: the sets, and that grouping moves no noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES
from support.small_model import same_bytes
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from fedkseed import ZOSGD, Manifest, decay_groups


class ScaleOnly(nn.Module):
    """The parameters of an RMSNorm, called as another library calls them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))


class OtherRMSNorm(ScaleOnly):
    pass


class Quick(nn.LayerNorm):
    """A norm by its base alone."""


class PreNorm(nn.Module):
    """A norm by name that holds more than a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.fn = nn.Linear(4, 4)


class NormedEmbedding(nn.Embedding):
    """An embedding, not a norm."""


class Mixed(nn.Module):
    """One module of each kind; ``out`` is tied to ``embed``."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.ones(3, 4))
        self.embed = NormedEmbedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.bn = nn.BatchNorm1d(4)
        self.gn = nn.GroupNorm(2, 4)
        self.n1 = nn.RMSNorm(4)
        self.n2 = OtherRMSNorm(4)
        self.n3 = Quick(4)
        self.scale = ScaleOnly(4)
        self.pre = PreNorm()
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight


def names(model: nn.Module, weight_decay: float | None = 0.01) -> tuple[list[str], list[str]]:
    """Names that decay, names that do not."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for group in decay_groups(model, weight_decay):
        found[group.get("weight_decay") != 0.0] += [name for name, _ in group["params"]]
    return found[True], found[False]


def test_norms_are_known_by_their_class_and_their_children_are_not_taken_for_them() -> None:
    decaying, exempt = names(Mixed())
    assert decaying == ["prompt", "embed.weight", "conv.weight", "scale.gamma", "pre.fn.weight"]
    assert exempt == [
        *("conv.bias", "bn.weight", "bn.bias", "gn.weight", "gn.bias", "n1.weight", "n2.gamma"),
        *("n3.weight", "n3.bias", "pre.scale", "pre.fn.bias"),
    ]


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Qwen3", "Gemma", "Phi", "Bert", "T5", "Bart", "Mamba"])
def test_a_model_of_transformers_decays_as_its_trainer_has_it(name: str) -> None:
    model = ARCHITECTURES[name].make_model(torch.float32)
    theirs = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    # An RMSNorm that the trainer knows neither by class nor, as it does all others here, by name.
    theirs -= {"backbone.norm_f.weight"} if name == "Mamba" else set()
    decaying, exempt = names(model)
    assert decaying
    assert exempt
    assert decaying == [name for name, _ in model.named_parameters() if name in theirs]
    assert exempt == [name for name, _ in model.named_parameters() if name not in theirs]


def freeze_nothing(model: Any) -> None:
    pass


def freeze_first_block(model: Any) -> None:
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)


@pytest.mark.parametrize("freeze", [freeze_nothing, freeze_first_block])
def test_each_parameter_keeps_the_noise_that_the_whole_model_has(freeze: Callable[[Any], None]) -> None:
    plain, grouped = (ARCHITECTURES["Qwen3"].make_model(torch.float32) for _ in range(2))
    freeze(plain)
    freeze(grouped)
    whole = ZOSGD(plain, 0.5, seed=4)
    parts = ZOSGD(decay_groups(grouped, 0.0), 0.5, seed=4, model=grouped)
    for optimizer in (whole, parts):
        sides = iter([1.0, 0.5, 0.25, 1.0])
        optimizer.step(lambda sides=sides: next(sides))  # type: ignore[misc]
        optimizer.step(lambda sides=sides: next(sides))  # type: ignore[misc]
    assert same_bytes([*plain.parameters()], [*grouped.parameters()])
    assert not same_bytes(
        [*plain.parameters()], [*ARCHITECTURES["Qwen3"].make_model(torch.float32).parameters()]
    )
    assert parts.manifest == Manifest.of(plain)


def test_the_first_group_decays_by_what_was_asked_for_and_the_other_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    nn.init.ones_(model[0].bias)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = ZOSGD(decay_groups(model, 0.25), 0.5, model=model)
    optimizer.step(lambda: 1.0)  # equal losses: decay alone
    for name, parameter in model.named_parameters():
        factor = 0.875 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), factor * start[name], msg=name)


def test_without_a_number_the_optimizer_s_own_decay_holds_for_what_decays() -> None:
    model = Mixed()
    optimizer = ZOSGD(decay_groups(model), 0.1, weight_decay=0.5, model=model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    if "param_names" in optimizer.param_groups[0]:  # torch keeps them
        assert optimizer.param_groups[1]["param_names"][0] == "conv.bias"


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    assert names(model) == (["1.weight"], ["1.bias"])
    model[1].bias.requires_grad_(False)
    assert decay_groups(model, 0.1) == [{"params": [("1.weight", model[1].weight)], "weight_decay": 0.1}]
    ZOSGD(decay_groups(model, 0.1), 0.1, model=model)
    model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="all frozen"):
        decay_groups(model, 0.1)


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf")])
def test_a_decay_out_of_range_is_refused(weight_decay: float) -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        decay_groups(nn.Linear(2, 2), weight_decay)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        decay_groups([nn.Linear(2, 2)], 0.1)  # type: ignore[arg-type]


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_wrappers_are_taken_off(process_group: None) -> None:
    model = Mixed()
    assert names(torch.compile(model)) == names(model)  # type: ignore[arg-type]
    assert names(DistributedDataParallel(model)) == names(model)
