"""A model that is spread over devices, tuned in every storage mode as on one: the second is a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from support import halves
from support.kernel_calls import watch_calls
from support.small_model import same_bytes, weights_of
from support.streamed_models import (
    VOCABULARY,
    LanguageModel,
    RootedModel,
    TiedModel,
    both_losses,
    build,
    loss_of,
    make_ids,
)
from support.two_devices import FIRST, SECOND, TwoDevices, two_devices
from torch import Tensor, nn

import fedkseed_kernels as fk
from fedkseed import ZOSGD, Inplace, Ledger, SeedPool, Streamed, WorkingCopy
from fedkseed.model import randomness
from fedkseed.model.packed import packed_bytes
from fedkseed.model.placement import PreparedTensors, by_device
from fedkseed.optim import evaluation
from fedkseed.storage import StorageOptions
from fedkseed.storage.streamed import pairing

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
        "paired, compensated in fp32",
    )
}


def losses_of(model: nn.Module, ids: Tensor, storage: StorageOptions) -> Any:
    """What a closure returns in a mode."""
    return (both_losses if getattr(storage, "paired", False) else loss_of)(model, ids)


def spread(devices: TwoDevices, model: nn.Module) -> None:
    """Layers behind the first to the second device, what is around them stays."""
    for layer in model.layers[1:]:
        devices.place_module(layer)


def tune(
    kind: type[LanguageModel], storage: StorageOptions, place: Callable[[nn.Module], None]
) -> tuple[list[Tensor], list[Any]]:
    """Weights and residuals of a model after three steps, and what was measured on the way."""
    model, ids = build(kind, torch.bfloat16), make_ids()
    place(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed}]
    optimizer = ZOSGD(
        groups, 0.05, 1e-2, seed=7, num_directions=2, weight_decay=0.1, storage=storage, model=model
    )
    measured = []
    for _ in range(3):
        loss = optimizer.step(lambda: losses_of(model, ids, storage))
        measured.append((loss, optimizer.projected_grads))
    optimizer.flush()
    state = optimizer.state_dict()["fedkseed"]["storage_state"]
    return [*weights_of(model), *state.get("residuals", [])], measured


@pytest.mark.parametrize("kind", [LanguageModel, RootedModel, TiedModel])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_tunes_as_on_one_device(
    mode: str, kind: type[LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    want, wanted = tune(kind, MODES[mode], lambda model: None)
    calls = watch_calls(monkeypatch)
    with two_devices() as devices:
        got, measured = tune(kind, MODES[mode], lambda model: spread(devices, model))
        assert {operands.device for operands, _ in calls} == {FIRST, SECOND}
    assert measured == wanted
    assert same_bytes(want, got)


def test_positions_are_grouped_by_device() -> None:
    tensors = [torch.zeros(2) for _ in range(5)]
    with two_devices() as devices:
        devices.place(tensors[0], tensors[3])
        assert by_device(tensors) == {SECOND: [0, 3], FIRST: [1, 2, 4]}
        with pytest.raises(ValueError, match="expected all tensors of a list on one device"):
            fk.perturb_(tensors, 1, 0.5)


def test_arguments_are_checked_on_any_number_of_devices() -> None:
    tensors = [torch.zeros(2) for _ in range(3)]
    with two_devices() as devices:
        devices.place(tensors[1])
        for count in (0, 1, 3):
            with pytest.raises(ValueError, match="expected family"):
                PreparedTensors(tensors[:count], range(count), "uniform")
            with pytest.raises(ValueError, match=r"zip\(\)"):
                PreparedTensors(tensors[:count], range(count + 1), "gaussian")
            prepared = PreparedTensors(tensors[:count], range(count), "gaussian")
            prepared.check()
            with pytest.raises(ValueError, match="expected one coefficient for each seed"):
                prepared.seed_axpy_([1, 2], [0.5])
    assert not torch.cat(tensors).any()


@pytest.mark.parametrize("mode", MODES)
def test_a_list_that_moved_to_another_device_goes_on(mode: str) -> None:
    """Half of the model is moved to the other device between steps, then all of it is moved back."""
    storage = MODES[mode]
    moved, stayed, ids = build(LanguageModel), build(LanguageModel), make_ids()
    optimizers = [ZOSGD(model, 0.05, 1e-2, seed=7, storage=storage) for model in (moved, stayed)]
    with two_devices() as devices:
        for step in range(3):
            for optimizer, model in zip(optimizers, (moved, stayed), strict=True):
                optimizer.step(lambda model=model: losses_of(model, ids, storage))  # type: ignore[misc]
            for weight in moved.layers.parameters():
                weight.data = weight.data.clone()
                if step == 0:
                    devices.place(weight.data)
    assert optimizers[0].projected_grads == optimizers[1].projected_grads != (0.0,)
    for optimizer in optimizers:
        optimizer.flush()
    assert same_bytes(weights_of(moved), weights_of(stayed))


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_closure_that_raises_leaves_every_device_clean(stop_at: int) -> None:
    model, calls = build(LanguageModel), []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == stop_at:
            raise OSError("gone")
        return loss_of(model, make_ids())

    with two_devices() as devices:
        spread(devices, model)
        before = weights_of(model)
        with pytest.raises(OSError, match="gone"):
            ZOSGD(model, 0.05, 1e-2, seed=7).step(closure)
    after = weights_of(model)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(before, after, strict=True))


def test_scratch_is_where_its_units_are_and_no_larger() -> None:
    """Blocks on the second device need no room there for the model's own parameters on the first."""
    model, storage = build(RootedModel), Streamed(paired=True)
    with two_devices() as devices:
        for layer in model.layers:
            devices.place_module(layer)
        places = [parameter.device for parameter in model.parameters()]
        optimizer = ZOSGD(model, 0.05, 1e-2, seed=7, storage=storage)

        def closure() -> Tensor:
            assert [parameter.device for parameter in model.parameters()] == places, "while perturbed"
            return losses_of(model, make_ids(), storage)

        optimizer.step(closure)
        scratches = optimizer._storage._model._scratches
        assert set(scratches) == {FIRST, SECOND}
        for device, both in scratches.items():
            assert [scratch._buffer.device for scratch in both] == [device] * 2
        block = list(model.layers[0].parameters())
        assert scratches[SECOND][0].num_bytes == packed_bytes(
            [p.shape for p in block], [p.dtype for p in block]
        )


def test_all_rows_of_an_embedding_are_drawn_where_it_is() -> None:
    ids = make_ids().repeat(2, 1)
    assert ids.numel() > VOCABULARY
    results = []
    for place in (False, True):
        with two_devices() as devices:
            model = build(LanguageModel)
            if place:
                devices.place_module(model.embed)
            results.append(ZOSGD(model, 0.05, 1e-2, storage=Streamed()).step(lambda m=model: loss_of(m, ids)))
    assert results[0] == results[1]


@pytest.mark.parametrize("paired", [False, True])
def test_a_unit_on_two_devices_is_served_in_place_alone(paired: bool) -> None:
    model = build(LanguageModel)
    with two_devices() as devices:
        devices.place_module(model.layers[1].second)
        with pytest.raises(
            ValueError,
            match=r"a unit on one device, got those of layers.1 \(Block\) on cpu, cpu:1; .*Inplace",
        ):
            ZOSGD(model, 0.05, 1e-2, storage=Streamed(paired=paired))
        ZOSGD(model, 0.05, 1e-2).step(lambda: loss_of(model, make_ids()))


@pytest.mark.parametrize("storage", [Inplace(), Streamed(paired=True)], ids=["alone", "paired"])
def test_generators_of_every_device_are_kept(
    storage: StorageOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random numbers are drawn where layers are, frozen ones too, and not where the inputs are."""
    kept: list[set[torch.device]] = []

    class Noted(randomness.Generators):
        def __init__(self, devices: Iterable[torch.device], own: Iterable[Any]) -> None:
            kept.append(set(devices))
            super().__init__([], own)

    for module in (evaluation, pairing):
        monkeypatch.setattr(module, "Generators", Noted)
    model, ids = build(LanguageModel), make_ids()
    with two_devices() as devices:
        spread(devices, model)
        if storage == Inplace():
            for layer in model.layers:
                layer.requires_grad_(False)
        ZOSGD(model, 0.05, 1e-2, storage=storage).step(lambda: losses_of(model, ids, storage))
    assert len(kept) == 1 + (storage != Inplace())
    assert all(devices == {FIRST, SECOND} for devices in kept)


def test_a_ledger_and_a_working_copy_take_a_spread_model() -> None:
    pool, coefficients = SeedPool(8, 16), np.linspace(-0.01, 0.02, 16).astype(np.float32)
    plain = build(LanguageModel)
    ledger = Ledger.of(plain, pool, coefficients)
    WorkingCopy(plain).load(pool, coefficients)
    with two_devices() as devices:
        applied, loaded = build(LanguageModel), build(LanguageModel)
        for model in (applied, loaded):
            spread(devices, model)
        ledger.apply_(applied)
        WorkingCopy(loaded).load(pool, coefficients)
    assert same_bytes(weights_of(plain), weights_of(loaded))
    assert same_bytes(weights_of(plain), weights_of(applied))
