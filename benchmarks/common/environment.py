"""Where a result was made: device, versions, commit, date, load. No paths and no host names."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedkseed_kernels
from benchmarks.common.places import REPOSITORY

#: Names the commit in a tree without git, as copies on other machines are.
COMMIT_VARIABLE = "FEDKSEED_COMMIT"

# The CPU features that decide which kernels run.
_CPU_FLAGS = ("fma", "avx2", "avx512f", "asimd")


def describe(num_threads: int) -> dict[str, Any]:
    """The environment block of a result file."""
    info = fedkseed_kernels.info()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": "cpu",
        "cpu": cpu_model(),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in _cpu_info("flags", "Features").split()],
        "num_cpus": os.cpu_count(),
        "num_threads": num_threads,
        "load_average": load_average(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pytest_benchmark": version_of("pytest-benchmark"),
        "fedkseed_kernels": info["version"],
        "contract_version": info["contract_version"],
    }


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None if it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def load_average() -> float:
    """Runnable processes, mean of the last minute: a run on a busy machine shows it here."""
    return round(os.getloadavg()[0], 2)


def cpu_model() -> str:
    """The CPU's own name for itself."""
    return _cpu_info("model name", "Model") or platform.processor() or platform.machine()


def commit() -> str:
    """The commit that FEDKSEED_COMMIT names, else that of the working tree, with "-dirty" when files differ.

    "unknown" in a tree without git, also one that lies inside another repository.
    """
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    if not (REPOSITORY / ".git").exists():
        return "unknown"
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _cpu_info(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return ""
