"""The primitive's bits do not depend on how it is called or run: instruction set, threads, splits, memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fedkseed_kernels as fk
from fedkseed_kernels.conformance import __main__ as conformance
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import Target, poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import reference

TARGETS, _ = conformance.find_targets()
NATIVE = [target for target in TARGETS if target.isa]
SEEDS, COEFFS = [1, -2, 2**63, 77, 5], [1e-2, -3e-3, 0.0, 0.25, 1e-4]
# Long enough to be shared between 7 threads, and no multiple of any vector, group or block.
NUM_MANY = 150_001
MODES = [("float32", "nearest"), ("float64", "nearest")] + [
    (dtype, rounding) for dtype in ("bfloat16", "float16") for rounding in reference.ROUNDINGS
]
all_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
native_targets = pytest.mark.parametrize("target", NATIVE, ids=str)
all_modes = pytest.mark.parametrize(("dtype", "rounding"), MODES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(count: int, dtype: str) -> NDArray[Any]:
    values = np.random.default_rng(30).standard_normal(count) * 0.05
    return values if dtype == "float64" else reference.round_to_nearest(values.astype(np.float32), dtype)


def options(rounding: str, family: str) -> dict[str, Any]:
    seed = 2**64 - 9 if rounding == "stochastic" else None
    return {"alpha": 0.999, "family": family, "rounding": rounding, "rounding_seed": seed}


def expected(stored: NDArray[Any], first: int, dtype: str, stream: int = 3, **chosen: Any) -> NDArray[Any]:
    elements = np.uint64(first) + np.arange(stored.size, dtype=np.uint64).reshape(stored.shape)
    return reference.seed_axpy_array(stored, elements, SEEDS, COEFFS, dtype=dtype, stream=stream, **chosen)


def assert_same(got: torch.Tensor, want: NDArray[Any], dtype: str) -> None:
    same = golden.same_value(stored_of(got).reshape(-1), np.ascontiguousarray(want).reshape(-1), dtype)
    assert same.all(), f"{(~same).sum()} of {same.size} differ, first {int(np.argmin(same))}"


@pytest.mark.few
@all_families
@all_modes
@all_targets
@pytest.mark.parametrize("first", [0, 5, 2**31 - 1000, 2**35 - 1003, 2**62 + 2])
def test_offsets(target: Target, dtype: str, rounding: str, family: str, first: int) -> None:
    chosen, stored = options(rounding, family), weights(2053, dtype)
    tensor = tensor_of(stored, dtype)
    with target.forced():
        fk.seed_axpy_([tensor], SEEDS, COEFFS, streams=[3], offsets=[first], **chosen)
    assert_same(tensor, expected(stored, first, dtype, **chosen), dtype)


@pytest.mark.few
@all_families
@all_modes
@native_targets
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads(target: Target, dtype: str, rounding: str, family: str, num_threads: int) -> None:
    """One long tensor and one short, in place, out of place and as a pair."""
    chosen, first = options(rounding, family), 2**32 - 70_000
    stored = weights(NUM_MANY, dtype)
    want = expected(stored, first, dtype, **chosen)
    torch.set_num_threads(num_threads)
    tensors = [tensor_of(stored, dtype), tensor_of(stored[:7], dtype)]
    places: dict[str, Any] = {"streams": [3, 3], "offsets": [first, first]}
    outs = [[poisoned(t.shape, dtype) for t in tensors] for _ in range(3)]
    with target.forced():
        fk.seed_axpy(tensors, SEEDS, COEFFS, out=outs[0], **places, **chosen)
        fk.seed_axpy_pair(
            tensors, SEEDS, [-c for c in COEFFS], out_plus=outs[1], out_minus=outs[2], **places, **chosen
        )
        fk.seed_axpy_(tensors, SEEDS, COEFFS, **places, **chosen)
    for got in (tensors, outs[0], outs[2]):
        assert_same(got[0], want, dtype)
        assert_same(got[1], want[:7], dtype)


@all_families
@all_modes
@all_targets
def test_odd_splits(target: Target, dtype: str, rounding: str, family: str) -> None:
    """A tensor updated in odd pieces, in any order, as one list, equals the tensor updated whole."""
    chosen, stored, first = options(rounding, family), weights(3001, dtype), 2**35 - 1501
    cuts = [0, 1, 8, 15, 31, 160, 161, 417, 1024, 1501, 2048, 2999, 3001]
    tensor = tensor_of(stored, dtype)
    bounds = list(pairwise(cuts))[::-1]
    pieces = [tensor[begin:end] for begin, end in bounds]
    with target.forced():
        fk.seed_axpy_(
            pieces,
            SEEDS,
            COEFFS,
            streams=[3] * len(pieces),
            offsets=[first + begin for begin, _ in bounds],
            **chosen,
        )
    assert_same(tensor, expected(stored, first, dtype, **chosen), dtype)


@all_modes
@all_targets
@pytest.mark.parametrize("memory", ["transposed", "every other"])
def test_strides_do_not_matter_and_gaps_are_not_touched(
    target: Target, dtype: str, rounding: str, memory: str
) -> None:
    chosen, stored = options(rounding, "gaussian"), weights(37 * 29, dtype).reshape(37, 29)
    tensor, out = tensor_of(stored, dtype, memory), poisoned((37, 29), dtype, memory)
    want = expected(stored, 11, dtype, **chosen)
    gaps = None
    if memory == "every other":
        gaps = tensor.as_strided((37, 29), (58, 2), 1)
        gaps_before = stored_of(gaps).tobytes()
    with target.forced():
        fk.seed_axpy([tensor], SEEDS, COEFFS, out=[out], streams=[3], offsets=[11], **chosen)
        fk.seed_axpy_([tensor], SEEDS, COEFFS, streams=[3], offsets=[11], **chosen)
    assert_same(out, want, dtype)
    assert_same(tensor, want, dtype)
    if gaps is not None:
        assert stored_of(gaps).tobytes() == gaps_before


@all_families
@all_modes
@all_targets
def test_shards_equal_the_whole(target: Target, dtype: str, rounding: str, family: str) -> None:
    """The four corners of a matrix, each a view of it, equal the whole matrix."""
    chosen, stored = options(rounding, family), weights(61 * 47, dtype).reshape(61, 47)
    tensor = tensor_of(stored, dtype)
    corners = [(r, c) for r in (slice(0, 20), slice(20, 61)) for c in (slice(0, 33), slice(33, 47))]
    with target.forced():
        fk.seed_axpy_(
            [tensor[corner] for corner in corners],
            SEEDS,
            COEFFS,
            streams=[3] * 4,
            views=[((61, 47), (r.start, c.start)) for r, c in corners],
            **chosen,
        )
    assert_same(tensor, expected(stored, 0, dtype, **chosen), dtype)


@all_families
@all_modes
@all_targets
def test_rows_equal_the_whole_gathered(target: Target, dtype: str, rounding: str, family: str) -> None:
    chosen, stored = options(rounding, family), weights(40 * 33, dtype).reshape(40, 33)
    whole = expected(stored, 2**31 - 50, dtype, **chosen)
    opposite = reference.seed_axpy_array(
        stored,
        np.uint64(2**31 - 50) + np.arange(stored.size, dtype=np.uint64).reshape(stored.shape),
        SEEDS,
        [-c for c in COEFFS],
        dtype=dtype,
        stream=3,
        **chosen,
    )
    rows = [39, 0, 7, 7, 7, 21]
    out_plus, out_minus = (poisoned((6, 33), dtype) for _ in range(2))
    with target.forced():
        fk.seed_axpy_pair(
            [tensor_of(stored, dtype)],
            SEEDS,
            COEFFS,
            streams=[3],
            offsets=[2**31 - 50],
            rows=torch.tensor(rows),
            out_plus=[out_plus],
            out_minus=[out_minus],
            **chosen,
        )
    assert_same(out_plus, whole[rows], dtype)
    assert_same(out_minus, opposite[rows], dtype)


@all_targets
def test_mixed_list(target: Target) -> None:
    """Dtypes, sizes (0 among them) and streams in one list: each as if it were alone."""
    sizes, kinds = (
        [1, 0, 130, 8, 1025, 3],
        ["float32", "bfloat16", "float64", "float16", "bfloat16", "float32"],
    )
    stored = [weights(size, dtype) for size, dtype in zip(sizes, kinds, strict=True)]
    tensors = [tensor_of(w, dtype) for w, dtype in zip(stored, kinds, strict=True)]
    chosen = options("stochastic", "gaussian")
    with target.forced():
        fk.seed_axpy_(tensors, SEEDS, COEFFS, **chosen)
    for stream, (tensor, w, dtype) in enumerate(zip(tensors, stored, kinds, strict=True)):
        assert_same(tensor, expected(w, 0, dtype, stream=stream, **chosen), dtype)


@pytest.mark.few(1)
@native_targets
def test_many_terms(target: Target) -> None:
    """K = 4096 with skipped terms."""
    random = np.random.default_rng(31)
    seeds = random.integers(-(2**63), 2**63, 4096).tolist()
    coeffs = random.standard_normal(4096) * 1e-4
    coeffs[random.random(4096) < 0.3] = 0
    for family in reference.FAMILIES:
        tensor, stored = tensor_of(weights(67, "bfloat16"), "bfloat16"), weights(67, "bfloat16")
        with target.forced():
            fk.seed_axpy_([tensor], seeds, coeffs.tolist(), family=family, offsets=[3])
        want = reference.seed_axpy_array(
            stored, np.arange(3, 70), seeds, coeffs, dtype="bfloat16", family=family
        )
        assert_same(tensor, want, "bfloat16")
