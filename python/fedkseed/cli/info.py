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
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints it."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        **fedkseed_kernels.info(),
    }
    print(json.dumps(found, indent=2, default=str) if options.json else "\n".join(_lines(found)))
    return 0


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
