"""fp32 outputs of bf16 and fp16 weights (contract section 6.1), and both sides of one term in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_compensated import inputs, like

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.conformance import __main__ as conformance
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import Target, poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import reference

TARGETS, _ = conformance.find_targets()
all_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", reference.COMPENSATED_DTYPES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)
compensated = pytest.mark.parametrize("is_compensated", [False, True], ids=["plain", "compensated"])
SEEDS, COEFFS = [1, -2, 2**63, 77, 5], [1e-2, -3e-3, 0.0, 0.25, 1e-4]
ONE, NONE = ([9], [1e-3]), ([9], [0.0])


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_fp32(got: torch.Tensor, want: NDArray[Any]) -> None:
    assert got.dtype == torch.float32
    assert want.dtype == np.float32
    same = golden.same_value(stored_of(got).reshape(-1), np.ascontiguousarray(want).reshape(-1), "float32")
    assert same.all(), f"{(~same).sum()} of {same.size} differ, first {int(np.argmin(same))}"


@pytest.mark.few
@all_families
@all_dtypes
@compensated
@all_targets
@pytest.mark.parametrize("count", [1, 129, 4999])
@pytest.mark.parametrize(
    ("terms", "alpha"), [((SEEDS, COEFFS), 0.999), (ONE, 1.0), (ONE, -0.5), (NONE, 1.0), (([], []), 3.0)]
)
def test_sizes(
    target: Target, dtype: str, family: str, is_compensated: bool, count: int, terms: Any, alpha: float
) -> None:
    first = 2**35 - 1003
    weights, residuals = inputs(count, dtype)
    its_residuals = residuals if is_compensated else None
    elements = np.uint64(first) + np.arange(count, dtype=np.uint64)
    options: dict[str, Any] = {"alpha": alpha, "family": family}
    sides = reference.seed_axpy_pair_array(
        weights, elements, *terms, dtype=dtype, stream=3, residuals=its_residuals, wide=True, **options
    )
    tensor = tensor_of(weights, dtype)
    outs = [poisoned((count,), "float32") for _ in range(3)]
    options |= {"streams": [3], "offsets": [first]}
    options["residuals"] = None if its_residuals is None else [torch.from_numpy(its_residuals.copy())]
    with target.forced():
        fk.seed_axpy([tensor], *terms, out=outs[:1], **options)
        fk.seed_axpy_pair([tensor], *terms, out_plus=outs[1:2], out_minus=outs[2:], **options)
    for out, side in zip(outs, (sides[0], *sides), strict=True):
        assert_fp32(out, side)
    assert stored_of(tensor).tobytes() == weights.tobytes()


@all_families
@all_dtypes
@compensated
def test_rounded_they_are_the_results_of_16_bits(dtype: str, family: str, is_compensated: bool) -> None:
    weights, residuals = inputs(5000, dtype)
    options: dict[str, Any] = {"dtype": dtype, "family": family, "alpha": 0.75}
    options["residuals"] = residuals if is_compensated else None
    wide = reference.seed_axpy_array(weights, np.arange(5000), SEEDS, COEFFS, wide=True, **options)
    narrow = reference.seed_axpy_array(weights, np.arange(5000), SEEDS, COEFFS, **options)
    np.testing.assert_array_equal(reference.round_to_nearest(wide, dtype), narrow)


@all_dtypes
@compensated
@all_targets
@pytest.mark.parametrize("memory", ["transposed", "every other"])
def test_strides_views_and_a_rounding_without_effect(
    target: Target, dtype: str, memory: str, is_compensated: bool
) -> None:
    weights, residuals = inputs((13, 129), dtype)
    elements = reference.view_elements((13, 129), (50, 140), (7, 5))
    tensor = tensor_of(weights, dtype, memory)
    its_residuals = residuals if is_compensated else None
    sides = reference.seed_axpy_pair_array(
        weights, elements, *ONE, dtype=dtype, stream=3, residuals=its_residuals, wide=True
    )
    for out_memory in ("contiguous", "transposed", "every other"):
        outs = [poisoned((13, 129), "float32", out_memory) for _ in range(2)]
        with target.forced():
            fk.seed_axpy_pair(
                [tensor],
                *ONE,
                out_plus=outs[:1],
                out_minus=outs[1:],
                streams=[3],
                views=[((50, 140), (7, 5))],
                residuals=None if its_residuals is None else [like(its_residuals, tensor)],
                rounding="stochastic",
                rounding_seed=4,
            )
        for out, side in zip(outs, sides, strict=True):
            assert_fp32(out, side)


@all_families
@pytest.mark.parametrize("target", [target for target in TARGETS if target.isa], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads_and_mixed_lists(target: Target, family: str, num_threads: int) -> None:
    """Outputs of 16 and 32 bits in one list shared between threads; one side may overwrite its input."""
    torch.set_num_threads(num_threads)
    kinds = ["bfloat16", "float32", "float16", "bfloat16", "float64", "float16"]
    wide = [True, False, False, False, False, True]
    sizes = [70_001, 40_009, 50_003, 33_333, 3, 9_000]
    stored: list[NDArray[Any]] = [
        inputs(size, dtype, position)[0]
        if dtype in reference.COMPENSATED_DTYPES
        else np.linspace(-1, 1, size).astype(dtype)
        for position, (dtype, size) in enumerate(zip(kinds, sizes, strict=True))
    ]
    tensors = [tensor_of(w, dtype) for w, dtype in zip(stored, kinds, strict=True)]
    plus, minus = (
        [
            poisoned((size,), "float32" if w else dtype)
            for size, w, dtype in zip(sizes, wide, kinds, strict=True)
        ]
        for _ in range(2)
    )
    plus[1], minus[2], plus[3] = tensors[1], tensors[2], tensors[3]
    with target.forced():
        fk.seed_axpy_pair(tensors, *ONE, family=family, out_plus=plus, out_minus=minus)
    for stream, (dtype, w) in enumerate(zip(kinds, stored, strict=True)):
        options: dict[str, Any] = {"dtype": dtype, "stream": stream, "family": family, "wide": wide[stream]}
        sides = reference.seed_axpy_pair_array(w, np.arange(w.size), *ONE, **options)
        for got, want in zip((plus[stream], minus[stream]), sides, strict=True):
            kind = "float32" if wide[stream] else dtype
            same = golden.same_value(stored_of(got), want, kind)
            assert same.all(), f"{dtype}, stream {stream}: {(~same).sum()} differ"


@all_dtypes
@compensated
def test_backends_that_write_what_they_read(
    monkeypatch: pytest.MonkeyPatch, dtype: str, is_compensated: bool
) -> None:
    """The weight is widened first, then perturbed where it went: the same bits."""
    if native_cpu.unavailable() is not None:
        pytest.skip("needs the native library")
    weights, residuals = inputs((700, 300), dtype)
    tensors = [tensor_of(weights, dtype, memory) for memory in ("contiguous", "transposed")]
    tensors.append(torch.linspace(-1, 1, 5))
    its_residuals = [like(residuals, tensor) for tensor in tensors[:2]] if is_compensated else [None, None]

    def both_sides() -> list[torch.Tensor]:
        outs = [[poisoned((700, 300), "float32"), poisoned((700, 300), dtype)] for _ in range(2)]
        outs[1][1] = poisoned((700, 300), dtype, "transposed")
        for side in outs:
            side.append(poisoned((5,), "float32"))
        with dispatch.backend("native"):
            fk.seed_axpy_pair(
                tensors, *ONE, out_plus=outs[0], out_minus=outs[1], residuals=[*its_residuals, None]
            )
            wide = poisoned((700, 300), "float32", "every other")
            fk.seed_axpy(tensors[1], SEEDS, COEFFS, alpha=0.5, residuals=its_residuals[1:], out=wide)
        return [*outs[0], *outs[1], wide]

    expected = both_sides()
    calls = []
    monkeypatch.setattr(native_cpu, "WRITES_FP32", False)
    monkeypatch.setattr(native_cpu, "seed_axpy", _watched(native_cpu, calls))
    for got, want in zip(both_sides(), expected, strict=True):
        kind = str(got.dtype).removeprefix("torch.")
        assert golden.same_value(stored_of(got), stored_of(want), kind).all()
    assert calls == [True, True]


def _watched(backend: ModuleType, calls: list[bool]) -> Any:
    original = backend.seed_axpy

    def seed_axpy(operands: Any, terms: Any, **options: Any) -> None:
        calls.append(operands.inputs.dtypes == operands.outs.dtypes)
        original(operands, terms, **options)

    return seed_axpy
