"""The parts of `make ptx` and their jobs: what runs on which driver, and what a record of it rests on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from support.native_build import load_setup

from ptx import damages, entries
from ptx.calls import Driver, Verdict, run_case
from ptx.cases import all_cases
from ptx.cuda_build import ROOT, digest_of
from ptx.cuda_driver import CudaDriver

HERE = Path(__file__).parent
#: Those that the CUDA library is built for, and those of Triton with how many cases make one of a sample.
CUDA_ARCHITECTURES = sorted(load_setup().CUDA_ARCHS, key=lambda architecture: architecture != 90)
TRITON_ARCHITECTURES = {90: 1, 80: 6, 100: 6}
# What decides a verdict beside the kernels: the emulator, and the launching code on the host.
_NO_EMULATOR = (
    *("__init__.py", "__main__.py", "runner.py", "worker.py", "log.py", "jobs.py", "missed.py"),
    *("cases.py", "damages.py", "entries.py"),  # a job's definition says what of these it is
)
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

    @classmethod
    def of_label(cls, label: str) -> Part:
        found = re.fullmatch(r"((?:damage-)?(?:cuda|triton))-(?:(.+)-)?sm(\d+)", label)
        assert found is not None, label
        return cls(found[1], int(found[3]), found[2] or "")

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
        found_here = (package / "backends" / "triton").glob("*.py")
        return digest_of([*files, *(path for path in found_here if path.name != "self_test.py")], part.label)
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
        text = digest_of([HERE / "damages.py"])
        return {d.name: Job(f"{d!r} {text}", partial(_run_damage, d)) for d in listed}
    jobs = {str(case): Job(repr(case), partial(_run_case, case)) for case in all_cases()}
    if part.is_cuda:
        return {**_tests(entries.CUDA), **jobs}
    every = TRITON_ARCHITECTURES[part.architecture]
    jobs = dict(list(jobs.items())[::every])
    # Lists of many tiles get programs of several blocks: forced here for some.
    several = {
        f"programs of eight blocks: {case}": Job(f"eight blocks {case!r}", partial(_run_case_in_eight, case))
        for case in all_cases()
        if case.name == "flat" and case.k in (1, 2) and case.alpha == 1 and not case.device
    }
    return {**_tests(entries.TRITON), **dict(list(several.items())[::every]), **jobs}


def _tests(listed: dict[str, Callable[[Any], Verdict]]) -> dict[str, Job]:
    text = digest_of([HERE / "entries.py"])
    return {name: Job(f"{name} {text}", test) for name, test in listed.items()}


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
