"""The native backend of cpu tensors: the CPU library (csrc/include/fedkseed.h) through ctypes.

It is loaded at the first use, never at import. `unavailable()` says why it cannot be used; nothing here falls
back to anything else: that choice is made, aloud, in `dispatch`.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed_kernels.backends import c_abi
from fedkseed_kernels.backends.identity import library_identity
from fedkseed_kernels.operands import FAMILY_CODES, ISA_CODES, ROUNDING_CODES, Operands, Terms
from fedkseed_kernels.self_test.gate import SelfTest

WRITES_FP32 = True
ERROR_ARGUMENT, ERROR_ISA, ERROR_MEMORY = -1, -2, -3

LIBRARY_PATH = c_abi.LIBRARY_FOLDER / "libfedkseed_cpu.so"

_REBUILD = "install g++ or clang++ and reinstall (from a checkout: make)"
# ELF e_machine of the machines that the library is built for.
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_ERRORS = {
    ERROR_ARGUMENT: "it does not know a dtype, family or rounding code of this package; reinstall",
    ERROR_ISA: "the instruction set asked for is not there",
    ERROR_MEMORY: "out of memory for its bookkeeping",
}


@dataclass(frozen=True)
class _Library:
    handle: ctypes.CDLL
    # Address of libtorch's torch_parallel_for, None when it has none: then calls run on one thread.
    parallel_for: int | None


def _why_it_does_not_load(error: OSError) -> str:
    header = LIBRARY_PATH.read_bytes()[:20]
    if header[:4] != b"\x7fELF":
        return f"{LIBRARY_PATH} is not an ELF library; {_REBUILD}"
    built_for = _ELF_MACHINES.get(int.from_bytes(header[18:20], "little"), "another machine")
    if built_for != platform.machine():
        return f"{LIBRARY_PATH} is built for {built_for}, this machine is {platform.machine()}; {_REBUILD}"
    return f"{LIBRARY_PATH} does not load: {error}; {_REBUILD}"


def _why_it_was_not_built() -> str:
    reason = c_abi.recorded_reason("cpu")
    if reason is None:
        return f"{LIBRARY_PATH} is not there: it was not built at installation; {_REBUILD}"
    return f"{LIBRARY_PATH} was not built at installation: {reason}; {_REBUILD}"


def _parallel_for_of_libtorch() -> int | None:
    libraries = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (libraries / name).exists():
            # torch has loaded this library already: this only finds it again.
            found = getattr(ctypes.CDLL(str(libraries / name)), "torch_parallel_for", None)
            return ctypes.cast(found, ctypes.c_void_p).value if found is not None else None
    return None


def _declare(handle: ctypes.CDLL) -> None:
    pointer, int32, int64, uint64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
    handle.fk_cpu_seed_axpy.argtypes = (pointer, int64, pointer, pointer, int32, pointer)
    handle.fk_cpu_philox_words.argtypes = (pointer, pointer, pointer, int64, int32)
    handle.fk_cpu_normal_from_words.argtypes = (pointer, pointer, int64, int32)
    handle.fk_cpu_normal_digest.argtypes = (uint64, uint64, int32, pointer)
    for name in (
        "seed_axpy",
        "philox_words",
        "normal_from_words",
        "normal_digest",
        "isas_built",
        "isas_usable",
    ):
        getattr(handle, f"fk_cpu_{name}").restype = int32


@functools.cache
def _load() -> _Library | str:
    """The library, or the reason why there is none."""
    if not LIBRARY_PATH.exists():
        return _why_it_was_not_built()
    try:
        handle = ctypes.CDLL(str(LIBRARY_PATH))
    except OSError as error:
        return _why_it_does_not_load(error)
    if (mismatch := c_abi.other_release(handle, LIBRARY_PATH)) is not None:
        return f"{mismatch}; {_REBUILD}"
    try:
        _declare(handle)
    except AttributeError as error:
        return f"{LIBRARY_PATH} lacks an entry ({error}); {_REBUILD}"
    return _Library(handle, _parallel_for_of_libtorch())


def unavailable(device: torch.device | None = None) -> str | None:
    """Why the native library cannot be used, with what to do about it; None when it can."""
    library = _load()
    return library if isinstance(library, str) else None


def _library() -> _Library:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the native CPU library cannot be used: {library}")
    return library


def _machine_code(device: torch.device, isa: str) -> str | None:
    """What tells the kernels of an instruction set from any others."""
    library = library_identity(_library().handle.fk_abi_version, LIBRARY_PATH)
    return library and f"{library}; {usable_isas()[-1] if isa == 'auto' else isa}"


SELF_TEST: SelfTest | None = SelfTest("processor", _machine_code)


def has_threads() -> bool:
    """Whether calls run on torch's thread pool; otherwise they run on the calling thread alone."""
    return _library().parallel_for is not None


def _isas(mask: int) -> list[str]:
    return [name for name, code in ISA_CODES.items() if code >= 0 and mask >> code & 1]


def built_isas() -> list[str]:
    """Instruction sets that the library was built with, slowest first."""
    return _isas(int(_library().handle.fk_cpu_isas_built()))


def usable_isas() -> list[str]:
    """Instruction sets of the library that this machine can run, slowest first; `auto` takes the last."""
    return _isas(int(_library().handle.fk_cpu_isas_usable()))


def _check(status: int, isa: str) -> None:
    if status == 0:
        return
    if status == ERROR_MEMORY:
        raise MemoryError(f"the native CPU library failed: {_ERRORS[status]}")
    reason = _ERRORS.get(status, f"unknown status {status}")
    if status == ERROR_ISA:
        reason += f": expected one of auto, {', '.join(usable_isas())}, got {isa}"
    raise RuntimeError(f"the native CPU library failed: {reason}")


def seed_axpy(operands: Operands, terms: Terms, isa: str = "auto") -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`): the list in one native call."""
    if operands.table is None:
        operands.table = c_abi.pointer_table(operands)
    if operands.table.size:
        rows = None if operands.rows is None else operands.rows.numpy()
        cpu_seed_axpy(operands.table, rows, terms, isa)


def cpu_seed_axpy(
    table: NDArray[np.void], rows: NDArray[np.int64] | None, terms: Terms, isa: str = "auto"
) -> None:
    """Run the primitive over a pointer table in one native call; nothing is checked here.

    Args:
        table: c_abi.TABLE_DTYPE [num_tensors]; the memory that it points to must outlive the call.
        rows: int64 [sizes[0] of every tensor], contiguous, or None.
        terms: the sum of noises.
        isa: a name of ISA_CODES.
    Raises:
        RuntimeError: no library, or an instruction set that is not there.
    """
    library = _library()
    seeds, coeffs = terms.seeds, terms.coeffs
    native_terms = c_abi.FkTerms(
        seeds.ctypes.data,
        coeffs.ctypes.data,
        seeds.size,
        terms.alpha,
        FAMILY_CODES[terms.family],
        ROUNDING_CODES[terms.rounding],
        terms.rounding_seed,
    )
    status = library.handle.fk_cpu_seed_axpy(
        table.ctypes.data,
        table.size,
        rows.ctypes.data if rows is not None else None,
        ctypes.byref(native_terms),
        ISA_CODES[isa],
        library.parallel_for,
    )
    _check(status, isa)


def philox_words(
    counters: NDArray[np.uint32], keys: NDArray[np.uint32], isa: str = "auto"
) -> NDArray[np.uint32]:
    """Raw Philox4x32-10 words, uint32 [n, 4], of counters uint32 [n, 4] and keys uint32 [n, 2]. For tests."""
    counters = np.ascontiguousarray(counters, dtype=np.uint32)
    keys = np.ascontiguousarray(keys, dtype=np.uint32)
    if counters.ndim != 2 or counters.shape[1] != 4 or keys.shape != (counters.shape[0], 2):
        raise ValueError(f"expected counters [n, 4] and keys [n, 2], got {counters.shape} and {keys.shape}")
    words = np.full_like(counters, 0xDEADBEEF)
    status = _library().handle.fk_cpu_philox_words(
        counters.ctypes.data, keys.ctypes.data, words.ctypes.data, len(counters), ISA_CODES[isa]
    )
    _check(status, isa)
    return words


def normal_from_words(words: NDArray[np.uint32], isa: str = "auto") -> NDArray[np.float32]:
    """The two normals (even, odd) of each word, fp32 [n, 2] of words uint32 [n]. For tests."""
    words = np.ascontiguousarray(words, dtype=np.uint32)
    if words.ndim != 1:
        raise ValueError(f"expected words [n], got shape {words.shape}")
    normals = np.full((words.size, 2), np.nan, dtype=np.float32)
    status = _library().handle.fk_cpu_normal_from_words(
        words.ctypes.data, normals.ctypes.data, words.size, ISA_CODES[isa]
    )
    _check(status, isa)
    return normals


def normal_digest(first: int, count: int, isa: str = "auto") -> int:
    """One 64-bit digest of the transform of words first .. first + count - 1 (the header's). For tests."""
    if first < 0 or count < 0 or first + count > 2**32:
        raise ValueError(f"expected words within [0, 2^32), got first {first} and count {count}")
    digest = ctypes.c_uint64()
    status = _library().handle.fk_cpu_normal_digest(first, count, ISA_CODES[isa], ctypes.byref(digest))
    _check(status, isa)
    return digest.value
