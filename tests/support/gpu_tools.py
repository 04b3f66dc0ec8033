"""Stand-ins for nvidia-smi, ncu and compute-sanitizer: they check their arguments and run what they get."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

#: Ends a stand-in that is called in a way that the tool would not understand, or that would measure nothing.
MISUSED = 77

_SMI = """
import sys
query = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
fields = query["query-gpu"].split(",")
if query.get("format") != "csv,noheader" or not {"name", "driver_version", "clocks.sm"} <= set(fields):
    sys.exit(f"nvidia-smi: unknown query {sys.argv}")
values = {"name": "Stand-in 1/2 GPU", "driver_version": "580.1"}
print(", ".join(values.get(field, "7") for field in fields))
"""

_COMMON = """
import os, subprocess, sys
arguments = sys.argv[1:]

def fail(why):
    print(f"stand-in: {why}: {arguments}")
    sys.exit(MISUSED)

# Options until the first word that is neither an option nor the value of one.
options, position = [], 0
while position < len(arguments) and arguments[position].startswith("--"):
    name = arguments[position]
    takes_no_value = name in ("--csv",)
    options.append((name, None if takes_no_value else arguments[position + 1]))
    position += 1 if takes_no_value else 2
command = arguments[position:]
if command[:1] != [PYTHON]:
    fail("expected the program after the options")

def expect(wanted):
    if sorted(options) != sorted(wanted):
        fail(f"expected {wanted}")
"""

_SANITIZER = (
    _COMMON
    + """
kernels = ("few_terms", "many_gaussian", "many_rademacher", "strided")
wanted = [("--tool", "memcheck"), ("--error-exitcode", "9"), ("--target-processes", "all")]
expect([*wanted, *(("--kernel-name", f"kernel_substring={name}") for name in kernels)])
if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
    fail("expected torch's allocator to be off")
if command[1:4] != ["-m", "pytest", "tests/gpu/test_native_cuda_gpu.py"] or "--numprocesses" in command:
    fail("expected pytest over the native tests in one process")
print("========= COMPUTE-SANITIZER", flush=True)
status = subprocess.run(command).returncode
print("========= ERROR SUMMARY: 0 errors")
sys.exit(status)
"""
)

_NCU = (
    _COMMON
    + """
named = dict(options)
metrics, names = named["--metrics"].split(","), named["--kernel-name"].removeprefix("regex:").split("|")
count = int(named["--launch-count"])
wanted = [("--clock-control", "none"), ("--profile-from-start", "off"), ("--target-processes", "all")]
wanted += [("--csv", None), ("--page", "raw"), ("--print-units", "base")]
wanted += [option for option in options if option[0] in ("--metrics", "--kernel-name", "--launch-count")]
expect([*wanted, *(("--section", name) for name in ("LaunchStats", "Occupancy", "WarpStateStats"))])
if names != ["few_terms", "many_gaussian", "many_rademacher", "strided"]:
    fail("expected the names of the kernels")
print("==PROF== Connected to process 1", flush=True)
status = subprocess.run(command).returncode
if status:
    sys.exit(status)
start = ["Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size"]
start += ["Grid Size", "Device", "CC"]
rows = [["ID", *start, *metrics], [""] * (len(start) + 1) + ["%"] * len(metrics)]
for launch in range(count):
    row = [str(launch), "1", "python", "host", names[launch % len(names)], "1", "7", "(256, 1, 1)"]
    rows.append([*row, "(9, 1, 1)", "0", "9.0", *("1,234.5" for _ in metrics)])
for row in rows:
    print(",".join(f'"{value}"' for value in row))
"""
)

STAND_INS = {"nvidia-smi": _SMI, "compute-sanitizer": _SANITIZER, "ncu": _NCU}


def write_tool(folder: Path, name: str, source: str, python: str = sys.executable) -> None:
    """An executable file of Python source in a folder; what it is to run has to begin with ``python``."""
    path = folder / name
    constants = f"MISUSED, PYTHON = {MISUSED}, {python!r}\n"
    path.write_text(f"#!{sys.executable}\n{constants}{source}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def write_stand_ins(folder: Path, python: str = sys.executable) -> Path:
    """All of them; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, source in STAND_INS.items():
        write_tool(folder, name, source, python)
    return folder
