"""The ctypes side of the CUDA library: its structs are the header's, and it says why it cannot be used."""

from __future__ import annotations

import ctypes
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import c_abi, native_cuda
from fedkseed_kernels.self_test import gate

HEADER = Path(__file__).parents[1] / "csrc" / "include" / "fedkseed_cuda.h"
COMPILER = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
needs_library = pytest.mark.skipif(
    isinstance(native_cuda.open_library(native_cuda.LIBRARY_PATH), str), reason="built without CUDA"
)


def compile_c(source: str, folder: Path, *flags: str) -> Path:
    assert COMPILER is not None
    code, target = folder / "probe.c", folder / "probe.out"
    code.write_text(source)
    command = [COMPILER, "-std=c11", f"-I{HEADER.parent}", *flags, str(code), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Forgets what was remembered of another test's library or driver."""
    remembering = [
        native_cuda._load,
        native_cuda._why_the_driver_cannot_serve,
        native_cuda._why_a_gpu_is_too_old,
        native_cuda._why_a_gpu_cannot_serve,
        native_cuda.load_kernels,
    ]
    for function in remembering:
        function.cache_clear()
    yield
    for function in remembering:
        function.cache_clear()


@pytest.fixture
def library_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "libfedkseed_cuda.so"
    monkeypatch.setattr(native_cuda, "LIBRARY_PATH", path)
    monkeypatch.setattr(c_abi, "BUILD_INFO_PATH", tmp_path / "build_info.json")
    return path


# --- the header


@needs_compiler
def test_the_struct_is_the_headers(tmp_path: Path) -> None:
    struct = c_abi.FkCudaTerms
    text = re.sub(r"//.*", "", HEADER.read_text())
    body = re.search(r"typedef struct fk_cuda_terms {(.*?)} fk_cuda_terms;", text, re.S)
    assert body is not None
    fields = re.findall(r"(\w+);", body.group(1))
    assert fields == [field for field, *_ in struct._fields_]
    lines = ['printf("%zu\\n", sizeof(fk_cuda_terms));'] + [
        f'printf("%zu %zu\\n", offsetof(fk_cuda_terms, {f}), sizeof(((fk_cuda_terms *)0)->{f}));'
        for f in fields
    ]
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <fedkseed_cuda.h>\nint main(void) {"
    program = compile_c(source + "".join(lines) + "}", tmp_path)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    descriptors = [getattr(struct, field) for field in fields]
    assert printed == [str(ctypes.sizeof(struct)), *(f"{d.offset} {d.size}" for d in descriptors)]


def test_constants_are_the_headers() -> None:
    found = re.search(r"^#define FK_CUDA_MAX_TERMS_BY_VALUE (\d+)$", HEADER.read_text(), re.M)
    assert found is not None
    assert int(found.group(1)) == native_cuda.MAX_TERMS_BY_VALUE


# --- why it cannot be used


def assert_reason(*parts: str) -> None:
    why = native_cuda.unavailable()
    assert why is not None
    for part in parts:
        assert part in why
    assert fk.info()["native_cuda"] == {"available": False, "reason": why}
    with (
        dispatch.backend("native"),
        pytest.raises(RuntimeError, match="asks for native, which cannot be used"),
    ):
        fk.normal(3, 1, device="cuda")


def test_not_built(library_path: Path) -> None:
    assert_reason(str(library_path), "the installation left no record", "reinstall")
    c_abi.BUILD_INFO_PATH.write_text('{"cuda": {"reason": "nvcc was not found"}}')
    native_cuda._load.cache_clear()
    assert_reason("was not built at installation: nvcc was not found", "install the CUDA toolkit")


def test_not_a_library(library_path: Path) -> None:
    library_path.write_text("not a library")
    assert_reason("does not load", "reinstall")
    with pytest.raises(RuntimeError, match="the native CUDA library cannot be used"):
        native_cuda.library()


@needs_compiler
@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ((99, 1), f"fk_abi_version expected {c_abi.ABI_VERSION}, got 99"),
        ((c_abi.ABI_VERSION, 2), "fk_contract_version expected 1, got 2"),
        ((c_abi.ABI_VERSION, 1), "lacks an entry"),
    ],
)
def test_another_release(library_path: Path, tmp_path: Path, versions: tuple[int, int], message: str) -> None:
    source = "int fk_abi_version(void) {{ return {}; }} int fk_contract_version(void) {{ return {}; }}"
    compile_c(source.format(*versions), tmp_path, "-shared", "-fPIC").rename(library_path)
    assert_reason(message, "reinstall")


@needs_library
def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert_reason(f"torch {torch.__version__} is built without CUDA", "install")


class StandIn:
    """A handle of a library on a machine of its own: what its calls return is chosen here."""

    def __init__(self, driver: int = 13000, runtime: int = 13000, load: dict[int, int] | None = None):
        self.versions = {"driver": driver, "runtime": runtime}
        self.load = load or {}
        self.loaded: list[int] = []

    def _version(self, of: str, target: Any) -> int:
        target._obj.value = self.versions[of]
        return 0

    def fk_cuda_driver_version(self, target: Any) -> int:
        return self._version("driver", target)

    def fk_cuda_runtime_version(self, target: Any) -> int:
        return self._version("runtime", target)

    def fk_cuda_load(self, device: int) -> int:
        self.loaded.append(device)
        return self.load.get(device, 0)

    def fk_cuda_error_string(self, status: int) -> bytes:
        return b"CUDA's words"


Machine = Callable[..., StandIn]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes a machine of two GPUs that torch has found, with a stand-in for the library."""

    def make(
        *versions: int,
        load: dict[int, int] | None = None,
        capabilities: Sequence[tuple[int, int]] = ((9, 0),) * 2,
    ) -> StandIn:
        handle = StandIn(*versions, load=load)
        monkeypatch.setattr(native_cuda, "_load", lambda: handle)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(dispatch.TABLE["cuda"]["triton"], "unavailable", lambda device=None: None)
        monkeypatch.setattr(dispatch, "_logged", set())
        monkeypatch.setattr(dispatch, "_settled", set())
        monkeypatch.setattr(gate, "verdicts", {})
        monkeypatch.setenv(gate.SELF_TEST_VARIABLE, "0")  # the stand-in computes nothing
        return handle

    return make


@pytest.mark.parametrize(
    ("driver", "runtime", "needed"),
    [
        (12080, 13000, "13.0"),
        (12090, 13020, "13.0"),
        (13000, 13000, None),
        (13000, 13020, None),  # one driver serves every minor version of its major one
        (13020, 13000, None),
        (14000, 13000, None),
        (11080, 12080, "12.1"),
        (12000, 12080, "12.1"),  # it takes 4 KB of parameters
        (12010, 12080, None),
        (12020, 12090, None),
        (13000, 12080, None),
    ],
)
def test_drivers(machine: Machine, driver: int, runtime: int, needed: str | None) -> None:
    machine(driver, runtime)
    if needed is None:
        assert native_cuda.unavailable() is None
    else:
        assert_reason(
            f"serves CUDA {driver // 1000}.{driver % 1000 // 10}, the library needs {needed} or later",
            "update the driver or use FEDKSEED_BACKEND",
        )


def test_no_driver(machine: Machine) -> None:
    machine(0)
    assert_reason("no NVIDIA driver")


@needs_library
def test_a_new_enough_driver_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    real = native_cuda._version
    monkeypatch.setattr(native_cuda, "_version", lambda h, of: 13020 if of == "driver" else real(h, of))
    assert native_cuda.unavailable() is None


def test_torch_for_rocm(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(torch.version, "hip", "6.4.43484")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert_reason(f"torch {torch.__version__} is built for ROCm", "NVIDIA GPUs alone")


# --- each GPU by itself


def chosen_for(*devices: str) -> list[str]:
    return [dispatch.select(device).name for device in devices]


def test_a_gpu_that_is_too_old_leaves_the_others_to_the_library(machine: Machine) -> None:
    machine(capabilities=[(7, 5), (9, 0)])
    assert native_cuda.unavailable() is None
    native_cuda._why_a_gpu_is_too_old.cache_clear()
    handle = machine(capabilities=[(9, 0), (7, 5)])
    assert native_cuda.unavailable() is None
    assert chosen_for("cuda:0", "cuda:1", "cuda") == ["native", "triton", "triton"]
    assert handle.loaded == [0]
    why = fk.unavailable("native", torch.device("cuda", 1))
    assert why is not None
    assert "cuda:1 is of compute capability 7.5, the library is built for 8.0 and later" in why
    assert fk.unavailable("native", "cuda:0") is None


def test_where_every_gpu_is_too_old_the_machine_cannot_serve(machine: Machine) -> None:
    machine(capabilities=[(7, 0), (7, 5)])
    assert_reason("cuda:0 is of compute capability 7.0")


@pytest.mark.parametrize("status", native_cuda.REFUSALS)
def test_kernels_that_do_not_load_send_their_gpu_alone_to_triton(
    machine: Machine, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    handle = machine(load={0: status})
    reason = f"the library does not load on cuda:0: {native_cuda.REFUSALS[status]} (CUDA error {status})"
    with caplog.at_level(logging.INFO, logger="fedkseed_kernels"):
        for _ in range(3):
            assert chosen_for("cuda:0", "cuda:1", "cuda") == ["triton", "native", "native"]
    assert handle.loaded == [0, 1]
    first, second = caplog.records
    assert first.levelname == "WARNING"
    assert first.getMessage().startswith(
        f"cuda:0 tensors are served by the triton backend; native: {reason}; use FEDKSEED_BACKEND=triton"
    )
    assert second.levelname == "INFO"
    assert second.getMessage().startswith("cuda:1 tensors are served by the native backend")
    with dispatch.backend("native"):
        assert chosen_for("cuda:1") == ["native"]
        with pytest.raises(RuntimeError, match=re.escape(f"which cannot be used: {reason}")):
            dispatch.select("cuda:0")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (2, r"CUDA's words \(CUDA error 2\); free some \(torch.cuda.empty_cache\(\)\) and call again"),
        (46, r"CUDA's words \(CUDA error 46\)$"),
        (700, r"CUDA's words \(CUDA error 700\)$"),
        (-1, "does not know a code"),
    ],
)
def test_what_may_pass_is_raised_and_tried_again(machine: Machine, status: int, message: str) -> None:
    handle = machine(load={0: status})
    for name in ("auto", "native"):
        with dispatch.backend(name), pytest.raises(native_cuda.CudaError, match=message):
            dispatch.select("cuda:0")
    handle.load.clear()
    assert chosen_for("cuda:0") == ["native"]
    assert handle.loaded == [0] * 3


def test_no_gpu_is_asked_before_torch_has_found_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handle = machine(load={1: 222})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("current_device", "device_count", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(f"asked {name}"))
    with caplog.at_level(logging.INFO, logger="fedkseed_kernels"):
        assert chosen_for("cuda") == ["native"]
    assert handle.loaded == []
    assert not caplog.records, "said before there was a device to say it of"


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_library_loads_without_a_driver_and_calls_say_what_is_missing() -> None:
    handle = native_cuda.library()
    with pytest.raises(
        RuntimeError, match=r"the native CUDA library failed: .*(driver|device).*\(CUDA error \d+\)"
    ):
        native_cuda.check(handle, handle.fk_cuda_load(0))
    assert b"driver" in handle.fk_cuda_error_string(35)
    with pytest.raises(RuntimeError, match="no backend can serve cuda tensors: native: "):
        fk.normal(3, 1, device="cuda")


def test_importing_touches_neither_the_library_nor_a_driver() -> None:
    program = (
        "import sys, torch, fedkseed_kernels\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libfedkseed' not in maps and 'libcuda.so' not in maps\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
