"""Prepared handles: the bits of the functions, whatever was prepared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.op_calls import COEFFS, DTYPES, SEEDS, assert_same_bits, each_backend, poisoned, random_tensor

import fedkseed_kernels as fk

pytestmark = pytest.mark.usefixtures(each_backend.__name__)


def test_prepared_is_the_function() -> None:
    shapes = [(3, 5), (0,), (7,), ()]
    for dtype in DTYPES:
        weights = [random_tensor(s, dtype, i) for i, s in enumerate(shapes)]
        twins = [w.clone() for w in weights]
        views = [((9, 9), (1, 2)), None, None, None]
        layout: dict[str, Any] = {
            "streams": [4, 3, 2, 1],
            "offsets": [None, None, 5, None],
            "views": views,
            "family": "rademacher",
        }
        prepared = fk.prepare(weights, **layout)
        for step in range(3):
            prepared.perturb_(step, 0.25, rounding="stochastic", rounding_seed=step)
            prepared.seed_axpy_(SEEDS, COEFFS, alpha=0.5)
            fk.perturb_(twins, step, 0.25, rounding="stochastic", rounding_seed=step, **layout)
            fk.seed_axpy_(twins, SEEDS, COEFFS, alpha=0.5, **layout)
        for got, want in zip(weights, twins, strict=True):
            assert_same_bits(got, want)
        assert weights[0]._version == twins[0]._version == 6


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("wide", [False, True])
def test_prepared_outputs_are_those_of_the_functions(wide: bool, family: str) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    weights = [random_tensor((3, 131), dtype, i) for i, dtype in enumerate(dtypes)]
    residuals = [
        torch.full(w.shape, 7, dtype=torch.int16) if w.dtype.itemsize == 2 else None for w in weights
    ]
    kept = [w.clone() for w in weights]
    layout: dict[str, Any] = {"streams": [4, 3, 2, 1], "offsets": [None, 5, 8, 0], "residuals": residuals}
    layout["family"] = family
    wides = [torch.float32 if wide and dtype.itemsize == 2 else dtype for dtype in dtypes]
    out, plus, minus = (
        [torch.full(w.shape, float("nan"), dtype=dtype) for w, dtype in zip(weights, wides, strict=True)]
        for _ in range(3)
    )
    one = fk.prepare_out(weights, out, **layout)
    both = fk.prepare_pair(weights, plus, minus, **layout)
    for step in range(2):
        options: dict[str, Any] = {"alpha": 0.5, "rounding": "stochastic", "rounding_seed": step}
        one.seed_axpy([step, 9], [0.25, 0.125], **options)
        both.seed_axpy_pair([step], [0.25], **options)
        expected = fk.seed_axpy(
            weights,
            [step, 9],
            [0.25, 0.125],
            out=[torch.full_like(o, float("nan")) for o in out],
            **options,
            **layout,
        )
        twins = [[torch.full_like(o, float("nan")) for o in side] for side in (plus, minus)]
        fk.seed_axpy_pair(weights, [step], [0.25], out_plus=twins[0], out_minus=twins[1], **options, **layout)
        for got, want in zip([*out, *plus, *minus], [*expected, *twins[0], *twins[1]], strict=True):
            assert_same_bits(got, want)
    for weight, before in zip(weights, kept, strict=True):
        assert_same_bits(weight, before)
    assert [o._version for o in out] == [2] * 4


def test_one_method_runs_whatever_was_prepared() -> None:
    weight = torch.ones(9)
    out, plus, minus = (poisoned(weight) for _ in range(3))
    in_place, one, both = (
        fk.prepare(weight),
        fk.prepare_out(weight, out),
        fk.prepare_pair(weight, plus, minus),
    )
    for handle in (one, both, in_place):
        handle.seed_axpy([3], [0.5])
    for got, coeff in ((out, 0.5), (plus, 0.5), (minus, -0.5), (weight, 0.5)):
        assert_same_bits(got, fk.seed_axpy(torch.ones(9), [3], [coeff])[0])


def test_a_method_of_another_kind_of_handle_writes_nothing() -> None:
    weight, out, other = (torch.ones(9) for _ in range(3))
    in_place, one, both = fk.prepare(weight), fk.prepare_out(weight, out), fk.prepare_pair(weight, out, other)
    for handle, maker in ((one, "prepare_out"), (both, "prepare_pair")):
        with pytest.raises(
            TypeError,
            match=f"expected a handle of prepare, got one of {maker}, whose seed_axpy writes the outputs",
        ):
            handle.seed_axpy_([3], [0.5])
        with pytest.raises(TypeError, match=f"expected a handle of prepare, got one of {maker}"):
            handle.perturb_(3, 0.5)
    for handle, maker in ((one, "prepare_out"), (in_place, "prepare")):
        with pytest.raises(TypeError, match=f"expected a handle of prepare_pair, got one of {maker}, whose "):
            handle.seed_axpy_pair([3], [0.5])
    for tensor in (weight, out, other):
        assert torch.equal(tensor, torch.ones(9))
