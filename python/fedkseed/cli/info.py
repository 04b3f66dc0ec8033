"""`fedkseed info`: versions, and which kernels run here and why."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

import fedkseed_kernels


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "info",
        parents=parents,
        help="versions, and which kernels run here and why",
        description="Shows versions, the noise contract, and which backend serves which device and why.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the self-tests of all kernels on all devices (with Triton on a GPU: minutes); the exit "
        "status is 1 if one fails",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints it."""
    results = [_told(result, options.json) for result in fedkseed_kernels.verify()] if options.verify else []
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        **fedkseed_kernels.info(),
    }
    if options.verify and options.json:
        found["verified"] = [result._asdict() for result in results]
    print(json.dumps(found, indent=2, default=str) if options.json else "\n".join(_lines(found)))
    return 1 if any(result.status == "fail" for result in results) else 0


def _told(result: fedkseed_kernels.Verification, as_json: bool) -> fedkseed_kernels.Verification:
    """The result, printed as soon as it is there."""
    where = f"{result.backend} on {result.device}" + (f" ({result.isa})" if result.isa != "auto" else "")
    detail = result.problem or f"{result.num_cases} cases equal the reference, {result.seconds:.2f} s"
    if not as_json:
        print(f"{result.status}: {where}: {detail}", flush=True)
    return result


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    """One name a line, what is nested indented."""
    width = max((len(name) for name in found), default=0)
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name.ljust(width)}  {value}")
    return lines
