"""Seeds, coefficients and scalars: from what callers write to tensors, and from tensors to checked terms."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.contract.arithmetic import ieee_arithmetic
from fedkseed_kernels.contract.sums import SUM_MAX_TERMS
from fedkseed_kernels.operands import FAMILY_CODES, ROUNDING_CODES, DeviceTerms, Terms

# Numbers of at least this magnitude become infinite in fp32: its largest number and half an ulp.
FP32_OVERFLOW = float.fromhex("0x1.ffffffp+127")
_FP32_SMALLEST_NORMAL = float.fromhex("0x1p-126")

IntLike = Any  # anything with __index__: int, NumPy integers
Seeds = Sequence[IntLike] | Tensor | np.ndarray[Any, Any]
Coeffs = Sequence[float] | Tensor | np.ndarray[Any, Any]


class TermArguments(NamedTuple):
    """What every mutating op of `ops` ends with: the fields are its schema's arguments, in their order.

    `seeds` int64 [K], `coeffs` fp64 [K], `alpha` fp64 and `rounding_seed` int64 of shape (), all on the host
    or on the tensors' GPU; `streams`, `offsets` and `views` as `encoding` writes them, empty for defaults.
    """

    seeds: Tensor
    coeffs: Tensor
    alpha: Tensor
    streams: Sequence[int]
    offsets: Sequence[int]
    views: Sequence[int]
    family: str
    rounding: str
    rounding_seed: Tensor | None
    num_skipped: Tensor | None = None


def _signed(seed: IntLike) -> int:
    """The int64 with the bit pattern of seed mod 2^64."""
    number = operator.index(seed)
    if -(1 << 63) <= number < 1 << 63:
        return number
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number


def _int64(values: int | list[int]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    return torch.from_numpy(np.array(values, dtype=np.int64))  # several times faster than torch.tensor


def _float64(values: float | list[float]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    return torch.from_numpy(np.array(values, dtype=np.float64))


def seed_tensor(seeds: Seeds) -> Tensor:
    """Seeds as int64 bit patterns, shape [K].

    Raises:
        TypeError: something that is no integer.
    """
    if isinstance(seeds, Tensor):
        if seeds.dtype not in (torch.int64, torch.uint64):
            raise TypeError(f"expected seeds as an int64 tensor (their bit pattern), got {seeds.dtype}")
        return seeds.view(torch.int64)
    if isinstance(seeds, np.ndarray):
        if seeds.dtype.kind not in "iu":
            raise TypeError(f"expected seeds as an integer array, got {seeds.dtype}")
        wide = seeds.astype(np.uint64 if seeds.dtype.kind == "u" else np.int64)
        return torch.from_numpy(wide.view(np.int64))
    if isinstance(seeds, (int, float, str)):
        raise TypeError(f"expected a sequence of seeds, got {type(seeds).__name__}; write [seed]")
    return _int64([_signed(s) for s in seeds])


def number_tensor(value: float | Tensor, name: str) -> Tensor:
    """A real number as a 0-d fp64 tensor. A tensor must hold one number; its device is kept.

    Raises:
        TypeError: an integer, complex or larger tensor.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.dtype.is_floating_point:
            raise TypeError(
                f"expected {name} as a number or a floating-point tensor of one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        return _fp64(value.detach().reshape(()))
    return _float64(float(value))


def coefficient_tensor(coeffs: Coeffs) -> Tensor:
    """Coefficients in fp64, shape [K].

    Raises:
        TypeError: something that is no real number.
    """
    if isinstance(coeffs, Tensor):
        if not coeffs.dtype.is_floating_point:
            raise TypeError(f"expected coeffs as a floating-point tensor, got {coeffs.dtype}")
        return _fp64(coeffs.detach())
    if isinstance(coeffs, np.ndarray):
        if coeffs.dtype.kind != "f":
            raise TypeError(f"expected coeffs as a floating-point array, got {coeffs.dtype}")
        with ieee_arithmetic():
            return torch.from_numpy(coeffs.astype(np.float64))
    if isinstance(coeffs, (int, float, str)):
        raise TypeError(
            f"expected a sequence of coefficients, got {type(coeffs).__name__}; write [coefficient]"
        )
    return _float64([float(c) for c in coeffs])


def _fp64(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64 or torch.compiler.is_compiling():
        return tensor.to(torch.float64)
    # A thread that flushes subnormals would lose those of the tensor here.
    with ieee_arithmetic():
        return tensor.to(torch.float64)


def seed_scalar(seed: IntLike | Tensor) -> Tensor:
    """One seed as a 0-d int64 tensor."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1:
            raise ValueError(f"expected one seed, got a tensor of shape {tuple(seed.shape)}")
        return seed_tensor(seed).reshape(())
    return _int64(_signed(seed))


def encode_terms(
    seeds: Seeds,
    coeffs: Coeffs,
    alpha: float | Tensor,
    family: str,
    rounding: str,
    rounding_seed: IntLike | Tensor | None,
    num_skipped: Tensor | None,
    streams: Sequence[int] = (),
    offsets: Sequence[int] = (),
    views: Sequence[int] = (),
) -> TermArguments:
    """Terms in the schemas' form, from what callers write; streams, offsets and views are in it already."""
    return TermArguments(
        seeds=seed_tensor(seeds),
        coeffs=coefficient_tensor(coeffs),
        alpha=number_tensor(alpha, "alpha"),
        streams=streams,
        offsets=offsets,
        views=views,
        family=family,
        rounding=rounding,
        rounding_seed=None if rounding_seed is None else seed_scalar(rounding_seed),
        num_skipped=num_skipped,
    )


def rounded_to_fp32(value: float) -> float:
    """A finite number rounded once to fp32, subnormals kept whatever the thread's mode."""
    if abs(value) < _FP32_SMALLEST_NORMAL:
        with ieee_arithmetic():
            return float(np.float32(value))
    return float(np.float32(value))


def check_choices(family: str, rounding: str) -> None:
    """Refuse an unknown noise family or rounding mode."""
    if family not in FAMILY_CODES:
        raise ValueError(f"expected family to be one of {', '.join(FAMILY_CODES)}, got {family!r}")
    if rounding not in ROUNDING_CODES:
        raise ValueError(f"expected rounding to be one of {', '.join(ROUNDING_CODES)}, got {rounding!r}")


def check_on_host(tensor: Tensor, name: str) -> None:
    """Refuse a term on another device; one on meta would turn the call into a fake one that does no work."""
    if tensor.device.type != "cpu":
        raise ValueError(f"expected {name} on the cpu, got {tensor.device}; call {name}.cpu()")


def check_term_place(tensor: Tensor, name: str, device: torch.device) -> None:
    """Refuse a term that is neither on the host nor on the GPU of the tensors it changes."""
    if device.type != "cuda":
        check_on_host(tensor, name)
    elif tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(
            f"expected {name} on {device} like the tensors, or on the cpu, got {tensor.device}; move it there"
        )


def check_num_skipped(num_skipped: Tensor, device: torch.device) -> None:
    """The counter of skipped coefficients."""
    if num_skipped.dtype != torch.int32 or num_skipped.numel() != 1:
        got = f"{num_skipped.dtype} of shape {tuple(num_skipped.shape)}"
        raise ValueError(f"expected num_skipped int32 of one element, got {got}")
    if num_skipped.device != device:
        raise ValueError(f"expected num_skipped on {device} like the tensors, got {num_skipped.device}")


def check_term_metadata(arguments: TermArguments, device: torch.device) -> None:
    """Shapes, dtypes, choices and places of the terms; looks at no values. device: of the tensors."""
    seeds, coeffs, alpha, _, _, _, family, rounding, rounding_seed, num_skipped = arguments
    check_choices(family, rounding)
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"expected seeds int64 [num_terms], got {seeds.dtype} of shape {tuple(seeds.shape)}")
    if coeffs.dim() != 1 or coeffs.dtype != torch.float64:
        raise ValueError(
            f"expected coeffs fp64 [num_terms], got {coeffs.dtype} of shape {tuple(coeffs.shape)}"
        )
    if seeds.shape[0] != coeffs.shape[0]:
        raise ValueError(
            f"expected one coefficient for each seed, "
            f"got {seeds.shape[0]} seeds and {coeffs.shape[0]} coefficients"
        )
    if family == "rademacher" and coeffs.shape[0] > SUM_MAX_TERMS:
        raise ValueError(
            f"expected at most 2^24 terms of rademacher noise, got {coeffs.shape[0]}; make several calls"
        )
    if alpha.dim() != 0 or alpha.dtype != torch.float64:
        raise ValueError(f"expected alpha fp64 of shape (), got {alpha.dtype} of shape {tuple(alpha.shape)}")
    if rounding == "stochastic" and rounding_seed is None:
        raise ValueError(
            "expected a rounding_seed for rounding='stochastic', got None; pass one, a new one each step"
        )
    if rounding != "stochastic" and rounding_seed is not None:
        raise ValueError(
            "expected no rounding_seed for rounding='nearest', got one; pass rounding='stochastic' too"
        )
    if rounding_seed is not None and (rounding_seed.dim() != 0 or rounding_seed.dtype != torch.int64):
        got = f"{rounding_seed.dtype} of shape {tuple(rounding_seed.shape)}"
        raise ValueError(f"expected rounding_seed int64 of shape (), got {got}")
    check_term_place(seeds, "seeds", device)
    check_term_place(coeffs, "coeffs", device)
    check_term_place(alpha, "alpha", device)
    if rounding_seed is not None:
        check_term_place(rounding_seed, "rounding_seed", device)
    if num_skipped is not None:
        check_num_skipped(num_skipped, device)


def check_terms(arguments: TermArguments, all_fp64: bool, device: torch.device) -> Terms | DeviceTerms:
    """Check the terms as the ops take them. Values on the host are checked and copied; for those on a GPU the
    host does not synchronise.

    Args:
        all_fp64: whether every tensor of the list is fp64, so that nothing is rounded to fp32.
        device: of the tensors.
    Raises:
        ValueError: as the public functions document.
    """
    check_term_metadata(arguments, device)
    seeds, coeffs, alpha, _, _, _, family, rounding, rounding_seed, num_skipped = arguments
    if coeffs.device.type == "cpu":
        _check_coefficients(coeffs.numpy(), all_fp64)
    alpha_value = _alpha_value(alpha) if alpha.device.type == "cpu" else alpha
    rounding_value: int | Tensor = 0
    if rounding_seed is not None:
        on_host = rounding_seed.device.type == "cpu"
        rounding_value = int(rounding_seed.item()) % (1 << 64) if on_host else rounding_seed
    # Copies: the caller may hold these tensors in the very list that is about to be written.
    host_seeds = np.array(seeds.numpy()).view(np.uint64) if seeds.device.type == "cpu" else None
    host_coeffs = np.array(coeffs.numpy()) if coeffs.device.type == "cpu" else None
    if (
        host_seeds is not None
        and host_coeffs is not None
        and isinstance(alpha_value, float)
        and isinstance(rounding_value, int)
    ):
        return Terms(
            seeds=host_seeds,
            coeffs=host_coeffs,
            alpha=alpha_value,
            family=family,
            rounding=rounding,
            rounding_seed=rounding_value,
        )
    return DeviceTerms(
        seeds=seeds.contiguous() if host_seeds is None else host_seeds,
        coeffs=coeffs.contiguous() if host_coeffs is None else host_coeffs,
        alpha=alpha_value,
        family=family,
        rounding=rounding,
        rounding_seed=rounding_value,
        num_skipped=num_skipped,
    )


def _alpha_value(alpha: Tensor) -> float:
    value = alpha.item()
    if not abs(value) < FP32_OVERFLOW:
        raise ValueError(f"expected alpha to be finite in fp32, got {value}")
    return rounded_to_fp32(value)


def _check_coefficients(values: NDArray[np.float64], all_fp64: bool) -> None:
    limit = np.inf if all_fp64 else FP32_OVERFLOW
    finite = np.abs(values) < limit  # False for NaN
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"expected coefficients that are finite{'' if all_fp64 else ' in fp32'}, "
            f"got {values[first]} at index {first}; skip the step or leave the term out"
        )
