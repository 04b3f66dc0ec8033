"""setup.py as a module, builds in a folder of their own, and what their libraries export and need."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Command

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("csrc", "fedkseed_kernels", "python")
SWITCHES = (
    *(f"FEDKSEED_{name}" for name in ("BUILD_CPU", "REQUIRE_CPU", "BUILD_CUDA", "REQUIRE_CUDA")),
    *("CXX", "CUDA_HOME"),
)


def load_script(path: Path) -> ModuleType:
    """A script that belongs to no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"fedkseed_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_setup() -> ModuleType:
    """setup.py as a module: importing it builds nothing."""
    return load_script(ROOT / "setup.py")


def run_pip_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel of a copy of the sources, ``folder/tree``, into ``folder`` without a network."""
    ignore = shutil.ignore_patterns("_lib", "__pycache__", ".*")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(folder / "tree")]
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True)


def build_command(build: ModuleType, folder: Path) -> Command:
    """The command build_native, from ``folder/temp`` into ``folder/lib``."""
    command = build.BuildNative(build.NativeDistribution())
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    return command


def fake_nvcc(folder: Path, release: str, compiles: str) -> None:
    (folder / "bin").mkdir()
    nvcc = folder / "bin" / "nvcc"
    version = f"Cuda compilation tools, release {release[:4]}, V{release}"
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; else {compiles}; fi\n')
    nvcc.chmod(0o755)


def without_ninja(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the package ninja cannot be imported."""
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "ninja.py").write_text("raise ImportError('blocked')\n")
    return blocked


def exported_names(library: Path) -> set[str]:
    command = ["nm", "--dynamic", "--defined-only", str(library)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in table.splitlines()}


def needed_libraries(library: Path) -> set[str]:
    """The libraries that it is loaded with."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("--dynamic", library)))


def needed_versions(library: Path) -> set[str]:
    """The versions of symbols that it asks of them, like GLIBC_2.17."""
    needs = _readelf("--version-info", library).partition("Version needs section")[2]
    return set(re.findall(r"Name: (\S+)", needs))


def assert_loads_on_glibc_2_28(library: Path) -> None:
    """It needs the libraries of glibc alone, and of them nothing newer than version 2.28 has."""
    libraries, versions = needed_libraries(library), needed_versions(library)
    assert versions, f"{library.name} needs nothing of glibc: was it read?"
    known = r"lib(c|dl|m|pthread|rt)\.so\.\d|ld-linux\S+"
    problems = {name for name in libraries if not re.fullmatch(known, name)}
    for version in versions:
        number = re.fullmatch(r"GLIBC_2\.(\d+)(\.\d+)?", version)
        if number is None or int(number[1]) > 28:
            problems.add(version)
    assert not problems, f"{library.name} needs {', '.join(sorted(problems))}"


def _readelf(option: str, library: Path) -> str:
    command = ["readelf", "--wide", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
