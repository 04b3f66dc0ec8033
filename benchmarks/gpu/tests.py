"""The parts that run tests/gpu: as they are, and under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import sys

from benchmarks.gpu.channel import FAILED, REFUSED, SKIPPED, Channel, PartEnded
from benchmarks.gpu.plan import KERNELS, Settings
from benchmarks.gpu.processes import describe_status, find_tool, stream

NATIVE, TRITON = "tests/gpu/test_native_cuda_gpu.py", "tests/gpu/test_triton_gpu.py"
#: Tests that reach every kernel with few elements: a sanitizer slows a kernel down some fifty times.
MEMCHECKED = "pair_rows_views or compensated or nan_coefficients or philox_words"
#: Two tests of those: shared memory is the same for every dtype.
RACECHECKED = "pair_rows_views and dtype2"
_MOST_WORKERS = 8
_NO_TEST_COLLECTED = 5  # pytest's status
_FOUND_ERRORS = 9  # what compute-sanitizer is told to end with; not a status of pytest
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)")
_REFUSAL = re.compile(
    r"=+ .*(?:Device not supported|Internal Sanitizer Error|Unable to find injection library|"
    r"Failed to initialize)",
)


def native(settings: Settings, channel: Channel) -> None:
    """The part of the CUDA library's tests."""
    _run_tests(NATIVE, channel)


def triton(settings: Settings, channel: Channel) -> None:
    """The part of the Triton kernels' tests. Most of its time is Triton compiling, on all processors."""
    _require("triton")
    _run_tests(TRITON, channel)


def memcheck(settings: Settings, channel: Channel) -> None:
    """The part of compute-sanitizer's memcheck."""
    _sanitize("memcheck", MEMCHECKED, channel)


def racecheck(settings: Settings, channel: Channel) -> None:
    """The part of compute-sanitizer's racecheck."""
    _sanitize("racecheck", RACECHECKED, channel)


def command(file: str, channel: Channel, *options: str) -> list[str]:
    """The command line of pytest for a file of tests."""
    line = [
        sys.executable,
        "-m",
        "pytest",
        file,
        "-v",
        "--tb=short",
        "--durations=10",
        "-p",
        "no:cacheprovider",
    ]
    line += ["-p", "benchmarks.gpu.pytest_rows", "--gpu-rows", str(channel.path)]
    # Bits are the question here: that a package warns of its next version must not cost the answer.
    return [*line, "-W", "default", *options]


def judge(status: int, channel: Channel) -> None:
    """Raises unless some test ran and none failed.

    Args:
        status: of pytest.

    Raises:
        PartEnded: no test ran, which is "skipped"; or some failed.
    """
    tests = dict(channel.noted("tests") or {})
    skips = tests.pop("skips", {})
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tests.items()) or "no test was collected"
    failed = set(tests) - {"passed", "skipped"}
    if status in (0, _NO_TEST_COLLECTED) and not tests.get("passed") and not failed:
        reasons = f" ({'; '.join(skips)})" if skips else ""
        raise PartEnded(SKIPPED, f"no test ran: {counts}{reasons}")
    if status != 0:
        raise PartEnded(FAILED, f"{counts}; the command ended with {describe_status(status)}")


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise PartEnded(SKIPPED, f"expected the package {package}, which is not installed")


def _run_tests(file: str, channel: Channel) -> None:
    _require("pytest")
    workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
    if importlib.util.find_spec("xdist") is None:
        channel.note(workers="1: pytest-xdist is not installed")
        options = []
    else:
        channel.note(workers=workers)
        options = ["--numprocesses", str(workers), "--dist", "worksteal"]
    status, _ = stream(command(file, channel, *options))
    judge(status, channel)


def _sanitize(check: str, chosen: str, channel: Channel) -> None:
    _require("pytest")
    tool = find_tool("compute-sanitizer")
    # torch's allocator hands out parts of large segments, within which memcheck sees no bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = stream(sanitizer_command(tool, check, chosen, channel), environment)
    judge_sanitizer(status, output, channel)


def sanitizer_command(tool: str, check: str, chosen: str, channel: Channel) -> list[str]:
    """The command line of compute-sanitizer over the native tests of some names; it checks our kernels."""
    line = [tool, "--tool", check, "--error-exitcode", str(_FOUND_ERRORS), "--target-processes", "all"]
    for kernel in KERNELS:
        line += ["--kernel-name", f"kernel_substring={kernel}"]
    return [*line, *command(NATIVE, channel, "-x", "-k", chosen)]


def judge_sanitizer(status: int, output: list[str], channel: Channel) -> None:
    """Raises unless tests ran, passed, and the tool's summary counts no error.

    Raises:
        PartEnded: the tool refuses; it found errors, or gives no summary; what `judge` says of the tests.
    """
    if (refusal := next(filter(_REFUSAL.match, output), None)) is not None:
        raise PartEnded(REFUSED, f"compute-sanitizer: {refusal.strip('= ')}")
    summaries = [found for text in output if (found := _SUMMARY.match(text))]
    if status == _FOUND_ERRORS or any(int(found[1]) for found in summaries):
        texts = [found.string.strip("= ") for found in summaries]
        raise PartEnded(FAILED, f"compute-sanitizer found errors: {'; '.join(texts) or 'see the log'}")
    judge(status, channel)
    if not summaries:
        raise PartEnded(FAILED, "compute-sanitizer ended without a summary: it may have checked nothing")
