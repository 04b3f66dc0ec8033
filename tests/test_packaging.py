"""The distribution: what is built with and without a compiler, what a wheel holds, what the pages promise."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Command

from fedkseed_kernels import CONTRACT_VERSION, __version__

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("csrc", "fedkseed_kernels", "python")
GIT_LIST = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
SWITCHES = (
    *(f"FEDKSEED_{name}" for name in ("BUILD_CPU", "REQUIRE_CPU", "BUILD_CUDA", "REQUIRE_CUDA")),
    *("CXX", "CUDA_HOME"),
)
ELF_AARCH64 = 183


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module: importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("fedkseed_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


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


def build_wheel(folder: Path, **environment: str) -> Path:
    result = run_pip_wheel(folder, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def exported_names(library: Path) -> set[str]:
    command = ["nm", "--dynamic", "--defined-only", str(library)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in table.splitlines()}


def expected_members() -> set[str]:
    """What both import packages consist of in the source tree, without what a build makes."""
    found = set()
    for folder, package in ((ROOT, "fedkseed_kernels"), (ROOT / "python", "fedkseed")):
        for path in (folder / package).rglob("*"):
            name = path.relative_to(folder)
            if path.is_file() and not {"_lib", "__pycache__"} & set(name.parts) and name.parts[1][0] != ".":
                found.add(name.as_posix())
    return found


def test_version_stands_once() -> None:
    assert metadata.version("fedkseed-kernels") == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert __version__ not in (ROOT / "pyproject.toml").read_text()


def test_contract_version_is_the_headers(build: ModuleType) -> None:
    assert build.contract_version() == CONTRACT_VERSION


@pytest.fixture(scope="module")
def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


@pytest.fixture(scope="module")
def built_wheel(tmp_path_factory: pytest.TempPathFactory, has_nvcc: bool) -> Path:
    """A wheel with all that can be compiled; the tree that it was built in, ``tree``, lies beside it."""
    chosen = "FEDKSEED_REQUIRE_CUDA" if has_nvcc else "FEDKSEED_BUILD_CUDA"
    environment = {"FEDKSEED_REQUIRE_CPU": "1", chosen: "1" if has_nvcc else "0"}
    return build_wheel(tmp_path_factory.mktemp("wheel"), **environment)


@pytest.mark.slow
def test_wheel_with_compiler(built_wheel: Path, has_nvcc: bool, tmp_path: Path) -> None:
    """Both libraries where nvcc is there; they load without a driver and export their interfaces alone."""
    wheel = built_wheel
    assert re.fullmatch(rf"fedkseed_kernels-{re.escape(__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    found = {name for name in members(wheel) if ".dist-info/" not in name}
    library = {"fedkseed_kernels/_lib/libfedkseed_cpu.so", "fedkseed_kernels/_lib/build_info.json"}
    if has_nvcc:
        library.add("fedkseed_kernels/_lib/libfedkseed_cuda.so")
    assert found == expected_members() | library
    assert {"fedkseed_kernels/py.typed", "fedkseed/py.typed"} <= found
    assert any(name.startswith("fedkseed_kernels/conformance/golden/") for name in found)
    with zipfile.ZipFile(wheel) as opened:
        info = json.loads(opened.read("fedkseed_kernels/_lib/build_info.json"))
        opened.extractall(tmp_path / "site")
    if has_nvcc:
        assert info["cuda"]["built"] is True
        assert info["cuda"]["archs"] == ["sm_80", "sm_90", "sm_100"]
        cuda = tmp_path / "site" / "fedkseed_kernels" / "_lib" / "libfedkseed_cuda.so"
        exported = exported_names(cuda)
        assert {name for name in exported if not name.startswith("fk_")} == set()
        assert {"fk_cuda_seed_axpy", "fk_cuda_load", "fk_abi_version"} <= exported
        ctypes.CDLL(str(cuda))
    else:
        assert info["cuda"] == {
            "built": False,
            "reason": "FEDKSEED_BUILD_CUDA=0 was set",
            "nvcc": "",
            "archs": [],
        }
    assert info["contract"] == CONTRACT_VERSION
    assert info["cpu"]["built"] is True
    assert info["cpu"]["reason"] == ""
    assert info["cpu"]["isas"][0] == "baseline"


def without_ninja(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the package ninja cannot be imported."""
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "ninja.py").write_text("raise ImportError('blocked')\n")
    return blocked


@pytest.mark.slow
def test_wheel_without_compiler_runs_on_numpy(tmp_path: Path) -> None:
    environment = {"CXX": "no-such-compiler", "FEDKSEED_BUILD_CUDA": "0"}
    wheel = build_wheel(tmp_path, **environment, PYTHONPATH=str(without_ninja(tmp_path)))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in members(wheel) if name.endswith(".so")]
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(site)
    program = (
        "import torch, fedkseed_kernels as k\n"
        "native = k.info()['backends']['native']\n"
        "assert not native['available'] and 'no-such-compiler' in native['reason'], native\n"
        "assert k.info()['cpu_backend'] == 'reference'\n"
        "assert torch.isfinite(k.normal((9,), 1)).all()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("FEDKSEED_BACKEND", None)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "times slower than the native library" in result.stderr
    assert "no C++ compiler was found (tried no-such-compiler)" in result.stderr


def test_missing_compiler_is_an_error_on_request(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_toolchain() == ((), (), "no C++ compiler was found (tried no-such-compiler)")
    monkeypatch.setenv("FEDKSEED_REQUIRE_CPU", "1")
    with pytest.raises(build.CompileError, match=r"no-such-compiler.*install g\+\+ or clang\+\+"):
        build.find_toolchain()


def test_compiler_that_cannot_link(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    toolchain = build.find_toolchain()
    assert not toolchain.command
    assert "cannot make a shared library" in toolchain.reason


def test_compiler_without_avx512(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "old-compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in\n*x86-64-v4*) echo unknown >&2; exit 1;;\n'
        "*-dumpmachine*) echo x86_64-linux-gnu;;\nesac\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    toolchain = build.find_toolchain()
    assert list(toolchain.isas) == ["baseline", "avx2"]
    assert "avx512 is left out" in toolchain.reason
    assert toolchain.flags(Path("kernels_avx512.cpp")) is None
    assert "-DFK_HAVE_AVX512=1" not in toolchain.flags(Path("entry.cpp"))
    assert "-DFK_HAVE_AVX2=1" in toolchain.flags(Path("entry.cpp"))
    monkeypatch.setenv("FEDKSEED_REQUIRE_CPU", "1")
    with pytest.raises(build.CompileError, match="avx512 is left out"):
        build.find_toolchain()


def test_switches_are_0_or_1(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKSEED_BUILD_CPU", "yes")
    with pytest.raises(build.CompileError, match="FEDKSEED_BUILD_CPU: expected 0 or 1, got 'yes'"):
        build.find_toolchain()
    monkeypatch.setenv("FEDKSEED_BUILD_CPU", "0")
    assert build.find_toolchain().reason == "FEDKSEED_BUILD_CPU=0 was set"


def test_missing_nvcc_is_found_out(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert build.find_nvcc() is None
    assert build.find_cuda_toolchain() == ("", "", "nvcc was not found in $CUDA_HOME/bin or on PATH")
    monkeypatch.setenv("FEDKSEED_REQUIRE_CUDA", "1")
    with pytest.raises(
        build.CompileError, match="REQUIRE_CUDA=1 expects .* nvcc was not found .*install the"
    ):
        build.find_cuda_toolchain()


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


def test_an_old_nvcc_is_left_alone(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, "12.8.61", "true")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    toolchain = build.find_cuda_toolchain()
    assert not toolchain.nvcc
    assert not toolchain.release
    assert "of CUDA 12.8.61, 13.0 is needed" in toolchain.reason


def test_a_failing_nvcc_is_an_error_only_on_request(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, "13.0.88", "echo no such host compiler; exit 3")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FEDKSEED_BUILD_CPU", "0")
    command = build_command(build, tmp_path)
    command.run()
    info = json.loads((tmp_path / "lib" / "fedkseed_kernels" / "_lib" / "build_info.json").read_text())
    assert info["cuda"]["built"] is False
    assert "nvcc failed: " in info["cuda"]["reason"]
    assert "no such host compiler" in info["cuda"]["reason"]
    monkeypatch.setenv("FEDKSEED_REQUIRE_CUDA", "1")
    with pytest.raises(build.CompileError, match="no such host compiler"):
        command.run()


def test_a_library_in_use_is_replaced_not_overwritten(build: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "_lib" / "library.so"
    build.publish(target, "old")
    with target.open() as mapped:
        build.publish(target, "new")
        assert mapped.read() == "old"
    assert target.read_text() == "new"
    with pytest.raises(FileNotFoundError):
        build.publish(target, tmp_path / "missing.so")
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["library.so"]


class SmallTree:
    """A source tree of few lines in place of csrc: a C++ compiler, and one that takes nvcc's flags."""

    def __init__(self, build: ModuleType, folder: Path, patch: pytest.MonkeyPatch) -> None:
        toolchain = build.find_toolchain()
        if not toolchain.command:
            pytest.skip(toolchain.reason)
        self.build, self.folder = build, folder
        self.write("include/shared.h", "inline int shared() { return 1; }")
        self.write("cpu/loop.inc", "inline int loop() { return 2; }")
        self.write(
            "cpu/one.cpp", '#include "loop.inc"\n#include "shared.h"\nint one() { return loop() + shared(); }'
        )
        self.write("cpu/two.cpp", "int two() { return 2; }")
        self.write("cuda/three.cu", '#include "shared.h"\nint three() { return shared(); }')
        self.write("cuda/inner/four.cu", "int four() { return 4; }")
        for name, source in (("CPU_SOURCES", "cpu"), ("CUDA_SOURCES", "cuda"), ("INCLUDE", "include")):
            patch.setattr(build, name, folder / "csrc" / source)
        patch.setattr(build, "contract_version", lambda: 1)
        host = f"{shlex.join(toolchain.command)} -fPIC"
        takes = "-gencode=*|-fmad=*|-cudart=*|-Xcompiler=*|-Xlinker=*"
        compiles = (
            f'for word; do shift; case "$word" in {takes}) ;; *) set -- "$@" "$word";; esac; done\n'
            f'case " $* " in *" -c "*) {host} -x c++ "$@";; *) {host} "$@";; esac'
        )
        (folder / "toolkit").mkdir()
        fake_nvcc(folder / "toolkit", "13.0.88", compiles)
        patch.setenv("CUDA_HOME", str(folder / "toolkit"))
        patch.setenv("FEDKSEED_REQUIRE_CUDA", "1")

    def write(self, name: str, text: str) -> None:
        path = self.folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def made_by(self, action: Callable[[], object]) -> set[str]:
        """The files that a build after the action makes anew."""
        before = self._times()
        action()
        build_command(self.build, self.folder).run()
        return {name for name, changed in self._times().items() if before.get(name) != changed}

    def _times(self) -> dict[str, int]:
        root = self.folder / "temp"
        files = [*root.rglob("*.o"), *root.rglob("*.so")]
        return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in files}


@pytest.fixture
def small_tree(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallTree:
    return SmallTree(build, tmp_path, monkeypatch)


CPU_LINKED, CUDA_LINKED = "cpu/libfedkseed_cpu.so", "cuda/libfedkseed_cuda.so"
CPU_MADE = {"cpu/one.o", "cpu/two.o", CPU_LINKED}
CUDA_MADE = {"cuda/three.o", "cuda/inner/four.o", CUDA_LINKED}


def test_an_edit_recompiles_what_it_touches(small_tree: SmallTree) -> None:
    csrc = small_tree.folder / "csrc"
    assert small_tree.made_by(lambda: None) == CPU_MADE | CUDA_MADE
    assert small_tree.made_by(lambda: None) == set()
    touched = {
        "cpu/loop.inc": {"cpu/one.o", CPU_LINKED},
        "cpu/two.cpp": {"cpu/two.o", CPU_LINKED},
        "cuda/inner/four.cu": {"cuda/inner/four.o", CUDA_LINKED},
        "include/shared.h": {"cpu/one.o", CPU_LINKED, "cuda/three.o", CUDA_LINKED},
    }
    assert {name: small_tree.made_by((csrc / name).touch) for name in touched} == touched


def test_libraries_of_an_earlier_build_are_replaced(small_tree: SmallTree) -> None:
    small_tree.made_by(lambda: None)
    published = small_tree.folder / "lib" / "fedkseed_kernels" / "_lib"
    with (published / "libfedkseed_cpu.so").open("rb") as mapped:
        old = mapped.read()
        small_tree.made_by(lambda: small_tree.write("cpu/two.cpp", 'extern "C" int fk_two() { return 2; }'))
        mapped.seek(0)
        assert mapped.read() == old
    assert (published / "libfedkseed_cpu.so").read_bytes() != old
    assert {path.name for path in published.iterdir()} == {
        "build_info.json",
        "libfedkseed_cpu.so",
        "libfedkseed_cuda.so",
    }


def test_another_flag_recompiles_all(small_tree: SmallTree, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tree.made_by(lambda: None)
    flags = [*small_tree.build.COMPILE_FLAGS, "-DFK_OTHER=1"]
    assert (
        small_tree.made_by(lambda: monkeypatch.setattr(small_tree.build, "COMPILE_FLAGS", flags)) == CPU_MADE
    )
    flags = [*small_tree.build.NVCC_FLAGS, "-DFK_OTHER=1"]
    assert small_tree.made_by(lambda: monkeypatch.setattr(small_tree.build, "NVCC_FLAGS", flags)) == CUDA_MADE
    flags = [*small_tree.build.LINK_FLAGS, "-Wl,--as-needed"]
    assert small_tree.made_by(lambda: monkeypatch.setattr(small_tree.build, "LINK_FLAGS", flags)) == {
        CPU_LINKED
    }


def test_another_compiler_recompiles_all(small_tree: SmallTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that took the place of the last, and one that nvcc is told of by the environment."""
    small_tree.made_by(lambda: None)
    real = shlex.join(small_tree.build.find_toolchain().command)
    compiler = small_tree.folder / "compiler"

    def release(version: int) -> None:
        version_or_work = f'if [ "$1" = --version ]; then echo {version}; else exec {real} "$@"; fi'
        compiler.write_text(f"#!/bin/sh\n{version_or_work}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))

    assert small_tree.made_by(lambda: release(1)) == CPU_MADE
    assert small_tree.made_by(lambda: release(1)) == set()
    assert small_tree.made_by(lambda: release(2)) == CPU_MADE
    assert small_tree.made_by(lambda: monkeypatch.setenv("NVCC_CCBIN", real)) == CUDA_MADE


def test_a_source_renamed_and_a_header_removed(small_tree: SmallTree) -> None:
    csrc = small_tree.folder / "csrc"
    small_tree.write(
        "cpu/two.cpp", 'extern "C" __attribute__((visibility("default"))) int fk_two() { return 2; }'
    )
    small_tree.made_by(lambda: None)
    published = small_tree.folder / "lib" / "fedkseed_kernels" / "_lib" / "libfedkseed_cpu.so"
    assert "fk_two" in exported_names(published)

    def edit() -> None:
        (csrc / "cpu" / "two.cpp").unlink()
        (csrc / "cpu" / "loop.inc").unlink()
        (csrc / "cpu" / "one.cpp").rename(csrc / "cpu" / "other.cpp")
        small_tree.write("cpu/other.cpp", "int one() { return 1; }")

    assert small_tree.made_by(edit) == {"cpu/other.o", CPU_LINKED}
    assert "fk_two" not in exported_names(published)


def test_a_source_that_does_not_compile(small_tree: SmallTree) -> None:
    """The message holds the command and its output; the old library stays, and the next build mends it."""
    small_tree.made_by(lambda: None)
    published = small_tree.folder / "lib" / "fedkseed_kernels" / "_lib" / "libfedkseed_cpu.so"
    old = published.read_bytes()
    with pytest.raises(small_tree.build.CompileError) as error:
        small_tree.made_by(lambda: small_tree.write("cpu/two.cpp", "#error not today"))
    assert "not today" in str(error.value)
    assert re.search(r"-ffp-contract=off .* -c \S+two\.cpp -o \S+two\.o$", str(error.value), re.M)
    assert published.read_bytes() == old
    assert small_tree.made_by(lambda: small_tree.write("cpu/two.cpp", "int two() { return 2; }")) == {
        "cpu/two.o",
        CPU_LINKED,
    }


def test_warnings_are_shown(small_tree: SmallTree, capsys: pytest.CaptureFixture[str]) -> None:
    small_tree.write("cpu/two.cpp", "#warning look here")
    small_tree.made_by(lambda: None)
    assert "look here" in capsys.readouterr().err


def test_paths_with_spaces_and_dollars(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a $b c"
    folder.mkdir()
    assert SmallTree(build, folder, monkeypatch).made_by(lambda: None) == CPU_MADE | CUDA_MADE


def test_max_jobs_caps_the_compilations(small_tree: SmallTree, monkeypatch: pytest.MonkeyPatch) -> None:
    build, commands = small_tree.build, []
    real_run = build.run
    monkeypatch.setattr(build, "run", lambda command: commands.append(command) or real_run(command))
    cores = len(os.sched_getaffinity(0))
    for given, jobs in (("1", 1), ("0", 1), ("", cores), ("100000", cores)):
        monkeypatch.setenv("MAX_JOBS", given)
        commands.clear()
        small_tree.made_by(lambda: None)
        assert [command[-1] for command in commands if "ninja" in command[0]] == [f"-j{jobs}"] * 2


def test_missing_ninja_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where something is to be compiled, also by an nvcc whose failure would be a warning; not elsewhere."""
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("FEDKSEED_BUILD_CUDA", "0")
    monkeypatch.setenv("FEDKSEED_BUILD_CPU", "0")
    build_command(build, tmp_path).run()
    fake_nvcc(tmp_path, "13.0.88", "true")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FEDKSEED_BUILD_CUDA", "1")
    with pytest.raises(
        build.CompileError, match="the Python package ninja, .*, is not installed; pip install"
    ):
        build_command(build, tmp_path).run()


def test_pip_names_the_missing_package(build: ModuleType, tmp_path: Path) -> None:
    if not build.find_toolchain().command:
        pytest.skip("nothing is compiled here")
    blocked = without_ninja(tmp_path)
    result = run_pip_wheel(tmp_path, PYTHONPATH=str(blocked), FEDKSEED_BUILD_CUDA="0")
    assert result.returncode != 0
    (line,) = (line for line in (result.stdout + result.stderr).splitlines() if "ninja" in line)
    assert line.strip().startswith(
        "error: the Python package ninja, which runs the compilers, is not installed;"
    )


def included(file: Path, include: Path) -> set[Path]:
    """The file itself and what it includes in the source tree, at any depth."""
    found, open_ones = set(), [file]
    while open_ones:
        path = open_ones.pop()
        found.add(path)
        for name in re.findall(r'^\s*#\s*include "(.+)"', path.read_text(), re.M):
            candidates = (folder / name for folder in (path.parent, include))
            target = next(candidate.resolve() for candidate in candidates if candidate.exists())
            if target not in found:
                open_ones.append(target)
    return found


@pytest.mark.slow
def test_every_edit_recompiles_its_own_objects(build: ModuleType, built_wheel: Path, has_nvcc: bool) -> None:
    """What ninja would compile after a touch of each file of csrc, against the sources that include it."""
    tree = (built_wheel.parent / "tree").resolve()
    csrc = tree / "csrc"
    rooms = {"cpu": "*.cpp", **({"cuda": "*.cu"} if has_nvcc else {})}
    reach = {
        f"{room}/{source.relative_to(csrc / room).with_suffix('.o')}": included(source, csrc / "include")
        for room, pattern in rooms.items()
        for source in (csrc / room).rglob(pattern)
    }
    files = [path for path in csrc.rglob("*") if path.suffix in (".inc", ".h", ".cpp", ".cu")]
    assert {path.suffix for path in files} == {".inc", ".h", ".cpp", ".cu"}
    for path in files:
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.touch()
        planned = set()
        for room in rooms:
            command = [build.find_ninja(), "-n", "-v", "-f", f"build/native/{room}/build.ninja"]
            plan = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout
            planned |= set(re.findall(r"-o build/native/(\S+\.o)$", plan, re.M))
        os.utime(path, ns=times)
        assert planned == {name for name, sources in reach.items() if path in sources}, path.name


@pytest.fixture(scope="module")
def objects(built_wheel: Path) -> list[Path]:
    """The objects of the CPU library in the wheel."""
    return sorted((built_wheel.parent / "tree" / "build" / "native" / "cpu").rglob("*.o"))


@pytest.mark.slow
def test_isa_files_share_no_symbols(build: ModuleType, objects: list[Path]) -> None:
    """A weak or unique symbol with AVX code could be the one that the linker keeps for the baseline too."""
    isa_objects = [path for path in objects if path.stem.rpartition("_")[2] in build.ISA_FLAGS]
    if not isa_objects:
        pytest.skip("the compiler's target has no instruction sets above the baseline")
    for path in isa_objects:
        table = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        assert " T " in table or " R " in table or " D " in table, f"{path.name} defines nothing"
        assert re.findall(r"^.* [WVu] .*$", table, re.M) == [], path.name


@pytest.mark.slow
def test_library_exports_only_its_interface(build: ModuleType, built_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built_wheel) as opened:
        library = Path(opened.extract(f"fedkseed_kernels/_lib/{build.LIBRARY}", tmp_path))
    declared = set(re.findall(r"^int32_t (fk_\w+)\(", (build.INCLUDE / "fedkseed.h").read_text(), re.M))
    assert exported_names(library) == declared


@pytest.mark.slow
def test_baseline_builds_for_aarch64(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv("CXX", compiler)
    toolchain = build.find_toolchain()
    assert toolchain == ([compiler], ["baseline"], "")
    library = build.compile_library(build.cpu_library(toolchain), tmp_path)
    assert not [path.name for path in tmp_path.rglob("*.o") if "avx" in path.name]
    header = library.read_bytes()[:20]
    assert int.from_bytes(header[18:20], "little") == ELF_AARCH64


def test_readme_example_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 1
    result = subprocess.run([sys.executable, "-c", blocks[0]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_environment_variables_are_documented() -> None:
    used = set()
    for path in (
        ROOT / "setup.py",
        *(ROOT / "fedkseed_kernels").glob("*.py"),
        *(ROOT / "python").rglob("*.py"),
    ):
        used |= set(re.findall(r"\bFEDKSEED_[A-Z_]+\b", path.read_text()))
    documented = set(re.findall(r"^\| `(FEDKSEED_[A-Z_]+)`", (ROOT / "README.md").read_text(), re.M))
    assert used == documented


def test_make_targets_are_documented() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (\w+)$", makefile, re.M))
    described = set(re.findall(r"^(\w+):.*## \w", makefile, re.M))
    assert phony == described
    pages = [ROOT / name for name in ("README.md", "CHANGELOG.md", ".ci/run")]
    named = {name for page in pages for name in re.findall(r"(?:`|    )make (\w+)", page.read_text())}
    assert named
    assert named <= phony


def test_ci_script() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def committed_files() -> list[Path]:
    """What a commit of this tree would hold; in an unpacked archive without git, nothing."""
    try:
        listed = subprocess.run(GIT_LIST, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    paths = (ROOT / name.decode() for name in listed.split(b"\0") if name)
    return [path for path in paths if path.is_file()]


def test_no_registry_and_no_path_of_a_machine_is_named() -> None:
    files = committed_files()
    if not files:
        pytest.skip("not a git checkout")
    # Written so that this file does not name them either.
    hosts = [r"pypi\.or[g]", r"pythonhoste[d]\.", r"registry\.npmj[s]", r"deb\.debia[n]", r"crates\.i[o]"]
    paths = [r"(?<![\w.:/~$}])/(?:wor[k]|roo[t]|hom[e]/\w+|User[s]/\w+)/"]
    forbidden = re.compile("|".join(hosts + paths))
    found = []
    for path in files:
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:  # a binary file: golden vectors
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if forbidden.search(line)
        ]
    assert found == []
