"""Samples of the package's noise, through its public functions, as NumPy arrays."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

import fedkseed_kernels
from fedkseed_kernels.backends import native_cpu

# One seed of no structure for everything that does not vary it, and one of much structure.
SEED = 0x9E3779B97F4A7C15
ZERO_SEED = 0


def gaussian(num: int, seed: int, stream: int = 0, offset: int = 0) -> NDArray[np.float32]:
    """Elements offset .. offset + num - 1 of one stream."""
    values: NDArray[np.float32] = fedkseed_kernels.normal((num,), seed, stream=stream, offset=offset).numpy()
    return values


def rademacher(num: int, seed: int, stream: int = 0, offset: int = 0) -> NDArray[np.float32]:
    """The same for signs +-1."""
    values: NDArray[np.float32] = fedkseed_kernels.normal(
        (num,), seed, stream=stream, offset=offset, family="rademacher"
    ).numpy()
    return values


@functools.lru_cache(maxsize=1)
def long_sample() -> NDArray[np.float32]:
    """2^26 elements, 2^22 of each of 16 streams: even and odd elements stand at even and odd indices."""
    z = np.concatenate([gaussian(1 << 22, SEED, stream) for stream in range(16)])
    z.setflags(write=False)
    return z


def transformed(words: NDArray[np.uint32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The even and odd normals of chosen words, through the native library's test entry."""
    pairs = native_cpu.normal_from_words(words)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def philox(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Raw Philox words [n, 4] of counters [n, 4] and keys [n, 2], through the native library's test entry."""
    return native_cpu.philox_words(counters, keys)


def group_words(seed: int, stream: int, groups: NDArray[np.uint64], tag: int) -> NDArray[np.uint32]:
    """The words [n, 4] of groups [n], with key and counter filled as the contract says."""
    counters = np.empty((groups.size, 4), dtype=np.uint32)
    counters[:, 0] = groups & np.uint64(0xFFFFFFFF)
    counters[:, 1] = stream
    counters[:, 2] = groups >> np.uint64(32)
    counters[:, 3] = tag
    keys = np.empty((groups.size, 2), dtype=np.uint32)
    keys[:] = seed % 2**32, seed >> 32
    return philox(counters, keys)
