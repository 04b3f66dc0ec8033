"""The distribution: what a wheel holds with a compiler and without, and what its libraries export."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from support.native_build import (
    ROOT,
    SWITCHES,
    assert_loads_on_glibc_2_28,
    exported_names,
    load_setup,
    run_pip_wheel,
    without_ninja,
)

from benchmarks.machine_code.reader import find_binary_tool
from fedkseed_kernels import CONTRACT_VERSION, __version__


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load_setup()


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


def build_wheel(folder: Path, **environment: str) -> Path:
    result = run_pip_wheel(folder, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


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
        assert info["cuda"]["archs"] == ["sm_80", "sm_90", "sm_100", "sm_120"]
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


@pytest.mark.slow
def test_the_wheel_loads_on_glibc_2_28(build: ModuleType, built_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built_wheel) as opened:
        names = [name for name in opened.namelist() if name.endswith(".so")]
        for name in names:
            assert_loads_on_glibc_2_28(Path(opened.extract(name, tmp_path)))
    assert f"fedkseed_kernels/_lib/{build.LIBRARY}" in names


@pytest.mark.parametrize("name", ["LIBRARY", "CUDA_LIBRARY"])
def test_the_built_libraries_load_on_glibc_2_28(build: ModuleType, name: str) -> None:
    """Those of this checkout, as make left them."""
    library = ROOT / build.LIB_PACKAGE / getattr(build, name)
    if not library.exists():
        pytest.skip(f"{library.name} is not built here")
    assert_loads_on_glibc_2_28(library)


@pytest.mark.slow
def test_gpus_and_ptx_of_the_cuda_library(
    build: ModuleType, built_wheel: Path, has_nvcc: bool, tmp_path: Path
) -> None:
    """Machine code for what is listed, PTX for 11.x and what follows; no code path of <<<>>> (target.h)."""
    if not has_nvcc:
        pytest.skip("nvcc is not here")
    with zipfile.ZipFile(built_wheel) as opened:
        library = Path(opened.extract(f"fedkseed_kernels/_lib/{build.CUDA_LIBRARY}", tmp_path))

    def listed(option: str, path: Path) -> set[str]:
        command = [find_binary_tool("cuobjdump"), option, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(re.findall(r"\.(sm_\d+)\.(?:cubin|ptx)$", result.stdout, re.M))

    machine_code = {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert machine_code <= listed("--list-elf", library)  # beside it an empty one, of nvcc's own link step
    assert listed("--list-ptx", library) == {"sm_100"}
    objects = sorted((built_wheel.parent / "tree" / "build" / "native" / "cuda").rglob("*.o"))
    assert len(objects) == len(build.find_sources(build.CUDA_SOURCES, "*.cu"))
    for path in objects:
        table = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        assert "__cudaPushCallConfiguration" not in table, f"{path.name} launches by <<<>>>"
        if "__cudaRegisterFunction" in table:
            assert listed("--list-elf", path) == machine_code, path.name
            assert listed("--list-ptx", path) == {"sm_100"}, path.name


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
