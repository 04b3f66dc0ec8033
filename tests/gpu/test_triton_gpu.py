"""The Triton kernels on a GPU, bit for bit what the CPU backend writes; skipped without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import triton as triton_backend
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.contract import reference

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

MODES = [(torch.float32, "nearest"), (torch.float64, "nearest")] + [
    (dtype, rounding) for dtype in (torch.bfloat16, torch.float16) for rounding in reference.ROUNDINGS
]
all_modes = pytest.mark.parametrize(("dtype", "rounding"), MODES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)
# Around an octet, a Rademacher group, a block, a tile of 32768; and one of many tiles.
SIZES = [1, 7, 8, 9, 0, 129, 4097, 32_768, 100_003]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Call = Callable[[str], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def _triton_is_there() -> None:
    """On a machine with a GPU its absence is a failure, not a reason to skip."""
    assert triton_backend.unavailable() is None


@pytest.fixture
def on_gpu() -> Iterator[None]:
    with dispatch.backend("triton"):
        yield


def weights(size: int | tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * 0.05).to(dtype).to(device)


def terms(count: int) -> tuple[list[int], list[float]]:
    generator = np.random.default_rng(count)
    coeffs = generator.standard_normal(count) * 0.01
    coeffs[4::5] = 0.0
    return [int(s) for s in generator.integers(-(2**63), 2**63, count)], coeffs.tolist()


def options(rounding: str, family: str = "gaussian") -> dict[str, Any]:
    seed = 2**64 - 9 if rounding == "stochastic" else None
    return {"alpha": 0.999, "family": family, "rounding": rounding, "rounding_seed": seed}


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bits; two NaNs are equal whatever their payloads (contract section 6.1)."""
    got, want = got.cpu(), want.cpu()
    integer = INTEGER[want.element_size()]
    same = (got.contiguous().view(integer) == want.contiguous().view(integer)) | (got.isnan() & want.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ, first {int(same.int().argmin())}"


def compare(call: Call) -> None:
    """The call on the GPU by Triton and on the CPU by what serves it."""
    with dispatch.backend("triton"):
        got = call("cuda")
    for one, other in zip(got, call("cpu"), strict=True):
        assert_same_bits(one, other)


@all_families
@all_modes
@pytest.mark.parametrize("num_terms", [0, 1, 2, 3, 17, 300])
def test_lists(dtype: torch.dtype, rounding: str, family: str, num_terms: int) -> None:
    def call(device: str) -> list[Tensor]:
        tensors = [weights(size, dtype, device) for size in SIZES]
        offsets = [2**35 - 40 if i % 2 else 8 * i for i in range(len(SIZES))]
        fk.seed_axpy_(tensors, *terms(num_terms), offsets=offsets, **options(rounding, family))
        return tensors

    compare(call)


@all_families
@all_modes
@pytest.mark.parametrize("num_terms", [1, 2, 5])
def test_both_sides_and_rows(dtype: torch.dtype, rounding: str, family: str, num_terms: int) -> None:
    def call(device: str) -> list[Tensor]:
        tensor, chosen = weights((300, 72), dtype, device), options(rounding, family)
        rows = torch.tensor([299, 0, 7, 7, 123], device=device)
        plus, minus = fk.seed_axpy_pair([tensor], *terms(num_terms), **chosen)
        some = fk.seed_axpy([tensor], *terms(num_terms), rows=rows, **chosen)
        return [*plus, *minus, *some]

    compare(call)


def residuals(size: int | tuple[int, ...], device: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(
        -(2**15),
        2**15,
        torch.Size([size] if isinstance(size, int) else size),
        generator=generator,
        dtype=torch.int16,
    ).to(device)


@all_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_terms", [0, 1, 2, 17])
def test_compensated(dtype: torch.dtype, family: str, num_terms: int) -> None:
    """In place, beside tensors without residuals, misaligned and strided ones; read only on both sides."""

    def call(device: str) -> list[Tensor]:
        tensors = [weights(size, dtype, device) for size in SIZES]
        all_residuals = [residuals(size + 1, device)[i % 2 :][:size] for i, size in enumerate(SIZES)]
        # Of any kind: infinities, NaN and subnormals among them.
        tensors[-1].view(torch.int16)[::3] = residuals(SIZES[-1], device)[::3]
        tensors.append(weights((94, 130), dtype, device).T)
        all_residuals.append(residuals((94, 130), device).T)
        given = [None if i == 6 else residual for i, residual in enumerate(all_residuals)]
        fk.seed_axpy_(tensors, *terms(num_terms), residuals=given, **options("nearest", family))
        read, chosen = weights((300, 72), dtype, device), options("stochastic", family)
        residual, rows = residuals((300, 72), device), torch.tensor([299, 0, 7, 7], device=device)
        plus, minus = fk.seed_axpy_pair([read], *terms(num_terms), residuals=[residual], **chosen)
        some = fk.seed_axpy([read], *terms(num_terms), rows=rows, residuals=[residual], **chosen)
        return [*tensors, *all_residuals, *plus, *minus, *some]

    compare(call)


@all_families
def test_views_and_strides(family: str) -> None:
    def call(device: str) -> list[Tensor]:
        whole = weights((130, 94), torch.bfloat16, device)
        corners = [(r, c) for r in (slice(0, 61), slice(61, 130)) for c in (slice(0, 33), slice(33, 94))]
        fk.seed_axpy_(
            [whole[corner] for corner in corners],
            *terms(3),
            streams=[1] * 4,
            views=[((130, 94), (r.start, c.start)) for r, c in corners],
            **options("stochastic", family),
        )
        turned = weights((94, 130), torch.float32, device).T
        fk.seed_axpy_([turned], *terms(1), **options("nearest", family))
        return [whole, turned]

    compare(call)


@pytest.mark.parametrize("offset", [2**31 - 8, 2**35 - 64, 2**62])
def test_noise_itself(offset: int) -> None:
    compare(lambda device: [fk.normal((1000,), 5, offset=offset, dtype=torch.float16, device=device)])


@pytest.mark.slow
def test_a_tensor_of_more_than_two_to_the_31_elements(on_gpu: None) -> None:
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 3 * numel:
        pytest.skip("less than 6 GB of GPU memory are free")
    tensor = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    fk.perturb_(tensor, 5, 0.5)
    for first in (0, 2**30 - 17, 2**31 - 2048, numel - 999):
        got = tensor[first : first + 999].cpu()
        want = torch.zeros_like(got)
        with dispatch.backend("auto"):
            fk.perturb_(want, 5, 0.5, offsets=[first])
        assert_same_bits(got, want)


def test_another_stream(on_gpu: None) -> None:
    tensor, stream = weights(100_003, torch.float32, "cpu").cuda(), torch.cuda.Stream()
    want = weights(100_003, torch.float32, "cpu")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fk.perturb_(tensor, 5, 0.5)
    torch.cuda.current_stream().wait_stream(stream)
    with dispatch.backend("auto"):
        fk.perturb_(want, 5, 0.5)
    assert_same_bits(tensor, want)


def test_a_captured_graph_reads_new_terms_from_the_device(on_gpu: None) -> None:
    tensors = [weights(size, torch.bfloat16, "cuda") for size in (4096, 999)]
    twins = [t.cpu() for t in tensors]
    prepared = fk.prepare(tensors)
    seeds = torch.tensor([3, 4, 5], device="cuda")
    coeffs = torch.zeros(3, dtype=torch.float64, device="cuda")
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):  # compiles, and puts the table on the GPU; zeros change nothing
        prepared.seed_axpy_(seeds, coeffs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.seed_axpy_(seeds, coeffs)
    for step in range(3):
        values = [0.5, float("nan") if step == 1 else 0.25, -0.125]
        seeds.copy_(torch.tensor([step, step + 7, step + 9]))
        coeffs.copy_(torch.tensor(values, dtype=torch.float64))
        graph.replay()
        kept = [(s, c) for s, c in zip((step, step + 7, step + 9), values, strict=True) if c == c]
        with dispatch.backend("auto"):
            fk.seed_axpy_(twins, [s for s, _ in kept], [c for _, c in kept])
    for got, want in zip(tensors, twins, strict=True):
        assert_same_bits(got, want)


@all_families
def test_golden_cases_of_variants_pass(family: str) -> None:
    from fedkseed_kernels.backends.triton import self_test
    from fedkseed_kernels.backends.triton.launch import Variant

    device = torch.device("cuda", torch.cuda.current_device())
    kinds = ((False, torch.float32, 1), (False, torch.bfloat16, 0), (True, torch.float16, 2))
    for is_runs, dtype, num_by_value in kinds:
        variant = Variant(
            is_runs, family, dtype, num_by_value, True, pair=True, stochastic=False, residuals="none"
        )
        self_test._test(variant, device)  # SelfTestError where one does not


def test_philox_words() -> None:
    from fedkseed_kernels.backends.triton import test_entries

    generator = np.random.default_rng(5)
    counters = generator.integers(0, 2**32, (10_000, 4), dtype=np.uint32)
    keys = generator.integers(0, 2**32, (10_000, 2), dtype=np.uint32)
    got = test_entries.philox_words(
        torch.from_numpy(counters.view(np.int32)).cuda(), torch.from_numpy(keys.view(np.int32)).cuda()
    )
    assert (got.cpu().numpy().view(np.uint32) == reference.philox4x32_10(counters, keys)).all()


def test_all_words() -> None:
    """The Gaussian transform of all 2^32 words, by the digests that every CPU instruction set gives."""
    from fedkseed_kernels.backends.triton import test_entries

    content = golden.load(golden.DIGESTS_FILE)
    num_words = content["block_words"]
    for block, digest in enumerate(content["digests"]):
        assert test_entries.normal_digest(block * num_words, num_words, "cuda") == int(digest, 16), (
            f"block {block}"
        )
