"""What a backend is handed: checked tensors with noise indices (Operands), and a sum of noises (Terms on the
host, DeviceTerms on a GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.contract import reference

# Codes of csrc/include/fedkseed.h; tests/test_native.py holds them to the header.
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
}
# Those that may carry residuals (contract section 6.5), and whose results may be written in fp32.
COMPENSATED_DTYPES = tuple(getattr(torch, name) for name in reference.COMPENSATED_DTYPES)
FAMILY_CODES: dict[str, int] = {"gaussian": 0, "rademacher": 1}
ROUNDING_CODES: dict[str, int] = {"nearest": 0, "stochastic": 1}
ISA_CODES: dict[str, int] = {"auto": -1, "baseline": 0, "avx2": 1, "avx512": 2}
MAX_DIMS = 16

# A tensor that is a slice of a logical tensor: the logical shape, and where the slice starts in each
# dimension.
View = tuple[Sequence[int], Sequence[int]]


class TensorList:
    """Tensors and, read once for the whole call, what the checks and the pointer table ask of each."""

    __slots__ = ("addresses", "contiguous", "dtypes", "numels", "tensors")

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.dtypes = [t.dtype for t in tensors]
        self.addresses = [t.data_ptr() for t in tensors]
        self.numels = [t.numel() for t in tensors]
        self.contiguous = [t.is_contiguous() for t in tensors]


@dataclass(slots=True)
class Operands:
    """A checked list of tensors (`arguments.tensors.check_operands`): one device, right shapes, no overlap.

    Output i is `outs.tensors[i]` (and `outs_minus.tensors[i]`); it may be input i itself. `inputs` is None
    when the noise itself is written. `rows`, if given, gathers along dimension 0 of every input. The element
    indices of tensor i are row-major from `offsets[i]` on, or those of `views[i]` where that is not None.
    `residuals`, if there are any: int16 of input i, with its shape and strides, or None where it has none
    (contract section 6.5); `writes_residuals`: in place, results are split into weights and residuals.
    An output of a bf16 or fp16 input is in fp32 where it takes results that are not rounded.
    """

    inputs: TensorList | None
    outs: TensorList
    outs_minus: TensorList | None
    rows: Tensor | None
    streams: Sequence[int]
    offsets: Sequence[int]
    views: Sequence[View | None]
    residuals: Sequence[Tensor | None] | None = None
    writes_residuals: bool = False
    # The native pointer table, built at the first call that needs it (`backends.c_abi.pointer_table`).
    table: NDArray[np.void] | None = field(default=None, repr=False)
    # What the Triton backend keeps of the list in the device's memory, built likewise.
    device_tables: Any = field(default=None, repr=False)
    # Of all tensors; the processor for an empty list.
    device: torch.device = field(init=False)
    # Whether no sum is made in fp32.
    all_fp64: bool = field(init=False)

    def __post_init__(self) -> None:
        outs = self.outs
        self.device = outs.tensors[0].device if outs.tensors else torch.device("cpu")
        self.all_fp64 = outs.dtypes.count(torch.float64) == len(outs.dtypes)


@dataclass(slots=True)
class Terms:
    """The sum of noises: acc = sum_k coeffs[k] z(seeds[k]), y = alpha w + acc; contract section 6.1.

    `seeds` uint64 [K], `coeffs` finite fp64 [K], `alpha` already rounded to fp32. `rounding_seed` is 0 when
    rounding is to nearest.
    """

    seeds: NDArray[np.uint64]
    coeffs: NDArray[np.float64]
    alpha: float
    family: str
    rounding: str
    rounding_seed: int

    def to(self, device: torch.device) -> DeviceTerms:
        """The same terms with seeds and coefficients in the memory of a device, as `upload` brings them."""
        return DeviceTerms(
            seeds=upload(self.seeds.view(np.int64), device, "seeds"),
            coeffs=upload(self.coeffs, device, "coefficients"),
            alpha=self.alpha,
            family=self.family,
            rounding=self.rounding,
            rounding_seed=self.rounding_seed,
        )


@dataclass(slots=True)
class DeviceTerms:
    """Terms of which only a device knows some: these may change between replays of a captured graph.

    Tensors are on the device: `seeds` int64 [K] (bit patterns) and `coeffs` fp64 [K], contiguous; NaN and
    infinite coefficients are skipped like zeros and their number is added to `num_skipped` (int32, one
    element) where there is one. `alpha` (fp64, rounded to fp32 there) and `rounding_seed` (int64) have one
    element. What the host knows stays arrays and numbers like those of Terms.
    """

    seeds: Tensor | NDArray[np.uint64]
    coeffs: Tensor | NDArray[np.float64]
    alpha: float | Tensor
    family: str
    rounding: str
    rounding_seed: int | Tensor
    num_skipped: Tensor | None = None

    def to(self, device: torch.device) -> DeviceTerms:
        """The same terms with seeds and coefficients in the memory of the device, as `upload` brings them."""
        seeds, coeffs = self.seeds, self.coeffs
        return replace(
            self,
            seeds=seeds if isinstance(seeds, Tensor) else upload(seeds.view(np.int64), device, "seeds"),
            coeffs=coeffs if isinstance(coeffs, Tensor) else upload(coeffs, device, "coefficients"),
        )


def upload(array: NDArray[Any] | Tensor, device: torch.device, what: str) -> Tensor:
    """A copy on the device, which nothing waits for; the array itself on the processor.

    From pageable memory the driver might wait for the CUDA stream, and a graph cannot capture such a copy.

    Raises:
        RuntimeError: a CUDA graph is being captured: its replays would read host memory that is gone.
    """
    host = array if isinstance(array, Tensor) else torch.from_numpy(array)
    if device.type == "cpu":
        return host
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"expected no copy from the host while a CUDA graph is captured, but the {what} are on the host; "
            f"pass them as tensors on {device}, or few enough to travel by value, and use a prepared list "
            "that has run once"
        )
    return host.pin_memory().to(device, non_blocking=True)
