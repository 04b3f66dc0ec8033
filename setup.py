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
    something to compile, no package ninja . error

ninja runs the compilers. Objects stay in build/native: the next build, of a wheel or an editable install,
compiles only what an edit, another compiler or another flag touches. `make clean` removes them.
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
from collections.abc import Mapping, Sequence
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
STUB_MAKER = CUDA_SOURCES / "glibc_stubs.py"
LIB_PACKAGE = Path("fedkseed_kernels", "_lib")
LIBRARY = "libfedkseed_cpu.so"
CUDA_LIBRARY = "libfedkseed_cuda.so"
BUILD_INFO = "build_info.json"

# No contraction and no fast-math: every fma of the contract is written out, everything else rounds by itself.
BIT_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno"]
COMPILE_FLAGS = [*BIT_FLAGS, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# By the build id a self-test that passed is remembered (fedkseed_kernels/backends/identity.py).
BUILD_ID = "--build-id=sha1"
LINK_FLAGS = ["-shared", f"-Wl,--exclude-libs,ALL,{BUILD_ID}", "-static-libgcc", "-static-libstdc++"]
ISA_FLAGS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}

# Machine code serves the GPUs of its major version, PTX those of its own version and of all later ones: of
# 10.0 rather than of 12.0, or 11.x would have none. docs/native-libraries.md says which drivers take it.
CUDA_ARCHS = (80, 90, 100, 120)
PTX_ARCH = 100
# Exceptions would bring in the C++ runtime, and its static unwinder needs glibc 2.35. So would guards of
# static variables; nvcc makes such for <<<>>>, in code that nothing here runs (csrc/cuda/target.h).
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"),
    "-Xcompiler=-fno-exceptions,-fno-threadsafe-statics",
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS),
    f"-gencode=arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}",
]
# CUDA's runtime is linked in, so that the library loads without CUDA; its symbols stay inside, so that
# torch's own is left alone. What it takes from glibc the linker finds in stubs, in versions of old systems.
NVCC_LINK_FLAGS = ["-shared", "-cudart=static", f"-Xlinker=--exclude-libs,ALL,--as-needed,{BUILD_ID}"]
GLIBC_STUBS = ("libdl.so", "libpthread.so", "librt.so")
NVCC_MIN_MAJOR = 13
NVCC_VARIABLES = ("NVCC_APPEND_FLAGS", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS")
NVCC_HOST_VERSION = ("-x", "cu", "-E", "-Xcompiler=--version", os.devnull)

# The headers that a compiler names in the file of -MF are inputs of the object from then on.
NINJA_RULES = """\
builddir = {folder}
compiler = {compiler}

rule object
  command = $compiler $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc

rule library
  command = $compiler $in $flags -o $out

rule stub
  command = {stub_maker} $out $compiler
"""


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


class CudaToolchain(NamedTuple):
    """What compiles the CUDA library. Without ``nvcc`` nothing does, and ``reason`` says why."""

    nvcc: str
    release: str
    reason: str


class Library(NamedTuple):
    """What one library is made of: the sources below ``root`` with their flags, and what links them."""

    name: str
    compiler: Sequence[str]
    root: Path
    sources: Mapping[Path, Sequence[str]]
    link_flags: Sequence[str]
    stubs: Sequence[str] = ()  # libraries made by csrc/cuda/glibc_stubs.py, which the linker finds first
    variables: Sequence[str] = ()  # of the environment, which the compiler reads beside its command line
    host_version: Sequence[str] = ()  # what has it print the version of the compiler that it calls


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


def find_cuda_toolchain() -> CudaToolchain:
    """Decide by the tree at the top of this file.

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
            return CudaToolchain(nvcc, release.group(2), "")
        found = release.group(2) if release else "unknown"
        reason = f"{nvcc} is of CUDA {found}, {NVCC_MIN_MAJOR}.0 is needed (docs/native-libraries.md)"
    if enabled("FEDKSEED_REQUIRE_CUDA"):
        raise CompileError(
            f"FEDKSEED_REQUIRE_CUDA=1 expects the native CUDA library, but {reason}; install the CUDA "
            f"toolkit (>= {NVCC_MIN_MAJOR}.0) or unset the switch to build without it"
        )
    return CudaToolchain("", "", reason)


def contract_version() -> int:
    """The version of the noise contract, from the header that defines it."""
    found = re.search(r"^#define FK_CONTRACT_VERSION (\d+)$", (INCLUDE / "fedkseed.h").read_text(), re.M)
    if found is None:
        raise CompileError(f"{INCLUDE / 'fedkseed.h'} does not define FK_CONTRACT_VERSION")
    return int(found.group(1))


def cpu_library(toolchain: Toolchain) -> Library:
    """The library of csrc/cpu, without the instruction sets that are not built."""
    flags = {source: toolchain.flags(source) for source in find_sources(CPU_SOURCES, "*.cpp")}
    built = {source: own for source, own in flags.items() if own is not None}
    return Library(LIBRARY, toolchain.command, CPU_SOURCES, built, LINK_FLAGS)


def cuda_library(toolchain: CudaToolchain) -> Library:
    """The library of csrc/cuda."""
    flags = [*NVCC_FLAGS, f"-I{INCLUDE}"]
    sources = dict.fromkeys(find_sources(CUDA_SOURCES, "*.cu"), flags)
    of_nvcc = (NVCC_LINK_FLAGS, GLIBC_STUBS, NVCC_VARIABLES, NVCC_HOST_VERSION)
    return Library(CUDA_LIBRARY, [toolchain.nvcc], CUDA_SOURCES, sources, *of_nvcc)


def find_sources(folder: Path, pattern: str) -> list[Path]:
    """The files below ``folder`` of that name.

    Raises:
        CompileError: there is none.
    """
    sources = sorted(folder.rglob(pattern))
    if not sources:
        raise CompileError(f"expected {pattern} in {folder}, got none; the source tree is incomplete")
    return sources


def find_ninja() -> str:
    """The executable of the Python package ninja.

    Raises:
        CompileError: it is not installed.
    """
    try:
        import ninja
    except ImportError:
        found = None
    else:
        # The package finds no folder in pip's isolated builds, which have it on PATH.
        found = shutil.which("ninja", path=ninja.BIN_DIR or None)
    if found is None:
        raise CompileError(
            "the Python package ninja, which runs the compilers, is not installed; pip install ninja, "
            "or build without --no-build-isolation so that pip fetches it"
        )
    return found


def compile_library(library: Library, folder: Path) -> Path:
    """The library, made in ``folder`` from what changed since the last time, by ninja.

    At most MAX_JOBS files and one per core are compiled at a time.

    Raises:
        CompileError: a source does not compile, the library does not link, or ninja is missing.
    """
    # The identity is an input of all: a compiler can change behind an unchanged command line.
    identity, script = folder / "compiler", folder / "build.ninja"
    known = run([*library.compiler, "--version"])
    if library.host_version:
        known += run([*library.compiler, *library.host_version])
    known += "".join(f"{name}={os.environ[name]}\n" for name in library.variables if name in os.environ)
    if not identity.exists() or identity.read_text() != known:
        publish(identity, known)
    publish(script, ninja_script(library, folder, identity))
    cores = len(os.sched_getaffinity(0))
    jobs = max(1, min(int(os.environ.get("MAX_JOBS") or cores), cores))
    sys.stderr.write(run([find_ninja(), "--quiet", "-f", str(script), f"-j{jobs}"]))
    return folder / library.name


def ninja_script(library: Library, folder: Path, identity: Path) -> str:
    """The text of the ``build.ninja`` that makes the library in ``folder``."""

    def path(file: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(file))

    def words(command: Sequence[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    maker = words([sys.executable, str(STUB_MAKER)])
    lines = [NINJA_RULES.format(folder=path(folder), compiler=words(library.compiler), stub_maker=maker)]
    objects = []
    for source, flags in library.sources.items():
        objects.append(path(folder / source.relative_to(library.root).with_suffix(".o")))
        lines.append(f"build {objects[-1]}: object {path(source)} | {path(identity)}")
        lines.append(f"  flags = {words(flags)}")
    stubs = [path(folder / "glibc" / name) for name in library.stubs]
    lines += [f"build {stub}: stub | {path(STUB_MAKER)} {path(identity)}" for stub in stubs]
    lines.append(f"build {path(folder / library.name)}: library {' '.join(objects)} | {' '.join(stubs)}")
    found_first = [f"-L{folder / 'glibc'}"] if stubs else []
    lines.append(f"  flags = {words([*found_first, *library.link_flags])}")
    return "\n".join(lines) + "\n"


def publish(target: Path, content: Path | str) -> None:
    """Make ``target`` a copy of a file, or a file of this text, in one rename.

    A library that a running process has mapped is replaced, never written over.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if isinstance(content, str):
            part.write_text(content)
        else:
            shutil.copy(content, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class NativeDistribution(Distribution):
    """A distribution whose wheel is tied to a platform exactly when it holds the native library."""

    _toolchain: Toolchain | None = None
    _cuda_toolchain: CudaToolchain | None = None

    @property
    def toolchain(self) -> Toolchain:
        if self._toolchain is None:
            self._toolchain = find_toolchain()
        return self._toolchain

    @property
    def cuda_toolchain(self) -> CudaToolchain:
        if self._cuda_toolchain is None:
            self._cuda_toolchain = find_cuda_toolchain()
        return self._cuda_toolchain

    def has_ext_modules(self) -> bool:
        return bool(self.toolchain.command or self.cuda_toolchain.nvcc)


class BuildNative(Command):
    """Compile and link the libraries into the build tree, or into the source tree for an editable install."""

    description = "build the native libraries"
    user_options: ClassVar = [
        ("build-lib=", None, "folder of the packages"),
        ("build-temp=", None, "folder of the objects (default: build/native)"),
        ("inplace", "i", "put the libraries into the source tree"),
    ]
    boolean_options: ClassVar = ["inplace"]
    distribution: NativeDistribution
    build_lib: str | None
    build_base: str | None
    build_temp: str | None
    inplace: bool
    editable_mode: bool

    def initialize_options(self) -> None:
        self.build_lib = None
        self.build_base = None
        self.build_temp = None
        self.inplace = False
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_base", "build_base"))
        # Not the build_temp of "build", which an editable install removes again.
        self.build_temp = self.build_temp or str(Path(self.build_base or "build", "native"))

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            find_ninja()  # A build that lacks it ends here, also where a failing nvcc would be a warning.
        info = {"cpu": self._build_cpu(), "cuda": self._build_cuda(), "contract": contract_version()}
        publish(self._folder() / BUILD_INFO, json.dumps(info, indent=2) + "\n")

    def _build_cpu(self) -> dict[str, Any]:
        toolchain, folder = self.distribution.toolchain, self._folder()
        if toolchain.command:
            publish(folder / LIBRARY, self._compile(cpu_library(toolchain), "cpu"))
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
        toolchain, target = self.distribution.cuda_toolchain, self._folder() / CUDA_LIBRARY
        target.unlink(missing_ok=True)
        reason = toolchain.reason
        if toolchain.nvcc:
            try:
                publish(target, self._compile(cuda_library(toolchain), "cuda"))
            except CompileError as error:
                if enabled("FEDKSEED_REQUIRE_CUDA"):
                    raise
                reason = f"nvcc failed: {error}"
        if reason:
            self.warn(f"native CUDA library: {reason}")
        return {
            "built": not reason,
            "reason": reason,
            "nvcc": toolchain.release,
            "archs": [] if reason else [f"sm_{arch}" for arch in CUDA_ARCHS],
        }

    def _compile(self, library: Library, name: str) -> Path:
        return compile_library(library, Path(self.build_temp or "build", name))

    def _folder(self) -> Path:
        in_source_tree = self.inplace or self.editable_mode
        return (ROOT if in_source_tree else Path(self.build_lib or "build")) / LIB_PACKAGE

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
