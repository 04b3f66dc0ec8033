"""Hold every backend of this machine to the noise contract: `python -m fedkseed_kernels.conformance`.

Runs each backend, and each instruction set of the native one, against the golden vectors, and prints a line
for each check. `--exhaustive` adds the Gaussian transform of all 2^32 words. What this machine cannot run is
named with the reason. Exit status 1: something differs, or what was asked for by name is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fedkseed_kernels
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.conformance import exhaustive, golden
from fedkseed_kernels.conformance.checks import CHECKS, Check, Target, derived_values
from fedkseed_kernels.operands import ISA_CODES

KNOWN_ISAS = tuple(name for name in ISA_CODES if name != "auto")


class Result(NamedTuple):
    """One line of the report; status is "pass", "fail" or "skip"."""

    status: str
    target: str
    check: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status.upper():4}  {self.target:16}  {self.check}: {self.detail}"


def _why_isa_is_missing(isa: str) -> str | None:
    if isa in native_cpu.usable_isas():
        return None
    if isa in native_cpu.built_isas():
        return f"this CPU ({platform.machine()}) has none"
    return "the library was built without it"


def find_targets(backends: Sequence[str] = (), isas: Sequence[str] = ()) -> tuple[list[Target], list[Result]]:
    """The targets that can run here, and a result for each that cannot ("fail" if asked for by name).

    Args:
        backends, isas: names asked for; empty means all there are. Instruction sets are those of `native`.
    """
    targets: list[Target] = []
    missing: list[Result] = []
    for backend in backends or (["native"] if isas else dispatch.NAMES):
        reason = dispatch.backend_of(backend, "cpu").unavailable()
        if reason is None and not dispatch.serves(backend, "cpu"):
            reason = "it serves no cpu tensors; tests/gpu holds it to the same bits"
        if reason is not None:
            status = "fail" if backend in backends or isas else "skip"
            missing.append(Result(status, backend, "left out", reason))
        elif backend != "native":
            targets.append(Target(backend))
        else:
            for isa in isas or KNOWN_ISAS:
                reason = _why_isa_is_missing(isa)
                if reason is None:
                    targets.append(Target(backend, isa))
                else:
                    status = "fail" if isas else "skip"
                    missing.append(Result(status, f"{backend}/{isa}", "left out", reason))
    return targets, missing


def run_check(name: str, check: Check, target: Target, vectors: dict[str, Any]) -> Result:
    """One check on one target; at a difference it stops and tells the first."""
    num_comparisons = num_values = 0
    for comparison in check(target, vectors):
        difference = comparison.first_difference()
        if difference is not None:
            return Result("fail", str(target), name, difference)
        num_comparisons += 1
        num_values += comparison.expected.size
    return Result("pass", str(target), name, f"{num_comparisons} comparisons, {num_values} values")


def _run(arguments: argparse.Namespace) -> Iterator[Result]:
    vectors = golden.load()
    targets, missing = find_targets(arguments.backend, arguments.isa)
    yield from missing
    if not targets:
        yield Result("fail", "-", "targets", "nothing to run")
    for target in targets:
        for name, check in CHECKS.items():
            yield run_check(name, check, target, vectors)
    yield run_check("derived values", derived_values, Target("NumPy"), vectors)
    if arguments.exhaustive:
        isas = [target.isa for target in targets if target.isa is not None]
        if not isas:
            yield Result("fail", "native", "exhaustive", "no instruction set of the native library to run")
        for outcome in exhaustive.run(isas):
            status = "pass" if outcome.difference is None else "fail"
            detail = outcome.difference or outcome.detail
            yield Result(status, f"native/{outcome.isa}", outcome.check, detail)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fedkseed_kernels.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--exhaustive", action="store_true", help="the transform of all 2^32 words: minutes")
    parser.add_argument(
        "--backend", nargs="+", default=[], choices=dispatch.NAMES, help="only these backends"
    )
    parser.add_argument(
        "--isa", nargs="+", default=[], choices=KNOWN_ISAS, help="only these instruction sets of native"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    arguments = parser.parse_args(argv)
    if arguments.isa and arguments.backend and "native" not in arguments.backend:
        parser.error("expected --backend native with --isa: only native has instruction sets")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print and return the exit status."""
    arguments = _arguments(argv)
    info = fedkseed_kernels.info()
    versions = f"fedkseed_kernels {info['version']}, noise contract {info['contract_version']}"
    print(f"{versions}, {platform.machine()}")
    results = []
    for result in _run(arguments):
        print(result, flush=True)
        results.append(result)
    num_failed = sum(result.status == "fail" for result in results)
    num_passed = sum(result.status == "pass" for result in results)
    num_skipped = len(results) - num_passed - num_failed
    print(f"{num_passed} checks passed, {num_failed} failed, {num_skipped} left out")
    if arguments.json is not None:
        listed = [result._asdict() for result in results]
        report = {"info": info, "passed": num_failed == 0, "results": listed}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
