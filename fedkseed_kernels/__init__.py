"""Bit-exact seeded noise and the one fused primitive over it: w <- alpha w + sum_k c_k z(seed_k).

The noise contract is docs/noise-contract.md; arguments, dtypes and errors are described in
`fedkseed_kernels.ops`.
"""

from fedkseed_kernels._version import __version__
from fedkseed_kernels.arguments.overlap import Overlap, find_overlap
from fedkseed_kernels.contract import derived
from fedkseed_kernels.contract.derived import candidate_seeds
from fedkseed_kernels.contract.reference import CONTRACT_VERSION, FAMILIES
from fedkseed_kernels.dispatch import Verification, backend, cpu_isa, info, unavailable, verify
from fedkseed_kernels.ops import normal, perturb_, seed_axpy, seed_axpy_, seed_axpy_pair
from fedkseed_kernels.prepared import (
    Prepared,
    PreparedOut,
    PreparedPair,
    prepare,
    prepare_out,
    prepare_pair,
)
from fedkseed_kernels.self_test.remembered import cache_folder

__all__ = [
    "CONTRACT_VERSION",
    "FAMILIES",
    "Overlap",
    "Prepared",
    "PreparedOut",
    "PreparedPair",
    "Verification",
    "__version__",
    "backend",
    "cache_folder",
    "candidate_seeds",
    "cpu_isa",
    "derived",
    "find_overlap",
    "info",
    "normal",
    "perturb_",
    "prepare",
    "prepare_out",
    "prepare_pair",
    "seed_axpy",
    "seed_axpy_",
    "seed_axpy_pair",
    "unavailable",
    "verify",
]
