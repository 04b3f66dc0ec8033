"""Test-only entries of the Triton backend: raw Philox words, and the Gaussian transform of chosen words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedkseed_kernels.backends.triton.launch import on_device
from fedkseed_kernels.backends.triton.noise import (
    ONE_PATTERN,
    RADIUS_BASE_PATTERN,
    normal_pair,
    philox4x32_10,
)

_BLOCK = 256
_PATTERNS = {"radius_base": RADIUS_BASE_PATTERN, "one_bits": ONE_PATTERN}
# Words that a lane folds into its digest.
_WORDS_OF_A_LANE = 64


@triton.jit
def _philox_kernel(counters, keys, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    c0 = tl.load(counters + 4 * i, mask=mask, other=0).to(tl.uint32, bitcast=True)
    c1 = tl.load(counters + 4 * i + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
    c2 = tl.load(counters + 4 * i + 2, mask=mask, other=0).to(tl.uint32, bitcast=True)
    c3 = tl.load(counters + 4 * i + 3, mask=mask, other=0).to(tl.uint32, bitcast=True)
    k0 = tl.load(keys + 2 * i, mask=mask, other=0).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys + 2 * i + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
    words = philox4x32_10(c0, c1, c2, c3, k0, k1)
    for j in tl.static_range(4):
        tl.store(out + 4 * i + j, words[j].to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def _normals_kernel(words, out, count, radius_base, one_bits, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    word = tl.load(words + i, mask=mask, other=0).to(tl.uint32, bitcast=True)
    even, odd = normal_pair(word, radius_base, one_bits)
    tl.store(out + 2 * i, even, mask=mask)
    tl.store(out + 2 * i + 1, odd, mask=mask)


@triton.jit
def _digest_kernel(
    out, first: tl.int64, count: tl.int64, radius_base, one_bits, NUM: tl.constexpr, BLOCK: tl.constexpr
):
    lane = tl.arange(0, BLOCK)
    digest = tl.full((BLOCK,), 0, tl.uint64)
    for step in range(NUM):
        i = (tl.program_id(0).to(tl.int64) * NUM + step) * BLOCK + lane
        word = (i + first).to(tl.uint32)
        even, odd = normal_pair(word, radius_base, one_bits)
        high = odd.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        bits = high | even.to(tl.uint32, bitcast=True).to(tl.uint64)
        digest += tl.where(i < count, bits * (2 * word.to(tl.uint64) + 1), 0)
    tl.store(out + tl.program_id(0) * BLOCK + lane, digest.to(tl.int64, bitcast=True))


def philox_words(counters: Tensor, keys: Tensor) -> Tensor:
    """Philox4x32-10, int32 [n, 4] (bit patterns), of counters int32 [n, 4] and keys int32 [n, 2]."""
    out = torch.full_like(counters, -559038737)
    grid = (triton.cdiv(len(counters), _BLOCK),)
    with on_device(counters.device):
        _philox_kernel[grid](counters, keys, out, len(counters), BLOCK=_BLOCK, enable_fp_fusion=False)
    return out


def normal_from_words(words: Tensor) -> Tensor:
    """The two normals (even, odd) of each word, fp32 [n, 2] of words int32 [n] (bit patterns)."""
    out = torch.full((len(words), 2), torch.nan, device=words.device)
    grid = (triton.cdiv(len(words), _BLOCK),)
    with on_device(words.device):
        _normals_kernel[grid](words, out, len(words), **_PATTERNS, BLOCK=_BLOCK, enable_fp_fusion=False)
    return out


def normal_digest(first: int, count: int, device: torch.device | str) -> int:
    """The digest of `reference.normal_digest`: of the transform of words first .. first + count - 1."""
    num_programs = triton.cdiv(count, _BLOCK * _WORDS_OF_A_LANE)
    out = torch.full((num_programs * _BLOCK,), -1, dtype=torch.int64, device=device)
    with on_device(out.device):
        _digest_kernel[(num_programs,)](
            out, first, count, **_PATTERNS, NUM=_WORDS_OF_A_LANE, BLOCK=_BLOCK, enable_fp_fusion=False
        )
    return int(out.sum().item()) % (1 << 64)
