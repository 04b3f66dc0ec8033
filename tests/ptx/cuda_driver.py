"""The CUDA library with its own host code (plan.cu, entry.cu), whose launches the emulator runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkseed_kernels.backends import c_abi, native_cuda
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms
from ptx import machine
from ptx.cuda_build import LIBRARY, build, readable_name, sources_in
from ptx.kernel import Kernel
from ptx.memory import READ, Memory
from ptx.parser import Source, UnknownPtxError

_LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
_UINTS, _POINTERS = ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, _UINTS, _POINTERS, ctypes.c_size_t)


class CudaDriver:
    """A backend of tensors in `memory`, and `handle`, which stands in for `native_cuda.library()`.

    Every function of the handle runs the library's own host code; what it launches runs in the emulator, at
    once. `damaged` runs a kernel from another text. After a fault of a kernel every call of the handle fails
    with CUDA error 719, as on a GPU, until `checked` has raised the fault; `seed_axpy` does it by itself.

    Attributes:
        handle: for all that takes the library, `native_cuda.launch(driver.handle, ...)` say.
        memory: what kernels may use, set before the first launch, anew as often as wanted: a `Memory`, whose
            arena tensors are made in (`allocate`, `admitted`), or an `OpenMemory` for tensors made anywhere.
        launches: (kernel, blocks, threads of a block) of each launch so far.
        num_instructions: of all threads of all launches so far.
    """

    WRITES_FP32 = native_cuda.WRITES_FP32

    def __init__(self, architecture: int, folder: Path | None = None):
        """folder: one that `cuda_build.build` made; its own of today's sources by default."""
        folder = folder or build(architecture)
        self.sources: dict[str, Source] = {
            readable_name(symbol): source for symbol, source in sources_in(folder).items()
        }
        self._kernels: dict[str, Kernel] = {}
        self.memory = Memory(1 << 22)
        self.launches: list[tuple[str, int, int]] = []
        self.num_instructions = 0
        self._error: BaseException | None = None
        handle = native_cuda.open_library(folder / LIBRARY)
        if isinstance(handle, str):
            raise RuntimeError(handle)
        self.handle = handle
        self._callback = _CALLBACK(self._launch)
        handle.ptx_set_callback(self._callback)
        self.checked(handle.fk_cuda_load(0))

    def unavailable(self, device: torch.device | None = None) -> None:
        return None

    def kernel(self, name: str) -> Kernel:
        """A kernel by its readable name, `few_terms<Bf16, Gaussian, 1, 0>`."""
        if name not in self._kernels:
            self._kernels[name] = Kernel(self.sources[name])
        return self._kernels[name]

    def kernels(self) -> dict[str, Kernel]:
        """Those that were launched so far."""
        return dict(self._kernels)

    def body(self, name: str) -> str:
        """The text of a kernel, as `damaged` changes it."""
        return self.sources[name].body

    @contextmanager
    def damaged(self, name: str, change: Callable[[str], str]) -> Iterator[None]:
        """Run a kernel from a changed text within a block. change: body of the kernel -> another body."""
        whole, before = self.sources[name], self._kernels.pop(name, None)
        self.sources[name] = whole._replace(body=change(whole.body))
        try:
            yield
        finally:
            self.sources[name] = whole
            self._kernels.pop(name, None)
            if before is not None:
                self._kernels[name] = before

    def _launch(self, symbol: bytes, sizes: Any, arguments: Any, shared: int) -> int:
        if self._error is not None:
            return _LAUNCH_FAILURE
        try:
            name = readable_name(symbol.decode())
            kernel = self.kernel(name)
            grid, *others = sizes[:3]
            threads, *more = sizes[3:6]
            if (*others, *more) != (1, 1, 1, 1) or len(kernel.entry.parameters) != 1 or shared:
                raise UnknownPtxError(f"a launch of {sizes[:6]} with {shared} bytes of shared memory")
            parameters = ctypes.string_at(arguments[0], kernel.entry.param_bytes)
            self.launches.append((name, grid, threads))
            self.num_instructions += machine.launch(kernel, self.memory, grid, threads, parameters)
        except BaseException as error:  # this is called from C: `checked` raises it
            self._error = error
            return _LAUNCH_FAILURE
        return 0

    def checked(self, status: int) -> None:
        """Raise what a launch raised, and for a status of the library that is not 0."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        native_cuda.check(self.handle, status)

    def seed_axpy(self, operands: Operands, terms: Terms | DeviceTerms, isa: str = "auto") -> None:
        """What `native_cuda.seed_axpy` does, on tensors that lie in the memory."""
        if len(terms.seeds) > native_cuda.MAX_TERMS_BY_VALUE:
            terms = terms.to(torch.device("cpu"))
        num_source_rows = 0
        if operands.rows is not None and operands.inputs is not None:
            num_source_rows = operands.inputs.tensors[0].shape[0]
        table = c_abi.pointer_table(operands)
        copied = (value for value in (terms.seeds, terms.coeffs) if isinstance(value, Tensor))
        try:
            with self.memory.admitted(*copied, rights=READ):
                native_cuda.launch(self.handle, table, operands.rows, num_source_rows, terms, 0, 0)
        finally:
            self.checked(0)
