"""The self-test of the Triton kernels: each variant runs a golden case when a process first launches it.

There are too many variants to compile them all first, so they are tested one by one, against the reference
itself: a case is small, and compiling or loading the variant takes longer. In Triton's interpreter nothing is
compiled, and nothing tested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from fedkseed_kernels.backends import reference
from fedkseed_kernels.backends.identity import gpu_identity
from fedkseed_kernels.backends.triton import launch as launcher
from fedkseed_kernels.backends.triton.launch import Launch, Variant
from fedkseed_kernels.operands import Operands, Terms
from fedkseed_kernels.self_test import gate, remembered
from fedkseed_kernels.self_test.arena import Arena
from fedkseed_kernels.self_test.cases import Call, Case
from fedkseed_kernels.self_test.run import Mismatch, Report

_TERMS = {0: "3 terms", 1: "1 term", 2: "2 terms"}
# Terms whose sums are zero here and there, for pairs: the minus side has its own way with a zero.
_ZERO_SUMS = {1: "1 vanishing term", 2: "2 vanishing terms"}
_ZERO_SUMS_FP64 = {1: "1 vanishing fp64 term", 2: "2 vanishing fp64 terms"}

_may_run: set[tuple[torch.device, Variant]] = set()


class SelfTestError(RuntimeError):
    """A kernel that does not compute what the reference does; nothing was written."""


def golden_cases(variant: Variant) -> tuple[list[Call], Case]:
    """The small calls that this variant serves, each of one tensor."""
    has_residual = variant.residuals != "none"
    if variant.has_rows:
        form = "rows, pair" if variant.pair else "rows"
    elif not variant.has_input:
        form = "noise"
    elif variant.pair:
        form = "pair"
    else:
        form = "out" if variant.residuals == "read" else "in place"
    terms = ["unit term" if form == "noise" else _TERMS[variant.num_by_value]]
    if variant.pair and variant.num_by_value and variant.family == "gaussian":
        zero_sums = _ZERO_SUMS_FP64 if variant.dtype == torch.float64 else _ZERO_SUMS
        terms.append(zero_sums[variant.num_by_value])
    elif variant.pair and variant.num_by_value == 2:
        terms.append("opposite terms")
    memory = "rows" if variant.has_rows else "strided" if variant.is_runs else "whole"
    rounding = "stochastic" if variant.stochastic else "nearest"
    dtype = str(variant.dtype).removeprefix("torch.")
    calls = [Call(variant.family, name, form, rounding) for name in terms]
    return calls, Case(dtype, memory, has_residual)


def ensure(launches: Sequence[Launch], device: torch.device) -> None:
    """Test the variants that this process has not launched yet on the device, which must be the current one.

    Where that cannot be done yet (`gate.ran`) they may run all the same.

    Raises:
        SelfTestError: one of them fails.
        ValueError: FEDKSEED_SELF_TEST is neither 0 nor 1.
    """
    for launch in launches:
        if (device, launch.variant) not in _may_run and not launcher.IS_INTERPRETED:
            _ensure(launch, device)


def _ensure(launch: Launch, device: torch.device) -> None:
    def test() -> None:
        identity = _identity(launch, device)
        if not remembered.is_remembered(identity):
            _test(launch.variant, device)
            remembered.remember(identity)

    if not gate.is_switched_on() or gate.ran(f"of Triton's kernels on {device}", test):
        _may_run.add((device, launch.variant))


def _identity(launch: Launch, device: torch.device) -> str:
    """What tells the machine code of a launch from any other; it is compiled here."""
    warp_size = launcher.warp_size(device)
    compiled = launch.kernel.warmup(
        *launch.arguments, grid=(launch.num_programs,), **launch.variant.options(warp_size)
    )
    machine_code = hashlib.blake2b(compiled.kernel, digest_size=16).hexdigest()
    return f"triton {compiled.hash} {machine_code}; {gpu_identity(device)}"


def _test(variant: Variant, device: torch.device) -> None:
    def seed_axpy(operands: Operands, terms: Terms) -> None:
        for launch in launcher.ready_launches(operands, terms, variant.many_tiles):
            launch.run(launcher.warp_size(device))

    calls, case = golden_cases(variant)
    mismatches = []
    for call in calls:
        (got,) = Arena(call, [case], "gpu", device).run(seed_axpy).values()
        twin = Arena(call, [case], "gpu", torch.device("cpu"))
        ((name, expected),) = twin.run(reference.seed_axpy).items()
        mismatches += [Mismatch(name, expected, got)] if got != expected else []
    if mismatches:
        raise SelfTestError(gate.why_it_fails(str(device), Report(len(calls), mismatches)))
