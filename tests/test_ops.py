"""The public functions and the ops under them, on every backend that works here, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.op_calls import (
    COEFFS,
    DTYPES,
    SEEDS,
    assert_same_bits,
    bits,
    each_backend,
    poisoned,
    random_tensor,
)
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch, ops
from fedkseed_kernels.arguments.terms import TermArguments
from fedkseed_kernels.contract import reference

pytestmark = pytest.mark.usefixtures(each_backend.__name__)


def expected_axpy(
    tensor: Tensor,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    *,
    stream: int = 0,
    elements: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The reference's answer for a tensor with element indices `elements` (default: row-major from 0)."""
    if elements is None:
        elements = torch.arange(tensor.numel()).reshape(tensor.shape)
    stored = bits(tensor).numpy()
    stored = stored.view(np.uint16) if tensor.element_size() == 2 else stored
    stored = stored.view(tensor.numpy().dtype) if tensor.element_size() > 2 else stored
    dtype = str(tensor.dtype).removeprefix("torch.")
    result = reference.seed_axpy_array(
        stored, elements.numpy(), seeds, coeffs, dtype=dtype, stream=stream, **options
    )
    if tensor.element_size() == 2:
        result = result.view(np.int16)
    return torch.from_numpy(result).view(tensor.dtype)


# --- the noise itself


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_normal_is_the_references_noise(dtype: torch.dtype, family: str) -> None:
    got = fk.normal((3, 67), -5, stream=9, offset=2**33 + 3, dtype=dtype, family=family)
    name = str(dtype).removeprefix("torch.")
    stored = reference.normal_array(-5, 9, np.arange(201) + 2**33 + 3, name, family)
    expected = torch.from_numpy(stored.view(np.int16) if got.element_size() == 2 else stored)
    assert_same_bits(got, expected.view(dtype).reshape(3, 67))
    assert got.is_contiguous()


@pytest.mark.parametrize("shape", [(), (0,), (1,), 5, (2, 0, 3), (7, 1, 2)])
def test_normal_takes_any_shape(shape: int | tuple[int, ...]) -> None:
    got = fk.normal(shape, 11)
    assert got.shape == torch.empty(shape).shape
    assert_same_bits(got.reshape(-1), fk.normal(14, 11)[: got.numel()])


def test_normal_takes_a_seed_tensor_and_any_integer() -> None:
    for seed in (0, 1, -1, 2**63, 2**64 - 1):
        as_tensor = torch.tensor(seed if seed < 2**63 else seed - 2**64)
        assert_same_bits(fk.normal(9, seed), fk.normal(9, as_tensor))
    assert_same_bits(fk.normal(9, -1), fk.normal(9, 2**64 - 1))
    assert not torch.equal(fk.normal(9, 0), fk.normal(9, 1))


def test_normal_reaches_the_last_element() -> None:
    assert torch.isfinite(fk.normal(3, 1, offset=2**63 - 3)).all()


def test_normal_on_meta_has_a_shape_only() -> None:
    got = fk.normal((2, 3), 1, device="meta", dtype=torch.bfloat16)
    assert (got.shape, got.dtype, got.device.type) == ((2, 3), torch.bfloat16, "meta")


# --- the primitive, plain


@pytest.mark.few
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("num_terms", [0, 1, 5])
@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_in_place_is_the_reference(
    dtype: torch.dtype, family: str, rounding: str, num_terms: int, alpha: float
) -> None:
    weights = [
        random_tensor(shape, dtype, i) for i, shape in enumerate([(), (1,), (0, 4), (13, 11), (5, 2, 3)])
    ]
    seeds, coeffs = SEEDS[:num_terms], COEFFS[:num_terms]
    options: dict[str, Any] = {"alpha": alpha, "family": family, "rounding": rounding}
    if rounding == "stochastic":
        options["rounding_seed"] = -7
    expected = [expected_axpy(w, seeds, coeffs, stream=i, **options) for i, w in enumerate(weights)]
    fk.seed_axpy_(weights, seeds, coeffs, **options)
    for got, want in zip(weights, expected, strict=True):
        assert_same_bits(got, want)


def test_a_list_may_mix_dtypes() -> None:
    weights = [random_tensor((9,), dtype, i) for i, dtype in enumerate(DTYPES)]
    expected = [expected_axpy(w, SEEDS, COEFFS, stream=i, alpha=0.5) for i, w in enumerate(weights)]
    fk.seed_axpy_(weights, SEEDS, COEFFS, alpha=0.5)
    for got, want in zip(weights, expected, strict=True):
        assert_same_bits(got, want)


def test_perturb_is_one_term() -> None:
    weights = random_tensor((33,), torch.bfloat16)
    expected = expected_axpy(weights, [2**63 + 1], [0.125], stream=4)
    fk.perturb_(weights, 2**63 + 1, 0.125, streams=[4])
    assert_same_bits(weights, expected)


def test_nothing_to_do_leaves_every_byte() -> None:
    patterns = torch.tensor([0x7F800001, 0x7FC12345, 0x00000001, 0x80000000 - 2**32], dtype=torch.int64)
    weights = patterns.to(torch.int32).view(torch.float32)
    before = bits(weights).clone()
    fk.seed_axpy_(weights, [1, 2], [0.0, -0.0])
    fk.seed_axpy_(weights, [], [])
    copy = fk.seed_axpy(weights, [], [], out=torch.zeros(4))[0]
    assert torch.equal(bits(weights), before)
    assert torch.equal(bits(copy), before)


def test_empty_lists_and_tensors_are_no_work() -> None:
    fk.seed_axpy_([], [1], [1.0])
    fk.perturb_(torch.empty(0), 1, 1.0)
    fk.perturb_([torch.empty(0, 3), torch.empty(2, 0)], 1, 1.0)
    assert fk.seed_axpy([], [1], [1.0]) == []
    assert fk.seed_axpy_pair([], [1], [1.0]) == ([], [])
    weights = [torch.empty(0), torch.ones(3), torch.empty(0)]
    fk.perturb_(weights, 1, 1.0)
    assert_same_bits(weights[1], expected_axpy(torch.ones(3), [1], [1.0], stream=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_empty_tensors_may_be_widened(dtype: torch.dtype) -> None:
    weights = [torch.empty(2, 0, dtype=dtype), torch.ones(3, dtype=dtype)]
    outs = [torch.empty(2, 0), torch.empty(3)]
    fk.seed_axpy(weights, [1], [1.0], out=outs)
    assert_same_bits(outs[1], expected_axpy(torch.ones(3), [1], [1.0], stream=1))


@pytest.mark.parametrize(
    ("seeds", "coeffs"),
    [
        ((3, 2**64 - 5), (0.5, 2)),
        (torch.tensor([3, -5]), torch.tensor([0.5, 2.0])),
        (np.array([3, 2**64 - 5], dtype=np.uint64), np.array([0.5, 2.0], dtype=np.float32)),
        (list(np.array([3, 2**64 - 5], dtype=np.uint64)), list(np.array([0.5, 2.0]))),
        (torch.tensor([3, 0, -5])[::2], torch.tensor([0.5, 9.0, 2.0], dtype=torch.float64)[::2]),
    ],
)
def test_terms_come_in_many_forms(seeds: Any, coeffs: Any) -> None:
    weights = random_tensor((40,), torch.float32)
    expected = expected_axpy(weights, [3, -5], [0.5, 2.0], alpha=0.75, rounding="nearest")
    fk.seed_axpy_(weights, seeds, coeffs, alpha=torch.tensor(0.75))
    assert_same_bits(weights, expected)


def test_alpha_is_rounded_to_fp32_and_coefficients_are_not_for_fp64() -> None:
    weights = random_tensor((40,), torch.float64)
    fp32 = float(np.float32(0.1))
    expected = expected_axpy(weights, [3], [0.1], alpha=fp32)
    assert not torch.equal(expected, expected_axpy(weights, [3], [fp32], alpha=fp32))
    fk.seed_axpy_(weights, [3], [0.1], alpha=0.1)
    assert_same_bits(weights, expected)


def test_coefficients_too_large_for_fp32_are_right_for_fp64() -> None:
    weights = torch.zeros(9, dtype=torch.float64)
    fk.perturb_(weights, 1, 1e300)
    assert_same_bits(weights, fk.normal(9, 1, dtype=torch.float64) * 1e300)


def test_terms_inside_the_list_are_read_before_it_is_written() -> None:
    coeffs = torch.tensor([0.5, 0.25], dtype=torch.float64)
    expected = expected_axpy(coeffs, [1, 2], [0.5, 0.25])
    fk.seed_axpy_([coeffs], [1, 2], coeffs)
    assert_same_bits(coeffs, expected)


# --- out of place, pairs, rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_of_place(dtype: torch.dtype) -> None:
    weights = [random_tensor((7, 9), dtype), random_tensor((5,), dtype, 1)]
    before = [w.clone() for w in weights]
    expected = [expected_axpy(w, SEEDS, COEFFS, stream=i, alpha=0.5) for i, w in enumerate(weights)]
    fresh = fk.seed_axpy(weights, SEEDS, COEFFS, alpha=0.5)
    out = [poisoned(w) for w in weights]
    assert all(
        a is b for a, b in zip(fk.seed_axpy(weights, SEEDS, COEFFS, alpha=0.5, out=out), out, strict=True)
    )
    for f, o, e, w, b in zip(fresh, out, expected, weights, before, strict=True):
        assert_same_bits(f, e)
        assert_same_bits(o, e)
        assert_same_bits(w, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding_seed", [None, 5])
def test_pair_is_two_calls(dtype: torch.dtype, rounding_seed: int | None) -> None:
    weights = random_tensor((7, 9), dtype)
    options: dict[str, Any] = {"alpha": 0.75}
    if rounding_seed is not None:
        options |= {"rounding": "stochastic", "rounding_seed": rounding_seed}
    plus = expected_axpy(weights, SEEDS, COEFFS, **options)
    minus = expected_axpy(weights, SEEDS, [-c for c in COEFFS], **options)
    out_minus = poisoned(weights)
    got_plus, got_minus = fk.seed_axpy_pair(weights, SEEDS, COEFFS, out_minus=out_minus, **options)
    assert got_minus[0] is out_minus
    assert_same_bits(got_plus[0], plus)
    assert_same_bits(got_minus[0], minus)


@pytest.mark.parametrize("side", ["out", "out_plus", "out_minus"])
def test_an_output_may_be_its_input(side: str) -> None:
    weights = [random_tensor((30,), torch.float32), random_tensor((8, 8), torch.float32)[:, ::2]]
    coeffs = [-c for c in COEFFS] if side == "out_minus" else COEFFS
    expected = [expected_axpy(w, SEEDS, coeffs, stream=i) for i, w in enumerate(weights)]
    function = fk.seed_axpy if side == "out" else fk.seed_axpy_pair
    function(weights, SEEDS, COEFFS, **{side: weights})
    for got, want in zip(weights, expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rows_of_the_whole_result(dtype: torch.dtype) -> None:
    weights = [
        random_tensor((11, 13), dtype),
        random_tensor((11,), dtype, 1),
        random_tensor((11, 3, 2), dtype, 2),
    ]
    whole = [expected_axpy(w, SEEDS, COEFFS, stream=i) for i, w in enumerate(weights)]
    rows = torch.tensor([10, 0, 3, 3, 10])
    for got, want in zip(fk.seed_axpy(weights, SEEDS, COEFFS, rows=rows), whole, strict=True):
        assert_same_bits(got, want[rows])
    plus, minus = fk.seed_axpy_pair(weights, SEEDS, COEFFS, rows=rows[::2])
    negated = fk.seed_axpy(weights, SEEDS, [-c for c in COEFFS], rows=rows[::2])
    for got, want, mirrored, also in zip(plus, whole, minus, negated, strict=True):
        assert_same_bits(got, want[rows[::2]])
        assert_same_bits(mirrored, also)


def test_rows_of_a_strided_tensor_with_a_view() -> None:
    memory = random_tensor((6, 10), torch.bfloat16)
    weights = memory.t()[2:9]  # [7, 6]
    view = ((20, 12), (5, 6))
    elements = (torch.arange(5, 12)[:, None] * 12 + torch.arange(6, 12)[None]).contiguous()
    whole = expected_axpy(weights.contiguous(), SEEDS, COEFFS, elements=elements)
    for rows in (torch.tensor([6, 1, 1]), torch.tensor([4]), torch.tensor([], dtype=torch.int64)):
        out = torch.full((6, len(rows)), float("nan"), dtype=torch.bfloat16).t()
        fk.seed_axpy(weights, SEEDS, COEFFS, views=[view], rows=rows, out=out)
        assert_same_bits(out, whole[rows])


def test_rows_of_one_row() -> None:
    weights = random_tensor((1, 9), torch.float32)
    got = fk.seed_axpy(weights, [1], [0.5], rows=torch.tensor([0, 0]))[0]
    assert_same_bits(got, expected_axpy(weights, [1], [0.5]).expand(2, 9))


# --- streams, offsets, views, strides


@pytest.mark.parametrize("offset", [0, 1, 7, 2**31 - 3, 2**32 - 1, 2**35 + 5, 2**63 - 21])
def test_offsets(offset: int) -> None:
    weights = random_tensor((3, 7), torch.float32)
    elements = (torch.arange(21) + offset).reshape(3, 7)
    expected = expected_axpy(weights, SEEDS, COEFFS, stream=2**32 - 1, elements=elements)
    fk.seed_axpy_(weights, SEEDS, COEFFS, streams=[2**32 - 1], offsets=[offset])
    assert_same_bits(weights, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_slices_of_the_whole(dtype: torch.dtype) -> None:
    whole = random_tensor((10, 6, 5), dtype)
    shards = [whole[:4].clone(), whole[4:, 1:5].clone(), whole[:, :, 2].clone().unsqueeze(2)]
    views = [((10, 6, 5), start) for start in [(0, 0, 0), (4, 1, 0), (0, 0, 2)]]
    fk.seed_axpy_(shards, SEEDS, COEFFS, streams=[3, 3, 3], views=views)
    fk.seed_axpy_(whole, SEEDS, COEFFS, streams=[3])
    assert_same_bits(shards[0], whole[:4])
    assert_same_bits(shards[1], whole[4:, 1:5])
    assert_same_bits(shards[2], whole[:, :, 2:3])


def test_a_flat_offset_is_a_shard_too() -> None:
    whole = random_tensor((40,), torch.float32)
    shards = [whole[:13].clone(), whole[13:].clone()]
    fk.seed_axpy_(shards, SEEDS, COEFFS, streams=[0, 0], offsets=[None, 13])
    fk.seed_axpy_(whole, SEEDS, COEFFS)
    assert_same_bits(torch.cat(shards), whole)


def strided(kind: str, dtype: torch.dtype) -> Tensor:
    memory = random_tensor((12, 10, 6), dtype)
    return {
        "transposed": memory[0].t(),
        "permuted": memory.permute(2, 0, 1),
        "columns": memory[:, 3:8, 1],
        "steps": memory[::3, ::2, ::5],
        "channels_last": memory[None].contiguous(memory_format=torch.channels_last),
        "size_one": memory[:, :1, :1],
        "zero_dim": memory[3, 4, 5],
        "irregular": torch.as_strided(memory, (2, 3), (3, 2)),
    }[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    ["transposed", "permuted", "columns", "steps", "channels_last", "size_one", "zero_dim", "irregular"],
)
def test_strides_in_memory_never_matter(kind: str, dtype: torch.dtype) -> None:
    weights = strided(kind, dtype)
    base = weights._base if weights._base is not None else weights
    outside = base.clone()
    expected = expected_axpy(weights.contiguous(), SEEDS, COEFFS, alpha=0.5)
    assert_same_bits(fk.seed_axpy(weights, SEEDS, COEFFS, alpha=0.5)[0], expected)
    out = poisoned(torch.empty(*weights.shape, 2, dtype=dtype))[..., 0]
    fk.seed_axpy(weights, SEEDS, COEFFS, alpha=0.5, out=out)
    assert_same_bits(out, expected)
    fk.seed_axpy_(weights, SEEDS, COEFFS, alpha=0.5)
    assert_same_bits(weights, expected)
    # Nothing but the elements of the view has changed.
    outside.as_strided(weights.shape, weights.stride(), weights.storage_offset()).copy_(weights)
    assert_same_bits(base, outside)


def test_many_dimensions_that_merge() -> None:
    weights = random_tensor((2,) * 20, torch.bfloat16)[..., :1]
    expected = expected_axpy(weights.contiguous(), [1], [0.5])
    fk.perturb_(weights, 1, 0.5)
    assert_same_bits(weights.contiguous(), expected)


def test_interleaved_tensors_do_not_overlap() -> None:
    memory = random_tensor((9, 12), torch.float32)
    columns = [memory[:, i : i + 4] for i in (0, 4, 8)]
    expected = [expected_axpy(c.contiguous(), [1], [0.5], stream=i) for i, c in enumerate(columns)]
    fk.perturb_(columns, 1, 0.5)
    for got, want in zip(columns, expected, strict=True):
        assert_same_bits(got, want)


# --- versions, grad mode, ops


def test_version_counters_are_raised() -> None:
    weights, out, plus, minus = (torch.zeros(4) for _ in range(4))
    fk.perturb_(weights, 1, 0.1)
    fk.seed_axpy(weights, [1], [0.1], out=out)
    fk.seed_axpy_pair(weights, [1], [0.1], out_plus=plus, out_minus=minus)
    assert [t._version for t in (weights, out, plus, minus)] == [1, 1, 1, 1]


def test_a_changed_tensor_is_noticed_by_backward() -> None:
    weights = torch.ones(3, requires_grad=True)
    loss = (weights * weights).sum()
    with torch.no_grad():
        fk.perturb_(weights, 1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_under_no_grad_and_inference_mode() -> None:
    weights = torch.nn.Parameter(torch.zeros(5))
    with torch.no_grad():
        fk.perturb_([weights], 1, 0.5)
    with torch.inference_mode():
        fk.perturb_([weights], 1, -0.5)
        inside = torch.zeros(5)
        fk.perturb_(inside, 1, 0.5)
    assert torch.equal(weights, torch.zeros(5))
    assert torch.equal(inside, fk.normal(5, 1) * 0.5)


def opcheck_cases(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op of the library, by name."""

    def lists() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        make = (random_tensor((4, 6), dtype, 1), random_tensor((10, 4), dtype, 2)[::2, :3])
        return list(make), [torch.zeros_like(t) for t in make], [torch.zeros_like(t) for t in make]

    inputs, out, out_minus = lists()
    rows = torch.tensor([3, 3, 0])
    gathered = [torch.zeros(3, 6, dtype=dtype)]
    seeds, coeffs = torch.tensor([1, -2]), torch.tensor([0.5, 0.25], dtype=torch.float64)
    alpha = torch.tensor(0.75, dtype=torch.float64)
    views = [-1, 2, 20, 30, 4, 5]
    plain = (seeds, coeffs, alpha, [], [], [], "gaussian", "nearest", None)
    full = (seeds, coeffs, alpha, [5, 6], [2**40, 0], views, "rademacher", "stochastic", torch.tensor(9))
    return {
        "normal": ([3, 5], torch.tensor(7), 1, 2**33, dtype, torch.device("cpu"), "gaussian"),
        "seed_axpy_": (inputs, [], *full),
        "seed_axpy_out": (inputs[:1], [], gathered, rows, *plain),
        "seed_axpy_pair_out": (inputs, [], out, out_minus, None, *full),
    }


@pytest.mark.few
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ops.SCHEMAS))
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.fedkseed, name).default
    results = torch.library.opcheck(op, opcheck_cases(dtype)[name])
    assert set(results.values()) == {"SUCCESS"}


def test_every_op_of_the_library_is_checked() -> None:
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fedkseed::")}
    assert registered == {f"fedkseed::{name}" for name in opcheck_cases(torch.float32)}
    for name in ops.SCHEMAS:
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.fedkseed, name).default.tags


def test_schemas_end_with_the_term_arguments() -> None:
    for name in sorted(ops.SCHEMAS.keys() - {"normal"}):
        arguments = getattr(torch.ops.fedkseed, name).default._schema.arguments
        assert tuple(a.name for a in arguments)[-len(TermArguments._fields) :] == TermArguments._fields


def test_ops_called_directly_are_the_functions() -> None:
    for name, arguments in opcheck_cases(torch.bfloat16).items():
        getattr(torch.ops.fedkseed, name)(*arguments)
        if name == "seed_axpy_out":
            expected = expected_axpy(arguments[0][0], [1, -2], [0.5, 0.25], alpha=0.75)
            assert_same_bits(arguments[2][0], expected[torch.tensor([3, 3, 0])])


# --- what serves


def test_info_names_what_serves() -> None:
    info = fk.info()
    assert info["contract_version"] == reference.CONTRACT_VERSION == fk.CONTRACT_VERSION
    assert info["cpu_backend"] == dispatch.requested_backend()
    assert info["version"] == fk.__version__
    assert info["num_threads"] >= 1
    for backend in info["backends"].values():
        assert backend["available"] is (backend["reason"] is None)
