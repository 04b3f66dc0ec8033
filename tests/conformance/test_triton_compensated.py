"""Compensated weights in the Triton kernels, in its interpreter: memory, lists, terms, and damaged sources.

Sizes, ties and golden vectors are those of test_compensated, which has Triton among its targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.arguments.tensors import check_operands
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import reference
from fedkseed_kernels.operands import DeviceTerms

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from interpreted_triton import damaged, interpreted

all_dtypes = pytest.mark.parametrize("dtype", reference.COMPENSATED_DTYPES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)
SEEDS, COEFFS = [2**64 - 3, 1, 2**63, 77], [1e-2, -3e-3, 0.25, 1e-6]
SPECIAL = [0, 0x8000, 1, 0x8001, 0x7C00, 0xFC00, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF]

Call = Callable[[], Sequence[Tensor]]


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreted():
        yield


def weights(shape: Any, dtype: str) -> NDArray[np.uint16]:
    """Ordinary weights, every fourth of any kind; first zeros, subnormals, infinities, NaN of both dtypes."""
    random = np.random.default_rng(60)
    ordinary = reference.round_to_nearest((random.standard_normal(shape) * 0.05).astype(np.float32), dtype)
    anything = random.integers(0, 2**16, shape, dtype=np.uint16)
    mixed = np.where(random.random(shape) < 0.25, anything, ordinary).astype(np.uint16)
    mixed.reshape(-1)[: len(SPECIAL)] = SPECIAL[: mixed.size]
    return mixed


def residuals(*shape: int) -> Tensor:
    """Residuals of every size, the largest of both signs among them."""
    values = np.random.default_rng(61).integers(-(2**15), 2**15, shape).astype(np.int16)
    values.reshape(-1)[:2] = 0  # of the zeros: -0 reads as +0 in fp16
    values.reshape(-1)[-2:] = -(2**15), 2**15 - 1
    return torch.from_numpy(values)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bits; a NaN weight equals any other."""
    if want.is_floating_point():
        kind = str(want.dtype).removeprefix("torch.")
        same = golden.same_value(stored_of(got).reshape(-1), stored_of(want).reshape(-1), kind)
    else:
        same = (got == want).reshape(-1).numpy()
    assert same.all(), f"{(~same).sum()} of {same.size} differ, first {int(np.argmin(same))}"


def compare(call: Call) -> None:
    """The call by Triton and by the reference."""
    got = call()
    with dispatch.backend("reference"):
        want = call()
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert_same(one, other)


@pytest.mark.few
@all_families
@all_dtypes
@pytest.mark.parametrize("num_terms", [0, 1, 2, 4])
def test_in_place(num_terms: int, dtype: str, family: str) -> None:
    """Whole octets and ragged ends, misaligned and strided memory, beside weights without residuals."""
    terms = SEEDS[:num_terms], COEFFS[:num_terms]

    def call() -> list[Tensor]:
        tensors = [tensor_of(weights(n, dtype), dtype) for n in (141, 19, 24)]
        matrix = tensor_of(weights((6, 5), dtype), dtype, "transposed")
        all_residuals = [
            residuals(141),
            torch.cat([residuals(3), residuals(19)])[3:],
            None,
            residuals(5, 6).t(),
        ]
        plain = torch.linspace(-1, 1, 9)
        fk.seed_axpy_(
            [*tensors, matrix, plain],
            *terms,
            residuals=[*all_residuals, None],
            streams=[1, 2, 3, 4, 5],
            offsets=[2**35 - 64, 8, 0, 0, 0],
            alpha=0.999 if num_terms else 1.0,
            family=family,
        )
        return [*tensors, matrix, plain, *(x for x in all_residuals if x is not None)]

    compare(call)


@pytest.mark.few
@all_families
@all_dtypes
@pytest.mark.parametrize(
    ("num_terms", "rounding"), [(0, "stochastic"), (1, "nearest"), (1, "stochastic"), (3, "stochastic")]
)
def test_out_of_place(num_terms: int, rounding: str, dtype: str, family: str) -> None:
    """Residuals are read: both sides, one side in other memory than the weights, and gathered rows."""
    chosen: dict[str, Any] = {"rounding": rounding, "family": family}
    if rounding == "stochastic":
        chosen["rounding_seed"] = 2**64 - 9

    def call() -> list[Tensor]:
        tensor, residual = tensor_of(weights((9, 16), dtype), dtype), residuals(9, 16)
        before = residual.clone()
        outs = [poisoned((9, 16), dtype, memory) for memory in ("contiguous", "every other", "transposed")]
        some = poisoned((3, 16), dtype)
        terms = SEEDS[:num_terms], COEFFS[:num_terms]
        fk.seed_axpy_pair(tensor, *terms, out_plus=outs[0], out_minus=outs[1], residuals=residual, **chosen)
        fk.seed_axpy(tensor, *terms, out=outs[2], residuals=residual, **chosen)
        fk.seed_axpy(tensor, *terms, rows=torch.tensor([8, 0, 0]), out=some, residuals=residual, **chosen)
        assert torch.equal(residual, before)
        return [*outs, some]

    compare(call)


@all_dtypes
@pytest.mark.parametrize("coeff", [3e38, 60000.0, 2.0**-126])
def test_results_at_the_ends_of_the_range(coeff: float, dtype: str) -> None:
    """Sums that overflow the dtype, fp32 too, and subnormal ones."""

    def call() -> list[Tensor]:
        tensor, residual = tensor_of(weights(64, dtype), dtype), residuals(64)
        small = torch.zeros(64, dtype=tensor.dtype)
        its_residual = torch.zeros(64, dtype=torch.int16)
        fk.seed_axpy_([tensor, small], [7], [coeff], residuals=[residual, its_residual])
        return [tensor, small, residual, its_residual]

    compare(call)


def test_ties() -> None:
    """Values in the middle between two bf16 numbers, which stay."""

    def call() -> list[Tensor]:
        tensor, residual = (
            torch.linspace(0.01, 2, 16).bfloat16(),
            torch.full((16,), -(2**15), dtype=torch.int16),
        )
        fk.perturb_(tensor, 3, 1e-20, residuals=residual)
        return [tensor, residual]

    compare(call)


def test_a_prepared_list() -> None:
    def call() -> list[Tensor]:
        tensors = [tensor_of(weights(n, "bfloat16"), "bfloat16") for n in (40, 9)]
        residual = residuals(40)
        prepared = fk.prepare(tensors, residuals=[residual, None])
        for step in range(3):
            prepared.perturb_(step, 1e-4)
        return [*tensors, residual]

    compare(call)


@all_dtypes
def test_terms_on_the_device(dtype: str) -> None:
    """Terms of which none is kept change nothing; others are as from the host, NaN and infinities skipped."""
    from fedkseed_kernels.backends.triton import launch

    bad = [float("nan"), 0.0, float("inf")]
    for coeffs in (bad, [*bad, 0.25]):
        tensor, residual = tensor_of(weights(70, dtype), dtype), residuals(70)
        want, want_residual = tensor.clone(), residual.clone()
        num_skipped = torch.zeros(1, dtype=torch.int32)
        seeds = torch.tensor([1, 2, 3, 4][: len(coeffs)])
        terms = DeviceTerms(
            seeds,
            torch.tensor(coeffs, dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
            "gaussian",
            "nearest",
            0,
            num_skipped,
        )
        launch.seed_axpy(check_operands([tensor], None, None, None, [3], [0], [], [residual]), terms)
        assert num_skipped.tolist() == [2]
        if len(coeffs) == 4:
            with dispatch.backend("reference"):
                fk.seed_axpy_([want], [4], [0.25], residuals=[want_residual], streams=[3])
            assert_same(tensor, want)
        else:
            assert stored_of(tensor).tobytes() == stored_of(want).tobytes()
        assert torch.equal(residual, want_residual)


DAMAGES = {
    "residuals are not written": (
        "sums.py",
        "            tl.store(residual, new_residual, mask=mask)\n",
        "",
    ),
    "ties to even": ("compensated.py", "(bits + 0x8000) >> 16", "(bits + 0x7FFF) >> 16"),
    "residuals of NaN": ("compensated.py", "tl.where(y == y,", "tl.where(True,"),
    "values of negative residuals": (
        "compensated.py",
        "residual.to(tl.int32)",
        "residual.to(tl.uint16).to(tl.int32)",
    ),
    "subnormals": ("compensated.py", "(127 - 14) << 23", "(127 - 15) << 23"),
    "residuals' strides": (
        "kernels.py",
        "residual + source_at[:, None] + position * source_stride",
        "residual + position",
    ),
    "addresses of residuals": ("tables.py", "residual.data_ptr(),", "residual.data_ptr() + 2,"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_seen(what: str, tmp_path: Path) -> None:
    """Each of these changes of a Triton file turns one of the checks above red."""
    source = damaged(tmp_path, *DAMAGES[what])

    def all_of_them() -> None:
        for dtype in reference.COMPENSATED_DTYPES:
            test_in_place(1, dtype, "gaussian")
            test_results_at_the_ends_of_the_range(60000.0, dtype)
        test_ties()

    with interpreted(source), pytest.raises(AssertionError, match="differ"):
        all_of_them()
