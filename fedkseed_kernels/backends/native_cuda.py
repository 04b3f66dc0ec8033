"""The native backend of cuda tensors: the CUDA library (csrc/include/fedkseed_cuda.h) through ctypes.

It is loaded at the first use, never at import, and so is the driver. `unavailable()` says why it cannot be
used; nothing here falls back to anything else: that choice is made, aloud, in `dispatch`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.backends import c_abi
from fedkseed_kernels.backends.identity import gpu_identity, library_identity
from fedkseed_kernels.operands import FAMILY_CODES, ROUNDING_CODES, DeviceTerms, Operands, Terms
from fedkseed_kernels.self_test.gate import SelfTest

LIBRARY_PATH = c_abi.LIBRARY_FOLDER / "libfedkseed_cuda.so"
WRITES_FP32 = False
MAX_TERMS_BY_VALUE = 64
MIN_COMPUTE_CAPABILITY = (8, 0)
# The first CUDA whose drivers (R530) take a launch's 24,000 bytes of parameters.
OLDEST_DRIVER = 12010
OUT_OF_MEMORY = 2
# Statuses of `fk_cuda_load` that stay what they are while this library, driver and GPU do: reasons to choose
# another backend on that GPU. Any other (out of memory, a GPU in use, a kernel that crashed before) may pass
# or is no fault of the library's: it is raised, and the next call tries again.
REFUSALS = {
    35: "the driver is older than the library's CUDA runtime",
    36: "the driver lacks a function that the library calls",
    98: "the library has no code for this GPU",
    200: "the driver cannot read the library's code",
    209: "the library has no code for this GPU",
    218: "the driver cannot compile the library's PTX",
    221: "the driver's compiler of PTX is not installed",
    222: "the driver is older than the compiler that made the library's PTX",
    223: "compiling PTX is switched off (CUDA_DISABLE_PTX_JIT)",
}

_REBUILD = "install the CUDA toolkit (nvcc) and reinstall (from a checkout: make)"


def _declare(handle: ctypes.CDLL) -> None:
    pointer, int32, int64, uint64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
    arguments = {
        "driver_version": (pointer,),
        "runtime_version": (pointer,),
        "load": (int32,),
        "seed_axpy": (pointer, int64, pointer, int64, pointer, int32, pointer),
        "philox_words": (pointer, pointer, pointer, int64, int32, pointer),
        "normal_from_words": (pointer, pointer, int64, int32, pointer),
        "normal_digest": (uint64, uint64, pointer, int32, pointer),
    }
    for name, types in arguments.items():
        function = getattr(handle, f"fk_cuda_{name}")
        function.argtypes, function.restype = types, int32
    handle.fk_cuda_error_string.argtypes, handle.fk_cuda_error_string.restype = (int32,), ctypes.c_char_p


def open_library(path: Path) -> ctypes.CDLL | str:
    """The library in a file, or the reason why it cannot be used. Touches no device and no driver."""
    if not path.exists():
        reason = c_abi.recorded_reason("cuda") or "the installation left no record"
        return f"{path} was not built at installation: {reason}; {_REBUILD}"
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} does not load: {error}; {_REBUILD}"
    if (mismatch := c_abi.other_release(handle, path)) is not None:
        return f"{mismatch}; {_REBUILD}"
    try:
        _declare(handle)
    except AttributeError as error:
        return f"{path} lacks an entry ({error}); {_REBUILD}"
    return handle


@functools.cache
def _load() -> ctypes.CDLL | str:
    return open_library(LIBRARY_PATH)


def _version(handle: ctypes.CDLL, of: str) -> int:
    version = ctypes.c_int32()
    check(handle, getattr(handle, f"fk_cuda_{of}_version")(ctypes.byref(version)))
    return version.value


def _readable(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def _why_the_driver_cannot_serve() -> str | None:
    handle = library()
    driver, runtime = _version(handle, "driver"), _version(handle, "runtime")
    if driver == 0:
        return "this machine has no NVIDIA driver; install one or use cpu tensors"
    # A driver serves every minor version of its major one.
    needed = max(runtime // 1000 * 1000, OLDEST_DRIVER)
    if driver < needed:
        return (
            f"the NVIDIA driver serves CUDA {_readable(driver)}, the library needs {_readable(needed)} or "
            "later; update the driver or use FEDKSEED_BACKEND=triton"
        )
    return None


@functools.cache
def _why_a_gpu_is_too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= MIN_COMPUTE_CAPABILITY:
        return None
    got, needed = (".".join(map(str, c)) for c in (capability, MIN_COMPUTE_CAPABILITY))
    return (
        f"cuda:{index} is of compute capability {got}, the library is built for {needed} and later; "
        "use another GPU or FEDKSEED_BACKEND=triton"
    )


@functools.cache
def _why_a_gpu_cannot_serve(index: int) -> str | None:
    """The verdict on one GPU; it ends with every kernel loaded there. What is raised is no verdict."""
    if (reason := _why_a_gpu_is_too_old(index)) is not None:
        return reason
    try:
        load_kernels(index)
    except CudaError as error:
        if error.status not in REFUSALS:
            raise
        return (
            f"the library does not load on cuda:{index}: {REFUSALS[error.status]} "
            f"(CUDA error {error.status}); use FEDKSEED_BACKEND=triton"
        )
    return None


def unavailable(device: torch.device | None = None) -> str | None:
    """Why the CUDA library cannot be used, with what to do about it; None when it can.

    Args:
        device: the GPU that is asked about ("cuda" is the current one), on which the kernels are then loaded;
            None for this machine. Before torch has initialized CUDA the answer for a GPU is the machine's.
    Raises:
        CudaError: loading failed in a way that may pass (out of memory, say), so there is no answer yet.
    """
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm, the CUDA library serves NVIDIA GPUs alone"
    handle = _load()
    if isinstance(handle, str):
        return handle
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    reason = _why_the_driver_cannot_serve()
    # No GPU is asked before torch has done so: tensors that need an answer are there only afterwards.
    if reason is not None or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return reason
    if device is not None:
        return _why_a_gpu_cannot_serve(torch.cuda.current_device() if device.index is None else device.index)
    reasons = [_why_a_gpu_is_too_old(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else next(iter(reasons), None)


def _machine_code(device: torch.device, isa: str) -> str | None:
    """What tells the kernels on a GPU from any others. isa: only processors have several."""
    handle = library()
    found = library_identity(handle.fk_abi_version, LIBRARY_PATH)
    return found and f"{found}; {gpu_identity(device)}; {_version(handle, 'driver')}"


SELF_TEST: SelfTest | None = SelfTest("gpu", _machine_code)


def library() -> ctypes.CDLL:
    """The library of this installation.

    Raises:
        RuntimeError: there is none that loads.
    """
    handle = _load()
    if isinstance(handle, str):
        raise RuntimeError(f"the native CUDA library cannot be used: {handle}")
    return handle


class CudaError(RuntimeError):
    """A call of the library that failed: `status` is a cudaError_t where positive."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def check(handle: ctypes.CDLL, status: int) -> None:
    """Raise CudaError for a status of the library that is not 0."""
    if status > 0:
        message = handle.fk_cuda_error_string(status).decode()
        advice = "; free some (torch.cuda.empty_cache()) and call again" if status == OUT_OF_MEMORY else ""
        raise CudaError(f"the native CUDA library failed: {message} (CUDA error {status}){advice}", status)
    if status < 0:
        raise CudaError(
            "the native CUDA library failed: it does not know a code or a size of this call "
            f"(status {status}); reinstall",
            status,
        )


@functools.cache
def load_kernels(device: int) -> None:
    """Load every kernel on a device, once; lazy loading by the runtime would fail inside a graph capture."""
    handle = library()
    with torch.cuda.device(device):  # torch restores the caller's without making a context there
        check(handle, handle.fk_cuda_load(device))


def _host_terms(terms: Terms) -> c_abi.FkCudaTerms:
    return c_abi.FkCudaTerms(
        terms.seeds.ctypes.data,
        terms.coeffs.ctypes.data,
        terms.seeds.size,
        terms.alpha,
        None,
        terms.rounding_seed,
        None,
        None,
        0,
        0,
        FAMILY_CODES[terms.family],
        ROUNDING_CODES[terms.rounding],
    )


def _device_terms(terms: DeviceTerms) -> c_abi.FkCudaTerms:
    def by_value(value: float | Tensor) -> bool:
        return not isinstance(value, Tensor)

    def pointer(value: float | Tensor | None) -> int | None:
        return value.data_ptr() if isinstance(value, Tensor) else None

    def values(of: Tensor | NDArray[Any]) -> int:
        return of.data_ptr() if isinstance(of, Tensor) else of.ctypes.data

    return c_abi.FkCudaTerms(
        values(terms.seeds),
        values(terms.coeffs),
        len(terms.seeds),
        terms.alpha if by_value(terms.alpha) else 0.0,
        pointer(terms.alpha),
        terms.rounding_seed if by_value(terms.rounding_seed) else 0,
        pointer(terms.rounding_seed),
        pointer(terms.num_skipped),
        isinstance(terms.seeds, Tensor),
        isinstance(terms.coeffs, Tensor),
        FAMILY_CODES[terms.family],
        ROUNDING_CODES[terms.rounding],
    )


def launch(
    handle: ctypes.CDLL,
    table: NDArray[np.void],
    rows: Tensor | None,
    num_source_rows: int,
    terms: Terms | DeviceTerms,
    device: int,
    stream: int,
) -> None:
    """Run the primitive over a pointer table in one native call; nothing is checked here.

    Args:
        handle: a library from `open_library`.
        table: c_abi.TABLE_DTYPE [num_tensors]; the memory that it points to must outlive the kernels.
        rows: int64 [sizes[0] of every tensor], contiguous, on the device; or None.
        num_source_rows: rows of every input, which `rows` counts.
        terms: the sum of noises; at most MAX_TERMS_BY_VALUE unless all are on the device.
        device: index of the GPU.
        stream: its cudaStream_t.
    Raises:
        RuntimeError: a launch failed.
    """
    native_terms = _device_terms(terms) if isinstance(terms, DeviceTerms) else _host_terms(terms)
    status = handle.fk_cuda_seed_axpy(
        table.ctypes.data,
        table.size,
        None if rows is None else rows.data_ptr(),
        num_source_rows,
        ctypes.byref(native_terms),
        device,
        stream,
    )
    check(handle, status)


def seed_axpy(operands: Operands, terms: Terms | DeviceTerms) -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`); returns before it is there."""
    if operands.table is None:
        operands.table = c_abi.pointer_table(operands)
    if not operands.table.size:
        return
    device = operands.device
    if (num_terms := len(terms.seeds)) > MAX_TERMS_BY_VALUE:
        is_on_host = isinstance(terms.seeds, np.ndarray) or isinstance(terms.coeffs, np.ndarray)
        if is_on_host and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"expected at most {MAX_TERMS_BY_VALUE} terms from the host while a CUDA graph "
                f"is captured, got {num_terms}; pass seeds and coeffs as tensors on {device}"
            )
        terms = terms.to(device)
    num_source_rows = 0
    if operands.rows is not None and operands.inputs is not None:
        num_source_rows = operands.inputs.tensors[0].shape[0]
    index = torch.cuda.current_device() if device.index is None else device.index
    load_kernels(index)
    with torch.cuda.device(index):  # as in load_kernels
        launch(
            library(),
            operands.table,
            operands.rows,
            num_source_rows,
            terms,
            index,
            torch.cuda.current_stream(device).cuda_stream,
        )
