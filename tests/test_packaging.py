"""The distribution: what is built with and without a compiler, what a wheel holds, what the pages promise."""

from __future__ import annotations

import ctypes
import importlib.util
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

from fedkseed_kernels import CONTRACT_VERSION, __version__

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("csrc", "fedkseed_kernels", "python")
GIT_LIST = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
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
    for name in ("BUILD_CPU", "REQUIRE_CPU", "BUILD_CUDA", "REQUIRE_CUDA"):
        monkeypatch.delenv(f"FEDKSEED_{name}", raising=False)
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel of a copy of the sources, built without a network."""
    ignore = shutil.ignore_patterns("_lib", "__pycache__", ".*")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(folder / "tree")]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
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


@pytest.mark.slow
def test_wheel_with_compiler(tmp_path: Path) -> None:
    """Both libraries where nvcc is there; they load without a driver and export their interfaces alone."""
    has_nvcc = shutil.which("nvcc") is not None
    chosen = "FEDKSEED_REQUIRE_CUDA" if has_nvcc else "FEDKSEED_BUILD_CUDA"
    wheel = build_wheel(tmp_path, FEDKSEED_REQUIRE_CPU="1", **{chosen: "1" if has_nvcc else "0"})
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


@pytest.mark.slow
def test_wheel_without_compiler_runs_on_numpy(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX="no-such-compiler", FEDKSEED_BUILD_CUDA="0")
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
    assert build.find_cuda_toolchain() == ("", "nvcc was not found in $CUDA_HOME/bin or on PATH")
    monkeypatch.setenv("FEDKSEED_REQUIRE_CUDA", "1")
    with pytest.raises(
        build.CompileError, match="REQUIRE_CUDA=1 expects .* nvcc was not found .*install the"
    ):
        build.find_cuda_toolchain()


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
    nvcc, reason = build.find_cuda_toolchain()
    assert nvcc == ""
    assert "of CUDA 12.8.61, 13.0 is needed" in reason


def test_a_failing_nvcc_is_an_error_only_on_request(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, "13.0.88", "echo no such host compiler; exit 3")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FEDKSEED_BUILD_CPU", "0")
    command = build.BuildNative(build.NativeDistribution())
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
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
    with pytest.raises(build.CompileError):
        build.publish(target, ["false"])
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["library.so"]


@pytest.fixture(scope="module")
def objects(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX", raising=False)
        toolchain = build.find_toolchain()
    if not toolchain.command:
        pytest.skip(toolchain.reason)
    folder = tmp_path_factory.mktemp("objects")
    return build.compile_objects(toolchain, folder)


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
def test_library_exports_only_its_interface(build: ModuleType, objects: list[Path], tmp_path: Path) -> None:
    library = tmp_path / build.LIBRARY
    build.publish(library, [*build.find_toolchain().command, *map(str, objects), *build.LINK_FLAGS])
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
    built = build.compile_objects(toolchain, tmp_path / "objects")
    assert not [path.name for path in built if "avx" in path.name]
    build.publish(tmp_path / build.LIBRARY, [compiler, *map(str, built), *build.LINK_FLAGS])
    header = (tmp_path / build.LIBRARY).read_bytes()[:20]
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
