"""What an optimizer says once, at the caller's line; and closures that it refuses, in every storage mode."""

from __future__ import annotations

import logging
import math
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import halves
from support.messages import make_broadcast
from support.small_model import make_model, same_bytes, weights_of

from fedkseed import ZOSGD, Client, FedKSeedSGD, Inplace, ModelIdentity, SeedPool, Streamed, WorkingCopy
from fedkseed.storage import StorageOptions

MODES = {
    name: halves.MODES[name]
    for name in ("in place", "chained", "streamed", "streamed in fp32", "compensated", "paired")
}
all_modes = pytest.mark.parametrize("storage", MODES.values(), ids=MODES)
EPS, SEED = 2.0**-8, 5


class Case:
    """A model, an optimizer of it, and closures of its mode.

    Every loss goes through ``change`` before the closure returns it.
    """

    def __init__(self, storage: StorageOptions, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model = make_model(dtype)
        self.optimizer = ZOSGD(self.model, 0.01, EPS, seed=SEED, storage=storage, **options)
        self._is_paired = getattr(storage, "paired", False)
        generator = torch.Generator().manual_seed(4)
        self._x = torch.randn(12, 5, generator=generator).to(dtype)

    def closure(self, change: Callable[[torch.Tensor], Any] = lambda loss: loss) -> Callable[[], Any]:
        def evaluate() -> Any:
            y = (
                self.model(torch.cat([self._x, self._x]) if self._is_paired else self._x).double() - 1
            ).square()
            losses = [change(half.mean()) for half in (y.chunk(2) if self._is_paired else [y])]
            return losses if self._is_paired else losses[0]

        return evaluate


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    """All warnings of a test, repeated ones too."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def check_said_once(caught: list[warnings.WarningMessage], what: str) -> None:
    """One warning, of this, at a line of this file."""
    assert [warning.category for warning in caught] == [UserWarning]
    assert what in str(caught[0].message)
    assert Path(caught[0].filename) == Path(__file__)
    line = Path(__file__).read_text().splitlines()[caught[0].lineno - 1]
    assert "# said here" in line


@all_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_of_16_bits(
    storage: StorageOptions, dtype: torch.dtype, caught: list[warnings.WarningMessage]
) -> None:
    case = Case(storage)
    for _ in range(2):
        case.optimizer.step(case.closure(lambda loss: loss.to(dtype)))  # said here
    check_said_once(caught, f"a loss of {str(dtype).removeprefix('torch.')}")


@all_modes
def test_a_loss_of_32_bits_and_numbers_say_nothing(
    storage: StorageOptions, caught: list[warnings.WarningMessage]
) -> None:
    case = Case(storage)
    for change in (torch.Tensor.float, float, lambda loss: np.float32(loss), lambda loss: loss.reshape(1)):
        case.optimizer.step(case.closure(change))
    assert not caught


@all_modes
def test_a_loss_with_a_graph_is_said_and_right(
    storage: StorageOptions, caught: list[warnings.WarningMessage]
) -> None:
    case, plain = Case(storage), Case(storage)

    def graph() -> Any:
        with torch.enable_grad():
            return case.closure()()

    for _ in range(2):
        case.optimizer.step(graph)  # said here
        plain.optimizer.step(plain.closure())
    check_said_once(caught, "requires_grad")
    assert case.optimizer.last == plain.optimizer.last
    assert same_bytes(weights_of(case.model), weights_of(plain.model))


@all_modes
def test_a_closure_of_lightning_is_said_and_right(
    storage: StorageOptions, caught: list[warnings.WarningMessage]
) -> None:
    """It brings enable_grad, zero_grad and backward."""
    case, plain = Case(storage), Case(storage)

    def training_step() -> Any:
        with torch.enable_grad():
            loss = case.closure()()
            case.optimizer.zero_grad()
            sum(loss if isinstance(loss, list) else [loss]).backward()  # type: ignore[union-attr]
        return loss

    for _ in range(2):
        case.optimizer.step(training_step)  # said here
        plain.optimizer.step(plain.closure())
    check_said_once(caught, "requires_grad")
    assert case.optimizer.last == plain.optimizer.last
    assert same_bytes(weights_of(case.model), weights_of(plain.model))


@all_modes
def test_equal_losses_in_the_first_three_steps(
    storage: StorageOptions, caught: list[warnings.WarningMessage]
) -> None:
    case, other = Case(storage), make_model(torch.float32)
    blind = case.closure(lambda loss: other(torch.ones(2, 5)).sum())
    for _ in range(2):
        case.optimizer.step(blind)
    assert not caught
    for _ in range(60):
        case.optimizer.step(blind)  # said here
    check_said_once(caught, "in 3 steps in a row: g is 0 and nothing is tuned")


def test_equal_losses_in_fifty_steps_in_a_row(caught: list[warnings.WarningMessage]) -> None:
    case = Case(Inplace())
    constant = case.closure(lambda loss: 1.0)
    for _ in range(2):
        case.optimizer.step(constant)
    for _ in range(2):
        case.optimizer.step(case.closure())
        for _ in range(49):
            case.optimizer.step(constant)
    assert not caught
    case.optimizer.step(constant)  # said here
    check_said_once(caught, "in 50 steps in a row")
    for _ in range(60):
        case.optimizer.step(constant)
    check_said_once(caught, "in 50 steps in a row")


def test_skipped_steps_do_not_count_as_equal(caught: list[warnings.WarningMessage]) -> None:
    case = Case(Inplace())
    for _ in range(60):
        case.optimizer.step(lambda: math.inf)
    assert not caught
    for _ in range(3):
        case.optimizer.step(lambda: 1.0)  # said here
    check_said_once(caught, "in 3 steps in a row")


def test_one_direction_that_moves_is_enough(caught: list[warnings.WarningMessage]) -> None:
    case = Case(Inplace(), num_directions=2)
    for step in range(5):
        losses = iter([1.0, 1.0, 1.0, 1.0 + step % 2 + 1e-3])
        case.optimizer.step(lambda losses=losses: next(losses))  # type: ignore[misc]
    assert not caught


def test_skipped_directions_are_logged_aloud_once(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(Inplace())
    with caplog.at_level(logging.INFO, logger="fedkseed"):
        for _ in range(3):
            case.optimizer.step(lambda: math.inf)
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO, logging.INFO]


def test_measure_apart_says_it_too(caught: list[warnings.WarningMessage]) -> None:
    case = Case(Inplace())
    for _ in range(3):
        case.optimizer.measure(case.closure(torch.Tensor.bfloat16))  # said here
    check_said_once(caught, "bfloat16")


def test_through_a_client_the_line_is_that_of_its_caller(caught: list[warnings.WarningMessage]) -> None:
    pool = SeedPool(8, 64)
    model = make_model()
    client = Client(
        3,
        WorkingCopy(model),
        pool,
        loss=lambda model, batch: model(batch).sum().bfloat16(),
        batches=lambda round, num_steps: [torch.ones(2, 5, dtype=torch.float64)] * num_steps,
        data_size=1,
    )
    fields = {"identity": ModelIdentity.of(model), "base_seed": 8}
    coefficients = np.zeros(64, dtype=np.float32)
    message = make_broadcast(eps=1.0, lr=0.01, max_abs_g=1e3, coefficients=coefficients, **fields).to_bytes()
    client.step(message)  # said here
    check_said_once(caught, "bfloat16")


def test_hooks_and_schedulers_do_not_hide_the_line(caught: list[warnings.WarningMessage]) -> None:
    case = Case(Inplace())
    torch.optim.lr_scheduler.ExponentialLR(case.optimizer, 0.9)
    case.optimizer.register_step_pre_hook(lambda *_: None)
    case.optimizer.step(case.closure(torch.Tensor.bfloat16))  # said here
    check_said_once(caught, "bfloat16")


def test_an_installed_wrapper_does_not_hide_the_line(caught: list[warnings.WarningMessage]) -> None:
    """Such as accelerate's, which hands the closure on."""
    case = Case(Inplace())
    source = "def step(optimizer, closure):\n    return optimizer.step(closure)\n"
    namespace: dict[str, Any] = {}
    exec(compile(source, f"{sysconfig.get_path('purelib')}/wrapping/optimizer.py", "exec"), namespace)
    namespace["step"](case.optimizer, case.closure(torch.Tensor.bfloat16))  # said here
    check_said_once(caught, "bfloat16")


@all_modes
@pytest.mark.parametrize("kind", [ZOSGD, FedKSeedSGD])
def test_a_complex_loss_is_refused(storage: StorageOptions, kind: type[Any]) -> None:
    case = Case(storage)
    if kind is FedKSeedSGD:
        case.optimizer = FedKSeedSGD(case.model, 0.01, EPS, seed_pool=SeedPool(8, 64), storage=storage)
    before = weights_of(case.model)
    complexes = case.closure(lambda loss: torch.complex(loss, loss))
    for call in (case.optimizer.step, case.optimizer.measure):
        with pytest.raises(
            TypeError, match=r"expected a real loss, got torch.complex128.* return its .abs\(\)"
        ):
            call(complexes)
    with pytest.raises(TypeError, match="tensor or a number, got complex"):
        case.optimizer.step(case.closure(lambda loss: complex(loss)))
    check_clean(case, before, storage)


@all_modes
@pytest.mark.parametrize("where", ["loss", "detached", "autograd.grad"])
def test_backward_in_a_closure_is_refused(storage: StorageOptions, where: str) -> None:
    case = Case(storage)
    before = weights_of(case.model)

    def backward(loss: torch.Tensor) -> torch.Tensor:
        if where == "autograd.grad":
            torch.autograd.grad(loss, list(case.model.parameters()))
        else:
            (loss if where == "loss" else loss.detach()).backward()
        return loss

    for call in (case.optimizer.step, case.optimizer.measure):
        with pytest.raises(
            RuntimeError, match=r"got one that calls backward\(\): a zeroth-order step takes no"
        ):
            call(case.closure(backward))
    check_clean(case, before, storage)


def check_clean(case: Case, before: list[torch.Tensor], storage: StorageOptions) -> None:
    after = weights_of(case.model)
    if isinstance(storage, Streamed):
        assert same_bytes(after, before)
    for a, b in zip(after, before, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    case.optimizer.step(case.closure())
    assert case.optimizer.last.projected_grads != (0.0,)  # type: ignore[union-attr]


@all_modes
def test_other_runtime_errors_of_a_closure_come_through(storage: StorageOptions) -> None:
    case = Case(storage)

    def fails(loss: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="^shapes do not fit$"):
        case.optimizer.step(case.closure(fails))


@pytest.mark.parametrize("storage", [Inplace(), Inplace(chained=True)], ids=repr)
def test_a_closure_that_writes_tuned_weights(
    storage: StorageOptions, caught: list[warnings.WarningMessage]
) -> None:
    """Streamed modes refuse it."""
    case = Case(storage)
    evaluate = case.closure()

    def clamps() -> Any:
        case.model[2].weight.clamp_(-0.1, 0.1)  # type: ignore[operator, index]
        return evaluate()

    for _ in range(3):
        case.optimizer.step(clamps)  # said here
    check_said_once(caught, "writes the tuned weight 2.weight")


@all_modes
def test_weights_that_are_frozen_later(
    storage: StorageOptions, caught: list[warnings.WarningMessage]
) -> None:
    case = Case(storage)
    case.optimizer.step(case.closure())
    case.model[0].bias.requires_grad_(False)  # type: ignore[operator, index]
    before = weights_of(case.model)
    for _ in range(2):
        case.optimizer.step(case.closure())  # said here
    check_said_once(caught, "0.bias has requires_grad=False by now and is tuned all the same")
    case.optimizer.flush()
    assert not torch.equal(weights_of(case.model)[1], before[1])
