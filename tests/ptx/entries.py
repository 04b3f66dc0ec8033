"""The entries that only tests call, raw Philox words and the transform of chosen words, and their cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

from fedkseed_kernels.contract import reference
from ptx.arithmetic import Array
from ptx.calls import Driver, Verdict
from ptx.cuda_driver import CudaDriver
from ptx.memory import READ, WRITE, Memory

_NUM_CALLS, _NUM_WORDS = 1000, 20_000
_EDGES = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x1FFFF, 0x20000], np.uint32)
_LAST_WORDS = (1 << 32) - 20_001, 20_001  # first and count of a digest


def _words(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, dtype=np.uint64).astype(np.uint32)


def _verdict(got: Any, expected: Any) -> Verdict:
    got, expected = np.asarray(got), np.asarray(expected)
    num_wrong = int((got.view(np.uint32) != expected.view(np.uint32)).sum())
    return Verdict("differs" if num_wrong else "equal", f"{num_wrong} of {expected.size}")


def _normals(words: Array) -> Array:
    return np.stack(reference.normals_from_words(words), 1)


class _CudaMemory:
    """A new memory of a driver, with copies of arrays in it."""

    def __init__(self, driver: CudaDriver):
        self._memory = driver.memory = Memory(1 << 20)

    def put(self, array: Array, rights: int = READ) -> Array:
        raw = self._memory.allocate(array.nbytes, rights)
        made = raw.view(array.dtype).reshape(array.shape)
        made[...] = array
        return made


def _cuda_philox_words(driver: CudaDriver) -> Verdict:
    memory = _CudaMemory(driver)
    counters, keys = memory.put(_words(3, _NUM_CALLS, 4)), memory.put(_words(4, _NUM_CALLS, 2))
    out = memory.put(np.zeros((_NUM_CALLS, 4), np.uint32), WRITE)
    addresses = (array.ctypes.data for array in (counters, keys, out))
    driver.checked(driver.handle.fk_cuda_philox_words(*addresses, _NUM_CALLS, 0, 0))
    return _verdict(out, reference.philox4x32_10(counters, keys))


def _cuda_normals(driver: CudaDriver) -> Verdict:
    memory = _CudaMemory(driver)
    words = memory.put(np.concatenate([_EDGES, _words(5, _NUM_WORDS)]))
    out = memory.put(np.zeros((words.size, 2), np.float32), WRITE)
    driver.checked(
        driver.handle.fk_cuda_normal_from_words(words.ctypes.data, out.ctypes.data, words.size, 0, 0)
    )
    return _verdict(out, _normals(words))


def _cuda_digest(driver: CudaDriver) -> Verdict:
    digest = _CudaMemory(driver).put(np.array([11], np.uint64), READ | WRITE)
    driver.checked(driver.handle.fk_cuda_normal_digest(*_LAST_WORDS, digest.ctypes.data, 0, 0))
    return _verdict(digest, np.array([(reference.normal_digest(*_LAST_WORDS) + 11) % 2**64], np.uint64))


CUDA: dict[str, Callable[[CudaDriver], Verdict]] = {
    "philox_words": _cuda_philox_words,
    "normal_from_words": _cuda_normals,
    "normal_digest": _cuda_digest,
}


def _triton_call(driver: Driver, name: str, *arguments: Any) -> Any:
    """What an entry returns; kernels may write the tensors that it makes."""
    from fedkseed_kernels.backends.triton import test_entries

    driver.memory = Memory(1 << 20)
    with mock.patch.object(driver, "rights", READ | WRITE):
        return getattr(test_entries, name)(*arguments)


def _tensor(words: Array) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int32))


def _triton_philox_words(driver: Driver) -> Verdict:
    counters, keys = _words(3, _NUM_CALLS, 4), _words(4, _NUM_CALLS, 2)
    got = _triton_call(driver, "philox_words", _tensor(counters), _tensor(keys))
    return _verdict(got.numpy(), reference.philox4x32_10(counters, keys))


def _triton_normals(driver: Driver) -> Verdict:
    words = np.concatenate([_EDGES, _words(5, _NUM_WORDS)])
    return _verdict(_triton_call(driver, "normal_from_words", _tensor(words)).numpy(), _normals(words))


def _triton_digest(driver: Driver) -> Verdict:
    got = _triton_call(driver, "normal_digest", *_LAST_WORDS, "cpu")
    return _verdict(np.array([got], np.uint64), np.array([reference.normal_digest(*_LAST_WORDS)], np.uint64))


TRITON: dict[str, Callable[[Driver], Verdict]] = {
    "philox_words": _triton_philox_words,
    "normal_from_words": _triton_normals,
    "normal_digest": _triton_digest,
}
