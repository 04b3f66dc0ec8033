"""Builds the native libraries, for CPUs and for CUDA, beside the Python packages.

Metadata is in pyproject.toml.

What is built, decided once, before anything is compiled:

    FEDKSEED_BUILD_CPU=0 ................... no library: runs on NumPy
    not Linux .............................. no library: runs on NumPy
    no C++ compiler, or one that fails on a trivial library
        FEDKSEED_REQUIRE_CPU=1 ............. error
        otherwise .......................... warning, no library: runs on NumPy
    C++ compiler ($CXX, else c++, g++, clang++)
        target x86-64 ...................... baseline, AVX2 and AVX-512, each if the compiler knows its flags
            FEDKSEED_REQUIRE_CPU=1 ......... error if it does not
        other targets ...................... baseline
        a source does not compile .......... error
    FEDKSEED_BUILD_CUDA=0, or not Linux .... no CUDA library
    nvcc ($CUDA_HOME/bin, else PATH), no GPU is needed
        missing, older than CUDA 13, or fails on a source
            FEDKSEED_REQUIRE_CUDA=1 ........ error
            otherwise ...................... warning, no CUDA library

MAX_JOBS caps the parallel compilations. CXXFLAGS is ignored: the noise contract's bits depend on the flags.
The decision is recorded in fedkseed_kernels/_lib/build_info.json, which the package quotes at run time.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = ROOT / "csrc" / "cpu"
CUDA_SOURCES = ROOT / "csrc" / "cuda"
INCLUDE = ROOT / "csrc" / "include"
LIB_PACKAGE = Path("fedkseed_kernels", "_lib")
LIBRARY = "libfedkseed_cpu.so"
CUDA_LIBRARY = "libfedkseed_cuda.so"
BUILD_INFO = "build_info.json"

# No contraction and no fast-math: every fma of the contract is written out, everything else rounds by itself.
BIT_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno"]
COMPILE_FLAGS = [*BIT_FLAGS, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
LINK_FLAGS = ["-shared", "-Wl,--exclude-libs,ALL", "-static-libgcc", "-static-libstdc++"]
ISA_FLAGS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


# Machine code for these, and PTX of the newest for what comes after it. The runtime is linked in, so that the
# library loads without CUDA; its symbols stay inside, so that torch's own runtime is left alone.
CUDA_ARCHS = (80, 90, 100)
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"),
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS),
    f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}",
]
NVCC_LINK_FLAGS = [
    *("-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"),
    "-Xcompiler=-static-libgcc,-static-libstdc++",
]
NVCC_MIN_MAJOR = 13


class Toolchain(NamedTuple):
    """What compiles the CPU library. An empty command means that nothing does, and ``reason`` says why."""

    command: Sequence[str]
    isas: Sequence[str]
    reason: str

    def flags(self, source: Path) -> list[str] | None:
        """Flags of one source; None if it belongs to an instruction set that is not built."""
        isa = source.stem.rpartition("_")[2]
        if isa in ISA_FLAGS and isa not in self.isas:
            return None
        have = [f"-DFK_HAVE_{name.upper()}=1" for name in self.isas if name in ISA_FLAGS]
        return [*COMPILE_FLAGS, f"-I{INCLUDE}", *have, *ISA_FLAGS.get(isa, [])]


def enabled(name: str, default: str = "0") -> bool:
    """The 0/1 switch ``name`` of the environment."""
    value = os.environ.get(name) or default
    if value not in ("0", "1"):
        raise CompileError(f"{name}: expected 0 or 1, got {value!r}; unset it or set one of the two")
    return value == "1"


def run(command: Sequence[str]) -> str:
    """Standard output and error of a command.

    Raises:
        CompileError: it failed; the message holds the command and all that it printed.
    """
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CompileError(f"cannot run {shlex.join(command)}: {error}") from error
    if result.returncode:
        raise CompileError(f"{shlex.join(command)} failed ({result.returncode}):\n{result.stdout.strip()}")
    return result.stdout


def links(command: Sequence[str], flags: Sequence[str]) -> str:
    """Why the compiler cannot make a trivial library with these flags; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text('#include <stdint.h>\nextern "C" int32_t probe(void) { return 0; }\n')
        try:
            run([*command, *COMPILE_FLAGS, *flags, str(source), *LINK_FLAGS, "-o", f"{folder}/probe.so"])
        except CompileError as error:
            return str(error)
    return ""


def find_toolchain() -> Toolchain:
    """Decide by the tree at the top of this file.

    Raises:
        CompileError: FEDKSEED_REQUIRE_CPU=1 and something is missing.
    """
    if not enabled("FEDKSEED_BUILD_CPU", default="1"):
        return _without("FEDKSEED_BUILD_CPU=0 was set")
    if sys.platform != "linux":
        return _without(f"the native library is built on Linux only, this is {sys.platform}")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    command = next((shlex.split(name) for name in names if shutil.which(shlex.split(name)[0])), None)
    if command is None:
        return _without(f"no C++ compiler was found (tried {', '.join(names)})")
    if problem := links(command, []):
        return _without(f"the C++ compiler cannot make a shared library: {problem}")
    isas, reasons = ["baseline"], []
    if run([*command, "-dumpmachine"]).startswith("x86_64"):
        for isa, flags in ISA_FLAGS.items():
            if problem := links(command, flags):
                reasons.append(f"{isa} is left out: {problem}")
            else:
                isas.append(isa)
    if reasons and enabled("FEDKSEED_REQUIRE_CPU"):
        raise CompileError(f"FEDKSEED_REQUIRE_CPU=1, but {'; '.join(reasons)}; use gcc >= 11 or clang >= 12")
    return Toolchain(command, isas, "; ".join(reasons))


def _without(reason: str) -> Toolchain:
    if enabled("FEDKSEED_REQUIRE_CPU"):
        raise CompileError(
            f"FEDKSEED_REQUIRE_CPU=1 expects the native CPU library, but {reason}; "
            "install g++ or clang++ (or name one in CXX), or unset the switch to run on NumPy"
        )
    return Toolchain((), (), reason)


def find_nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def find_cuda_toolchain() -> tuple[str, str]:
    """nvcc and its release; "" and the reason if the CUDA library is not built.

    Raises:
        CompileError: FEDKSEED_REQUIRE_CUDA=1 and there is none to build it with.
    """
    nvcc = find_nvcc()
    reason = ""
    if not enabled("FEDKSEED_BUILD_CUDA", default="1"):
        reason = "FEDKSEED_BUILD_CUDA=0 was set"
    elif sys.platform != "linux":
        reason = f"the CUDA library is built on Linux only, this is {sys.platform}"
    elif nvcc is None:
        reason = "nvcc was not found in $CUDA_HOME/bin or on PATH"
    else:
        release = re.search(r"release (\d+)\.\d+, V([\d.]+)", run([nvcc, "--version"]))
        if release is not None and int(release.group(1)) >= NVCC_MIN_MAJOR:
            return nvcc, release.group(2)
        reason = (
            f"{nvcc} is of CUDA {release.group(2) if release else 'unknown'}, {NVCC_MIN_MAJOR}.0 is needed"
        )
    if enabled("FEDKSEED_REQUIRE_CUDA"):
        raise CompileError(
            f"FEDKSEED_REQUIRE_CUDA=1 expects the native CUDA library, but {reason}; install the CUDA "
            f"toolkit (>= {NVCC_MIN_MAJOR}.0) or unset the switch to build without it"
        )
    return "", reason


def contract_version() -> int:
    """The version of the noise contract, from the header that defines it."""
    found = re.search(r"^#define FK_CONTRACT_VERSION (\d+)$", (INCLUDE / "fedkseed.h").read_text(), re.M)
    if found is None:
        raise CompileError(f"{INCLUDE / 'fedkseed.h'} does not define FK_CONTRACT_VERSION")
    return int(found.group(1))


def compile_objects(toolchain: Toolchain, folder: Path) -> list[Path]:
    """Compile csrc/cpu into ``folder``, at most MAX_JOBS files and one per core at a time.

    Raises:
        CompileError: a source does not compile, or there is none.
    """
    flags = {source: toolchain.flags(source) for source in sorted(CPU_SOURCES.glob("*.cpp"))}
    tasks = {
        folder / f"{source.stem}.o": [*own, "-c", str(source)]
        for source, own in flags.items()
        if own is not None
    }
    if not tasks:
        raise CompileError(f"expected C++ sources in {CPU_SOURCES}, got none; the source tree is incomplete")
    compile_all({target: [*toolchain.command, *own, "-o", str(target)] for target, own in tasks.items()})
    return list(tasks)


def compile_cuda_objects(nvcc: str, folder: Path) -> list[Path]:
    """Compile csrc/cuda into ``folder``, as `compile_objects` does with csrc/cpu."""
    sources = sorted(CUDA_SOURCES.glob("*.cu"))
    if not sources:
        raise CompileError(
            f"expected CUDA sources in {CUDA_SOURCES}, got none; the source tree is incomplete"
        )
    tasks = {
        folder / f"{source.stem}.o": [nvcc, *NVCC_FLAGS, f"-I{INCLUDE}", "-c", str(source)]
        for source in sources
    }
    compile_all({target: [*command, "-o", str(target)] for target, command in tasks.items()})
    return list(tasks)


def compile_all(commands: dict[Path, list[str]]) -> None:
    """Run one command for each target, at most MAX_JOBS and one per core at a time."""
    for target in commands:
        target.parent.mkdir(parents=True, exist_ok=True)
    jobs = max(1, min(int(os.environ.get("MAX_JOBS") or len(commands)), len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(jobs) as pool:
        for warnings in pool.map(run, commands.values()):
            sys.stderr.write(warnings)


def publish(target: Path, write: Sequence[str] | str) -> None:
    """Make ``target`` by a command that takes "-o FILE", or from text, in one rename.

    A library that a running process has mapped is replaced, never written over.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if isinstance(write, str):
            part.write_text(write)
        else:
            run([*write, "-o", str(part)])
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class NativeDistribution(Distribution):
    """A distribution whose wheel is tied to a platform exactly when it holds the native library."""

    _toolchain: Toolchain | None = None
    _cuda_toolchain: tuple[str, str] | None = None

    @property
    def toolchain(self) -> Toolchain:
        if self._toolchain is None:
            self._toolchain = find_toolchain()
        return self._toolchain

    @property
    def cuda_toolchain(self) -> tuple[str, str]:
        if self._cuda_toolchain is None:
            self._cuda_toolchain = find_cuda_toolchain()
        return self._cuda_toolchain

    def has_ext_modules(self) -> bool:
        return bool(self.toolchain.command or self.cuda_toolchain[0])


class BuildNative(Command):
    """Compile and link the libraries into the build tree, or into the source tree for an editable install."""

    description = "build the native libraries"
    user_options: ClassVar = [
        ("build-lib=", None, "folder of the packages"),
        ("build-temp=", None, "folder of the objects"),
    ]
    distribution: NativeDistribution
    build_lib: str | None
    build_temp: str | None
    editable_mode: bool

    def initialize_options(self) -> None:
        self.build_lib = None
        self.build_temp = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))

    def run(self) -> None:
        info = {"cpu": self._build_cpu(), "cuda": self._build_cuda(), "contract": contract_version()}
        publish(self._folder() / BUILD_INFO, json.dumps(info, indent=2) + "\n")

    def _build_cpu(self) -> dict[str, Any]:
        toolchain, folder = self.distribution.toolchain, self._folder()
        if toolchain.command:
            objects = compile_objects(toolchain, Path(self.build_temp or "build", "cpu"))
            publish(folder / LIBRARY, [*toolchain.command, *map(str, objects), *LINK_FLAGS])
        else:
            (folder / LIBRARY).unlink(missing_ok=True)
        if toolchain.reason:
            self.warn(f"native CPU library: {toolchain.reason}")
        return {
            "built": bool(toolchain.command),
            "reason": toolchain.reason,
            "compiler": run([*toolchain.command, "--version"]).splitlines()[0] if toolchain.command else "",
            "isas": list(toolchain.isas),
        }

    def _build_cuda(self) -> dict[str, Any]:
        nvcc, release_or_reason = self.distribution.cuda_toolchain
        target = self._folder() / CUDA_LIBRARY
        target.unlink(missing_ok=True)
        reason = "" if nvcc else release_or_reason
        if nvcc:
            try:
                objects = compile_cuda_objects(nvcc, Path(self.build_temp or "build", "cuda"))
                publish(target, [nvcc, *map(str, objects), *NVCC_LINK_FLAGS])
            except CompileError as error:
                if enabled("FEDKSEED_REQUIRE_CUDA"):
                    raise
                reason = f"nvcc failed: {error}"
        if reason:
            self.warn(f"native CUDA library: {reason}")
        return {
            "built": not reason,
            "reason": reason,
            "nvcc": release_or_reason if nvcc else "",
            "archs": [] if reason else [f"sm_{arch}" for arch in CUDA_ARCHS],
        }

    def _folder(self) -> Path:
        return (ROOT if self.editable_mode else Path(self.build_lib or "build")) / LIB_PACKAGE

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]

    def get_outputs(self) -> list[str]:
        names = [BUILD_INFO]
        names += [LIBRARY] if self.distribution.toolchain.command else []
        names += [CUDA_LIBRARY] if (self._folder() / CUDA_LIBRARY).exists() else []
        return [str(self._folder() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BdistWheel(bdist_wheel):
    """The library has a C ABI and no Python in it: any Python 3 can use it, on its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


if __name__ == "__main__":
    setup(
        distclass=NativeDistribution,
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
    )
