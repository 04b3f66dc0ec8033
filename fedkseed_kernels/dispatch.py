"""Which backend serves which device, and what is installed.

An explicit request that cannot be met raises; a choice made here is logged once, with its reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fedkseed_kernels._version import __version__
from fedkseed_kernels.backends import c_abi, native_cpu, native_cuda, reference, widening
from fedkseed_kernels.backends import triton as triton_backend
from fedkseed_kernels.contract.reference import CONTRACT_VERSION
from fedkseed_kernels.operands import ISA_CODES, DeviceTerms, Operands, Terms
from fedkseed_kernels.self_test import gate
from fedkseed_kernels.self_test.gate import SELF_TEST_VARIABLE, SelfTest

logger = logging.getLogger("fedkseed_kernels")

BACKEND_VARIABLE = "FEDKSEED_BACKEND"
CPU_ISA_VARIABLE = "FEDKSEED_CPU_ISA"


class Backend(Protocol):
    """What the module of a backend provides."""

    #: Whether it writes results of 16-bit tensors to fp32 outputs; `backends.widening` does it for others.
    WRITES_FP32: bool
    #: How it proves itself at its first use on a device; None where there is nothing to prove at that time.
    SELF_TEST: SelfTest | None

    def unavailable(self, device: torch.device | None = None) -> str | None:
        """Why it cannot be used, with what to do about it; None when it can.

        Args:
            device: the answer is then that very device's (which type it serves is the table's matter). It is
                asked for at every call, so the backend remembers it. None asks for this machine.
        """

    @property
    def seed_axpy(self) -> Callable[..., None]:
        """The primitive over checked operands and terms: Terms; backends of cuda tensors also take
        DeviceTerms, the native one of cpu tensors an instruction set, `isa`."""


# What the choice is made for; "cuda" without an index is the current device.
Device = torch.device | str

# The whole choice: for each device type the backends that can serve it, best first.
TABLE: dict[str, dict[str, Backend]] = {
    "cpu": {"native": native_cpu, "reference": reference},
    "cuda": {"native": native_cuda, "triton": triton_backend},
}
NAMES = ("native", "triton", "reference")

_backend_override: ContextVar[str | None] = ContextVar("fedkseed_backend", default=None)
_isa_override: ContextVar[str | None] = ContextVar("fedkseed_cpu_isa", default=None)
_logged: set[tuple[torch.device, str]] = set()
# Requests that need no more than a choice: device, backend and what was asked for, each proved and said.
_settled: set[tuple[torch.device, Backend, str, str]] = set()


class Selection(NamedTuple):
    """A backend by name, the instruction set asked for, and the primitive on both."""

    name: str
    backend: Backend
    isa: str
    seed_axpy: Callable[..., None]


def _known(what: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"expected {what} to be one of {', '.join(known)}, got {value!r}")
    return value


def _requested(variable: str, override: ContextVar[str | None], known: tuple[str, ...]) -> str:
    value = override.get()
    if value is None:
        value = os.environ.get(variable) or "auto"
    return value if value == "auto" else _known(variable, value, known)


def requested_backend() -> str:
    """The backend asked for by `backend(...)`, else by FEDKSEED_BACKEND; "auto" when by neither.

    Raises:
        ValueError: the name is unknown.
    """
    return _requested(BACKEND_VARIABLE, _backend_override, ("auto", *NAMES))


def requested_cpu_isa() -> str:
    """The instruction set asked for by `cpu_isa(...)`, else by FEDKSEED_CPU_ISA; "auto" when by neither.

    Raises:
        ValueError: the name is unknown.
    """
    return _requested(CPU_ISA_VARIABLE, _isa_override, tuple(ISA_CODES))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Ask for a backend within a block, over FEDKSEED_BACKEND. "auto" asks for the automatic choice."""
    token = _backend_override.set(_known("backend", name, ("auto", *NAMES)))
    try:
        yield
    finally:
        _backend_override.reset(token)


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Ask for an instruction set of the native backend within a block, over FEDKSEED_CPU_ISA."""
    token = _isa_override.set(_known("cpu_isa", name, tuple(ISA_CODES)))
    try:
        yield
    finally:
        _isa_override.reset(token)


def backend_of(name: str, device_type: str) -> Backend:
    """The backend of that name for tensors of a device type; where it has no place, that of another type."""
    found = TABLE.get(device_type, {}).get(name)
    return found or next(backends[name] for backends in TABLE.values() if name in backends)


def _refusal(name: str, device: torch.device, isa: str) -> str | None:
    """Why a backend cannot serve tensors of a device, itself or in general; None when it can.

    isa: the instruction set asked for. A self-test that failed is a reason, one that has not run yet is not.
    """
    found = backend_of(name, device.type)
    reason = found.unavailable(device)
    if reason is None and gate.failures:
        reason = gate.failures.get((found, device, isa if device.type == "cpu" else "auto"))
    return reason


def _reasons_against(names: Iterable[str], device: torch.device, isa: str) -> str:
    reasons = {name: _refusal(name, device, isa) for name in names}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)


def _log_choice(device: torch.device, isa: str, chosen: str) -> None:
    """Say what the automatic choice was for a device, and why; the caller asks but once for each."""
    if device.type == "cuda" and device.index is None:
        return  # it is said of the device that "cuda" comes to
    _logged.add((device, chosen))
    candidates = list(TABLE[device.type])
    better = candidates[: candidates.index(chosen)]
    reasons = _reasons_against(better, device, isa)
    if chosen == "reference":
        logger.warning("%s tensors are served by NumPy, %s; %s", device, reference.COST, reasons)
    elif better:
        logger.warning("%s tensors are served by the %s backend; %s", device, chosen, reasons)
    else:
        logger.info("%s tensors are served by the %s backend, the best that works here", device, chosen)


def _automatic(device: torch.device, isa: str) -> str:
    candidates = TABLE[device.type]
    for chosen, found in candidates.items():
        if found.unavailable(device) is None and not (gate.failures and _refusal(chosen, device, isa)):
            break
    else:
        reasons = _reasons_against(candidates, device, isa)
        raise RuntimeError(f"no backend can serve {device} tensors: {reasons}")
    if isa != "auto" and chosen != "native" and device.type == "cpu":
        reasons = _reasons_against(candidates, device, isa)
        raise RuntimeError(f"{CPU_ISA_VARIABLE} asks for {isa}, which needs the native backend: {reasons}")
    return chosen


def serves(name: str, device_type: str) -> bool:
    """Whether a backend, where it can be used, takes tensors of a device type."""
    is_interpreted = name == "triton" and triton_backend.is_interpreting()
    return name in TABLE.get(device_type, ()) or is_interpreted


def unavailable(name: str, device: Device) -> str | None:
    """Why a backend cannot serve tensors of a device here; None when it can.

    A self-test that failed is a reason; this runs none. Kernels that cannot be loaded on a GPU just now (it
    has no memory left, say) are one too, for as long as that lasts.

    Args:
        device: a device, its name ("cuda:1"), or a device type: "cuda" is the current device. A GPU is asked
            once torch has initialized CUDA; until then the answer is this machine's.
    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: torch knows no such device.
    """
    _known("backend", name, NAMES)
    device = torch.device(device)
    is_initialized = device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if is_initialized and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        reason = _refusal(name, device, requested_cpu_isa())
    except native_cuda.CudaError as error:
        return str(error)
    if reason is not None:
        return reason
    return None if serves(name, device.type) else f"it does not serve {device.type} tensors"


def select(device: Device) -> Selection:
    """The backend for tensors of a device: a device, its name, or a device type (of which it is the current).

    At its first use on a device a backend proves itself there (`self_test.gate`).

    Raises:
        ValueError: FEDKSEED_BACKEND, FEDKSEED_CPU_ISA or FEDKSEED_SELF_TEST holds an unknown name.
        RuntimeError: what was asked for cannot be had on this machine or for this device.
    """
    name, isa = requested_backend(), requested_cpu_isa()
    if isinstance(device, str):
        device = torch.device(device)
    chosen = _choose(name, isa, device)
    if (device, chosen.backend, name, isa) not in _settled:
        while not gate.may_serve((chosen.backend, device, chosen.isa)):
            chosen = _choose(name, isa, device)
        if name == "auto" and (device, chosen.name) not in _logged:
            _log_choice(device, isa, chosen.name)
        if gate.has_verdict((chosen.backend, device, chosen.isa)):
            _settled.add((device, chosen.backend, name, isa))
    return chosen


def _choose(name: str, isa: str, device: torch.device) -> Selection:
    """What serves a device by all that is known, its self-test aside if it has not run yet.

    Raises:
        RuntimeError: what was asked for cannot be had on this machine or for this device.
    """
    device_type = device.type
    if device_type not in TABLE:
        raise RuntimeError(
            f"expected tensors on one of {', '.join(TABLE)}, got {device_type}; move them there"
        )
    if name == "auto":
        name = _automatic(device, isa)
    else:
        if (reason := _refusal(name, device, isa)) is not None:
            raise RuntimeError(f"{BACKEND_VARIABLE} asks for {name}, which cannot be used: {reason}")
        if not serves(name, device_type):
            raise RuntimeError(
                f"{BACKEND_VARIABLE} asks for {name}, which does not serve {device_type} tensors; "
                f"expected one of {', '.join(TABLE[device_type])}"
            )
    chosen = backend_of(name, device_type)
    if device_type != "cpu":
        return Selection(name, chosen, "auto", chosen.seed_axpy)
    if isa == "auto" or name != "native":
        return Selection(name, chosen, isa, chosen.seed_axpy)
    if isa not in native_cpu.usable_isas():
        built = isa in native_cpu.built_isas()
        reason = "this machine cannot run it" if built else "the library was built without it"
        usable = ", ".join(native_cpu.usable_isas())
        raise RuntimeError(f"{CPU_ISA_VARIABLE} asks for {isa}, but {reason}; expected one of auto, {usable}")
    return Selection(name, chosen, isa, partial(chosen.seed_axpy, isa=isa))


def execute(operands: Operands, terms: Terms | DeviceTerms) -> None:
    """Run the primitive on the backend of the operands' device, and raise the outputs' version counters."""
    outs = operands.outs.tensors
    chosen = select(operands.device)
    if not chosen.backend.WRITES_FP32:
        operands = widening.widened(operands)
    chosen.seed_axpy(operands, terms)
    written = outs if operands.outs_minus is None else [*outs, *operands.outs_minus.tensors]
    if operands.writes_residuals and operands.residuals is not None:
        written = [*written, *(r for r in operands.residuals if r is not None)]
    if isinstance(terms, DeviceTerms) and terms.num_skipped is not None:
        written = [*written, terms.num_skipped]
    torch.autograd.graph.increment_version(written)


class Verification(NamedTuple):
    """One self-test that `verify` ran ("pass", "fail") or left out ("skip"), and what is wrong or missing."""

    status: str
    backend: str
    device: str
    isa: str  # "auto" on a GPU
    num_cases: int
    seconds: float
    problem: str | None


def verify() -> Iterator[Verification]:
    """Run the self-tests of all backends on all devices of this machine, whatever is remembered.

    On GPUs that includes each kernel that Triton has to compile for the golden cases: minutes.

    Returns: a result for each backend, device and instruction set, as soon as it is there.
    """
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if gpus:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    for device in (torch.device("cpu"), *gpus):
        for name, found in TABLE[device.type].items():
            if found is reference:
                continue
            try:
                status, reason = "skip", found.unavailable(device)
            except RuntimeError as error:  # no verdict, and none on the others either
                status, reason = "fail", str(error)
            if reason is not None:
                yield Verification(status, name, str(device), "auto", 0, 0.0, reason)
                continue
            for isa in native_cpu.usable_isas() if device.type == "cpu" else ["auto"]:
                yield _verify(name, found, device, isa)


def _verify(name: str, found: Backend, device: torch.device, isa: str) -> Verification:
    start, num_cases, key = perf_counter(), 0, (found, device, isa)
    try:
        num_cases = gate.test(key).num_cases
        problem = gate.failures.get(key)
    except Exception as error:  # Triton's compilers have some of their own; verify goes on
        problem = f"{type(error).__name__}: {error}"
    status = "pass" if problem is None else "fail"
    return Verification(status, name, str(device), isa, num_cases, perf_counter() - start, problem)


def _self_tests() -> dict[str, str]:
    """What is known of self-tests: of the native library's instruction sets, and of the GPUs used so far."""
    cpu, native = torch.device("cpu"), TABLE["cpu"]["native"]
    found = {}
    if native is native_cpu and native_cpu.unavailable() is None:
        usable = native_cpu.usable_isas()
        for isa in usable:
            keys: list[gate.Key] = [(native, cpu, isa)]
            keys += [(native, cpu, "auto")] if isa == usable[-1] else []
            known = [key for key in keys if key in gate.verdicts or key in gate.failures]
            found[f"native on cpu ({isa})"] = gate.status((known or keys)[0])
    for key in (*gate.verdicts, *gate.failures):
        if key[1].type == "cuda" and key[0].SELF_TEST is not None:
            found[f"native on {key[1]}"] = gate.status(key)
    return found


def info() -> dict[str, Any]:
    """Versions, backends with their availability, what serves cpu tensors now and why, and the switches.

    Keys: `version`, `contract_version`, `abi_version`, `torch`, `numpy`; `backends`: for each name
    `available` and `reason` (why not, else None; `native` is the CPU library); `native_cuda`: the same of the
    CUDA library; `devices`: the dispatch table; `cpu_backend`: the backend that a call would take now, or the
    reason why it would fail; `cpu_isa`, `cpu_isas_built`, `cpu_isas_usable`: instruction sets of the native
    library, the first being what a call would take (None without the library, or where the call would fail);
    `num_threads`, `threads`: how many a call may use, and whose they are; `self_tests`: what is known of them
    (none is run for this); `environment`: the switches as they are set, None for unset.
    """
    reasons = {name: backend_of(name, "cpu").unavailable() for name in NAMES}
    cuda_reason = native_cuda.unavailable()
    has_native = reasons["native"] is None
    threaded = has_native and native_cpu.has_threads()
    try:
        chosen = _choose(requested_backend(), requested_cpu_isa(), torch.device("cpu"))
        cpu_backend, isa = chosen.name, chosen.isa
    except (RuntimeError, ValueError) as error:
        cpu_backend, isa = str(error), None
    usable = native_cpu.usable_isas() if has_native else []
    if isa == "auto":
        isa = usable[-1] if has_native else None
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
        "abi_version": c_abi.ABI_VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "backends": {name: {"available": r is None, "reason": r} for name, r in reasons.items()},
        "native_cuda": {"available": cuda_reason is None, "reason": cuda_reason},
        "devices": {device: list(names) for device, names in TABLE.items()},
        "cpu_backend": cpu_backend,
        "cpu_isa": isa,
        "cpu_isas_built": native_cpu.built_isas() if has_native else [],
        "cpu_isas_usable": usable,
        "num_threads": torch.get_num_threads() if threaded else 1,
        "threads": threads,
        "self_tests": _self_tests(),
        "environment": {
            name: os.environ.get(name) for name in (BACKEND_VARIABLE, CPU_ISA_VARIABLE, SELF_TEST_VARIABLE)
        },
    }
