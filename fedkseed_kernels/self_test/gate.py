"""When a self-test runs, and its verdicts in this process.

Nothing locks: threads that come first at the same time each run the test, to the same verdict. A forked child
has the verdicts of its parent.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from fedkseed_kernels.self_test import remembered

if TYPE_CHECKING:
    from fedkseed_kernels.self_test.run import Report

logger = logging.getLogger("fedkseed_kernels")

SELF_TEST_VARIABLE = "FEDKSEED_SELF_TEST"
# What `status` may say, beside a failure.
PASSED_BEFORE, PASSED_NOW, NOT_RUN = "passed before", "passed in this process", "not run yet"
SWITCHED_OFF, NONE = f"switched off by {SELF_TEST_VARIABLE}=0", "none"


class SelfTest(NamedTuple):
    """How a backend proves itself at its first use on a device.

    kind: the golden cases that it runs, one of `cases.KINDS`. machine_code: of a device and an instruction
    set ("auto" for the best, and on a GPU), what tells the code that would run, the device and its driver
    from any others, or None if nothing does: a test that passed is remembered by it.
    """

    kind: str
    machine_code: Callable[[torch.device, str], str | None]


class Tested(Protocol):
    """What a backend provides for its self-test; `dispatch.Backend` describes it."""

    WRITES_FP32: bool
    SELF_TEST: SelfTest | None

    @property
    def seed_axpy(self) -> Callable[..., None]:
        """The primitive."""


# A backend on a device, with an instruction set where it has several; "auto" for the best.
Key = tuple[Tested, torch.device, str]

#: Of those that may be used, what is known.
verdicts: dict[Key, str] = {}
#: Of those whose self-test failed in this process, the reason not to use them.
failures: dict[Key, str] = {}
# Those of which it has been said that they wait.
_deferred: set[str] = set()


def is_switched_on() -> bool:
    """Whether self-tests run: FEDKSEED_SELF_TEST.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(SELF_TEST_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"expected {SELF_TEST_VARIABLE} to be 0 or 1, got {value!r}")
    return value == "1"


def may_serve(key: Key) -> bool:
    """Whether a backend may serve a call now: at its first use it runs its self-test, or remembers one.

    After False `failures` has the reason. Where the test cannot run yet (`ran`) it may serve all the same.

    Raises:
        ValueError: FEDKSEED_SELF_TEST is neither 0 nor 1.
    """
    if key in verdicts or key in failures:
        return key in verdicts
    backend, device, isa = key
    if device.type == "cuda" and device.index is None:
        return True  # there is no tensor yet
    if backend.SELF_TEST is None:
        verdicts[key] = NONE
    elif not is_switched_on():
        verdicts[key] = SWITCHED_OFF
    elif remembered.is_remembered(backend.SELF_TEST.machine_code(device, isa)):
        verdicts[key] = PASSED_BEFORE
    elif device.type == "cuda":
        ran(f"on {device}", lambda: test(key))
    else:
        test(key)
    return key not in failures


def has_verdict(key: Key) -> bool:
    """Whether `may_serve` need not be asked again: what was deferred has none."""
    return key in verdicts


def ran(what: str, test: Callable[[], object]) -> bool:
    """Run a self-test on a GPU; whether it ran.

    While a CUDA graph is captured, and where the device has no memory left for it, it is deferred to the next
    call; that is said once.

    Args:
        what: which one it is, after "the self-test".
    """
    reason = "a CUDA graph is being captured"
    if not torch.cuda.is_current_stream_capturing():
        try:
            test()
            return True
        except torch.OutOfMemoryError:
            reason = "the device has no memory left for it"
    if what not in _deferred:
        _deferred.add(what)
        logger.warning("the self-test %s is deferred to the next call: %s", what, reason)
    return False


def test(key: Key) -> Report:
    """Run all golden cases through a backend, whatever is known, and note the verdict.

    Triton too, which has no self-test of all at its first use: those of a GPU, which are not remembered.
    """
    from fedkseed_kernels.self_test import run

    backend, device, isa = key
    own = backend.SELF_TEST
    kind, identity = ("gpu", None) if own is None else (own.kind, own.machine_code(device, isa))
    options = {"isa": isa} if device.type == "cpu" else {}

    def seed_axpy(operands: object, terms: object) -> None:
        backend.seed_axpy(operands, terms, **options)

    report = run.compare(seed_axpy, kind, device, backend.WRITES_FP32)
    if report.mismatches:
        verdicts.pop(key, None)
        failures[key] = why_it_fails(str(device) if isa == "auto" else f"{device} ({isa})", report)
        remembered.forget(identity)
    else:
        failures.pop(key, None)
        verdicts[key] = PASSED_NOW
        remembered.remember(identity)
    return report


def why_it_fails(where: str, report: Report) -> str:
    """The reason that a failed self-test is: its first case, and what to do."""
    case, expected, got = report.mismatches[0]
    return (
        f"it fails its self-test on {where}: the case '{case}' has digest {got}, expected {expected}; "
        f"{len(report.mismatches)} of {report.num_cases} cases differ; reinstall, and if that does not help "
        "report the output of: fedkseed info --verify"
    )


def status(key: Key) -> str:
    """What is known of a backend's self-test on a device; this runs none."""
    if (reason := failures.get(key)) is not None:
        return f"failed: {reason}"
    if (verdict := verdicts.get(key)) is not None:
        return verdict
    backend, device, isa = key
    if backend.SELF_TEST is None:
        return NONE
    is_remembered = remembered.is_remembered(backend.SELF_TEST.machine_code(device, isa))
    return PASSED_BEFORE if is_remembered else NOT_RUN
