"""The Triton kernels' bits, in Triton's interpreter, against the reference, on poisoned outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fedkseed_kernels as fk
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import reference
from fedkseed_kernels.operands import DeviceTerms, Terms

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from interpreted_triton import damaged, interpreted

from fedkseed_kernels.backends.triton.tables import OCTETS_PER_HIGH_WORD, Addresses, split_flat

MODES = [("float32", "nearest"), ("float64", "nearest")] + [
    (dtype, rounding) for dtype in ("bfloat16", "float16") for rounding in reference.ROUNDINGS
]
all_modes = pytest.mark.parametrize(("dtype", "rounding"), MODES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)
STREAM, ALPHA = 3, 0.999
SEEDS = [2**64 - 3, 1, 2**63, 77, 5, *range(10, 22)]
COEFFS = [1e-2, -3e-3, 0.25, 0.0, 1e-4, *(0.01 * k - 0.05 for k in range(12))]


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreted():
        yield


def weights(count: int, dtype: str) -> NDArray[Any]:
    """Ordinary weights among special ones: zeros, subnormals, the largest, infinities, a NaN."""
    values = np.random.default_rng(31).standard_normal(count) * 0.05
    special = [0.0, -0.0, 1e-45, -6e-8, 3e-5, 65504.0, 3.3e38, -3.39e38, np.inf, -np.inf, np.nan]
    values[: min(count, len(special))] = special[:count]
    if dtype == "float64":
        return values
    with np.errstate(over="ignore"):
        return reference.round_to_nearest(values.astype(np.float32), dtype)


def options(rounding: str, family: str) -> dict[str, Any]:
    seed = 2**64 - 9 if rounding == "stochastic" else None
    return {"alpha": ALPHA, "family": family, "rounding": rounding, "rounding_seed": seed}


def expected(
    stored: NDArray[Any], elements: Any, dtype: str, num_terms: int, sign: int, **chosen: Any
) -> Any:
    coeffs = [sign * c for c in COEFFS[:num_terms]]
    return reference.seed_axpy_array(
        stored, elements, SEEDS[:num_terms], coeffs, dtype=dtype, stream=STREAM, **chosen
    )


def assert_same(got: torch.Tensor, want: NDArray[Any], dtype: str) -> None:
    same = golden.same_value(stored_of(got).reshape(-1), np.ascontiguousarray(want).reshape(-1), dtype)
    assert same.all(), f"{(~same).sum()} of {same.size} differ, first {int(np.argmin(same))}"


def check_flat(
    dtype: str, rounding: str, family: str, num_terms: int, count: int, first: int, pair: bool = False
) -> None:
    """Passes in place, and out of place or as a pair, over one tensor whose elements begin at first."""
    chosen, stored = options(rounding, family), weights(count, dtype)
    elements = np.uint64(first) + np.arange(count, dtype=np.uint64)
    want = [expected(stored, elements, dtype, num_terms, sign, **chosen) for sign in (1, -1)]
    terms = (SEEDS[:num_terms], COEFFS[:num_terms])
    places = {"streams": [STREAM], "offsets": [first], **chosen}
    tensor, outs = tensor_of(stored, dtype), [poisoned((count,), dtype) for _ in range(2)]
    if pair:
        fk.seed_axpy_pair([tensor], *terms, out_plus=[outs[0]], out_minus=[outs[1]], **places)
        assert_same(outs[0], want[0], dtype)
        assert_same(outs[1], want[1], dtype)
        assert_same(tensor, stored, dtype)
    else:
        fk.seed_axpy_([tensor], *terms, **places)
        assert_same(tensor, want[0], dtype)


@pytest.mark.few
@all_families
@all_modes
@pytest.mark.parametrize("num_terms", [0, 1, 2, 3])
def test_numbers_of_terms(dtype: str, rounding: str, family: str, num_terms: int) -> None:
    check_flat(dtype, rounding, family, num_terms, count=70, first=0)


@all_families
@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", "stochastic"), ("float64", "nearest")])
def test_many_terms(dtype: str, rounding: str, family: str) -> None:
    check_flat(dtype, rounding, family, 17, count=64, first=8)


@pytest.mark.few
@all_families
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 128, 131, 520])
def test_ragged_sizes(family: str, count: int) -> None:
    check_flat("bfloat16", "nearest", family, 1, count, first=0)
    check_flat("float32", "nearest", family, 3, count, first=16)


@pytest.mark.few
@all_families
@pytest.mark.parametrize(
    ("first", "num_terms"),
    [
        (5, 3),
        (2**31 - 40, 1),
        (2**35 - 24, 1),
        (2**35 + 3, 1),
        (2**39 - 40, 3),
        (2**62 + 2, 1),
        (2**63 - 120, 3),
    ],
)
def test_offsets(family: str, first: int, num_terms: int) -> None:
    """Beyond 2^31 and 2^32 elements and, at 8 and 128 elements each, 2^32 groups."""
    check_flat("bfloat16", "stochastic", family, num_terms, count=120, first=first)


@pytest.mark.few
@all_families
@all_modes
@pytest.mark.parametrize("num_terms", [1, 3])
def test_both_sides(dtype: str, rounding: str, family: str, num_terms: int) -> None:
    check_flat(dtype, rounding, family, num_terms, count=43, first=8, pair=True)


@all_families
def test_sides_of_an_exact_cancellation(family: str) -> None:
    """+0 on both sides, where negating the sum would give -0; -0 weights show it."""
    stored = np.full(16, -0.0, dtype=np.float32)
    outs = [poisoned((16,), "float32") for _ in range(2)]
    for num_terms in (2, 4):
        seeds, coeffs = [9] * num_terms, [0.5, -0.5, 0.25, -0.25][:num_terms]
        fk.seed_axpy_pair(
            [tensor_of(stored, "float32")],
            seeds,
            coeffs,
            out_plus=[outs[0]],
            out_minus=[outs[1]],
            family=family,
        )
        for out in outs:
            assert stored_of(out).view(np.uint32).tolist() == [0] * 16


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_that_is_zero_has_both_signs(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the language's minus is a subtraction from +0, as in Triton 3.6; -0 weights show it."""
    from triton.language.semantic import TritonSemantic

    def minus(self: Any, number: Any) -> Any:
        of_type = number.type.scalar.to_ir(self.builder)
        zero = type(number)(self.builder.get_null_value(of_type), number.type.scalar)
        return self.sub(zero, number, True)

    monkeypatch.setattr(TritonSemantic, "minus", minus)
    smallest = np.nextafter(np.dtype(dtype).type(0), 1)
    stored = np.full(64, -0.0, dtype=dtype)
    outs = [poisoned((64,), dtype) for _ in range(2)]
    terms: Any = ([9], [float(smallest)])
    fk.seed_axpy_pair([tensor_of(stored, dtype)], *terms, out_plus=[outs[0]], out_minus=[outs[1]])
    for sign, out in zip((1, -1), outs, strict=True):
        coeffs = [sign * float(smallest)]
        want = reference.seed_axpy_array(stored, np.arange(64, dtype=np.uint64), [9], coeffs, dtype=dtype)
        bits = f"u{np.dtype(dtype).itemsize}"
        assert len(set(want.view(bits)[want == 0].tolist())) == 2, "zeros of both signs"
        assert stored_of(out).view(bits).tolist() == want.view(bits).tolist()


@all_families
def test_no_term_left_leaves_the_bytes(family: str) -> None:
    """NaN payloads too, in place and out of place, stochastic rounding or not."""
    stored = np.array([0x7F81, 0xFFC3, 0x0001, 0x3F80, 0x8000, 0x7F80, 1, 2, 3], dtype=np.uint16)
    tensor, out = tensor_of(stored, "bfloat16"), poisoned((9,), "bfloat16")
    for terms in (([], []), ([1, 2, 3], [0.0, -0.0, 0.0])):
        rounding = {"rounding": "stochastic", "rounding_seed": 1, "family": family}
        fk.seed_axpy([tensor], *terms, out=[out], **rounding)
        fk.seed_axpy_([tensor], *terms, **rounding)
        assert stored_of(out).tolist() == stored_of(tensor).tolist() == stored.tolist()


@all_families
@all_modes
def test_noise_itself(dtype: str, rounding: str, family: str) -> None:
    for first in (0, 2**35 - 11):
        got = fk.normal((61,), -5, stream=STREAM, offset=first, dtype=getattr(torch, dtype), family=family)
        elements = np.uint64(first) + np.arange(61, dtype=np.uint64)
        assert_same(got, reference.normal_array(-5, STREAM, elements, dtype, family), dtype)


@pytest.mark.few
@all_modes
@pytest.mark.parametrize(("memory", "family"), [("transposed", "gaussian"), ("every other", "rademacher")])
def test_strides(dtype: str, rounding: str, family: str, memory: str) -> None:
    chosen, stored = options(rounding, family), weights(7 * 11, dtype).reshape(7, 11)
    elements = np.uint64(11) + np.arange(77, dtype=np.uint64).reshape(7, 11)
    tensor, out = tensor_of(stored, dtype, memory), poisoned((7, 11), dtype, memory)
    places = {"streams": [STREAM], "offsets": [11], **chosen}
    fk.seed_axpy([tensor], SEEDS[:2], COEFFS[:2], out=[out], **places)
    assert_same(out, expected(stored, elements, dtype, 2, 1, **chosen), dtype)
    fk.seed_axpy_([tensor], SEEDS[:3], COEFFS[:3], **places)
    assert_same(tensor, expected(stored, elements, dtype, 3, 1, **chosen), dtype)


@pytest.mark.slow
@all_families
def test_views_equal_the_whole(family: str) -> None:
    """Corners of a matrix and slices of a cube, each a view, equal the whole."""
    chosen = options("stochastic", family)
    matrix, cube = (
        weights(19 * 23, "bfloat16").reshape(19, 23),
        weights(5 * 6 * 16, "bfloat16").reshape(5, 6, 16),
    )
    whole = [tensor_of(matrix, "bfloat16"), tensor_of(cube, "bfloat16")]
    corners = [(r, c) for r in (slice(0, 8), slice(8, 19)) for c in (slice(0, 16), slice(16, 23))]
    slices = [(slice(0, 5), slice(a, b), slice(0, 16)) for a, b in ((0, 1), (1, 6))]
    pieces = [whole[0][corner] for corner in corners] + [whole[1][piece] for piece in slices]
    views = [((19, 23), tuple(s.start for s in corner)) for corner in corners]
    views += [((5, 6, 16), tuple(s.start for s in piece)) for piece in slices]
    fk.seed_axpy_(pieces, SEEDS[:2], COEFFS[:2], streams=[STREAM] * 6, views=views, **chosen)
    for got, stored in zip(whole, (matrix, cube), strict=True):
        elements = np.arange(stored.size, dtype=np.uint64).reshape(stored.shape)
        assert_same(got, expected(stored, elements, "bfloat16", 2, 1, **chosen), "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "rounding", "family", "shape"),
    [(*mode, "gaussian", (9, 16)) for mode in MODES]
    + [
        ("bfloat16", "stochastic", family, s)
        for family in reference.FAMILIES
        for s in ((9, 5), (9,), (9, 2, 8))
    ],
)
def test_rows(dtype: str, rounding: str, family: str, shape: tuple[int, ...]) -> None:
    chosen, stored = options(rounding, family), weights(int(np.prod(shape)), dtype).reshape(shape)
    first = 2**31 - 8
    elements = np.uint64(first) + np.arange(stored.size, dtype=np.uint64).reshape(shape)
    rows = [8, 0, 3, 3, 7]
    plus, minus = (poisoned((5, *shape[1:]), dtype) for _ in range(2))
    fk.seed_axpy_pair(
        [tensor_of(stored, dtype)],
        SEEDS[:1],
        COEFFS[:1],
        streams=[STREAM],
        offsets=[first],
        rows=torch.tensor(rows),
        out_plus=[plus],
        out_minus=[minus],
        **chosen,
    )
    for got, sign in ((plus, 1), (minus, -1)):
        assert_same(got, expected(stored[rows], elements[rows], dtype, 1, sign, **chosen), dtype)


def test_lists() -> None:
    """Dtypes, sizes (0 among them), streams and alignments in one list: each as if it were alone."""
    kinds = ["bfloat16", "float32", "bfloat16", "float16", "bfloat16", "float64", "bfloat16", "bfloat16"]
    sizes = [130, 3, 0, 8, 1, 9, 600, 40]
    stored = [weights(n, dtype) for n, dtype in zip(sizes, kinds, strict=True)]
    tensors = [tensor_of(w, dtype) for w, dtype in zip(stored, kinds, strict=True)]
    tensors[-1] = torch.cat([torch.zeros(3, dtype=torch.bfloat16), tensors[-1]])[3:]
    chosen = options("stochastic", "gaussian")
    streams = [2**32 - 1, *range(1, 8)]
    for num_terms in (1, 3):
        before = [stored_of(t).copy() for t in tensors]
        fk.seed_axpy_(tensors, SEEDS[:num_terms], COEFFS[:num_terms], streams=streams, **chosen)
        for got, was, dtype, stream in zip(tensors, before, kinds, streams, strict=True):
            want = reference.seed_axpy_array(
                was,
                np.arange(was.size),
                SEEDS[:num_terms],
                COEFFS[:num_terms],
                dtype=dtype,
                stream=stream,
                **chosen,
            )
            assert_same(got, want, dtype)


def test_prepared_list_keeps_its_tables() -> None:
    tensors = [tensor_of(weights(n, "float32"), "float32") for n in (20, 9)]
    twins = [t.clone() for t in tensors]
    prepared = fk.prepare(tensors)
    for step in range(2):
        prepared.perturb_(step, 0.5)
        tables = prepared._operands.device_tables
        fk.perturb_(twins, step, 0.5)
        assert tables is not None
    assert prepared._operands.device_tables is tables
    for got, want in zip(tensors, twins, strict=True):
        assert_same(got, want.numpy(), "float32")


def test_philox_words() -> None:
    """The known answers, and counters and keys with every word in use."""
    from fedkseed_kernels.backends.triton import test_entries

    cases = golden.load()["philox"]
    counters = np.array([golden.words_from_hex(case["counter"]) for case in cases])
    keys = np.array([golden.words_from_hex(case["key"]) for case in cases])
    want = np.array([golden.words_from_hex(case["words"]) for case in cases])
    got = test_entries.philox_words(
        torch.from_numpy(counters.view(np.int32)), torch.from_numpy(keys.view(np.int32))
    )
    assert (got.numpy().view(np.uint32) == want).all()


def test_transform_of_chosen_words_and_its_digest() -> None:
    from fedkseed_kernels.backends.triton import test_entries

    case = golden.load()["normals"]
    chosen = golden.words_from_hex(case["words"])
    want = np.stack([golden.stored_from_hex(case[side], "float32") for side in ("even", "odd")], axis=-1)
    got = test_entries.normal_from_words(torch.from_numpy(chosen.view(np.int32))).numpy()
    assert (got.view(np.uint32) == want.view(np.uint32)).all()
    first, count = 2**32 - 700, 700
    assert test_entries.normal_digest(first, count, "cpu") == reference.normal_digest(first, count)


def on_device(num_terms: int, **fields: Any) -> DeviceTerms:
    """Terms as a device holds them; here its memory is the host's."""
    given: dict[str, Any] = {
        "seeds": torch.tensor(np.array(SEEDS[:num_terms], dtype=np.uint64).view(np.int64)),
        "coeffs": torch.tensor(COEFFS[:num_terms], dtype=torch.float64),
        "alpha": torch.tensor([ALPHA], dtype=torch.float64),
        "family": "gaussian",
        "rounding": "stochastic",
        "rounding_seed": torch.tensor(-9),
        "num_skipped": torch.tensor([5], dtype=torch.int32),
    }
    return DeviceTerms(**given | fields)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("num_terms", [0, 1, 5])
def test_terms_on_the_device(dtype: str, num_terms: int) -> None:
    """Zeros, NaN and infinities among the coefficients are skipped; the last two are counted."""
    from fedkseed_kernels.arguments.tensors import check_operands
    from fedkseed_kernels.backends.triton import launch

    stored = weights(19, dtype)
    seeds = np.array([1, 2, *SEEDS[:num_terms], 3, 4], dtype=np.uint64).view(np.int64)
    coeffs = [torch.nan, -torch.inf, *COEFFS[:num_terms], 0.0, -0.0]
    num_skipped = torch.tensor([5], dtype=torch.int32)
    terms = on_device(
        num_terms,
        seeds=torch.tensor(seeds),
        coeffs=torch.tensor(coeffs, dtype=torch.float64),
        num_skipped=num_skipped,
    )
    tensor = tensor_of(stored, dtype)
    launch.seed_axpy(check_operands([tensor], None, None, None, [STREAM], [0], []), terms)
    chosen = options("stochastic", "gaussian")
    assert_same(tensor, expected(stored, np.arange(19), dtype, num_terms, 1, **chosen), dtype)
    assert num_skipped.tolist() == [7]


@pytest.mark.parametrize("num_terms", [1, 2, 3])
@pytest.mark.parametrize("on_host", [["seeds"], ["coeffs"], ["seeds", "coeffs", "numbers"]])
def test_terms_on_the_device_with_some_of_the_host(on_host: list[str], num_terms: int) -> None:
    from fedkseed_kernels.arguments.tensors import check_operands
    from fedkseed_kernels.backends.triton import launch

    stored = weights(19, "float16")
    known: dict[str, Any] = {"num_skipped": None}
    if "seeds" in on_host:
        known["seeds"] = np.array(SEEDS[:num_terms], dtype=np.uint64)
    if "coeffs" in on_host:
        known["coeffs"] = np.array(COEFFS[:num_terms])
    if "numbers" in on_host:
        known |= {"alpha": float(np.float32(ALPHA)), "rounding_seed": 2**64 - 9}
    tensor = tensor_of(stored, "float16")
    operands = check_operands([tensor], None, None, None, [STREAM], [0], [])
    launch.seed_axpy(operands, on_device(num_terms, **known))
    chosen = options("stochastic", "gaussian")
    assert_same(tensor, expected(stored, np.arange(19), "float16", num_terms, 1, **chosen), "float16")


@pytest.mark.parametrize("num_terms", [1, 2, 3])
@pytest.mark.parametrize(("fp64", "smallest"), [(False, 2.0**-149), (True, 2.0**-1074)])
def test_terms_of_a_caller_that_flushes_subnormals(fp64: bool, smallest: float, num_terms: int) -> None:
    """Subnormal coefficients are packed for the device as they are, whatever the thread's mode."""
    from fedkseed_kernels.backends.triton.terms import pack_host_terms

    seeds = np.array(SEEDS[:num_terms], dtype=np.uint64)
    terms = Terms(seeds, smallest * np.arange(3, 3 + num_terms), 1.0, "gaussian", "nearest", 0)
    want = pack_host_terms(terms, fp64, torch.device("cpu"))
    if want.records is None:
        assert want.by_value[1 : 2 * num_terms : 2] == tuple(terms.coeffs.view(np.int64).tolist())
    else:
        assert int(want.records[0, 0]) == num_terms
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode that torch can set")
    try:
        got = pack_host_terms(terms, fp64, torch.device("cpu"))
    finally:
        torch.set_flush_denormal(False)
    assert got.by_value == want.by_value
    assert got.records is want.records is None or torch.equal(got.records, want.records)


def test_a_row_out_of_range_is_nan() -> None:
    """Rows are not looked at before the call, as on a GPU."""
    from fedkseed_kernels.arguments.tensors import check_operands
    from fedkseed_kernels.backends.triton import launch

    stored, out = np.ones((4, 8), dtype=np.float32), poisoned((4, 8), "float32")
    operands = check_operands(
        [tensor_of(stored, "float32")], [out], None, torch.tensor([0, 1, 2, 3]), [0], [0], []
    )
    assert operands.rows is not None
    operands.rows[1], operands.rows[2] = 4, -1
    launch.seed_axpy(operands, on_device(0, alpha=1.0, rounding="nearest", rounding_seed=0))
    assert torch.isnan(out).all(dim=1).tolist() == [False, True, True, False]
    assert (out[[0, 3]] == 1).all()


def test_segments_end_where_the_high_word_changes() -> None:
    """A tensor of more than 2^35 elements, by its plan alone."""
    numel = 3 * 2**35 + 5
    segments, runs = split_flat(Addresses(0, 1 << 20, 0, 0), 2**35 - 16, STREAM, numel, 2)
    assert [s.first_octet for s in segments] == [2**32 - 2, 2**32, 2**33, 3 * 2**32]
    assert sum(s.num_octets for s in segments) * 8 + sum(r.run_length for r in runs) == numel
    for segment in segments:
        assert segment.first_octet >> 32 == (segment.first_octet + segment.num_octets - 1) >> 32
        assert segment.num_octets <= OCTETS_PER_HIGH_WORD
        assert segment.addresses.target == (1 << 20) + 2 * (segment.first_octet * 8 - (2**35 - 16))
        assert segment.addresses.source == 0


DAMAGES = {
    "a constant of the transform": (
        "noise.py",
        "SQRT_TWO = _constant(reference.SQRT_TWO)",
        "SQRT_TWO = _constant(1.5)",
    ),
    "a constant of Philox": ("noise.py", "PHILOX_KEY_STEP_1)", "PHILOX_KEY_STEP_1 + 1)"),
    "the tail of a tensor": ("tables.py", "    if tail:\n", "    if False:\n"),
    "the last octets of a segment": (
        "kernels.py",
        "mask = (position < end)",
        "mask = (position < end - 1)",
    ),
    "the high word": ("kernels.py", "high = (first_octet >> 32)", "high = (first_octet >> 33)"),
    "a fused multiply-add": ("noise.py", "return tl.fma(-g, half_sin, r)", "return r - g * half_sin"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_seen(what: str, tmp_path: Path) -> None:
    """Each of these changes of a Triton file turns the checks above red."""
    source = damaged(tmp_path, *DAMAGES[what])
    with interpreted(source), pytest.raises(AssertionError, match="differ"):
        check_flat("float32", "nearest", "gaussian", 1, count=131, first=2**35 - 64 + 8)
