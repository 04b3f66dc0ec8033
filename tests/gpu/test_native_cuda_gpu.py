"""The CUDA library on a GPU, bit for bit what the CPU backend writes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.self_tests import first_process
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import native_cpu, native_cuda
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.contract import reference
from fedkseed_kernels.self_test import gate, run

pytestmark = pytest.mark.usefixtures("native_library")

MODES = [(torch.float32, "nearest"), (torch.float64, "nearest")] + [
    (dtype, rounding) for dtype in (torch.bfloat16, torch.float16) for rounding in reference.ROUNDINGS
]
all_modes = pytest.mark.parametrize(("dtype", "rounding"), MODES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)
# Around an octet, a group, a tile; and one of many tiles.
SIZES = [1, 7, 8, 9, 129, 0, 4097, 16_384, 100_003]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Call = Callable[[str], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with dispatch.backend("native"):
        yield


def weights(size: int | tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * 0.05).to(dtype).to(device)


def terms(count: int) -> tuple[list[int], list[float]]:
    generator = np.random.default_rng(count)
    coeffs = generator.standard_normal(count) * 0.01
    coeffs[4::5] = 0.0
    return [int(s) for s in generator.integers(-(2**63), 2**63, count)], coeffs.tolist()


def options(rounding: str, family: str = "gaussian", alpha: float = 0.999) -> dict[str, Any]:
    seed = 2**64 - 9 if rounding == "stochastic" else None
    return {"alpha": alpha, "family": family, "rounding": rounding, "rounding_seed": seed}


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bits; two NaNs are equal whatever their payloads (contract section 6.1)."""
    got, want = got.cpu(), want.cpu()
    integer = INTEGER[want.element_size()]
    same = (got.contiguous().view(integer) == want.contiguous().view(integer)) | (got.isnan() & want.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ, first {int(same.int().argmin())}"


def compare(call: Call) -> None:
    for got, want in zip(call("cuda"), call("cpu"), strict=True):
        assert_same_bits(got, want)


@all_families
@all_modes
@pytest.mark.parametrize("num_terms", [0, 1, 2, 3, 16, 64, 65, 300])
def test_every_dtype_rounding_number_of_terms_and_odd_size(
    num_terms: int, dtype: torch.dtype, rounding: str, family: str
) -> None:
    seeds, coeffs = terms(num_terms)

    def call(device: str) -> list[Tensor]:
        tensors = [weights(n, dtype, device, n) for n in SIZES]
        fk.seed_axpy_(tensors, seeds, coeffs, offsets=[5 * i for i in range(9)], **options(rounding, family))
        return tensors

    compare(call)


@all_families
@all_modes
def test_pair_rows_views_and_strides(dtype: torch.dtype, rounding: str, family: str) -> None:
    seeds, coeffs = [1, 2, 3], [0.5, 0.5, -0.25]
    chosen = options(rounding, family)

    def call(device: str) -> list[Tensor]:
        rows = torch.tensor([900, 0, 17, 17, 3], device=device)
        table = weights((1000, 129), dtype, device)
        table[:, ::3] = 0.0
        gathered = fk.seed_axpy_pair(table, seeds, coeffs, rows=rows, **chosen)
        transposed = weights((129, 200), dtype, device).t()
        fk.seed_axpy_(transposed, seeds, coeffs, views=[((2**40, 4096), (2**39, 77))], **chosen)
        misaligned = weights(50_001, dtype, device)[1:]
        fk.seed_axpy_(misaligned, seeds[:1], coeffs[:1], offsets=[2**35 - 40_000], **chosen)
        plus, minus = fk.seed_axpy_pair(table, seeds[:1], coeffs[:1], **chosen)
        return [*gathered[0], *gathered[1], transposed, misaligned, *plus, *minus]

    compare(call)


def residuals(shape: tuple[int, ...], device: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).to(device)


@all_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_terms", [1, 2, 17])
def test_compensated(num_terms: int, dtype: torch.dtype, family: str) -> None:
    """In place, beside tensors without residuals, misaligned and strided ones; read only on both sides."""
    seeds, coeffs = terms(num_terms)

    def call(device: str) -> list[Tensor]:
        tensors = [weights(n, dtype, device, n) for n in SIZES]
        given = [residuals((n + 1,), device)[i % 2 :][:n] for i, n in enumerate(SIZES)]
        # Of any kind: infinities, NaN and subnormals among them.
        tensors[-1].view(torch.int16)[::3] = residuals((SIZES[-1],), device)[::3]
        tensors.append(weights((94, 130), dtype, device).t())
        given.append(residuals((94, 130), device).t())
        fk.seed_axpy_(tensors, seeds, coeffs, residuals=[None, *given[1:]], **options("nearest", family))
        read, chosen = weights((300, 72), dtype, device), options("stochastic", family)
        residual, rows = residuals((300, 72), device), torch.tensor([299, 0, 7, 7], device=device)
        plus, minus = fk.seed_axpy_pair([read], seeds, coeffs, residuals=[residual], **chosen)
        some = fk.seed_axpy([read], seeds, coeffs, rows=rows, residuals=[residual], **chosen)
        return [*tensors, *given, *plus, *minus, *some]

    compare(call)


def test_lists_that_outgrow_a_table() -> None:
    def call(device: str) -> list[Tensor]:
        tensors = [weights(1 + i % 700, torch.bfloat16, device, i) for i in range(1100)]
        fk.seed_axpy_(tensors, [5], [0.25])
        return tensors

    compare(call)


@all_families
def test_the_noise_itself(family: str) -> None:
    compare(lambda device: [fk.normal((3, 70_001), -3, stream=9, offset=5, device=device, family=family)])


# --- streams, graphs, what only the device knows


def test_another_stream_is_used() -> None:
    """The work is ordered with torch's on the current stream and with no other."""
    tensor = weights(1 << 22, torch.float32, "cuda")
    want = tensor.cpu()
    dispatch.select(tensor.device)  # loads the kernels and runs their self-test, which waits for the GPU
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tensor.mul_(2)
        fk.seed_axpy_(tensor, [1, 2], [0.5, -0.25])
        tensor.mul_(3)
        finished = stream.record_event()
    assert not finished.query()
    stream.synchronize()
    want.mul_(2)
    fk.seed_axpy_(want, [1, 2], [0.5, -0.25])
    assert_same_bits(tensor, want.mul_(3))


@all_families
@pytest.mark.parametrize("num_terms", [1, 2, 3, 100])
def test_a_captured_graph_reads_seeds_and_coefficients_anew(num_terms: int, family: str) -> None:
    def fill(seed: int) -> None:
        numbers, values = terms(num_terms)
        seeds.copy_(torch.tensor([n ^ seed for n in numbers]))
        coeffs.copy_(torch.tensor(values, dtype=torch.float64) * seed)
        alpha.fill_(1 - seed / 64)
        rounding_seed.fill_(-seed)

    device = torch.device("cuda")
    seeds = torch.zeros(num_terms, dtype=torch.int64, device=device)
    coeffs = torch.zeros(num_terms, dtype=torch.float64, device=device)
    alpha = torch.ones((), dtype=torch.float64, device=device)
    rounding_seed = torch.zeros((), dtype=torch.int64, device=device)
    tensors = [weights(9001, torch.bfloat16, "cuda"), weights((40, 30), torch.float32, "cuda").t()]
    want = [t.cpu() for t in tensors]
    prepared = fk.prepare(tensors, family=family)
    chosen: dict[str, Any] = {"alpha": alpha, "rounding": "stochastic", "rounding_seed": rounding_seed}
    dispatch.select(tensors[0].device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.seed_axpy_(seeds, coeffs, **chosen)
    for seed in (1, 2, 3):
        fill(seed)
        graph.replay()
        fk.seed_axpy_(
            want,
            seeds.cpu(),
            coeffs.cpu(),
            alpha=alpha.cpu(),
            rounding="stochastic",
            rounding_seed=rounding_seed.cpu(),
            family=family,
        )
    for got, expected in zip(tensors, want, strict=True):
        assert_same_bits(got, expected)


def test_the_golden_cases_pass() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    report = run.compare(native_cuda.seed_axpy, "gpu", device, native_cuda.WRITES_FP32)
    assert report.mismatches == []


def test_a_capture_puts_the_self_test_off(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want = fk.normal(1000, 1) * 0.5
    tensor = torch.zeros(1000, device="cuda")
    prepared = fk.prepare([tensor])
    first_process(monkeypatch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.perturb_(1, 0.5)
    assert "the self-test on cuda:0 is deferred to the next call" in caplog.text
    assert gate.verdicts == {}
    graph.replay()
    assert_same_bits(tensor, want)
    prepared.perturb_(1, -0.5)
    assert list(gate.verdicts.values()) == [gate.PASSED_NOW]
    assert not tensor.any()


def test_more_terms_than_a_capture_may_take_from_the_host() -> None:
    tensor = torch.zeros(8, device="cuda")
    with (
        pytest.raises(RuntimeError, match="expected at most 64 terms from the host while a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fk.seed_axpy_(tensor, *terms(65))


@pytest.mark.parametrize("num_terms", [1, 2, 70])
def test_nan_coefficients_are_skipped_and_counted(num_terms: int) -> None:
    seeds, coeffs = terms(num_terms)
    bad = torch.tensor(coeffs, dtype=torch.float64)
    bad[::3] = float("nan")
    num_skipped = torch.zeros(1, dtype=torch.int32, device="cuda")
    tensor = weights(100_000, torch.float32, "cuda")
    want = tensor.cpu()
    fk.seed_axpy_(tensor, seeds, bad.cuda(), num_skipped=num_skipped)
    fk.seed_axpy_(want, seeds, bad.nan_to_num(nan=0.0))
    assert_same_bits(tensor, want)
    assert num_skipped.item() == len(range(0, num_terms, 3))


def test_nothing_left_changes_no_byte() -> None:
    every_half = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    tensor = every_half.cuda()
    fk.seed_axpy_(tensor, [1, 2], torch.tensor([0.0, float("inf")], dtype=torch.float64, device="cuda"))
    assert torch.equal(tensor.cpu().view(torch.int16), every_half.view(torch.int16))


def test_rows_out_of_range_give_nan() -> None:
    tensor = weights((10, 33), torch.float32, "cuda")
    (out,) = fk.seed_axpy(tensor, [1], [0.5], rows=torch.tensor([3, 10, -1], device="cuda"))
    assert out[1:].isnan().all()
    assert_same_bits(out[:1], fk.seed_axpy(tensor.cpu(), [1], [0.5], rows=torch.tensor([3]))[0])


# --- bad input


def test_tensors_on_the_cpu_and_on_a_gpu_are_not_one_list() -> None:
    tensors = [torch.ones(3), torch.ones(3, device="cuda")]
    with pytest.raises(ValueError, match="expected all tensors of a list on one device"):
        fk.seed_axpy_(tensors, [1], [0.5])
    with pytest.raises(ValueError, match="expected num_skipped on cuda:0 like the tensors, got cpu"):
        fk.seed_axpy_(tensors[1:], [1], [0.5], num_skipped=torch.zeros(1, dtype=torch.int32))
    assert all(torch.equal(t.cpu(), torch.ones(3)) for t in tensors)


def test_a_prepared_tensor_with_other_memory_is_refused() -> None:
    tensor = torch.nn.Parameter(torch.ones(100, device="cuda"))
    prepared = fk.prepare(tensor)
    tensor.data = torch.ones(100, device="cuda")
    with torch.no_grad(), pytest.raises(RuntimeError, match="its address changed .*call prepare again"):
        prepared.seed_axpy_([1], [0.5])


# --- size


@pytest.mark.slow
@all_families
def test_more_than_2_31_elements(family: str) -> None:
    """4.3 GB of bf16; the two ends and the middle against the CPU, with and without a view of them."""
    num_elements = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 3 * num_elements:
        pytest.skip("needs 7 GB of free GPU memory")
    tensor = torch.zeros(num_elements, dtype=torch.bfloat16, device="cuda")
    fk.seed_axpy_(tensor, [7], [0.5], family=family)
    fk.seed_axpy_(tensor, [8, 9, 10], [0.5, 0.25, 0.125], family=family)
    for begin in (0, 2**30 - 777, 2**31 - 5000, num_elements - 9_999):
        want = torch.zeros(9_999, dtype=torch.bfloat16)
        fk.seed_axpy_(want, [7], [0.5], offsets=[begin], family=family)
        fk.seed_axpy_(want, [8, 9, 10], [0.5, 0.25, 0.125], offsets=[begin], family=family)
        assert_same_bits(tensor[begin : begin + 9_999], want)
    del tensor
    gc.collect()
    torch.cuda.empty_cache()


# --- the transform's whole domain


def test_philox_words_and_chosen_normals() -> None:
    handle = native_cuda.library()
    counters = torch.randint(-(2**31), 2**31, (5000, 4), generator=torch.Generator().manual_seed(1)).int()
    keys = counters[:, :2].flip(0).contiguous()
    out = torch.empty_like(counters, device="cuda")
    on_gpu = counters.cuda(), keys.cuda()
    stream = torch.cuda.current_stream().cuda_stream
    native_cuda.check(
        handle,
        handle.fk_cuda_philox_words(*(t.data_ptr() for t in on_gpu), out.data_ptr(), 5000, 0, stream),
    )
    want = native_cpu.philox_words(counters.numpy().view(np.uint32), keys.numpy().view(np.uint32))
    assert np.array_equal(out.cpu().numpy().view(np.uint32), want)
    words = counters.reshape(-1)
    normals = torch.empty(words.numel(), 2, device="cuda")
    on_gpu_words = words.cuda()
    native_cuda.check(
        handle,
        handle.fk_cuda_normal_from_words(
            on_gpu_words.data_ptr(), normals.data_ptr(), words.numel(), 0, stream
        ),
    )
    want_normals = torch.from_numpy(native_cpu.normal_from_words(words.numpy().view(np.uint32)))
    assert_same_bits(normals, want_normals)


def test_all_words_equal_the_cpu_digests() -> None:
    content = golden.load(golden.DIGESTS_FILE)
    block_words, digests = content["block_words"], content["digests"]
    assert block_words * len(digests) == 2**32
    handle = native_cuda.library()
    found = torch.zeros(len(digests), dtype=torch.int64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    for block in range(len(digests)):
        status = handle.fk_cuda_normal_digest(
            block * block_words, block_words, found[block].data_ptr(), 0, stream
        )
        native_cuda.check(handle, status)
    assert [f"{d % 2**64:016x}" for d in found.tolist()] == digests
