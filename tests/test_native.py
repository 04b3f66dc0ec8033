"""The ctypes side of the C ABI: it must be the header's, and say why a library cannot be used."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch, operands
from fedkseed_kernels.arguments.tensors import check_operands
from fedkseed_kernels.backends import c_abi, native_cpu
from fedkseed_kernels.contract import reference

HEADER = Path(__file__).parents[1] / "csrc" / "include" / "fedkseed.h"
COMPILER = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)

needs_native = pytest.mark.skipif(
    native_cpu.unavailable() is not None, reason="test_the_library_is_there fails"
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")


def compile_c(source: str, folder: Path, *flags: str) -> Path:
    assert COMPILER is not None
    code, target = folder / "probe.c", folder / "probe.out"
    code.write_text(source)
    command = [COMPILER, "-std=c11", f"-I{HEADER.parent}", *flags, str(code), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def test_the_library_is_there() -> None:
    """Fails on an installation that has fallen back to NumPy; tests of the library are skipped there."""
    assert native_cpu.unavailable() is None


# --- the header


@needs_compiler
def test_structs_are_the_headers(tmp_path: Path) -> None:
    structs = {"fk_tensor": c_abi.FkTensor, "fk_terms": c_abi.FkTerms}
    lines = []
    for name, struct in structs.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in struct._fields_:
            member = f"{name}, {field}"
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof({member}), sizeof((({name} *)0)->{field}));'
            )
    source = (
        "#include <stddef.h>\n#include <stdio.h>\n#include <fedkseed.h>\nint main(void) {"
        + "".join(lines)
        + "}"
    )
    printed = subprocess.run([compile_c(source, tmp_path)], check=True, capture_output=True, text=True).stdout
    expected = []
    for name, struct in structs.items():
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            descriptor = getattr(struct, field)
            expected.append(f"{name}.{field} {descriptor.offset} {descriptor.size}")
    assert printed.split("\n")[:-1] == expected


def test_the_table_has_the_layout_of_the_struct() -> None:
    assert c_abi.TABLE_DTYPE.itemsize == ctypes.sizeof(c_abi.FkTensor)
    for name, *_ in c_abi.FkTensor._fields_:
        dtype, offset = c_abi.TABLE_DTYPE.fields[name][:2]
        descriptor = getattr(c_abi.FkTensor, name)
        assert (offset, dtype.itemsize) == (descriptor.offset, descriptor.size)


def test_fields_stand_in_the_headers_order() -> None:
    text = re.sub(r"//.*", "", HEADER.read_text())
    for name, struct in (("fk_tensor", c_abi.FkTensor), ("fk_terms", c_abi.FkTerms)):
        body = re.search(rf"typedef struct {name} {{(.*?)}} {name};", text, re.S)
        assert body is not None
        fields = re.findall(r"(\w+)(?:\[\w+\])?;", body.group(1))
        assert fields == [field for field, *_ in struct._fields_]


def header_values() -> dict[str, int]:
    text = re.sub(r"//.*", "", HEADER.read_text())
    values = {name: int(value) for name, value in re.findall(r"^#define (FK_\w+) (-?\d+)\s*$", text, re.M)}
    for body in re.findall(r"enum \w+ {(.*?)};", text, re.S):
        values |= {name: int(value) for name, value in re.findall(r"(FK_\w+) = (-?\d+)", body)}
    return values


def test_constants_are_the_headers() -> None:
    dtypes = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16", torch.float64: "FP64"}
    expected = {
        "FK_ABI_VERSION": c_abi.ABI_VERSION,
        "FK_CONTRACT_VERSION": fk.CONTRACT_VERSION,
        "FK_MAX_DIMS": operands.MAX_DIMS,
        "FK_ERROR_ARGUMENT": native_cpu.ERROR_ARGUMENT,
        "FK_ERROR_ISA": native_cpu.ERROR_ISA,
        "FK_ERROR_MEMORY": native_cpu.ERROR_MEMORY,
        "FK_NUM_ISAS": len(operands.ISA_CODES) - 1,
    }
    expected |= {f"FK_{dtypes[dtype]}": code for dtype, code in operands.DTYPE_CODES.items()}
    expected |= {f"FK_{name.upper()}": code for name, code in operands.FAMILY_CODES.items()}
    expected |= {f"FK_{name.upper()}": code for name, code in operands.ROUNDING_CODES.items()}
    expected |= {f"FK_ISA_{name.upper()}": code for name, code in operands.ISA_CODES.items()}
    assert header_values() == expected


def test_the_reference_has_the_same_choices() -> None:
    assert tuple(operands.FAMILY_CODES) == reference.FAMILIES
    assert tuple(operands.ROUNDING_CODES) == reference.ROUNDINGS
    assert set(reference.DTYPES) == {str(d).removeprefix("torch.") for d in operands.DTYPE_CODES}


# --- a status of the library


@needs_native
def test_a_code_that_the_library_does_not_know_is_an_error_and_writes_nothing() -> None:
    tensor = torch.ones(3)
    table = c_abi.pointer_table(check_operands([tensor], None, None, None, [], [], []))
    table["dtype"] = len(operands.DTYPE_CODES)
    terms = operands.Terms(np.ones(1, np.uint64), np.ones(1), 1.0, "gaussian", "nearest", 0)
    with pytest.raises(
        RuntimeError, match="CPU library failed: it does not know a dtype, family .*; reinstall"
    ):
        native_cpu.cpu_seed_axpy(table, None, terms)
    assert torch.equal(tensor, torch.ones(3))


@needs_native
def test_an_instruction_set_that_the_library_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operands.ISA_CODES, "later", len(operands.ISA_CODES) - 1)
    words = np.zeros((1, 4), np.uint32)
    message = f"is not there: expected one of auto, {', '.join(native_cpu.usable_isas())}, got later"
    for call in (
        lambda: native_cpu.philox_words(words, words[:, :2], "later"),
        lambda: native_cpu.normal_from_words(words[0], "later"),
        lambda: native_cpu.normal_digest(0, 1, "later"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# --- why a library cannot be used


@pytest.fixture
def library_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "libfedkseed_cpu.so"
    monkeypatch.setattr(native_cpu, "LIBRARY_PATH", path)
    monkeypatch.setattr(c_abi, "BUILD_INFO_PATH", tmp_path / "build_info.json")
    native_cpu._load.cache_clear()
    yield path
    native_cpu._load.cache_clear()


def reason(*parts: str) -> None:
    why = native_cpu.unavailable()
    assert why is not None
    for part in (*parts, "reinstall"):
        assert part in why
    with pytest.raises(RuntimeError, match="the native CPU library cannot be used"):
        native_cpu.usable_isas()


def test_not_built_without_a_record(library_path: Path) -> None:
    reason(str(library_path), "it was not built at installation")


def test_not_built_with_the_recorded_reason(library_path: Path) -> None:
    c_abi.BUILD_INFO_PATH.write_text('{"cpu": {"built": false, "reason": "FEDKSEED_BUILD_CPU=0 was set"}}')
    reason("was not built at installation: FEDKSEED_BUILD_CPU=0 was set")


def test_removed_after_it_was_built(library_path: Path) -> None:
    c_abi.BUILD_INFO_PATH.write_text('{"cpu": {"built": true, "reason": ""}}')
    reason("removed since")


def test_not_a_library(library_path: Path) -> None:
    library_path.write_text("not a library")
    reason("is not an ELF library")


@needs_compiler
def test_another_architecture(library_path: Path, tmp_path: Path) -> None:
    built = bytearray(compile_c("int x;", tmp_path, "-shared", "-fPIC").read_bytes())
    built[18:20] = (243).to_bytes(2, "little")  # RISC-V
    library_path.write_bytes(built)
    reason("is built for another machine, this machine is")


@needs_compiler
@pytest.mark.parametrize(
    ("abi", "contract", "message"),
    [
        ("return 99;", "return 1;", f"fk_abi_version expected {c_abi.ABI_VERSION}, got 99"),
        (f"return {c_abi.ABI_VERSION};", "return 2;", "fk_contract_version expected 1, got 2"),
        (f"return {c_abi.ABI_VERSION};", "return 1;", "lacks an entry"),
    ],
)
def test_another_release(library_path: Path, tmp_path: Path, abi: str, contract: str, message: str) -> None:
    source = f"int fk_abi_version(void) {{ {abi} }} int fk_contract_version(void) {{ {contract} }}"
    compile_c(source, tmp_path, "-shared", "-fPIC").rename(library_path)
    reason(message)


@needs_compiler
def test_a_library_of_something_else(library_path: Path, tmp_path: Path) -> None:
    compile_c("int other(void) { return 1; }", tmp_path, "-shared", "-fPIC").rename(library_path)
    reason(f"fk_abi_version expected {c_abi.ABI_VERSION}, got none")


# --- the functions


@needs_native
def test_threads_are_torchs() -> None:
    assert native_cpu.has_threads()
    assert fk.info()["num_threads"] == torch.get_num_threads()


@needs_native
def test_without_torchs_threads_it_runs_on_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fk.normal(300_000, 5)
    native_cpu._load.cache_clear()
    monkeypatch.setattr(native_cpu, "_parallel_for_of_libtorch", lambda: None)
    try:
        assert torch.equal(fk.normal(300_000, 5), expected)
        info = fk.info()
        assert info["num_threads"] == 1
        assert "lacks torch_parallel_for" in info["threads"]
    finally:
        monkeypatch.undo()
        native_cpu._load.cache_clear()


@needs_native
def test_philox_words() -> None:
    counters = np.arange(40, dtype=np.uint32).reshape(10, 4) * np.uint32(0x9E3779B9)
    keys = np.arange(20, dtype=np.uint32).reshape(10, 2) * np.uint32(0x85EBCA6B)
    for isa in native_cpu.usable_isas():
        assert np.array_equal(
            native_cpu.philox_words(counters, keys, isa), reference.philox4x32_10(counters, keys)
        )
    with pytest.raises(ValueError, match=r"expected counters \[n, 4\] and keys \[n, 2\]"):
        native_cpu.philox_words(counters, keys[:9])


@needs_native
def test_normal_from_words() -> None:
    words = np.arange(1001, dtype=np.uint32) * np.uint32(0x9E3779B9)
    expected = np.stack(reference.normals_from_words(words), axis=-1)
    for isa in native_cpu.usable_isas():
        got = native_cpu.normal_from_words(words, isa)
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    with pytest.raises(ValueError, match=r"expected words \[n\]"):
        native_cpu.normal_from_words(words.reshape(7, 143))


@needs_native
def test_normal_digest_is_the_headers_formula() -> None:
    first, count = 2**32 - 1003, 1003
    words = np.arange(first, first + count, dtype=np.uint64)
    even, odd = (
        z.view(np.uint32).astype(np.uint64) for z in reference.normals_from_words(words.astype(np.uint32))
    )
    with np.errstate(over="ignore"):
        expected = int(((even + (odd << np.uint64(32))) * (2 * words + 1)).sum(dtype=np.uint64))
    for isa in native_cpu.usable_isas():
        assert native_cpu.normal_digest(first, count, isa) == expected
    assert native_cpu.normal_digest(5, 0) == 0
    with pytest.raises(ValueError, match=r"expected words within \[0, 2\^32\)"):
        native_cpu.normal_digest(first, count + 1)


@needs_native
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_instruction_sets_and_threads_give_the_same_bits(num_threads: int) -> None:
    threads = torch.get_num_threads()
    shape = (701, 307)  # several chunks of work

    def run() -> torch.Tensor:
        weights = torch.ones(shape, dtype=torch.bfloat16)
        fk.seed_axpy_(weights, [1, 2, 3], [0.5, 0.25, 0.125], alpha=0.75)
        return weights.view(torch.int16)

    try:
        torch.set_num_threads(1)
        with dispatch.cpu_isa("baseline"):
            expected = run()
        torch.set_num_threads(num_threads)
        for isa in native_cpu.usable_isas():
            with dispatch.cpu_isa(isa):
                assert torch.equal(run(), expected)
    finally:
        torch.set_num_threads(threads)
