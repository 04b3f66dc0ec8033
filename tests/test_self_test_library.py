"""Libraries with one constant changed fail their self-test at the first call; where a build id is read."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.native_build import ROOT, load_setup
from support.self_tests import first_process

import fedkseed_kernels as fk
from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.backends.identity import build_id

COMPILER = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _no_verdicts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has loaded no library and knows of no self-test."""
    first_process(monkeypatch)
    native_cpu._load.cache_clear()
    yield
    native_cpu._load.cache_clear()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="64-bit ELF")
@pytest.mark.parametrize(
    ("flag", "expected"),
    [("--build-id=0x00112233445566778899", "00112233445566778899"), ("--build-id=none", None)],
)
def test_the_build_id_is_that_of_the_mapped_library(flag: str, expected: str | None, tmp_path: Path) -> None:
    assert COMPILER is not None
    source, library = tmp_path / "one.cpp", tmp_path / "one.so"
    source.write_text('extern "C" int one(void) { return 1; }\n')
    subprocess.run([COMPILER, "-shared", "-fPIC", f"-Wl,{flag}", source, "-o", library], check=True)
    handle = ctypes.CDLL(str(library))
    source.replace(library)  # another file of its name
    assert build_id(handle.one) == expected


def test_no_build_id_is_found_where_there_is_no_library() -> None:
    assert build_id(ctypes.c_void_p(0)) is None


# file, what stands there once, what takes its place, instruction set, the first case that shows it
DAMAGES = {
    "a constant of the Gaussian transform": (
        *("include/normal.h", "FK_COS_3 -0x1.192f62p-11f", "FK_COS_3 -0x1.192f64p-11f", "baseline"),
        "gaussian, unit term, noise, nearest, float32, flat",
    ),
    "a constant of Philox": (
        *("include/philox4x32.h", "FK_PHILOX_W1 0xBB67AE85u", "FK_PHILOX_W1 0xBB67AE84u", "baseline"),
        "gaussian, unit term, noise, nearest, float32, flat",
    ),
    "the tag of stochastic rounding": (
        *("include/philox4x32.h", "FK_TAG_ROUNDING 3u", "FK_TAG_ROUNDING 5u", "baseline"),
        "gaussian, 1 term, in place, stochastic, bfloat16, flat",
    ),
    "the bits of a Rademacher sum": (
        *("include/integer_sums.h", "FK_SUM_BITS 30 ", "FK_SUM_BITS 29 ", "baseline"),
        "rademacher, 70 terms, in place, nearest, float32, flat",
    ),
    "the step of a residual": (
        *("include/compensated.h", "(279u << 23) - exponent", "(278u << 23) - exponent", "baseline"),
        "gaussian, 1 term, in place, nearest, float16, flat, residuals",
    ),
    "AVX2 alone": (
        *("cpu/vector_avx2.h", "int kLookupTerms = 2", "int kLookupTerms = 1", "avx2"),
        "rademacher, ",
    ),
    "AVX-512 alone": (
        *("cpu/vector_avx512.h", "int kLookupTerms = 4", "int kLookupTerms = 2", "avx512"),
        "rademacher, ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_with_one_constant_changed_is_caught_at_the_first_call(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, right, wrong, isa, case = DAMAGES[damage]
    build = load_setup()
    toolchain = build.find_toolchain()
    if isa not in toolchain.isas or isa not in native_cpu.usable_isas():
        pytest.skip(f"this compiler or this processor has no {isa}")
    sources = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(build, "CPU_SOURCES", sources / "cpu")
    monkeypatch.setattr(build, "INCLUDE", sources / "include")
    only = toolchain._replace(isas=["baseline"] if isa == "baseline" else ["baseline", isa])
    library = build.compile_library(build.cpu_library(only), tmp_path / "built")
    monkeypatch.setattr(native_cpu, "LIBRARY_PATH", library)
    native_cpu._load.cache_clear()
    weights = torch.zeros(100)
    with fk.backend("native"), pytest.raises(RuntimeError) as caught:
        fk.perturb_(weights, 1, 0.5)
    assert f"it fails its self-test on cpu: the case '{case}" in str(caught.value)
    assert not weights.any()
    fk.perturb_(weights, 1, 0.5)
    assert fk.info()["cpu_backend"] == "reference"
    assert torch.equal(weights, fk.normal(100, 1) * 0.5)
    if isa != "baseline":
        with fk.cpu_isa("baseline"):  # which is whole
            fk.perturb_(weights, 1, -0.5)
        assert not weights.any()
