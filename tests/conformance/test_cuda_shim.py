"""The CUDA kernels, compiled for the host: bit for bit the golden vectors and what the CPU backend writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cuda_shim
import numpy as np
import pytest
import torch
from cuda_shim import MODES, assert_same, options, terms, weights
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.conformance import __main__ as conformance
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import CHECKS, Target, poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import reference

pytestmark = pytest.mark.skipif(cuda_shim.COMPILER is None, reason="needs a C++ compiler")

# Those without "words" and "transform", which ask a backend for raw words.
OP_CHECKS = [name for name in CHECKS if name not in ("Philox words", "Gaussian transform")]
all_modes = pytest.mark.parametrize(("dtype", "rounding"), MODES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)
# Around an octet (8), a Rademacher group (128), and a tile of each kernel (2048, 8192, 16384).
SIZES = [1, 7, 8, 9, 127, 4097, 129, 0, 3]

Call = Callable[[], Sequence[Tensor]]


class Bench:
    """Runs a call on the CPU backend and on the shim, and compares what it wrote."""

    def __init__(self, shim: cuda_shim.ShimBackend, monkeypatch: pytest.MonkeyPatch):
        self.shim = shim
        self.monkeypatch = monkeypatch

    def on_shim(self, call: Call) -> Sequence[Tensor]:
        with self.monkeypatch.context() as patch:
            patch.setitem(dispatch.TABLE["cpu"], "native", self.shim)
            before = self.shim.num_launches
            with dispatch.backend("native"):
                results = call()
        assert self.shim.num_launches > before
        return results

    def compare(self, call: Call, dtype: str) -> None:
        for position, (got, want) in enumerate(zip(self.on_shim(call), call(), strict=True)):
            assert_same(stored_of(got), stored_of(want), dtype, f"tensor {position}")


@pytest.fixture
def bench(shim: cuda_shim.ShimBackend, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(shim, monkeypatch)


# --- the golden vectors


@pytest.mark.parametrize("name", OP_CHECKS)
def test_golden(name: str, shim: cuda_shim.ShimBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.TABLE["cpu"], "native", shim)
    result = conformance.run_check(name, CHECKS[name], Target("native"), golden.load())
    assert result.status == "pass", result.detail


def test_raw_words_and_transform(shim: cuda_shim.ShimBackend) -> None:
    words = np.arange(1001, dtype=np.uint32) * np.uint32(0x9E3779B9)
    counters, keys = words[:1000].reshape(250, 4).copy(), words[:500].reshape(250, 2).copy()
    made = np.full_like(counters, 0xDEADBEEF)
    status = shim.handle.fk_cuda_philox_words(
        counters.ctypes.data, keys.ctypes.data, made.ctypes.data, len(counters), 0, None
    )
    assert status == 0
    assert np.array_equal(made, reference.philox4x32_10(counters, keys))
    normals = np.full((words.size, 2), np.nan, np.float32)
    assert (
        shim.handle.fk_cuda_normal_from_words(words.ctypes.data, normals.ctypes.data, words.size, 0, None)
        == 0
    )
    expected = np.stack(reference.normals_from_words(words), axis=-1)
    assert np.array_equal(normals.view(np.uint32), expected.view(np.uint32))
    digest = np.zeros(1, np.uint64)
    first, count = 2**32 - 1003, 1003
    assert shim.handle.fk_cuda_normal_digest(first, count, digest.ctypes.data, 0, None) == 0
    assert int(digest[0]) == reference.normal_digest(first, count)


# --- against the CPU backend


@pytest.mark.few
@all_families
@all_modes
@pytest.mark.parametrize("num_terms", [0, 1, 2, 3, 16, 65, 300])
def test_number_of_terms(bench: Bench, num_terms: int, dtype: str, rounding: str, family: str) -> None:
    seeds, coeffs = terms(num_terms)
    sizes = SIZES if num_terms <= 16 else [9, 0, 300]
    places: dict[str, Any] = {
        "streams": [7 * i for i in range(len(sizes))],
        "offsets": [3 * i for i in range(len(sizes))],
    }

    def call() -> list[Tensor]:
        tensors = [weights(n, dtype) for n in sizes]
        fk.seed_axpy_(tensors, seeds, coeffs, **places, **options(rounding, family))
        return tensors

    bench.compare(call, dtype)


@pytest.mark.few
@all_families
@all_modes
@pytest.mark.parametrize("num_terms", [1, 2, 3])
@pytest.mark.parametrize("size", [4096, 8193, 20_001])
def test_whole_tiles(bench: Bench, size: int, num_terms: int, dtype: str, rounding: str, family: str) -> None:
    """Long enough for the short way of each kernel, which takes whole steps; the last one is not whole."""
    seeds, coeffs = terms(num_terms)

    def call() -> list[Tensor]:
        tensor = weights(size, dtype)
        fk.seed_axpy_(tensor, seeds, coeffs, **options(rounding, family))
        return [tensor]

    bench.compare(call, dtype)


@pytest.mark.few
@all_families
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("num_terms", [1, 3])
@pytest.mark.parametrize("first", [5, 2**34 - 1000, 2**35 - 1003, 2**38 - 7, 2**39 - 64, 2**62 + 2])
def test_offsets(bench: Bench, first: int, num_terms: int, dtype: str, family: str) -> None:
    """Past 2^31 and 2^32 groups of either family, and across."""
    seeds, coeffs = terms(num_terms)

    def call() -> list[Tensor]:
        tensor = weights(2053, dtype)
        fk.seed_axpy_(tensor, seeds, coeffs, offsets=[first], **options("nearest", family))
        return [tensor]

    bench.compare(call, dtype)


@pytest.mark.few
@all_families
@all_modes
@pytest.mark.parametrize("num_terms", [0, 1, 2, 5])
def test_pair(bench: Bench, num_terms: int, dtype: str, rounding: str, family: str) -> None:
    """Both sides of weights with both zeros, and Rademacher sums that cancel, whose zeros do not mirror."""
    seeds = [11, 12, 13, 14, 15][:num_terms]
    coeffs = [0.5, 0.5, -0.5, 0.25, 0.25][:num_terms]

    def call() -> list[Tensor]:
        tensor = weights(1030, dtype)
        tensor[:500:2] = 0.0
        tensor[1:500:2] = -0.0
        plus, minus = (poisoned(tensor.shape, dtype) for _ in range(2))
        fk.seed_axpy_pair(
            tensor, seeds, coeffs, out_plus=plus, out_minus=minus, **options(rounding, family, alpha=1.0)
        )
        in_place = tensor.clone()
        fk.seed_axpy_pair(
            in_place, seeds, coeffs, out_plus=in_place, out_minus=minus, **options(rounding, family)
        )
        return [plus, minus, in_place]

    bench.compare(call, dtype)


@all_modes
@pytest.mark.parametrize("skip", [1, 3, 8])
def test_misaligned_memory_and_its_surroundings(bench: Bench, skip: int, dtype: str, rounding: str) -> None:
    """Storage offsets that no 16-byte access may be made at; what lies around stays."""
    seeds, coeffs = terms(2)

    def call() -> list[Tensor]:
        whole = poisoned((5000,), dtype)
        out = poisoned((5000,), dtype)
        tensor = whole[skip : skip + 4500]
        tensor.copy_(weights(4500, dtype))
        fk.seed_axpy(
            tensor, seeds, coeffs, out=out[2 * skip : 2 * skip + 4500], **options(rounding, "gaussian")
        )
        fk.seed_axpy_(tensor, seeds[:1], coeffs[:1], offsets=[skip], **options(rounding, "gaussian"))
        return [whole, out]

    bench.compare(call, dtype)


@all_families
@all_modes
@pytest.mark.parametrize("memory", ["transposed", "every other"])
def test_strides(bench: Bench, memory: str, dtype: str, rounding: str, family: str) -> None:
    seeds, coeffs = terms(3)

    def call() -> list[Tensor]:
        stored = stored_of(weights(37 * 45, dtype)).reshape(37, 45)
        tensor = tensor_of(stored, dtype, memory)
        out = poisoned((37, 45), dtype, memory)
        fk.seed_axpy(tensor, seeds, coeffs, out=out, **options(rounding, family))
        return [out]

    bench.compare(call, dtype)


@all_families
@all_modes
def test_views_and_rows(bench: Bench, dtype: str, rounding: str, family: str) -> None:
    seeds, coeffs = terms(2)
    rows = torch.tensor([4, 0, 4, 6, 1])

    def call() -> list[Tensor]:
        tensor = weights(7 * 33 * 2, dtype).reshape(7, 33, 2)
        outs = [poisoned((5, 33, 2), dtype) for _ in range(2)]
        chosen = options(rounding, family)
        view = ((2**20, 100, 5), (2**19 + 3, 17, 1))
        fk.seed_axpy_pair(
            tensor, seeds, coeffs, rows=rows, views=[view], out_plus=outs[0], out_minus=outs[1], **chosen
        )
        flat = weights(7, dtype)
        gathered = poisoned((5,), dtype)
        fk.seed_axpy(flat, seeds, coeffs, rows=rows, out=gathered, **chosen)
        sliced = weights(40 * 24, dtype).reshape(40, 24)
        fk.seed_axpy_(sliced[3:30, 8:], seeds, coeffs, views=[((64, 4096), (9, 40))], **chosen)
        return [*outs, gathered, sliced]

    bench.compare(call, dtype)


def test_tables_that_split(bench: Bench) -> None:
    """More tensors than a kernel's parameter holds, flat and strided, of two dtypes."""
    seeds, coeffs = terms(1)

    def call() -> list[Tensor]:
        flat = [weights(1 + i % 19, "bfloat16", i) for i in range(1000)]
        strided = [weights(4 * 6, "float32", i).reshape(4, 6).t() for i in range(70)]
        fk.seed_axpy_([*flat, *strided], seeds, coeffs)
        return [*flat, *strided]

    before = bench.shim.num_launches
    results = bench.on_shim(call)
    assert bench.shim.num_launches - before == 3 + 3
    for got, want in zip(results, call(), strict=True):
        dtype = str(got.dtype).removeprefix("torch.")
        assert_same(stored_of(got), stored_of(want), dtype)


def residuals(count: int) -> Tensor:
    """Residuals of every size, the largest of both signs among them."""
    values = np.random.default_rng(3).integers(-(2**15), 2**15, count).astype(np.int16)
    return torch.from_numpy(values)


@all_families
@pytest.mark.parametrize("dtype", reference.COMPENSATED_DTYPES)
@pytest.mark.parametrize("num_terms", [0, 1, 2, 3])
def test_compensated(bench: Bench, num_terms: int, dtype: str, family: str) -> None:
    """In place: whole steps, ragged ends, misaligned and strided memory, beside weights without residuals."""
    seeds, coeffs = terms(num_terms)

    def call() -> list[Tensor]:
        tensors = [weights(n, dtype) for n in (9001, 131, 40)]
        some_residuals = [residuals(9001), torch.cat([residuals(3), residuals(131)])[3:], None]
        matrix, its_residuals = weights(600, dtype).reshape(20, 30).t(), residuals(600).reshape(20, 30).t()
        fk.seed_axpy_(
            [*tensors, matrix],
            seeds,
            coeffs,
            residuals=[*some_residuals, its_residuals],
            streams=[1, 2, 3, 4],
            offsets=[0, 5, 0, 0],
            alpha=0.999 if num_terms else 1.0,
            family=family,
        )
        return [*tensors, matrix, *(x for x in (*some_residuals, its_residuals) if x is not None)]

    for got, want in zip(bench.on_shim(call), call(), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.contiguous().view(torch.int16), want.contiguous().view(torch.int16))


@all_families
@pytest.mark.parametrize("rounding", reference.ROUNDINGS)
@pytest.mark.parametrize("dtype", reference.COMPENSATED_DTYPES)
@pytest.mark.parametrize("num_terms", [0, 1, 3])
def test_compensated_out_of_place(
    bench: Bench, num_terms: int, dtype: str, rounding: str, family: str
) -> None:
    """Residuals are read: both sides, and gathered rows."""
    seeds, coeffs = terms(num_terms)

    def call() -> list[Tensor]:
        tensor, residual = weights(40 * 9, dtype).reshape(40, 9), residuals(40 * 9).reshape(40, 9)
        before = residual.clone()
        outs = [poisoned((40, 9), dtype) for _ in range(2)]
        chosen = {"residuals": residual, **options(rounding, family)}
        fk.seed_axpy_pair(tensor, seeds, coeffs, out_plus=outs[0], out_minus=outs[1], **chosen)
        gathered = poisoned((3, 9), dtype)
        fk.seed_axpy(tensor, seeds, coeffs, rows=torch.tensor([39, 0, 7]), out=gathered, **chosen)
        assert torch.equal(residual, before)
        return [*outs, gathered]

    bench.compare(call, dtype)


@all_families
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_outputs_in_fp32(bench: Bench, dtype: str, family: str) -> None:
    """Widened first, then perturbed where they are."""
    seeds, coeffs = terms(1)

    def call() -> list[Tensor]:
        tensor, residual = weights(40 * 9, dtype).reshape(40, 9), residuals(40 * 9).reshape(40, 9)
        outs = [poisoned((40, 9), "float32") for _ in range(2)]
        fk.seed_axpy_pair(
            tensor, seeds, coeffs, out_plus=outs[0], out_minus=outs[1], residuals=residual, family=family
        )
        return outs

    bench.compare(call, "float32")


HUGE = 2**31 + 3 * 2**14 + 77


@all_families
@pytest.mark.parametrize("num_terms", [1, 2, 3])
def test_more_than_2_31_elements(bench: Bench, num_terms: int, family: str) -> None:
    """The last blocks of a tensor of which nothing else is touched: it takes addresses, not memory."""
    seeds, coeffs = terms(num_terms)
    tensor = torch.empty(HUGE, dtype=torch.bfloat16)
    tail = 2**13 + 77
    tensor[-tail:] = want = weights(tail, "bfloat16")
    tile = 2**14 if num_terms <= 2 else 2**13 if family == "gaussian" else 2**11
    num_blocks = -(-HUGE // tile)
    last_blocks = tail // tile + 2

    def call() -> list[Tensor]:
        fk.seed_axpy_(tensor, seeds, coeffs, family=family)
        return [tensor[-tail:]]

    with bench.shim.only_blocks(num_blocks - last_blocks, num_blocks):
        (got,) = bench.on_shim(call)
    fk.seed_axpy_(want, seeds, coeffs, offsets=[HUGE - tail], family=family)
    assert_same(stored_of(got), stored_of(want), "bfloat16")


@all_families
def test_a_slice_of_more_than_2_31_elements(bench: Bench, family: str) -> None:
    """The last rows of a matrix without its first column, gathered from a view."""
    seeds, coeffs = terms(2)
    num_rows, width, last_rows = 2**19 + 5, 2**12 + 4, 3
    matrix = torch.empty(num_rows, width, dtype=torch.bfloat16)[:, 1:]
    matrix[-last_rows:] = want = weights(last_rows * (width - 1), "bfloat16").reshape(last_rows, width - 1)
    slots_per_run = (width - 1 + 14) // 8
    num_blocks = -(-num_rows * slots_per_run // 256)

    def call() -> list[Tensor]:
        fk.seed_axpy_(matrix, seeds, coeffs, views=[((num_rows, width), (0, 1))], family=family)
        return [matrix[-last_rows:]]

    with bench.shim.only_blocks(num_blocks - 1 - last_rows * slots_per_run // 256 - 1, num_blocks):
        (got,) = bench.on_shim(call)
    view = ((num_rows, width), (num_rows - last_rows, 1))
    fk.seed_axpy_(want, seeds, coeffs, views=[view], family=family)
    assert_same(stored_of(got), stored_of(want), "bfloat16")


def test_mixed_dtypes_in_one_list(bench: Bench) -> None:
    """A coefficient that rounds to zero in fp32 but not in fp64, beside one that does not."""

    def call() -> list[Tensor]:
        tensors = [weights(100, dtype) for dtype in reference.DTYPES]
        fk.seed_axpy_(tensors, [1, 2], [1e-60, 0.5])
        return tensors

    for got, want in zip(bench.on_shim(call), call(), strict=True):
        assert_same(stored_of(got), stored_of(want), str(got.dtype).removeprefix("torch."))


# --- these tests can fail


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("file", "text", "broken"),
    [
        ("include/normal.h", "FK_SIN_1 -0x1.16011ap-3f", "FK_SIN_1 -0x1.16011cp-3f"),
        ("cuda/flat.h", "(int32_t)(tensor.numel - at)", "(int32_t)(tensor.numel - at) / kOctet * kOctet"),
        (
            "cuda/octet.h",
            "write_octet<Storage>(memory, memory.residual_out, memory.in_stride, residuals);",
            "",
        ),
    ],
    ids=["a constant", "a tail", "residuals"],
)
def test_a_damaged_source_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, broken: str
) -> None:
    shutil.copytree(cuda_shim.SOURCES, tmp_path / "csrc")
    source = (tmp_path / "csrc" / file).read_text()
    assert source.count(text) == 1
    (tmp_path / "csrc" / file).write_text(source.replace(text, broken))
    backend = cuda_shim.ShimBackend(cuda_shim.build(tmp_path, tmp_path / "csrc"))
    monkeypatch.setitem(dispatch.TABLE["cpu"], "native", backend)
    vectors = golden.load()
    outcomes = [
        conformance.run_check(name, CHECKS[name], Target("native"), vectors).status for name in OP_CHECKS
    ]
    everything = ["fail"] * len(OP_CHECKS)
    assert outcomes == everything if broken else outcomes.count("fail") == 1
