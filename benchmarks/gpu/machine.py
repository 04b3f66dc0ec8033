"""What a result says of its machine: versions, the GPU's own numbers, its clocks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from importlib import import_module
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.common.places import REPOSITORY
from benchmarks.gpu.processes import output_of

_SMI_FIELDS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,memory.used,mig.mode.current"
)
_SMI_SECONDS = 20.0
_PACKAGES = ("pytest", "pytest-xdist", "transformers")


def describe() -> dict[str, Any]:
    """The environment of a document; nothing here makes a context on the GPU."""
    found = environment.describe(torch.get_num_threads())
    versions = {name.replace("-", "_"): environment.version_of(name) for name in _PACKAGES}
    versions |= {"triton": triton_version(), "cuda": torch.version.cuda}
    return {**found, **versions, "libraries": libraries(), "nvidia_smi": smi()}


def libraries() -> dict[str, Any]:
    """SHA-256 of each native library that lies in the tree, and the record of their build.

    A library that was carried along may be another commit's than the tree.
    """
    folder = REPOSITORY / "fedkseed_kernels" / "_lib"
    found: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.so"))
    }
    record = folder / "build_info.json"
    return found | ({"build": json.loads(record.read_bytes())} if record.exists() else {})


def triton_version() -> str | None:
    """The version of the module, whatever its distribution is called; None where it cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return str(import_module("triton").__version__)
    except Exception:  # a broken installation is what the parts that need it report
        return None


def smi() -> list[dict[str, str]] | str:
    """What nvidia-smi says of each GPU now; why it says nothing."""
    found = output_of(["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader"], _SMI_SECONDS)
    if "failed" in found:
        return str(found["failed"])
    names = _SMI_FIELDS.split(",")
    lines = [[value.strip() for value in line.split(",")] for line in found["output"].splitlines()]
    return [dict(zip(names, values, strict=False)) for values in lines if len(values) == len(names)]


def gpu_name(described: dict[str, Any]) -> str:
    """The GPU's name for a file's name."""
    gpus = described["nvidia_smi"]
    return gpus[0]["name"] if isinstance(gpus, list) and gpus else "unknown"


def gpu_facts(device: str) -> dict[str, Any]:
    """What torch says of the GPU that a part measures on."""
    if device == "cpu":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "num_multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }
