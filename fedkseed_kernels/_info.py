"""What is installed, what would serve a call, and why."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from fedkseed_kernels import dispatch
from fedkseed_kernels._version import __version__
from fedkseed_kernels.backends import native_cpu, native_cuda
from fedkseed_kernels.operands import CONTRACT_VERSION


def info() -> dict[str, Any]:
    """Versions, backends with their availability, what serves cpu tensors now and why, and the switches.

    Keys: `version`, `contract_version`, `abi_version`, `torch`, `numpy`; `backends`: for each name
    `available` and `reason` (why not, else None; `native` is the CPU library); `native_cuda`: the same of the
    CUDA library; `devices`: the dispatch table; `cpu_backend`: the backend that a call would take now, or the
    reason why it would fail; `cpu_isa`, `cpu_isas_built`, `cpu_isas_usable`: of the native library (None and
    empty without it); `num_threads`, `threads`: how many a call may use, and whose they are; `environment`:
    the switches as they are set, None for unset.
    """
    reasons = {name: backend.unavailable() for name, backend in dispatch.BACKENDS.items()}
    cuda_reason = native_cuda.unavailable()
    has_native = reasons["native"] is None
    threaded = has_native and native_cpu.has_threads()
    try:
        chosen = dispatch.select("cpu")
        cpu_backend, isa = chosen.name, chosen.isa
    except (RuntimeError, ValueError) as error:
        cpu_backend, isa = str(error), "auto"
    usable = native_cpu.usable_isas() if has_native else []
    if threaded:
        threads = "torch's pool (torch.set_num_threads)"
    elif has_native:
        threads = (
            f"the calling thread: torch {torch.__version__} lacks torch_parallel_for, torch >= 2.10 has it"
        )
    else:
        threads = "the calling thread"
    return {
        "version": __version__,
        "contract_version": CONTRACT_VERSION,
        "abi_version": native_cpu.ABI_VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "backends": {name: {"available": r is None, "reason": r} for name, r in reasons.items()},
        "native_cuda": {"available": cuda_reason is None, "reason": cuda_reason},
        "devices": {device: list(names) for device, names in dispatch.TABLE.items()},
        "cpu_backend": cpu_backend,
        "cpu_isa": (usable[-1] if isa == "auto" else isa) if has_native else None,
        "cpu_isas_built": native_cpu.built_isas() if has_native else [],
        "cpu_isas_usable": usable,
        "num_threads": torch.get_num_threads() if threaded else 1,
        "threads": threads,
        "environment": {
            name: os.environ.get(name) for name in (dispatch.BACKEND_VARIABLE, dispatch.CPU_ISA_VARIABLE)
        },
    }
