"""Streamed weights: g is that of perturbed copies, stored bytes stay, whatever happens in a forward pass."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.kernel_calls import watch_calls
from support.small_model import same_bytes, weights_of
from support.streamed_models import (
    SERVED,
    VOCABULARY,
    WIDTH,
    EmbeddingsModel,
    LanguageModel,
    RootedModel,
    TiedModel,
    build,
    loss_of,
    make_ids,
    projected,
    side_losses,
)
from torch import Tensor, nn

import fedkseed_kernels
from fedkseed import ZOSGD, FedKSeedSGD, Inplace, SeedPool, Streamed
from fedkseed.data import load_smollm2

SEED, EPS = 7, 1e-2
SEEDS = [int(seed) for seed in SeedPool(SEED, 8).seeds]


def addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.few
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SERVED)
def test_g_is_that_of_perturbed_copies(kind: type[LanguageModel], dtype: torch.dtype, family: str) -> None:
    model, ids = build(kind, dtype), make_ids()
    before, places = weights_of(model), addresses(model)
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, num_directions=2, storage=Streamed(), family=family)
    optimizer.step(lambda: loss_of(model, ids))
    for seed, g in zip(SEEDS, optimizer.projected_grads, strict=False):
        losses = side_losses(model, seed, optimizer.eps, lambda m: loss_of(m, ids), family)
        assert losses[0] != losses[1]
        assert g == projected(losses, optimizer.eps)
    assert same_bytes(before, weights_of(model))
    assert addresses(model) == places
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_embedding_that_is_written_whole_lies_in_the_scratch_of_the_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two kinds of token, more ids than that: both rows are written, and no memory is taken for them."""
    model, ids = build(EmbeddingsModel, torch.float32), make_ids()
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    calls = watch_calls(monkeypatch)
    ZOSGD(model, 0.0, EPS, seed=SEED, storage=Streamed()).step(lambda: loss_of(model, ids))
    whole = [call for call, _ in calls if call.rows is None and call.outs is not call.inputs]
    written = {names[address] for call in whole if call.inputs for address in call.inputs.addresses}
    assert any("kinds" in name for name in written)
    assert len({out.untyped_storage().data_ptr() for call in whole for out in call.outs.tensors}) == 1


@pytest.mark.parametrize("kind", SERVED)
def test_computing_in_fp32_is_a_model_converted_to_fp32(kind: type[LanguageModel]) -> None:
    model, ids = build(kind, torch.bfloat16), make_ids()
    for parameter in (model.norm.weight, model.embed.parameters().__next__()):
        parameter.requires_grad_(False)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    before = weights_of(model)
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=Streamed(compute_dtype=torch.float32))
    optimizer.step(lambda: loss_of(model, ids))
    losses = side_losses(
        model, SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids), dtype=torch.float32, frozen=frozen
    )
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)
    assert same_bytes(before, weights_of(model))


def test_embeddings_computed_in_fp32_draw_rows_alone() -> None:
    model, ids = build(LanguageModel, torch.float16), make_ids()[:1]
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=Streamed(compute_dtype=torch.float32))
    optimizer.step(lambda: loss_of(model, ids))
    losses = side_losses(model, SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids), dtype=torch.float32)
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)


def test_a_units_copies_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(TiedModel, torch.bfloat16), make_ids()[:1]
    prepared = []
    for name in ("prepare_out", "prepare_pair"):
        original = getattr(fedkseed_kernels, name)

        def counted(tensors: list[Tensor], *args: Any, original: Any = original, **options: Any) -> Any:
            prepared.append(len(tensors))
            return original(tensors, *args, **options)

        monkeypatch.setattr(fedkseed_kernels, name, counted)
    optimizer = ZOSGD(model, 1e-3, EPS, seed=SEED, num_directions=2, storage=Streamed())
    optimizer.step(lambda: loss_of(model, ids))
    optimizer.step(lambda: loss_of(model, ids))
    assert len(prepared) == len(model.layers) + 2  # the norm and the head; the embedding draws rows
    assert 0 not in prepared


def test_a_thousand_evaluations_change_no_byte() -> None:
    model, ids = build(TiedModel, torch.bfloat16), make_ids()
    before = weights_of(model)
    optimizer = ZOSGD(model, 0.0, 0.5, seed=SEED, storage=Streamed())
    for _ in range(500):
        optimizer.step(lambda: loss_of(model, ids))
    assert same_bytes(before, weights_of(model))
    assert optimizer.num_skipped == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_update_is_one_pass_of_the_primitive_a_group(dtype: torch.dtype) -> None:
    model, ids = build(RootedModel, dtype), make_ids()
    start = weights_of(model)
    layers = {id(p) for p in model.layers.parameters()}
    streams = {id(p): stream for stream, p in enumerate(model.parameters())}
    groups = [
        {"params": list(model.layers.parameters()), "lr": 0.5, "weight_decay": 0.125},
        {"params": [p for p in model.parameters() if id(p) not in layers]},
    ]
    optimizer = ZOSGD(groups, 0.25, EPS, seed=SEED, num_directions=3, model=model, storage=Streamed())
    optimizer.step(lambda: loss_of(model, ids))
    with torch.no_grad():
        for before, parameter in zip(start, model.parameters(), strict=True):
            lr, alpha = (0.5, 0.9375) if id(parameter) in layers else (0.25, 1.0)
            coeffs = [-(lr * g) / 3 for g in optimizer.projected_grads]
            stream = [streams[id(parameter)]]
            fedkseed_kernels.seed_axpy_([before], SEEDS[:3], coeffs, alpha=alpha, streams=stream)
    assert same_bytes(start, weights_of(model))


def test_a_ledger_of_streamed_steps_rebuilds_the_weights() -> None:
    model, ids, pool = build(TiedModel), make_ids(), SeedPool(SEED, 4)
    start = weights_of(model)
    optimizer = FedKSeedSGD(model, 0.05, EPS, pool, storage=Streamed())
    for _ in range(12):
        optimizer.step(lambda: loss_of(model, ids))
    with torch.no_grad():
        fedkseed_kernels.seed_axpy_(start, [int(s) for s in pool.seeds], optimizer.coefficients.tolist())
    worst = max(float((a - b).abs().max()) for a, b in zip(start, weights_of(model), strict=True))
    assert worst < 1e-14


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_resumed_run_goes_on_with_the_same_bits(rounding: str) -> None:
    ids, storage = make_ids(), Streamed(rounding=rounding)
    model, other = build(TiedModel, torch.bfloat16), build(TiedModel, torch.bfloat16, seed=9)
    optimizer = ZOSGD(model, 0.5, EPS, seed=SEED, storage=storage)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model, ids))
    other.load_state_dict(model.state_dict())
    resumed = ZOSGD(other, 0.5, EPS, seed=SEED, storage=storage)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        assert optimizer.step(lambda: loss_of(model, ids)) == resumed.step(lambda: loss_of(other, ids))
    assert same_bytes(weights_of(model), weights_of(other))


def test_stochastic_rounding_shares_its_bits_between_the_sides_and_rounds_the_update() -> None:
    model, ids = build(LanguageModel, torch.bfloat16), make_ids()
    optimizer = ZOSGD(model, 0.5, EPS, seed=SEED, storage=Streamed(rounding="stochastic"))
    passes = [
        int(s)
        for s in fedkseed_kernels.contract.derived.seeds(
            SEED, fedkseed_kernels.contract.derived.PURPOSE_ROUNDING_SEEDS, range(2)
        )
    ]
    losses = []
    for sign in (1, -1):
        copied = build(LanguageModel, torch.bfloat16)
        with torch.no_grad():
            fedkseed_kernels.perturb_(
                list(copied.parameters()),
                SEEDS[0],
                sign * optimizer.eps,
                rounding="stochastic",
                rounding_seed=passes[0],
            )
        losses.append(float(loss_of(copied, ids).detach()))
    optimizer.step(lambda: loss_of(model, ids))
    (g,) = optimizer.projected_grads
    assert g == projected(losses, optimizer.eps)
    expected = weights_of(build(LanguageModel, torch.bfloat16))
    fedkseed_kernels.perturb_(expected, SEEDS[0], -0.5 * g, rounding="stochastic", rounding_seed=passes[1])
    assert same_bytes(expected, weights_of(model))
    assert optimizer.state_dict()["fedkseed"]["storage_state"] == {"num_passes": 2}


def raising_at(call: int) -> Callable[..., None]:
    calls = iter(range(10**6))

    def hook(*_: Any) -> None:
        if next(calls) == call:
            raise KeyError("in the middle")

    return hook


@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize("place", ["layers.1.first", "embed", "norm", "body.blocks.0.norm"])
def test_an_exception_in_a_forward_leaves_everything_in_place(place: str, call: int) -> None:
    model, ids = build(RootedModel, torch.bfloat16), make_ids()
    before, places = weights_of(model), addresses(model)
    optimizer = ZOSGD(model, 0.1, EPS, seed=SEED, num_directions=2, storage=Streamed())
    handle = model.get_submodule(place).register_forward_hook(raising_at(call))
    with pytest.raises(KeyError, match="in the middle"):
        optimizer.step(lambda: loss_of(model, ids))
    handle.remove()
    assert same_bytes(before, weights_of(model))
    assert addresses(model) == places
    assert not any("forward" in vars(module) for module in model.modules())
    optimizer.step(lambda: loss_of(model, ids))
    losses = side_losses(
        build(RootedModel, torch.bfloat16), SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids)
    )
    assert optimizer.projected_grads[0] == projected(losses, optimizer.eps)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_an_interrupt_in_a_forward_leaves_everything_in_place() -> None:
    model, ids = build(TiedModel), make_ids()
    before, places = weights_of(model), addresses(model)
    optimizer = ZOSGD(model, 0.1, EPS, seed=SEED, storage=Streamed())
    handle = model.layers[1].register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: loss_of(model, ids))
    handle.remove()
    assert same_bytes(before, weights_of(model))
    assert addresses(model) == places


def test_a_forward_that_was_replaced_is_kept() -> None:
    model, ids = build(LanguageModel), make_ids()
    layer = model.layers[0]
    original = layer.forward
    layer.forward = replaced = lambda hidden: 2 * original(hidden)
    expected = ZOSGD(model, 0.0, EPS, seed=SEED, storage=Inplace())
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=Streamed())
    expected.step(lambda: loss_of(model, ids))
    optimizer.step(lambda: loss_of(model, ids))
    assert optimizer.projected_grads[0] == pytest.approx(expected.projected_grads[0], rel=1e-6)
    assert layer.forward is replaced


class Returning(LanguageModel):
    """A unit that returns its weight, and another that uses it."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        scale, hidden = self.layers[0](hidden)
        return self.head(self.norm(self.layers[1](hidden) * scale))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scaling(), nn.Linear(WIDTH, WIDTH)])


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight, hidden


def test_a_unit_may_return_its_weight() -> None:
    model, ids = build(Returning), make_ids()
    optimizer = ZOSGD(model, 0.0, EPS, seed=SEED, storage=Streamed())
    optimizer.step(lambda: loss_of(model, ids))
    losses = side_losses(model, SEEDS[0], optimizer.eps, lambda m: loss_of(m, ids))
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)


def test_rows_of_an_embedding_that_do_not_exist_are_an_error() -> None:
    model = build(LanguageModel)
    before = weights_of(model)
    optimizer = ZOSGD(model, 0.1, EPS, storage=Streamed())
    with pytest.raises(IndexError, match="expected rows in"):
        optimizer.step(lambda: model(torch.tensor([[1, VOCABULARY]])).mean())
    assert same_bytes(before, weights_of(model))


@pytest.mark.few(1)
@pytest.mark.model
@pytest.mark.parametrize("storage", [Streamed(), Streamed(compute_dtype=torch.float32)], ids=["bf16", "fp32"])
def test_g_of_a_pretrained_model_is_that_of_perturbed_copies(storage: Streamed) -> None:
    model, tokenizer = load_smollm2(torch.bfloat16)
    ids = torch.tensor(
        [tokenizer("Noise is a function of its seed, its stream and its element.")["input_ids"]]
    )

    def evaluate(walked: Any) -> Tensor:
        with torch.no_grad():
            loss: Tensor = walked(input_ids=ids, labels=ids, use_cache=False).loss
        return loss.double()

    before = weights_of(model)
    optimizer = ZOSGD(model, 0.0, 1e-3, seed=SEED, storage=storage)
    optimizer.step(lambda: evaluate(model))
    losses = side_losses(model, SEEDS[0], optimizer.eps, evaluate, dtype=storage.compute_dtype)
    assert losses[0] != losses[1]
    assert optimizer.projected_grads == (projected(losses, optimizer.eps),)
    assert same_bytes(before, weights_of(model))
