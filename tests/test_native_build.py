"""setup.py: which compilers are taken, what is built and rebuilt, and what a failure says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.native_build import (
    SWITCHES,
    assert_loads_on_glibc_2_28,
    build_command,
    exported_names,
    fake_nvcc,
    load_script,
    load_setup,
    needed_libraries,
)

ELF_AARCH64 = 183


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load_setup()


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


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
        drops = "-gencode=*|-fmad=*|-cudart=*"
        compiles = (
            f'for word; do shift; case "$word" in {drops}) ;; '
            '-Xcompiler=*) set -- "$@" $(echo "${word#*=}" | tr , " ");; '
            '-Xlinker=*) set -- "$@" "-Wl,${word#*=}";; *) set -- "$@" "$word";; esac; done\n'
            f'case " $* " in *" -print-file-name="*) {host} "$@";; '
            f'*" -E "*) cat {shlex.quote(str(folder / "host"))};; '
            f'*" -c "*) {host} -x c++ "$@";; *) {host} "$@" -lrt -lpthread -ldl;; esac'
        )
        (folder / "host").write_text("the compiler that nvcc calls, release 1\n")
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
CUDA_COMPILED = {"cuda/three.o", "cuda/inner/four.o", CUDA_LINKED}
CUDA_MADE = {*CUDA_COMPILED, "cuda/glibc/libdl.so", "cuda/glibc/libpthread.so", "cuda/glibc/librt.so"}


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


def test_libraries_that_are_built_no_more_go_away(
    small_tree: SmallTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the package would load what build_info.json says is not there."""
    small_tree.made_by(lambda: None)
    monkeypatch.delenv("FEDKSEED_REQUIRE_CUDA")
    for name in ("FEDKSEED_BUILD_CPU", "FEDKSEED_BUILD_CUDA"):
        monkeypatch.setenv(name, "0")
    assert small_tree.made_by(lambda: None) == set()
    published = small_tree.folder / "lib" / "fedkseed_kernels" / "_lib"
    assert [path.name for path in published.iterdir()] == ["build_info.json"]


def test_another_flag_recompiles_all(small_tree: SmallTree, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tree.made_by(lambda: None)
    flags = [*small_tree.build.COMPILE_FLAGS, "-DFK_OTHER=1"]
    assert (
        small_tree.made_by(lambda: monkeypatch.setattr(small_tree.build, "COMPILE_FLAGS", flags)) == CPU_MADE
    )
    flags = [*small_tree.build.NVCC_FLAGS, "-DFK_OTHER=1"]
    made = small_tree.made_by(lambda: monkeypatch.setattr(small_tree.build, "NVCC_FLAGS", flags))
    assert made == CUDA_COMPILED
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
    host = small_tree.folder / "host"
    assert small_tree.made_by(lambda: host.write_text("the same, release 2\n")) == CUDA_MADE
    assert small_tree.made_by(lambda: None) == set()


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


MOVED_FUNCTIONS = """\
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>
extern "C" int fk_uses_them(pthread_rwlock_t *lock, pthread_cond_t *condition, sem_t *semaphore) {
  return pthread_rwlock_rdlock(lock) + pthread_cond_signal(condition) + pthread_once(0, 0) +
         sem_post(semaphore) + shm_unlink("/name") + dlclose(dlopen("name", RTLD_LAZY));
}"""


def test_functions_that_glibc_moved_are_found_where_old_systems_have_them(small_tree: SmallTree) -> None:
    """Through the compiler that nvcc calls, whatever glibc is on this machine."""
    small_tree.made_by(lambda: small_tree.write("cuda/three.cu", MOVED_FUNCTIONS))
    library = small_tree.folder / "temp" / CUDA_LINKED
    assert_loads_on_glibc_2_28(library)
    assert {"libdl.so.2", "libpthread.so.0", "librt.so.1"} <= needed_libraries(library)
    small_tree.build.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"])


def test_stubs_have_versions_up_to_2_28(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    stubs = load_script(build.STUB_MAKER)
    table = """\
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     5: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND pthread_kill@GLIBC_2.17 (2)
    10: 0000000000089380  3821 FUNC    GLOBAL DEFAULT   15 pthread_create@GLIBC_2.2.5
    11: 0000000000089380  3821 FUNC    GLOBAL DEFAULT   15 pthread_create@@GLIBC_2.34
    12: 0000000000089390    42 FUNC    GLOBAL DEFAULT   15 pthread_cond_wait@@GLIBC_2.3.2
    13: 00000000000893a0    42 FUNC    GLOBAL DEFAULT   15 pthread_cond_wait@GLIBC_2.2.5
    14: 00000000000893b0    42 FUNC    WEAK   DEFAULT   15 pthread_mutex_lock@@GLIBC_2.17
    15: 00000000000893c0    42 FUNC    GLOBAL DEFAULT   15 pthread_cond_clockwait@@GLIBC_2.30
    16: 00000000000893d0    42 FUNC    GLOBAL DEFAULT   15 __pthread_get_minstack@@GLIBC_PRIVATE
    17: 00000000000893e0    42 FUNC    GLOBAL DEFAULT   15 mtx_pthread_like@@GLIBC_2.28
    18: 00000000000893f0    42 FUNC    GLOBAL DEFAULT   15 sem_wait@@GLIBC_2.28
"""
    _, pattern = stubs.LIBRARIES["libpthread.so"]
    assert stubs.old_versions(table, pattern) == {
        "pthread_cond_wait": "2.3.2",
        "pthread_create": "2.2.5",
        "pthread_mutex_lock": "2.17",
        "sem_wait": "2.28",
    }


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
    assert_loads_on_glibc_2_28(library)
