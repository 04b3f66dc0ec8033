"""How terms reach the Triton kernels: as arguments, or as records in device memory.

What follows from terms in device memory is worked out there: nothing waits, and a captured graph does it
again at each replay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.contract.arithmetic import ieee_arithmetic
from fedkseed_kernels.contract.sums import SUM_BITS, SUM_SMALLEST, integer_terms
from fedkseed_kernels.operands import DeviceTerms, Terms, upload

# Terms up to this number travel as kernel arguments, through kernels without a loop over terms.
MAX_TERMS_BY_VALUE = 2
# Words of 32 bits that a term takes in device memory: key, key, coefficient or integer (two for fp64). Before
# the terms stand two records: number of terms, alpha, rounding seed (two); unit of the integers (fp64: two).
RECORD_WORDS = 4
HEADER_RECORDS = 2
_NOTHING_BY_VALUE = (0, 0, 0, 0, 1.0, 0)


class PackedTerms(NamedTuple):
    """The terms of one arithmetic format as the kernels take them.

    Up to MAX_TERMS_BY_VALUE on the host: seeds, fp64 patterns of coefficients (of two Rademacher terms: of
    their sums where the signs are equal and where they are not), alpha, rounding seed. More, or on the
    device: records.
    """

    num_by_value: int
    by_value: tuple[int | float, ...]
    records: Tensor | None
    is_empty: bool  # surely no term is kept; False also when only the device knows


class _Format(NamedTuple):
    """An arithmetic format, and the integers that Rademacher noise sums in it (contract 6.3)."""

    dtype: torch.dtype
    integer: torch.dtype
    sum_bits: int
    mantissa_bits: int
    bias: int
    smallest: float  # coefficient that counts


_FP32 = _Format(torch.float32, torch.int32, SUM_BITS[False], 23, 127, SUM_SMALLEST[False])
_FP64 = _Format(torch.float64, torch.int64, SUM_BITS[True], 52, 1023, SUM_SMALLEST[True])


def _is_kept(coefficients: Tensor, family: str, form: _Format) -> Tensor:
    """Which coefficients count: bool [K]."""
    if family == "gaussian":
        return torch.isfinite(coefficients) & (coefficients != 0)
    return torch.isfinite(coefficients) & (coefficients.abs() >= form.smallest)


def _integers(coefficients: Tensor, is_kept: Tensor, form: _Format) -> tuple[Tensor, Tensor]:
    """Contract 6.3: q [K] of the coefficients that are kept (anything of the others), and 2^-s, 0-d."""
    magnitudes = torch.where(is_kept, coefficients.abs(), 0)
    num_kept = is_kept.sum()
    # The exponent of n - 1 as a number in [1/2, 1) times 2^L is the L wanted; of 0 it is 0.
    log_terms = torch.frexp((num_kept - 1).clamp(min=0).to(torch.float64)).exponent
    exponent = (magnitudes.max().view(form.integer) >> form.mantissa_bits) - (form.bias - 1)
    shift = (form.sum_bits - log_terms - exponent).to(form.integer)

    def power_of_two(of: Tensor) -> Tensor:
        return ((of + form.bias) << form.mantissa_bits).view(form.dtype)

    # Exact but for numbers that round to 0: a product with a power of two.
    q = torch.round(coefficients * power_of_two(shift)).to(form.integer)
    return q, power_of_two(-shift)


def signed_word(value: int) -> int:
    """The int64 with the bits of value mod 2^64."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


def pack_host_terms(terms: Terms, fp64: bool, device: torch.device) -> PackedTerms:
    """Terms on the host, packed there: as arguments where one or two are kept, else as records."""
    form = _FP64 if fp64 else _FP32
    with ieee_arithmetic():  # the caller's thread may flush subnormals
        rounded = terms.coeffs.astype(np.float64 if fp64 else np.float32)
        coefficients = torch.from_numpy(rounded)
        is_kept = _is_kept(coefficients, terms.family, form)
        kept = np.flatnonzero(is_kept.numpy())
        if 0 < kept.size <= MAX_TERMS_BY_VALUE:
            return _by_value(terms, terms.seeds[kept], rounded[kept])
        records = _records(terms, torch.from_numpy(terms.seeds.view(np.int64)), coefficients, is_kept, form)
    return PackedTerms(0, _NOTHING_BY_VALUE, upload(records, device, "terms"), is_empty=kept.size == 0)


def placed(terms: DeviceTerms, device: torch.device) -> DeviceTerms:
    """The terms with seeds and coefficients on the device: few from the host without a copy, as launches."""

    def of(values: Tensor | NDArray[Any], dtype: torch.dtype) -> Tensor | NDArray[Any]:
        if isinstance(values, Tensor) or len(values) > MAX_TERMS_BY_VALUE:
            return values
        tensor = torch.empty(len(values), dtype=dtype, device=device)
        for k, value in enumerate(values.tolist()):
            tensor[k].fill_(signed_word(value) if isinstance(value, int) else value)
        return tensor

    few = replace(terms, seeds=of(terms.seeds, torch.int64), coeffs=of(terms.coeffs, torch.float64))
    return few.to(device)


def pack_device_terms(terms: Any, fp64: bool) -> PackedTerms:
    """Terms in device memory, packed there: as records, since only the device knows how many are kept.

    terms: seeds int64 [K], coeffs fp64 [K]; alpha and rounding_seed numbers, or tensors of one element.
    A NaN or infinite coefficient is dropped like a zero.
    """
    form = _FP64 if fp64 else _FP32
    coefficients = terms.coeffs.to(form.dtype)
    is_kept = _is_kept(coefficients, terms.family, form)
    records = _records(terms, terms.seeds, coefficients, is_kept, form)
    return PackedTerms(0, _NOTHING_BY_VALUE, records, is_empty=False)


def _by_value(terms: Terms, seeds: NDArray[np.uint64], coefficients: NDArray[Any]) -> PackedTerms:
    """Terms as arguments; seeds and rounded coefficients of those that are kept, one or two."""
    numbers = coefficients
    if seeds.size == 2 and terms.family == "rademacher":
        (q_0, q_1), shift = integer_terms(coefficients.tolist(), fp64=coefficients.dtype == np.float64)
        sums = np.array([q_0 + q_1, q_0 - q_1]).astype(coefficients.dtype)
        numbers = np.ldexp(sums, -shift)
    patterns = numbers.astype(np.float64).view(np.int64)
    words = np.stack([seeds.view(np.int64), patterns], axis=1).ravel().tolist()
    words += [0] * (2 * MAX_TERMS_BY_VALUE - len(words))
    by_value = (*words, terms.alpha, signed_word(terms.rounding_seed))
    return PackedTerms(seeds.size, by_value, None, is_empty=False)


def _records(terms: Any, seeds: Tensor, coefficients: Tensor, is_kept: Tensor, form: _Format) -> Tensor:
    """Terms as records, int32 [HEADER_RECORDS + K + 1, RECORD_WORDS], where the coefficients are.

    Args:
        terms: family, alpha, rounding_seed.
        seeds, coefficients: int64 [K], and [K] rounded to the format.
    """
    num_terms, device = coefficients.numel(), coefficients.device
    records = torch.zeros((HEADER_RECORDS + num_terms + 1, RECORD_WORDS), dtype=torch.int32, device=device)
    records[0, 0] = is_kept.sum()
    _put(records[0, 1:2], terms.alpha, torch.float32)
    _put(records[0, 2:], terms.rounding_seed, torch.int64)
    if num_terms:
        factors = coefficients
        if terms.family == "rademacher":
            factors, unit = _integers(coefficients, is_kept, form)
            _put(records[1, : form.dtype.itemsize // 4], unit, form.dtype)
        factor_words = _words(factors)
        found = torch.zeros((num_terms, RECORD_WORDS), dtype=torch.int32, device=device)
        found[:, :2] = _words(seeds)
        found[:, 2 : 2 + factor_words.shape[1]] = factor_words
        # In order behind the header; dropped ones share a last record that is never read.
        last = HEADER_RECORDS + num_terms
        records[torch.where(is_kept, HEADER_RECORDS - 1 + torch.cumsum(is_kept, 0), last)] = found
    return records


def _words(numbers: Tensor) -> Tensor:
    """The patterns of [K] numbers as int32 words, [K, 1] or [K, 2]."""
    return numbers.reshape(-1, 1).contiguous().view(torch.int32)


def _put(words: Tensor, value: float | Tensor, dtype: torch.dtype) -> None:
    """Write a number in a dtype's pattern into int32 words; one from the host without a copy."""
    target = words.view(dtype)
    if isinstance(value, Tensor):
        target.copy_(value.reshape(1))
    else:
        target.fill_(signed_word(value) if isinstance(value, int) else value)


def count_skipped(terms: Any, all_fp64: bool) -> None:
    """Raise terms.num_skipped, if there is one, by the number of coefficients that are NaN or infinite."""
    if terms.num_skipped is not None:
        coefficients = terms.coeffs if all_fp64 else terms.coeffs.to(torch.float32)
        terms.num_skipped += (~torch.isfinite(coefficients)).sum().to(torch.int32)
