"""The choice of a backend: the table, the switches, what is said and what is refused."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import c_abi, native_cpu, native_cuda
from fedkseed_kernels.backends import triton as triton_backend
from fedkseed_kernels.operands import ISA_CODES

HAS_NATIVE = native_cpu.unavailable() is None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="tests/test_native.py says why")


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    monkeypatch.delenv(dispatch.CPU_ISA_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_settled", set())


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine on which the library was not built."""
    (tmp_path / "build_info.json").write_text('{"cpu": {"reason": "no C++ compiler was found"}}')
    monkeypatch.setattr(native_cpu, "LIBRARY_PATH", tmp_path / "libfedkseed_cpu.so")
    monkeypatch.setattr(c_abi, "BUILD_INFO_PATH", tmp_path / "build_info.json")
    native_cpu._load.cache_clear()
    yield
    native_cpu._load.cache_clear()


def test_the_table_names_known_backends() -> None:
    assert {name for names in dispatch.TABLE.values() for name in names} == set(dispatch.NAMES)


@needs_native
def test_the_automatic_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fedkseed_kernels"):
        for _ in range(3):
            fk.normal(3, 1)
            assert dispatch.select("cpu").name == "native"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "cpu tensors are served by the native backend, the best that works here")
    ]


def test_a_second_choice_for_a_gpu_is_said_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_cuda, "unavailable", lambda device: "the NVIDIA driver is too old")
    monkeypatch.setattr(dispatch.TABLE["cuda"]["triton"], "unavailable", lambda device: None)
    with caplog.at_level(logging.INFO, logger="fedkseed_kernels"):
        assert [dispatch.select(f"cuda:{index}").name for index in (0, 1, 0, 1)] == ["triton"] * 4
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        (
            "WARNING",
            f"cuda:{index} tensors are served by the triton backend; native: the NVIDIA driver is too old",
        )
        for index in (0, 1)
    ]


def test_cuda_tensors_have_a_native_backend_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "unavailable", lambda device: None)
    with dispatch.backend("native"), dispatch.cpu_isa("baseline"):
        assert dispatch.select("cuda").backend is native_cuda


@pytest.mark.usefixtures("without_native")
def test_without_the_library_numpy_serves_and_says_what_it_costs(caplog: pytest.LogCaptureFixture) -> None:
    weights = torch.zeros(4)
    with caplog.at_level(logging.INFO, logger="fedkseed_kernels"):
        for _ in range(3):
            fk.perturb_(weights, 1, 0.5)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    for part in ("NumPy", "slower", "no C++ compiler was found", "install g++"):
        assert part in message
    assert torch.equal(weights, fk.normal(4, 1) * 1.5)
    info = fk.info()
    assert info["cpu_backend"] == "reference"
    assert info["cpu_isa"] is None
    assert "no C++ compiler" in info["backends"]["native"]["reason"]


@pytest.mark.usefixtures("without_native")
def test_without_the_library_an_explicit_request_raises() -> None:
    weights = torch.ones(4)
    with (
        dispatch.backend("native"),
        pytest.raises(RuntimeError, match="asks for native, which cannot be used: .*no C"),
    ):
        fk.perturb_(weights, 1, 0.5)
    with (
        dispatch.cpu_isa("avx2"),
        pytest.raises(RuntimeError, match="asks for avx2, which needs the native backend"),
    ):
        fk.perturb_(weights, 1, 0.5)
    assert torch.equal(weights, torch.ones(4))
    assert "asks for" not in fk.info()["cpu_backend"]


@pytest.mark.parametrize("name", ["cuda", "", "Native", "numpy"])
def test_unknown_names_list_the_known_ones(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    known = "auto, native, triton, reference"
    with (
        pytest.raises(ValueError, match=f"expected backend to be one of {known}, got '{name}'"),
        dispatch.backend(name),
    ):
        pass
    isas = ", ".join(ISA_CODES)
    with (
        pytest.raises(ValueError, match=f"expected cpu_isa to be one of {isas}, got '{name}'"),
        dispatch.cpu_isa(name),
    ):
        pass
    if name:  # an empty variable is an unset one
        weights = torch.ones(4)
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, name)
        with pytest.raises(ValueError, match=f"expected FEDKSEED_BACKEND to be one of {known}, got '{name}'"):
            fk.perturb_(weights, 1, 0.5)
        monkeypatch.delenv(dispatch.BACKEND_VARIABLE)
        monkeypatch.setenv(dispatch.CPU_ISA_VARIABLE, name)
        with pytest.raises(ValueError, match=f"expected FEDKSEED_CPU_ISA to be one of {isas}, got '{name}'"):
            fk.perturb_(weights, 1, 0.5)
        assert name in fk.info()["cpu_backend"]
        assert fk.info()["cpu_isa"] is None
        assert torch.equal(weights, torch.ones(4))


def test_triton_says_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    monkeypatch.delenv(triton_backend.INTERPRET_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for reason in (None, "the package triton is not installed; pip install 'triton>=3.6'"):
        monkeypatch.setattr(triton_backend, "_why_not_installed", lambda reason=reason: reason)
        expected = reason or "torch finds no GPU; on the CPU it runs only in Triton's interpreter"
        with pytest.raises(RuntimeError, match=f"asks for triton, which cannot be used: {expected}"):
            fk.normal(3, 1)


def test_triton_serves_cpu_tensors_only_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_why_not_installed", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(triton_backend.INTERPRET_VARIABLE, raising=False)
    with dispatch.backend("triton"):
        with pytest.raises(
            RuntimeError, match="triton, which does not serve cpu tensors; expected one of native"
        ):
            dispatch.select("cpu")
        assert dispatch.select("cuda").name == "triton"
        monkeypatch.setenv(triton_backend.INTERPRET_VARIABLE, "1")
        assert dispatch.select("cpu").name == "triton"
    assert dispatch.select("cpu").name != "triton"


@pytest.mark.parametrize(
    ("version", "works"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", False), ("?", False)],
)
def test_releases_of_triton(version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_installed_version", lambda: version)
    reason = triton_backend._why_not_installed.__wrapped__()
    assert (
        reason is None if works else reason.startswith(f"expected triton 3.6 to 3.9, got {version}; install")
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"triton/__init__.py": '"""isort:skip_file"""\n__version__ = \'3.7.1\'\nimport nothing\n'}, "3.7.1"),
        ({"triton/__init__.py": "version = 3\n"}, "one without a version in "),
        ({"triton/README.md": "a checkout's folder"}, None),
        ({}, None),
    ],
    ids=["source", "no version", "a folder", "nothing"],
)
def test_the_version_of_triton_is_its_sources(
    files: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    found = triton_backend._installed_version()
    assert found == expected or (expected is not None and str(found).startswith(expected))
    assert "triton" not in sys.modules


def test_an_empty_module_named_triton_is_not_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert "not installed" in triton_backend._why_not_installed.__wrapped__()


SMALL_CALL = """
from importlib import metadata
import torch
import fedkseed_kernels as fk
names = {d.metadata["Name"] for d in metadata.distributions()}
assert "triton" not in names and "torch" in names, names
print(*(n for n in names if "triton" in n))
assert fk.unavailable("triton", "cpu") is None
got, want = (torch.linspace(-1, 1, 301, dtype=torch.bfloat16) for _ in range(2))
fk.seed_axpy_([got], [1, 2, 3], [0.5, -0.25, 1.0], alpha=0.75)
with fk.backend("reference"):
    fk.seed_axpy_([want], [1, 2, 3], [0.5, -0.25, 1.0], alpha=0.75)
assert torch.equal(got, want)
"""


@pytest.mark.skipif(util.find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize("distribution", ["triton_rocm", None])
def test_triton_of_any_distribution_serves(distribution: str | None, tmp_path: Path) -> None:
    """torch for ROCm brings triton-rocm, Windows has triton-windows; a build may have no record at all."""
    for found in {Path(util.find_spec(name).origin).parents[1] for name in ("torch", "triton", "numpy")}:
        for entry in found.iterdir():
            if not re.match(r"(triton-|__editable__|_)", entry.name) and entry.suffix != ".pth":
                (tmp_path / entry.name).symlink_to(entry)
    if distribution is not None:
        record = tmp_path / f"{distribution}-3.9.0.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 3.9.0\n")
    environment = os.environ | {
        "PYTHONPATH": f"{Path(fk.__file__).parents[1]}{os.pathsep}{tmp_path}",
        triton_backend.INTERPRET_VARIABLE: "1",
        dispatch.BACKEND_VARIABLE: "triton",
    }
    result = subprocess.run(  # -S: without the folder that those links point to
        [sys.executable, "-S", "-c", SMALL_CALL], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ([] if distribution is None else [distribution])


def test_a_backend_that_does_not_serve_the_device() -> None:
    with dispatch.backend("reference"), pytest.raises(RuntimeError, match="does not serve cuda tensors"):
        dispatch.select("cuda")


def test_switches_are_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "reference")
    assert dispatch.select("cpu").name == "reference"
    assert fk.info()["environment"][dispatch.BACKEND_VARIABLE] == "reference"
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "auto")
    assert dispatch.select("cpu").name == list(dispatch.TABLE["cpu"])[0 if HAS_NATIVE else 1]


def test_a_block_outranks_the_environment_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    with dispatch.backend("reference"):
        assert dispatch.select("cpu").name == "reference"
        with dispatch.backend("auto"):
            assert dispatch.requested_backend() == "auto"
        assert dispatch.select("cpu").name == "reference"
    assert dispatch.requested_backend() == "triton"


@needs_native
def test_every_instruction_set_is_usable_or_refused() -> None:
    usable, built = native_cpu.usable_isas(), native_cpu.built_isas()
    for name in ISA_CODES:
        with dispatch.cpu_isa(name):
            if name in ("auto", *usable):
                assert dispatch.select("cpu").isa == name
                assert fk.info()["cpu_isa"] == (usable[-1] if name == "auto" else name)
            else:
                reason = "this machine cannot run it" if name in built else "the library was built without it"
                with pytest.raises(
                    RuntimeError, match=f"asks for {name}, but {reason}; expected one of auto, baseline"
                ):
                    fk.normal(3, 1)


@needs_native
def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cpu, "usable_isas", lambda: ["baseline"])
    weights = torch.ones(4)
    with (
        dispatch.cpu_isa("avx512"),
        pytest.raises(RuntimeError, match="FEDKSEED_CPU_ISA asks for avx512, but"),
    ):
        fk.perturb_(weights, 1, 0.5)
    assert torch.equal(weights, torch.ones(4))


IMPORT_PROBE = """
import os, sys, threading
import torch
before = len(os.listdir("/proc/self/task"))
modules = set(sys.modules)
import fedkseed_kernels
assert len(os.listdir("/proc/self/task")) == before, "threads were started"
assert "libfedkseed_cpu" not in open("/proc/self/maps").read(), "the native library was loaded"
assert not torch.cuda.is_initialized()
new = set(sys.modules) - modules
print(" ".join(sorted({name.split(".")[0] for name in new})))
print(" ".join(sorted(name for name in new if name.startswith("torch"))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_importing_is_light() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    packages, torch_modules = result.stdout.split("\n")[:2]
    heavy = {"transformers", "triton", "fedkseed", "scipy", "sympy", "tqdm"}
    assert not heavy & set(packages.split())
    assert "torch._dynamo" not in torch_modules.split()
