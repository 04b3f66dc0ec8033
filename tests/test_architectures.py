"""Every storage mode on twelve architectures of transformers, beside explicitly perturbed copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import ARCHITECTURES, Architecture
from support.storage_reference import (
    ChainedReference,
    CompensatedFloatReference,
    CompensatedReference,
    InplaceReference,
    StreamedFloatReference,
    StreamedReference,
    pass_over,
    same_weights,
    stochastic,
)
from torch import nn

from fedkseed import ZOSGD, Inplace, Streamed
from fedkseed.optim.paired import paired_losses
from fedkseed.storage import StorageOptions
from fedkseed_kernels.contract import derived, reference

SEED, LR, WEIGHT_DECAY = 17, 2e-2, 0.25
ALPHA = float(np.float32(1 - LR * WEIGHT_DECAY))
NUM_STEPS = 3
# In bf16 large enough for losses that are bf16 themselves to differ between the sides.
EPS = {torch.float64: 1e-3, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Mode:
    """A storage mode: how users choose it, what it stands for, and the dtypes it is for."""

    options: StorageOptions
    reference: type[Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.bfloat16)

    @property
    def is_paired(self) -> bool:
        return getattr(self.options, "paired", False)

    @property
    def never_perturbs(self) -> bool:
        return issubclass(self.reference, StreamedReference)


BF16 = (torch.bfloat16,)
MODES = (
    Mode(Inplace(), InplaceReference),
    Mode(Inplace(chained=True), ChainedReference),
    Mode(Inplace(rounding="stochastic"), stochastic(InplaceReference), BF16),
    Mode(Inplace(chained=True, rounding="stochastic"), stochastic(ChainedReference), BF16),
    Mode(Streamed(), StreamedReference),
    Mode(Streamed(rounding="stochastic"), stochastic(StreamedReference), BF16),
    Mode(Streamed(compute_dtype=torch.float32), StreamedFloatReference, BF16),
    Mode(Streamed(compensated=True), CompensatedReference, BF16),
    Mode(Streamed(paired=True), StreamedReference),
    Mode(Streamed(paired=True, rounding="stochastic"), stochastic(StreamedReference), BF16),
    Mode(Streamed(paired=True, compute_dtype=torch.float32), StreamedFloatReference, BF16),
    Mode(
        Streamed(paired=True, compensated=True, compute_dtype=torch.float32), CompensatedFloatReference, BF16
    ),
)

ARCHITECTURE_ROWS = [pytest.param(row, id=name) for name, row in ARCHITECTURES.items()]
MODE_ROWS = [
    pytest.param(mode, dtype, id=f"{mode.options}-{str(dtype).removeprefix('torch.')}")
    for mode in MODES
    for dtype in mode.dtypes
]


def seeds() -> list[int]:
    return [int(seed) for seed in derived.candidate_seeds(SEED, NUM_STEPS + 1)]


def fp32(value: float) -> float:
    return float(np.float32(value))


class Run:
    """A model, its batch, and an optimizer in the given mode; the losses that its closure has returned."""

    def __init__(self, row: Architecture, mode: Mode, dtype: torch.dtype, lr: float = LR) -> None:
        self.model, self.batch = row.make_model(dtype), row.make_batch()
        self.is_paired = mode.is_paired
        self.eps = fp32(EPS[dtype])
        self.losses: list[float] = []
        decay = WEIGHT_DECAY if lr else 0.0
        self.reference = mode.reference(self.model, self.eps, lr, lr * decay, SEED)
        self.optimizer = ZOSGD(
            self.model, lr, EPS[dtype], seed=SEED, weight_decay=decay, storage=mode.options
        )

    def evaluate(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(**self.batch).loss.double())

    def closure(self) -> Any:
        if self.is_paired:
            losses = paired_losses(self.model, self.batch)
            self.losses += losses.tolist()
            return losses
        self.losses.append(self.evaluate(self.model))
        return self.losses[-1]

    def step(self) -> float:
        """One step; gives its g."""
        self.optimizer.step(self.closure)
        (g,) = self.optimizer.projected_grads
        return g

    def check_step(self, seed: int, next_seed: int) -> float:
        """One step here and in the reference: the same losses, and the g that they give."""
        self.losses.clear()
        g = self.step()
        plus, minus = self.reference.losses(seed, self.evaluate)
        assert self.losses == [plus, minus]
        assert g == pytest.approx((plus - minus) / (2 * self.eps), rel=1e-6, abs=0)
        self.reference.update(seed, g, next_seed)
        self.reference.decay.advance()
        return g


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_reference_is_the_primitive(dtype: torch.dtype) -> None:
    """The copies' pass, made for speed over all tensors at once, against the reference's tensor by tensor."""
    model = ARCHITECTURES["T5"].make_model(dtype)
    expected = []
    for stream, (_, parameter) in enumerate(model.named_parameters()):
        array = stored_array(parameter)
        elements = np.arange(array.size, dtype=np.uint64).reshape(array.shape)
        terms = {"seeds": seeds()[:2], "coeffs": [0.3, -1e-3], "alpha": ALPHA, "stream": stream}
        expected.append(reference.seed_axpy_array(array, elements, dtype=str(dtype).split(".")[1], **terms))
    pass_over(model, seeds()[:2], [0.3, -1e-3], ALPHA)
    for array, parameter in zip(expected, model.parameters(), strict=True):
        np.testing.assert_array_equal(array, stored_array(parameter))


def stored_array(parameter: torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = parameter.detach().clone()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.few
@pytest.mark.parametrize(("mode", "dtype"), MODE_ROWS)
@pytest.mark.parametrize("row", ARCHITECTURE_ROWS)
def test_steps_are_those_of_perturbed_copies(
    row: Architecture, mode: Mode, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, two forwards that raise in the second block, and the third step that these were to be."""
    run = Run(row, mode, dtype)
    first, second, third, fourth = seeds()
    # Losses of bf16 are coarse, and may be equal on both sides; not in the steps before the interruption.
    assert run.check_step(first, second) != 0
    assert run.check_step(second, third) != 0
    for num_evaluations in (1, 2):
        with monkeypatch.context() as patch:
            raise_in_forward(row.block(run.model), num_evaluations, patch)
            with pytest.raises(RuntimeError, match="within the second block"):
                run.step()
        run.reference.restore(third, num_evaluations)
        assert same_weights(run.model, run.reference.model)
        assert run.evaluate(run.model) == run.evaluate(run.reference.model)
    run.check_step(third, fourth)
    run.optimizer.flush()
    run.reference.flush()
    assert same_weights(run.model, run.reference.model)


@pytest.mark.few
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, id=str(mode.options)) for mode in MODES if mode.never_perturbs]
)
@pytest.mark.parametrize("row", ARCHITECTURE_ROWS)
def test_stored_bytes_stay_without_an_update(row: Architecture, mode: Mode) -> None:
    run = Run(row, mode, torch.bfloat16, lr=0.0)
    places = [parameter.data_ptr() for parameter in run.model.parameters()]
    assert run.step() != 0
    assert same_weights(run.model, run.reference.model)
    assert [parameter.data_ptr() for parameter in run.model.parameters()] == places
    assert run.evaluate(run.model) == run.evaluate(run.reference.model)


def raise_in_forward(block: nn.Module, num_evaluations: int, patch: pytest.MonkeyPatch) -> None:
    """Makes the ``num_evaluations``-th evaluation raise, or half of a paired one."""
    forward, num_calls = block.forward, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == num_evaluations:
            raise RuntimeError("within the second block")
        return forward(*args, **options)

    patch.setattr(block, "forward", counted)
