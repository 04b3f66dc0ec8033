"""Bad arguments: each gives a clear error, and no byte of any tensor has changed afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.unchanged import ALL, OUT_OF_PLACE, Watch, call, pair_of_tensors
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch

# --- tensors


@pytest.mark.parametrize("name", ALL)
def test_mixed_devices(name: str) -> None:
    a = torch.ones(4)
    with Watch(ValueError, r"tensors\[0\] on cpu and tensors\[1\] on meta", a):
        call(name, [a, torch.ones(4, device="meta")])


def test_device_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no backend can serve cuda tensors: .*triton"):
        fk.normal(4, 1, device="cuda")
    with pytest.raises(RuntimeError, match="expected tensors on one of cpu, cuda, got xpu"):
        dispatch.select("xpu")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_dtypes_that_the_contract_does_not_cover(name: str, dtype: torch.dtype) -> None:
    good = torch.ones(4)
    bad = torch.zeros(4, dtype=dtype)
    with Watch(
        TypeError, r"expected tensors\[1\] in one of float32, bfloat16, float16, float64, got", good, bad
    ):
        call(name, [good, bad])
    with pytest.raises(TypeError, match="expected the noise in one of float32"):
        fk.normal(4, 1, dtype=dtype)


@pytest.mark.parametrize("name", ALL)
def test_sparse_tensor(name: str) -> None:
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        call(name, torch.eye(3).to_sparse())


@pytest.mark.parametrize("name", ALL)
def test_tensor_without_memory(name: str) -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    good = torch.ones(3)
    with Watch(ValueError, r"expected tensors with memory, got tensors\[1\] without", good):
        call(name, [good, freed])


@pytest.mark.parametrize("name", ALL)
def test_negative_bit(name: str) -> None:
    negated = torch.ones(4, dtype=torch.complex64).conj().imag
    if name in OUT_OF_PLACE:  # torch materialises inputs that are only read
        call(name, negated)
        return
    with Watch((RuntimeError, ValueError), "negati", negated):
        call(name, negated)


@pytest.mark.parametrize("tensors", [(t for t in pair_of_tensors()), {"a": torch.ones(2)}, None, 3.0])
def test_not_a_list_of_tensors(tensors: Any) -> None:
    with pytest.raises(TypeError, match="expected tensors as a tensor or a list or tuple of tensors, got"):
        fk.perturb_(tensors, 1, 0.5)


def test_a_list_with_something_else_in_it() -> None:
    good = torch.ones(3)
    with Watch(TypeError, r"expected tensors\[1\] to be a tensor, got ndarray", good):
        fk.perturb_([good, np.ones(3)], 1, 0.5)  # type: ignore[list-item]


@pytest.mark.parametrize("name", ALL)
def test_tensor_that_requires_grad(name: str) -> None:
    leaf = torch.ones(4, requires_grad=True)
    good = torch.ones(3)
    for bad in (leaf, torch.nn.Parameter(torch.ones(2)), leaf * 2):
        with Watch(
            RuntimeError,
            r"got tensors\[1\] that requires grad; wrap the call in torch.no_grad\(\)",
            good,
            bad,
        ):
            call(name, [good, bad])
    with torch.no_grad():
        call(name, [good, leaf])


def test_output_that_requires_grad() -> None:
    tensor, out = torch.ones(4), torch.ones(4, requires_grad=True)
    with Watch(RuntimeError, r"got out\[0\] that requires grad", tensor, out):
        fk.seed_axpy(tensor, [1], [0.5], out=out)


@pytest.mark.parametrize("name", ALL)
def test_more_dimensions_than_the_table_has(name: str) -> None:
    wide = torch.zeros((2,) * 17 + (2,))[..., 0].permute(*reversed(range(17)))
    assert wide.dim() == 17
    with Watch(ValueError, "at most 16 dimensions that cannot be merged, got 17", wide):
        call(name, wide)


# --- terms


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("seeds", "coeffs"), [([1, 2], [0.5]), ([], [0.5]), ([1], [])])
def test_unequal_length(name: str, seeds: list[int], coeffs: list[float]) -> None:
    tensors = pair_of_tensors()
    message = f"expected one coefficient for each seed, got {len(seeds)} seeds and {len(coeffs)} coefficients"
    with Watch(ValueError, message, *tensors):
        call(name, tensors, seeds, coeffs)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.5e38, -1e300])
def test_coefficients_that_are_not_finite(name: str, value: float) -> None:
    tensors = [torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.bfloat16)]
    for coeffs in ([0.5, value], torch.tensor([0.5, value], dtype=torch.float64)):
        with Watch(ValueError, r"coefficients that are finite in fp32, got .* at index 1", *tensors):
            call(name, tensors, [1, 2], coeffs)
    if not math.isfinite(value):
        with Watch(ValueError, "coefficients that are finite, got", tensors[0]):
            call(name, tensors[:1], [1, 2], [0.5, value])


def test_the_largest_coefficient() -> None:
    largest = float(np.nextafter(float.fromhex("0x1.ffffffp+127"), 0))
    assert np.isfinite(np.float32(largest))
    tensor = torch.zeros(3)
    fk.perturb_(tensor, 1, largest)
    with Watch(ValueError, "finite in fp32", tensor):
        fk.perturb_(tensor, 1, float.fromhex("0x1.ffffffp+127"))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("alpha", [math.nan, math.inf, -3.5e38])
def test_alpha_that_is_not_finite(name: str, alpha: float) -> None:
    tensors = pair_of_tensors()
    for value in (alpha, torch.tensor(alpha, dtype=torch.float64)):
        with Watch(ValueError, "expected alpha to be finite in fp32, got", *tensors):
            call(name, tensors, alpha=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "normal"}, "expected family to be one of gaussian, rademacher, got 'normal'"),
        ({"rounding": "up"}, "expected rounding to be one of nearest, stochastic, got 'up'"),
        ({"rounding": "stochastic"}, "expected a rounding_seed for rounding='stochastic', got None"),
        ({"rounding_seed": 3}, "expected no rounding_seed for rounding='nearest', got one"),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_unknown_or_contradicting_choices(name: str, options: dict[str, Any], message: str) -> None:
    tensors = pair_of_tensors()
    with Watch(ValueError, message, *tensors):
        call(name, tensors, **options)


def test_unknown_family_of_normal() -> None:
    with pytest.raises(ValueError, match="expected family to be one of gaussian, rademacher, got 'uniform'"):
        fk.normal(3, 1, family="uniform")


@pytest.mark.parametrize(
    ("seeds", "coeffs", "message"),
    [
        (3, [0.5], "expected a sequence of seeds, got int"),
        ([1.5], [0.5], "float"),
        (["a"], [0.5], "str"),
        (torch.tensor([1.0]), [0.5], "expected seeds as an int64 tensor"),
        (torch.tensor([1], dtype=torch.int32), [0.5], "expected seeds as an int64 tensor"),
        (np.array([1.0]), [0.5], "expected seeds as an integer array"),
        ([1], 0.5, "expected a sequence of coefficients, got float"),
        ([1], torch.tensor([1]), "expected coeffs as a floating-point tensor"),
        ([1], torch.tensor([1j]), "expected coeffs as a floating-point tensor"),
        ([1], np.array([1]), "expected coeffs as a floating-point array"),
        ([1], [1j], "complex"),
    ],
)
def test_terms_of_wrong_types(seeds: Any, coeffs: Any, message: str) -> None:
    tensors = pair_of_tensors()
    with Watch(TypeError, message, *tensors):
        call("seed_axpy_", tensors, seeds, coeffs)


@pytest.mark.parametrize(
    ("seeds", "coeffs"),
    [(torch.tensor([[1]]), [0.5]), (torch.tensor(1), [0.5]), ([1], torch.tensor([[0.5]]))],
)
def test_terms_of_wrong_shapes(seeds: Any, coeffs: Any) -> None:
    tensors = pair_of_tensors()
    with Watch(ValueError, r"expected (seeds int64|coeffs fp64) \[num_terms\]", *tensors):
        call("seed_axpy_", tensors, seeds, coeffs)


@pytest.mark.parametrize("alpha", [torch.tensor([1.0, 2.0]), torch.tensor(1), torch.tensor(1j)])
def test_alpha_tensor_of_wrong_kind(alpha: Tensor) -> None:
    tensors = pair_of_tensors()
    with Watch(TypeError, "expected alpha as a number or a floating-point tensor of one element", *tensors):
        call("seed_axpy_", tensors, alpha=alpha)


@pytest.mark.parametrize("which", ["seeds", "coeffs", "alpha", "rounding_seed"])
@pytest.mark.parametrize("name", ALL)
def test_terms_without_memory(name: str, which: str) -> None:
    tensors = pair_of_tensors()
    terms: dict[str, Any] = {
        "seeds": torch.tensor([1]),
        "coeffs": torch.tensor([0.5]),
        "alpha": torch.tensor(1.0),
        "rounding": "stochastic",
        "rounding_seed": torch.tensor(3),
    }
    terms[which] = terms[which].to("meta")
    with Watch(ValueError, f"expected {which} on the cpu, got meta", *tensors):
        call(name, tensors, **terms)


def test_seed_of_normal_without_memory() -> None:
    with pytest.raises(ValueError, match="expected seed on the cpu, got meta"):
        fk.normal(3, torch.tensor(1, device="meta"))


def test_a_seed_that_is_not_one() -> None:
    tensors = pair_of_tensors()
    with Watch(ValueError, "expected one seed, got a tensor of shape", *tensors):
        fk.perturb_(tensors, torch.tensor([1, 2]), 0.5)
    with Watch(TypeError, "float", *tensors):
        fk.perturb_(tensors, 1.5, 0.5)


# --- streams, offsets, views


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": [1]}, "expected 2 streams, one for each tensor, got 1"),
        ({"streams": []}, "expected 2 streams, one for each tensor, got 0"),
        ({"streams": [0, 2**32]}, r"expected streams in \[0, 2\^32\), got 4294967296 for tensors\[1\]"),
        ({"streams": [0, -1]}, "expected streams in .* got -1"),
        ({"streams": [0, 2**70]}, "expected streams in"),
        ({"offsets": [0]}, "expected 2 offsets, one for each tensor, got 1"),
        ({"offsets": [-1, None]}, "expected offsets in .* got -1 at position 0"),
        ({"offsets": [None, 2**63]}, "expected offsets in"),
        (
            {"offsets": [0, 2**63 - 5]},
            r"expected element indices in \[0, 2\^63\), got offset .* 6 elements of tensors\[1\]",
        ),
        ({"views": [None]}, "expected 2 views, one .* for each tensor, got 1"),
        ({"views": [((3,), (0,)), None]}, r"expected a view that holds tensors\[0\] of shape \(3, 4\)"),
        ({"views": [((3, 4), (0, 1)), None]}, r"start \+ size within the full shape"),
        ({"views": [((3, 4), (-1, 0)), None]}, "expected a view that holds"),
        ({"views": [((2, 4), (0, 0)), None]}, "expected a view that holds"),
        ({"views": [((3, 4), (0,)), None]}, r"expected views\[0\] as \(full_shape, start\)"),
        ({"views": [None, ((2**62, 4), (0, 0))]}, "expected a view that holds"),
        ({"views": [((2**62, 4), (0, 0)), None]}, r"expected at most 2\^63 elements in a full shape"),
        (
            {"views": [((3, 4), (0, 0)), None], "offsets": [0, None]},
            r"a view or an offset, got both for tensors\[0\]",
        ),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_streams_offsets_and_views_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    tensors = pair_of_tensors()
    with Watch(ValueError, message, *tensors):
        call(name, tensors, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": -1}, "expected stream"),
        ({"stream": 2**32}, "expected streams in"),
        ({"offset": -1}, "expected offset"),
        ({"offset": 2**63 - 3}, r"expected element indices in \[0, 2\^63\)"),
    ],
)
def test_indices_of_normal(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fk.normal(4, 1, **options)


def test_negative_shape_of_normal() -> None:
    with pytest.raises(ValueError, match="expected a shape of non-negative sizes"):
        fk.normal((3, -1), 1)


# --- outputs and rows


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: [torch.ones(3, 4)], ValueError, "to hold 2 tensors, one for each input, got 1"),
        (lambda: [torch.ones(4, 3), torch.ones(6)], ValueError, r"\[0\] of shape \(3, 4\), got \(4, 3\)"),
        (lambda: [torch.ones(3, 4), torch.ones(7)], ValueError, r"\[1\] of shape \(6,\), got \(7,\)"),
        (
            lambda: [torch.ones(3, 4), torch.ones(6).double()],
            TypeError,
            r"\[1\] in torch.float32 like its input",
        ),
        (lambda: [torch.ones(3, 4), torch.ones(6).int()], TypeError, r"\[1\] in one of float32"),
        (lambda: [torch.ones(3, 1).expand(3, 4), torch.ones(6)], ValueError, "elements that share memory"),
        (lambda: [(m := torch.ones(17))[:12].view(3, 4), m[11:]], ValueError, "do not overlap"),
    ],
)
@pytest.mark.parametrize("side", ["out", "out_plus", "out_minus"])
def test_outputs_that_do_not_fit(
    side: str, make: Callable[[], list[Tensor]], error: type[Exception], message: str
) -> None:
    tensors, outs = pair_of_tensors(), make()
    with Watch(error, message, *tensors, *outs):
        call("seed_axpy" if side == "out" else "seed_axpy_pair", tensors, **{side: outs})


def test_wide_outputs_that_do_not_fit() -> None:
    """Outputs in fp32 are of bf16 and fp16 tensors, for both sides, in memory of their own, without rows."""
    tensor, half = torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.float16)
    wide, memory = torch.ones(3, 4), torch.ones(12)
    first, over = memory.view(torch.bfloat16)[:12].view(3, 4), memory.view(3, 4)
    rows = torch.tensor([0, 2, 1])
    cases: list[tuple[str, Tensor, dict[str, Any], type[Exception], str]] = [
        ("seed_axpy", tensor, {"out": half}, TypeError, "bfloat16 like its input or torch.float32, got .*16"),
        ("seed_axpy", wide, {"out": wide.bfloat16()}, TypeError, "torch.float32 like its input, got"),
        ("seed_axpy", wide.double(), {"out": wide}, TypeError, "torch.float64 like its input, got"),
        ("seed_axpy", tensor, {"out": wide, "rows": rows}, TypeError, "bfloat16 like its input, got .*32"),
        ("seed_axpy", first, {"out": over}, ValueError, r"tensors\[0\] and out\[0\] share memory"),
        (
            "seed_axpy_pair",
            tensor,
            {"out_plus": wide},
            TypeError,
            r"out_minus\[0\] in torch.float32 like out_p",
        ),
        ("seed_axpy_pair", tensor, {"out_minus": wide}, TypeError, r"out_minus\[0\] in torch.bfloat16 like"),
        ("seed_axpy_pair", tensor, {"out_plus": wide, "out_minus": wide}, ValueError, "in the same memory"),
    ]
    for name, given, options, error, message in cases:
        with Watch(error, message, tensor, half, wide, memory):
            call(name, given, **options)


def test_outputs_on_another_device() -> None:
    tensors = pair_of_tensors()
    with Watch(ValueError, "expected out on cpu like the inputs, got meta", *tensors):
        call("seed_axpy", tensors, out=[torch.empty_like(t, device="meta") for t in tensors])


@pytest.mark.parametrize("name", OUT_OF_PLACE)
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([0, 3]), IndexError, r"expected rows in \[0, 3\), got rows from 0 to 3"),
        (torch.tensor([-1]), IndexError, r"expected rows in \[0, 3\), got rows from -1 to -1"),
        (torch.tensor([[0]]), ValueError, "expected rows of shape"),
        (torch.tensor(0), ValueError, "expected rows of shape"),
        (torch.tensor([0], dtype=torch.int32), TypeError, "expected rows in int64"),
        (torch.tensor([0.0]), TypeError, "expected rows in int64"),
        (torch.tensor([0], device="meta"), ValueError, "expected rows on cpu like the tensors, got meta"),
        ([0, 1], TypeError, "expected rows as an int64 tensor, got list"),
    ],
)
def test_rows_that_do_not_fit(name: str, rows: Any, error: type[Exception], message: str) -> None:
    tensors = [torch.ones(3, 4), torch.ones(3)]
    with Watch(error, message, *tensors):
        call(name, tensors, rows=rows)


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_tensors_that_rows_cannot_index(name: str) -> None:
    rows = torch.tensor([0])
    with pytest.raises(ValueError, match=r"got 3 in tensors\[0\] and 2 in tensors\[1\]"):
        call(name, [torch.ones(3, 4), torch.ones(2)], rows=rows)
    with pytest.raises(ValueError, match=r"got tensors\[1\] without dimensions"):
        call(name, [torch.ones(3, 4), torch.ones(())], rows=rows)


def test_rows_do_not_go_in_place() -> None:
    tensor = torch.ones(3, 4)
    with Watch(ValueError, "do not overlap", tensor):
        fk.seed_axpy(tensor, [1], [0.5], rows=torch.tensor([2, 1, 0]), out=tensor)


# --- the ops called directly make the same checks; prepared handles notice what changed


def test_direct_calls_are_checked() -> None:
    tensor = torch.ones(4)
    one = torch.tensor(1.0, dtype=torch.float64)
    good: dict[str, Any] = {
        "seeds": torch.tensor([1]),
        "coeffs": torch.tensor([0.5], dtype=torch.float64),
        "alpha": one,
        "streams": [],
        "offsets": [],
        "views": [],
        "family": "gaussian",
        "rounding": "nearest",
        "rounding_seed": None,
    }
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"coeffs": torch.tensor([math.nan], dtype=torch.float64)}, ValueError, "finite"),
        ({"coeffs": torch.tensor([0.5])}, ValueError, "expected coeffs fp64"),
        ({"seeds": torch.tensor([1.0])}, ValueError, "expected seeds int64"),
        ({"seeds": torch.tensor([1, 2])}, ValueError, "expected one coefficient for each seed"),
        ({"alpha": one.reshape(1)}, ValueError, "expected alpha fp64 of shape"),
        ({"alpha": one * math.inf}, ValueError, "expected alpha to be finite"),
        ({"streams": [2**32]}, ValueError, "expected streams in"),
        ({"streams": [1, 2]}, ValueError, "expected 1 streams"),
        ({"offsets": [-1]}, ValueError, "expected element indices in"),
        ({"views": [1, 4, 1]}, ValueError, "expected a view that holds"),
        ({"views": [1, 4]}, ValueError, "expected one view"),
        ({"views": [-1, -1]}, ValueError, "expected one view or None for each of 1 tensors"),
        ({"views": [2, 4]}, ValueError, "expected one view"),
        ({"views": [1, 9, 2], "offsets": [3]}, ValueError, "a view or an offset, got both"),
        ({"family": "x"}, ValueError, "expected family"),
        ({"rounding": "x"}, ValueError, "expected rounding"),
        ({"rounding": "stochastic"}, ValueError, "expected a rounding_seed"),
        (
            {"rounding": "stochastic", "rounding_seed": torch.tensor([1])},
            ValueError,
            "expected rounding_seed int64",
        ),
    ]
    for change, error, message in bad:
        with Watch(error, message, tensor):
            torch.ops.fedkseed.seed_axpy_(tensors=[tensor], residuals=[], **(good | change))
    with Watch(ValueError, "do not overlap", tensor):
        torch.ops.fedkseed.seed_axpy_(tensors=[tensor, tensor[:2]], residuals=[], **good)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.set_(torch.ones(3, 4)), "address"),
        (lambda t: t.resize_(0), "shape"),
        (lambda t: t.t_(), "shape"),
        (lambda t: setattr(t, "data", t.data.view(4, 3)), "shape"),
        (lambda t: setattr(t, "data", t.data.as_strided((3, 4), (1, 3))), "strides"),
        (lambda t: setattr(t, "data", t.data.view(torch.int32)), "dtype"),
        (lambda t: t.untyped_storage().resize_(0), "address"),
    ],
)
def test_prepared_tensors_that_changed(change: Callable[[Tensor], Any], what: str) -> None:
    good, tensor = torch.ones(5), torch.ones(3, 4)
    prepared = fk.prepare([good, tensor])
    prepared.perturb_(1, 0.5)
    keep = tensor.data  # so that the old memory is not handed out again
    change(tensor)
    pattern = (
        rf"expected tensors\[1\] as it was prepared, but its ({what}|address) changed .*; call prepare again"
    )
    with Watch(RuntimeError, pattern, good, keep):
        prepared.perturb_(1, 0.5)


def test_prepared_outputs_that_changed() -> None:
    tensors, plus, minus = ([torch.ones(5), torch.ones(3, 4)] for _ in range(3))
    one, both = fk.prepare_out(tensors, plus), fk.prepare_pair(tensors, plus, minus)
    keep = minus[1].data
    minus[1].data = torch.zeros(3, 4)
    with Watch(RuntimeError, r"expected out_minus\[1\] as it was prepared, .* address", *plus, *minus, keep):
        both.seed_axpy_pair([1], [0.5])
    plus[0].requires_grad_()
    with Watch(RuntimeError, r"got out\[0\] that requires grad; wrap the call in torch.no_grad", *plus):
        one.seed_axpy([1], [0.5])


def test_outputs_that_cannot_be_prepared() -> None:
    tensor = torch.ones(5)
    with Watch(TypeError, r"expected out\[0\] in torch.float32 like its input, got torch.float64", tensor):
        fk.prepare_out(tensor, torch.ones(5, dtype=torch.float64))
    with Watch(ValueError, "two outputs, got .* in the same memory", tensor):
        fk.prepare_pair(tensor, tensor, tensor)
    negative = torch.zeros(5, dtype=torch.complex64).conj().imag
    with Watch(ValueError, r"expected plain memory, got out_minus\[0\] with the negative bit", tensor):
        fk.prepare_pair(tensor, torch.ones(5), negative)
