"""FedKSeedSGD: the bits of a step, what it refuses, and that no perturbation is ever left in the weights."""

from __future__ import annotations

import io
import math
import signal
from typing import Any

import numpy as np
import pytest
import torch
from support.small_model import largest_difference, make_closure, make_model, same_bytes, weights_of
from torch import nn

import fedkseed_kernels
from fedkseed import FedKSeedSGD, Inplace, SeedPool

POOL = SeedPool(11, 64)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_three_passes_with_the_stated_coefficients(dtype: torch.dtype) -> None:
    model, mirror = make_model(dtype), make_model(dtype)
    lr, eps = 0.37, 3e-3
    optimizer = FedKSeedSGD(model, lr=lr, eps=eps, seed_pool=POOL, storage=Inplace())
    returned = optimizer.step(make_closure(model), seed_index=9)

    eps32 = float(np.float32(eps))
    seed = int(POOL.seeds[9])
    closure = make_closure(mirror)
    tensors = list(mirror.parameters())
    with torch.no_grad():
        fedkseed_kernels.perturb_(tensors, seed, eps32)
        plus = float(closure())
        fedkseed_kernels.perturb_(tensors, seed, -2 * eps32)
        minus = float(closure())
        g = float(np.float32((plus - minus) / (2 * eps32)))
        fedkseed_kernels.perturb_(tensors, seed, eps32 - lr * g)
    assert g != 0
    assert optimizer.eps == eps32 != eps
    assert optimizer.history == [(9, g)]
    assert optimizer.coefficients[9] == -(lr * g)
    assert np.count_nonzero(optimizer.coefficients) == 1
    assert returned == (plus + minus) / 2
    assert same_bytes(weights_of(model), weights_of(mirror))
    assert largest_difference(weights_of(model), weights_of(make_model(dtype))) > 0


def test_it_minimises_and_the_coefficients_rebuild_the_weights() -> None:
    model = make_model()
    start = weights_of(model)
    closure = make_closure(model)
    first = float(closure().detach())
    optimizer = FedKSeedSGD(model, lr=0.02, eps=1e-3, seed_pool=POOL)
    for _ in range(150):
        optimizer.step(closure)
    assert float(closure().detach()) < 0.5 * first
    fedkseed_kernels.seed_axpy_(start, POOL.seeds.view(np.int64).tolist(), optimizer.coefficients.tolist())
    assert largest_difference(start, weights_of(model)) < 1e-13


def test_the_own_schedule_is_round_0_of_client_0() -> None:
    model = make_model()
    optimizer = FedKSeedSGD(model, lr=0.0, eps=1e-3, seed_pool=POOL)
    optimizer.step(make_closure(model))
    optimizer.step(make_closure(model), seed_index=1)  # does not advance the schedule
    optimizer.step(make_closure(model))
    first, second = POOL.schedule(0, 0, 2).tolist()
    assert [index for index, _ in optimizer.history] == [first, 1, second]


def test_the_own_schedule_goes_on_for_ever() -> None:
    optimizer = FedKSeedSGD([torch.zeros(1)], 0.0, 1e-3, POOL)
    for _ in range(300):
        optimizer.step(lambda: 1.0)
    assert [index for index, _ in optimizer.history] == POOL.schedule(0, 0, 300).tolist()
    state = optimizer.state_dict()
    state["fedkseed"].update(num_drawn=2**16 + 258)
    optimizer.load_state_dict(state)
    for _ in range(4):
        optimizer.step(lambda: 1.0)
    assert [index for index, _ in optimizer.history[300:]] == POOL.schedule(1, 0, 262)[258:].tolist()


def test_a_given_schedule_is_followed_and_ends() -> None:
    model = make_model()
    optimizer = FedKSeedSGD(model, 0.1, 1e-3, POOL, schedule=np.array([5, 63, 5], dtype=np.uint16))
    for _ in range(3):
        optimizer.step(make_closure(model))
    assert [index for index, _ in optimizer.history] == [5, 63, 5]
    before = weights_of(model)
    with pytest.raises(ValueError, match="at most 3 steps"):
        optimizer.step(make_closure(model))
    assert same_bytes(before, weights_of(model))


def test_both_sides_see_the_same_random_numbers_and_the_next_step_others() -> None:
    weight = torch.zeros(3, dtype=torch.float64)
    seen = []

    def closure() -> float:
        seen.append(float(torch.rand(())))
        return 1.0

    torch.manual_seed(0)
    optimizer = FedKSeedSGD([weight], 0.1, 1e-3, POOL)
    optimizer.step(closure)
    optimizer.step(closure)
    torch.manual_seed(0)
    expected = [float(torch.rand(())) for _ in range(2)]
    assert seen == [expected[0], expected[0], expected[1], expected[1]]


def test_dropout_agrees_on_both_sides() -> None:
    model = nn.Sequential(nn.Linear(4, 200), nn.Dropout(0.5), nn.Linear(200, 1)).double().train()
    optimizer = FedKSeedSGD(model, 0.0, 1e-6, POOL)
    with pytest.warns(UserWarning, match="train mode with dropout"):
        optimizer.step(lambda: model(torch.ones(1, 4, dtype=torch.float64)).sum(), seed_index=0)
    # Different masks would change the loss by far more than the perturbation: |g| of order 1e5.
    assert 0 < abs(optimizer.history[0][1]) < 100


@pytest.mark.parametrize("losses", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.inf), (1e300, -1e300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_that_is_not_finite_skips_the_update(losses: tuple[float, float], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    before = weights_of(model)
    optimizer = FedKSeedSGD(model, 0.1, 1e-3, POOL, storage=Inplace())
    values = iter(losses)
    optimizer.step(lambda: next(values), seed_index=3)
    assert optimizer.num_skipped == 1
    assert optimizer.history == [(3, 0.0)]
    assert not optimizer.coefficients.any()
    tolerance = 2 * torch.finfo(dtype).eps
    assert largest_difference(before, weights_of(model)) <= tolerance
    optimizer.step(lambda: 1.0, seed_index=4)
    assert optimizer.num_skipped == 1


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_closure_takes_the_perturbation_back(
    call: int, error: type[BaseException]
) -> None:
    model = make_model()
    before = weights_of(model)
    optimizer = FedKSeedSGD(model, 0.1, 1e-2, POOL)
    during = []

    def closure() -> float:
        during.append(largest_difference(before, weights_of(model)))
        if len(during) == call + 1:
            raise error("stop")
        return 1.0

    with pytest.raises(error, match="stop"):
        optimizer.step(closure)
    assert min(during) > 5e-3
    assert largest_difference(before, weights_of(model)) < 1e-15
    assert optimizer.history == []
    assert optimizer.num_skipped == 0
    optimizer.step(make_closure(model))
    assert optimizer.history[0][0] == POOL.schedule(0, 0, 1)[0]


@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_ctrl_c_inside_a_pass_over_the_weights(stop_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    before = weights_of(model)
    optimizer = FedKSeedSGD(model, 0.1, 1e-2, POOL)
    original = fedkseed_kernels.Prepared.seed_axpy_
    passes = []

    def seed_axpy_(self: fedkseed_kernels.Prepared, *terms: Any, **options: Any) -> None:
        original(self, *terms, **options)
        passes.append(terms)
        if len(passes) == stop_at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fedkseed_kernels.Prepared, "seed_axpy_", seed_axpy_)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(make_closure(model), seed_index=5)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(optimizer.history) == (1 if stop_at == 3 else 0)
    moved = float(optimizer.coefficients[5])
    assert (moved != 0) == (stop_at == 3)
    assert len(passes) == stop_at
    fedkseed_kernels.perturb_(before, int(POOL.seeds[5]), moved)
    assert largest_difference(before, weights_of(model)) < 1e-15


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (None, TypeError, "return the loss, a tensor or a number, got NoneType; end it with return loss"),
        ((torch.zeros(()), 1), TypeError, "got tuple; return the loss alone"),
        ({"loss": torch.zeros(())}, TypeError, "got dict; return its loss alone"),
        (torch.zeros(2), ValueError, r"one element, got shape \(2,\)"),
    ],
)
def test_a_bad_loss(loss: Any, error: type[Exception], message: str) -> None:
    model = make_model()
    before = weights_of(model)
    with pytest.raises(error, match=message):
        FedKSeedSGD(model, 0.1, 1e-3, POOL).step(lambda: loss)
    assert largest_difference(before, weights_of(model)) < 1e-15


def test_streams_are_manifest_indices_and_frozen_parameters_stay() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    before = weights_of(model)
    optimizer = FedKSeedSGD(model, 1.0, 1e-3, POOL)
    optimizer.step(make_closure(model), seed_index=2)
    coefficient = float(optimizer.coefficients[2])
    after = weights_of(model)
    assert torch.equal(before[0], after[0])
    for stream in (1, 2, 3):
        noise = fedkseed_kernels.normal(
            before[stream].shape, int(POOL.seeds[2]), stream=stream, dtype=torch.float64
        )
        expected = before[stream] + coefficient * noise
        assert float((after[stream] - expected).abs().max()) < 1e-15 * max(1.0, abs(coefficient))


def test_every_way_to_pass_parameters_gives_the_same_step() -> None:
    results = []
    for choose in (
        lambda model: model,
        lambda model: torch.compile(model),
        lambda model: model.named_parameters(),
        lambda model: model.parameters(),
        lambda model: [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}],
        lambda model: [
            {"params": list(model[0].named_parameters())},
            {"params": list(model[2].named_parameters())},
        ],
    ):
        model = make_model()
        FedKSeedSGD(choose(model), 0.3, 1e-3, POOL).step(make_closure(model), seed_index=1)
        results.append(weights_of(model))
    assert all(same_bytes(results[0], result) for result in results[1:])


def test_a_tied_parameter_moves_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    optimizer = FedKSeedSGD(model, 1.0, 1e-3, POOL)
    optimizer.step(lambda: model(torch.ones(2, 3, dtype=torch.float64)).sum(), seed_index=0)
    noise = fedkseed_kernels.normal((3, 3), int(POOL.seeds[0]), dtype=torch.float64)
    moved = model[0].weight.detach() - before
    assert float((moved - float(optimizer.coefficients[0]) * noise).abs().max()) < 1e-13


def test_a_scheduler_changes_lr_between_steps() -> None:
    model = make_model()
    optimizer = FedKSeedSGD(model, 0.2, 1e-3, POOL)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for index in (0, 1):
        optimizer.step(make_closure(model), seed_index=index)
        scheduler.step()
    (_, first), (_, second) = optimizer.history
    assert optimizer.coefficients[0] == -(0.2 * first)
    assert optimizer.coefficients[1] == -(0.1 * second)


def test_state_dict_resumes_bit_for_bit() -> None:
    model, other = make_model(), make_model()
    optimizer = FedKSeedSGD(model, 0.1, 1e-3, POOL)
    for _ in range(3):
        optimizer.step(make_closure(model))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed = FedKSeedSGD(other, 0.7, 1e-3, POOL)
    resumed.load_state_dict(state)
    for _ in range(2):
        optimizer.step(make_closure(model))
        resumed.step(make_closure(other))
    assert resumed.history == optimizer.history
    assert np.array_equal(resumed.coefficients, optimizer.coefficients)
    assert same_bytes(weights_of(model), weights_of(other))
    with pytest.raises(ValueError, match="construct the optimizer with those of the state"):
        FedKSeedSGD(make_model(), 0.1, 1e-3, SeedPool(12, 64)).load_state_dict(state)
    with pytest.raises(ValueError, match="got one of another optimizer"):
        resumed.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "finite lr of at least 0, got -0.1"),
        ({"lr": math.nan}, ValueError, "finite lr"),
        ({"lr": math.inf}, ValueError, "finite lr"),
        ({"lr": "0.1"}, TypeError, "real number for lr, got '0.1'"),
        ({"lr": torch.tensor(0.1)}, TypeError, r"real number for lr.*; take its .item\(\)"),
        ({"eps": 0.0}, ValueError, "expected eps in"),
        ({"eps": -1e-3}, ValueError, "expected eps in"),
        ({"eps": math.nan}, ValueError, "expected eps in"),
        ({"eps": 1e-46}, ValueError, "expected eps in"),
        ({"eps": 1e39}, ValueError, "expected eps in"),
        ({"eps": True}, TypeError, "real number for eps"),
        ({"seed_pool": 4096}, TypeError, "expected a SeedPool, got int"),
        ({"weight_decay": 0.01}, ValueError, "rebuilt from seeds and scalars"),
        ({"schedule": [0, 64]}, ValueError, r"seed index in \[0, 63\], got 64"),
        ({"schedule": [0.5]}, TypeError, "integer seed index"),
        ({"params": []}, ValueError, "at least one tensor to tune, got none"),
        ({"params": nn.ReLU()}, ValueError, "without any"),
        ({"params": nn.Linear(2, 2).requires_grad_(False)}, ValueError, "got 2, all of them frozen"),
        ({"params": None}, TypeError, "a model or an iterable of tensors, got NoneType"),
        ({"params": torch.zeros(3)}, TypeError, "got one tensor; put it into a list"),
        ({"params": [torch.zeros(3, dtype=torch.int64)]}, TypeError, "floating-point tensors, got tensor 0"),
        ({"params": [("a", torch.zeros(3, dtype=torch.uint8))]}, TypeError, "got a of torch.uint8"),
        ({"params": [torch.zeros(3), "b"]}, TypeError, "got str as tensor 1"),
        ({"params": [torch.zeros(3, dtype=torch.float8_e4m3fn)]}, TypeError, "float8"),
        ({"params": [{"params": [torch.zeros(3)], "lr": 0.2}]}, ValueError, "got lr=0.2: a model tuned by"),
        ({"params": [{"params": [torch.zeros(3)], "weight_decay": 0.1}]}, ValueError, "got weight_decay=0.1"),
        ({"params": [{"params": [torch.zeros(3)], "momentum": 0}]}, ValueError, "got momentum=0"),
        ({"params": [{"lr": 0.1}]}, TypeError, "dicts with 'params'"),
    ],
)
def test_refused_at_construction(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"params": [torch.zeros(3)], "lr": 0.1, "eps": 1e-3, "seed_pool": POOL}
    with pytest.raises(error, match=message):
        FedKSeedSGD(**{**arguments, **changes})


def test_tensors_that_share_memory_are_refused() -> None:
    tensor = torch.zeros(4)
    with pytest.raises(ValueError, match="every tensor once, got tensor 1 twice"):
        FedKSeedSGD([tensor, tensor], 0.1, 1e-3, POOL)
    with pytest.raises(ValueError, match="share memory"):
        FedKSeedSGD([tensor[:3], tensor[2:]], 0.1, 1e-3, POOL)


def test_refused_later() -> None:
    model = make_model()
    optimizer = FedKSeedSGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.1, 1e-3, POOL
    )
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="depends on its place among them"):
        optimizer.add_param_group({"params": [torch.zeros(2)]})
    with pytest.raises(ValueError, match=r"seed index in \[0, 63\], got -1"):
        optimizer.step(make_closure(model), seed_index=-1)
    optimizer.param_groups[1]["lr"] = 0.2
    with pytest.raises(ValueError, match=r"one lr for all groups, got \[0.1, 0.2\]"):
        optimizer.step(make_closure(model))
    assert same_bytes(before, weights_of(model))
    assert optimizer.history == []
