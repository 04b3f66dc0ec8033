"""The environment variables that a worker's answers depend on: under others it is another worker."""

from __future__ import annotations

import os

#: Read once, at the start of a process: which devices it sees, who computes, in how many threads, and which
#: instructions or roundings the libraries below torch take. docs/resident.md lists them.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "FEDKSEED_BACKEND",
    "FEDKSEED_CPU_ISA",
    "FEDKSEED_SELF_TEST",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
)


def stamp() -> str:
    """What they are in this process; unset is not empty (CUDA_VISIBLE_DEVICES)."""
    return repr([os.environ.get(name) for name in VARIABLES])
