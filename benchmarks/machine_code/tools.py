"""The tools of the CUDA toolkit that read machine code: where they are, and what they give."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import util
from pathlib import Path


class ToolError(RuntimeError):
    """A compiler or tool is missing or fails, or machine code is not as expected; the message says which."""


def find_binary_tool(name: str) -> str:
    """A tool of the CUDA toolkit that reads machine code: on PATH, else the copy inside the triton package.

    Raises:
        ToolError: there is none.
    """
    spec = util.find_spec("triton")
    folders = [str(Path(spec.origin).parent / "backends/nvidia/bin")] if spec and spec.origin else []
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ToolError(
            f"expected {name} on PATH or in the triton package, got none; "
            "run: pip install 'fedkseed-kernels[bench]'"
        )
    return found


def run(command: Sequence[str], folder: Path | None = None) -> str:
    """Standard output of a command, run in a folder.

    Raises:
        ToolError: it failed.
    """
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if result.returncode:
        output = result.stderr or result.stdout
        raise ToolError(f"{Path(command[0]).name} failed ({result.returncode}):\n{output}")
    return result.stdout


def disassembly(cubin: Path) -> str:
    """The instructions of a file of machine code, as nvdisasm writes them.

    Raises:
        ToolError: nvdisasm is missing or fails.
    """
    return run([find_binary_tool("nvdisasm"), "-c", str(cubin)])


def extract_cubins(library: Path, folder: Path) -> dict[str, list[Path]]:
    """The machine code inside a library, written to a folder: files by architecture (sm_90).

    Raises:
        ToolError: a tool is missing or fails.
    """
    run([find_binary_tool("cuobjdump"), "--extract-elf", "all", str(library.resolve())], folder)
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.cubin")):
        if arch := re.search(r"\.(sm_\d+)[a-z]?\.cubin$", file.name):
            found.setdefault(arch.group(1), []).append(file)
    return found
