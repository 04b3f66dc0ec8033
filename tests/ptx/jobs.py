"""The parts of `make ptx` and their jobs: what runs on which driver, and what a record of it rests on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from fedkseed_kernels.contract import reference
from ptx import damages
from ptx.calls import Driver, Verdict, run_case
from ptx.cases import all_cases
from ptx.cuda_build import ROOT, digest_of
from ptx.cuda_driver import CudaDriver
from ptx.memory import READ, WRITE, Memory

HERE = Path(__file__).parent
#: Architectures of the CUDA library's PTX, and those of Triton with how many cases make one of a sample.
CUDA_ARCHITECTURES = (90, 80, 100, 120)
TRITON_ARCHITECTURES = {90: 1, 80: 6, 100: 6}
# What decides a verdict beside the kernels: the emulator, and the launching code on the host.
_NO_EMULATOR = ("__main__.py", "worker.py", "log.py", "jobs.py", "cases.py", "damages.py")
_HOST = ("operands.py", "layout.py", "contract/*.py", "backends/c_abi.py")
_INCLUDE = re.compile(r'^#include "(.*?)"', re.M)


class Job(NamedTuple):
    """What runs, and a text that says all about it but the kernels and the code that launches them."""

    definition: str
    run: Callable[[Any], Verdict]


class Part(NamedTuple):
    """A set of jobs for one compiler and architecture. kind: cuda, triton, or damage-cuda, damage-triton."""

    kind: str
    architecture: int
    version: str = ""  # of Triton

    @property
    def label(self) -> str:
        return "-".join(filter(None, (self.kind, self.version, f"sm{self.architecture}")))

    @property
    def is_cuda(self) -> bool:
        return self.kind.endswith("cuda")


def emulator_digest() -> str:
    files = [path for path in HERE.iterdir() if path.suffix in (".py", ".cpp")]
    return digest_of(p for p in files if not p.name.startswith("test_") and p.name not in _NO_EMULATOR)


def host_digest(part: Part) -> str:
    """A hash of the code that turns checked operands into launches, and of the reference."""
    package = ROOT / "fedkseed_kernels"
    files = [path for pattern in _HOST for path in package.glob(pattern)]
    if not part.is_cuda:
        return digest_of([*files, *(package / "backends" / "triton").glob("*.py")], part.label)
    pending = [ROOT / "csrc" / "cuda" / name for name in ("plan.cu", "entry.cu")]
    found: set[Path] = set()
    while pending:
        path = pending.pop()
        if path.exists() and path not in found:
            found.add(path)
            names = _INCLUDE.findall(path.read_text())
            pending += [ROOT / "csrc" / folder / name for name in names for folder in ("cuda", "include")]
    return digest_of([*files, package / "backends" / "native_cuda.py", *found])


def jobs_of(part: Part) -> dict[str, Job]:
    """The jobs of a part by name."""
    if part.kind.startswith("damage"):
        listed = damages.CUDA if part.is_cuda else damages.TRITON
        return {d.name: Job(repr(d), partial(_run_damage, d)) for d in listed}
    jobs = {str(case): Job(repr(case), partial(_run_case, case)) for case in all_cases()}
    if part.is_cuda:
        return {**{name: Job(name, test) for name, test in ENTRY_TESTS.items()}, **jobs}
    every = TRITON_ARCHITECTURES[part.architecture]
    jobs = dict(list(jobs.items())[::every])
    # Lists of many tiles get programs of several blocks: forced here for some.
    several = {
        f"programs of eight blocks: {case}": Job(f"eight blocks {case!r}", partial(_run_case_in_eight, case))
        for case in all_cases()
        if case.name == "flat" and case.k in (1, 2) and case.alpha == 1 and not case.device
    }
    return {
        "normal_digest": Job("normal_digest", _triton_digest),
        **dict(list(several.items())[::every]),
        **jobs,
    }


def _run_damage(damage: damages.Damage, driver: damages.DamagedDriver) -> Verdict:
    return damages.run_damage(driver, damage)


def _run_case(case: Any, driver: Driver) -> Verdict:
    return run_case(driver, case)


def _run_case_in_eight(case: Any, driver: Driver) -> Verdict:
    from fedkseed_kernels.backends.triton import launch

    with mock.patch.object(launch, "FEW_TILES", 0):
        return run_case(driver, case)


@contextmanager
def open_driver(part: Part) -> Iterator[Any]:
    """The driver that the jobs of a part take."""
    with ExitStack() as stack:
        if part.is_cuda:
            yield CudaDriver(part.architecture)
        else:
            from ptx.triton_driver import driving

            yield stack.enter_context(driving(part.architecture))


# --- functions that only tests call


def _put(memory: Memory, array: Any, rights: int = READ) -> Any:
    """A copy of an array in the memory."""
    raw = memory.allocate(array.nbytes, rights)
    raw.view(array.dtype)[:] = array.reshape(-1)
    return raw.view(array.dtype).reshape(array.shape)


def _words(generator: np.random.Generator, *shape: int) -> Any:
    return generator.integers(0, 1 << 32, shape, dtype=np.uint64).astype(np.uint32)


def _verdict(is_equal: bool, detail: str) -> Verdict:
    return Verdict("equal" if is_equal else "differs", detail)


def _philox_words(driver: CudaDriver) -> Verdict:
    count, generator = 1000, np.random.default_rng(3)
    driver.memory = Memory(1 << 20)
    counters, keys = (_put(driver.memory, _words(generator, count, width)) for width in (4, 2))
    out = _put(driver.memory, np.zeros((count, 4), np.uint32), WRITE)
    addresses = (array.ctypes.data for array in (counters, keys, out))
    driver.checked(driver.handle.fk_cuda_philox_words(*addresses, count, 0, 0))
    return _verdict(bool((out == reference.philox4x32_10(counters, keys)).all()), f"{count} calls")


def _normals(driver: CudaDriver) -> Verdict:
    edges = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x1FFFF, 0x20000], np.uint32)
    driver.memory = Memory(1 << 20)
    words = _put(driver.memory, np.concatenate([edges, _words(np.random.default_rng(4), 60_000)]))
    out = _put(driver.memory, np.zeros((words.size, 2), np.float32), WRITE)
    addresses = words.ctypes.data, out.ctypes.data
    driver.checked(driver.handle.fk_cuda_normal_from_words(*addresses, words.size, 0, 0))
    expected = np.stack(reference.normals_from_words(words), 1)
    return _verdict(bool((out.view(np.uint32) == expected.view(np.uint32)).all()), f"{words.size} words")


def _digest(driver: CudaDriver) -> Verdict:
    first, count = (1 << 32) - 70_001, 70_001
    driver.memory = Memory(1 << 20)
    digest = _put(driver.memory, np.array([11], np.uint64), READ | WRITE)
    driver.checked(driver.handle.fk_cuda_normal_digest(first, count, digest.ctypes.data, 0, 0))
    expected = (reference.normal_digest(first, count) + 11) % 2**64
    return _verdict(int(digest[0]) == expected, f"{count} words")


ENTRY_TESTS: dict[str, Callable[[CudaDriver], Verdict]] = {
    "philox_words": _philox_words,
    "normal_from_words": _normals,
    "normal_digest": _digest,
}


def _triton_digest(driver: Any) -> Verdict:
    from fedkseed_kernels.backends.triton import test_entries

    first, count = (1 << 32) - 20_001, 20_001
    driver.memory = Memory(1 << 20)
    with mock.patch.object(driver, "rights", READ | WRITE):
        got = test_entries.normal_digest(first, count, "cpu")
    return _verdict(got == reference.normal_digest(first, count), f"{count} words")
