"""The package's Triton launcher without a GPU: launches are compiled for one and run by the emulator."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver as active_driver

from fedkseed_kernels.backends import triton as triton_backend
from fedkseed_kernels.backends.triton import launch as launcher
from fedkseed_kernels.backends.triton import test_entries
from fedkseed_kernels.backends.triton.kernels import runs_kernel, segments_kernel
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms
from ptx import machine
from ptx.cuda_build import CACHE
from ptx.kernel import Kernel
from ptx.memory import READ, Memory
from ptx.parser import FaultError, UnknownPtxError, sources_of

VERSION = triton.__version__
# How struct packs an argument of each type.
_CODES = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"},
    **{"u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"},
}
_POINTER = "Q"
_KERNELS = (
    segments_kernel,
    runs_kernel,
    test_entries._philox_kernel,
    test_entries._normals_kernel,
    test_entries._digest_kernel,
)


class _NoGpu:
    """What Triton's launches ask of a driver."""

    def __init__(self, architecture: int):
        self._target = GPUTarget("cuda", architecture, machine.WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class TritonDriver:
    """A backend of tensors in `memory`, by kernels that Triton compiles up to PTX. See `driving`.

    Attributes:
        memory: set before the first launch, anew as often as wanted.
        rights: what kernels may do with tensors outside of the arena: those that the launcher made.
        launches: (kernel, blocks, threads of a block) of each launch so far.
        num_instructions: of all threads of all launches so far.
    """

    WRITES_FP32 = triton_backend.WRITES_FP32

    def __init__(self) -> None:
        self.memory = Memory(1 << 22)
        self.rights = READ
        self.launches: list[tuple[str, int, int]] = []
        self.num_instructions = 0
        self._kernels: dict[str, Kernel] = {}
        self._names: dict[str, str] = {}  # by the hash of a compilation
        self._change: tuple[str, Callable[[str], str]] | None = None

    def unavailable(self, device: torch.device | None = None) -> None:
        return None

    def kernels(self) -> dict[str, Kernel]:
        """Those that were launched so far, by a name that says which variant each is."""
        return dict(self._kernels)

    def seed_axpy(self, operands: Operands, terms: Terms | DeviceTerms, isa: str = "auto") -> None:
        launcher.seed_axpy(operands, terms)

    def body(self, function: str) -> str:
        """The text of the variant of a Triton function that was launched last, as `damaged` changes it."""
        name = next(name for name, _, _ in reversed(self.launches) if name.split()[0] == function)
        return self._kernels[name].source.body

    @contextmanager
    def damaged(self, function: str, change: Callable[[str], str]) -> Iterator[None]:
        """Run the variants of a Triton function from changed texts within a block."""
        before = self._kernels, self._names
        self._kernels, self._names, self._change = {}, {}, (function, change)
        try:
            yield
        finally:
            (self._kernels, self._names), self._change = before, None

    def _kernel(self, compiled: CompiledKernel, given: dict[str, Any]) -> tuple[str, Kernel]:
        if compiled.hash not in self._names:
            (source,) = sources_of(compiled.asm["ptx"]).values()
            if self._change is not None and self._change[0] == source.name:
                source = source._replace(body=self._change[1](source.body))
            name = f"{variant_name(source.name, given)} #{source.digest[:6]}"
            self._names[compiled.hash] = name
            self._kernels.setdefault(name, Kernel(source))
        name = self._names[compiled.hash]
        return name, self._kernels[name]

    def launch(self, compiled: CompiledKernel, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Run a compiled kernel. arguments: all of its function, compile-time ones too."""
        given = dict(zip(compiled.src.fn.arg_names, arguments, strict=True))
        name, kernel = self._kernel(compiled, given)
        types = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
        values = [
            (_POINTER, given[name].data_ptr()) if kind[0] == "*" else (_CODES[kind], given[name])
            for name, kind in types.items()
        ]
        # Scratch memory of the launch, which no kernel here asks for.
        values += [(_POINTER, 0)] * (len(kernel.entry.parameters) - len(values))
        parameters = bytearray(kernel.entry.param_bytes)
        for parameter, (code, value) in zip(kernel.entry.parameters, values, strict=True):
            if struct.calcsize(code) != parameter.num_bytes:
                raise FaultError(
                    f"parameter {parameter.name} of {parameter.num_bytes} bytes is packed as {code}"
                )
            struct.pack_into(f"<{code}", parameters, parameter.offset, value)
        metadata = compiled.metadata
        if tuple(grid[1:]) != (1, 1) or metadata.num_ctas != 1:
            raise UnknownPtxError(f"a grid of {grid} in clusters of {metadata.num_ctas}")
        threads = metadata.num_warps * machine.WARP
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        self.launches.append((name, grid[0], threads))
        with self.memory.admitted(*tensors, rights=self.rights):
            self.num_instructions += machine.launch(
                kernel, self.memory, grid[0], threads, bytes(parameters), metadata.shared
            )


def variant_name(function: str, given: dict[str, Any]) -> str:
    """A compilation in words, from the compile-time arguments of the package's kernels."""
    if "FAMILY" not in given:
        return function
    num_terms, num_blocks = given["NUM_TERMS"], given.get("NUM_BLOCKS", 1)
    words = [function, given["FAMILY"], f"{given['DTYPE']},", f"K = {num_terms}" if num_terms else "K loop"]
    words += ["pair"] * given["PAIR"] + ["noise"] * (not given["HAS_INPUT"])
    words += ["stochastic"] * given["STOCHASTIC"] + ["rows"] * given.get("HAS_ROWS", False)
    words += [f"residuals {given['RESIDUALS']}"] * (given["RESIDUALS"] != "none")
    words += [f"{num_blocks} blocks"] * (num_blocks > 1)
    return " ".join(words)


@contextmanager
def driving(architecture: int, cache: Path = CACHE) -> Iterator[TritonDriver]:
    """A driver that Triton's launches of this process go to within a block.

    cache: what Triton compiled is kept there, apart from a user's own, as it stops at PTX.
    """
    made = TritonDriver()

    def init_handles(compiled: Any) -> None:
        if compiled.module is None:
            compiled.module, compiled.function = True, compiled
            # Triton's launcher: grid, stream, function, packed metadata, metadata, two hooks, arguments.
            compiled._run = lambda x, y, z, *rest: made.launch(compiled, (x, y, z), rest[6:])

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(cache / f"triton-{VERSION}")))
        for owner, name, value in (
            (launcher, "on_device", lambda _device: contextlib.nullcontext()),
            (test_entries, "on_device", lambda _device: contextlib.nullcontext()),
            (CompiledKernel, "_init_handles", init_handles),
            (CUDABackend, "make_cubin", lambda *_arguments, **_options: b"none"),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(_forget)
        _forget()
        stack.callback(active_driver.set_active, active_driver._active)
        active_driver.set_active(_NoGpu(architecture))
        yield made


def _forget() -> None:
    """Forget compiled kernels: they know the driver and the architecture that they were compiled for."""
    for kernel in _KERNELS:
        kernel.device_caches.clear()
