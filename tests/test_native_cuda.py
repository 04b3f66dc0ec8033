"""The ctypes side of the CUDA library: its structs are the header's, and it says why it cannot be used."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import c_abi, native_cuda

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
        native_cuda._why_a_gpu_cannot_serve,
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


@needs_library
@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (0, "no NVIDIA driver"),
        (
            12080,
            "serves CUDA 12.8, the library needs 13.0 or later; update the driver or use FEDKSEED_BACKEND",
        ),
    ],
)
def test_drivers(monkeypatch: pytest.MonkeyPatch, driver: int, message: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    real = native_cuda._version
    monkeypatch.setattr(native_cuda, "_version", lambda h, of: driver if of == "driver" else real(h, of))
    assert_reason(message)


@needs_library
def test_a_new_enough_driver_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    real = native_cuda._version
    monkeypatch.setattr(native_cuda, "_version", lambda h, of: 13020 if of == "driver" else real(h, of))
    assert native_cuda.unavailable() is None


@needs_library
def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native_cuda, "_why_the_driver_cannot_serve", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    why = native_cuda.unavailable()
    assert why is not None
    assert "cuda:1 is of compute capability 7.5, the library is built for 8.0 and later" in why


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_library_loads_without_a_driver_and_calls_say_what_is_missing() -> None:
    handle = native_cuda.library()
    with pytest.raises(
        RuntimeError, match=r"the native CUDA library failed: .*(driver|device).*\(CUDA error \d+\)"
    ):
        native_cuda.load_kernels(0)
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
