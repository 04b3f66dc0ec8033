"""Rows and budget of the machine code, on text whose counts are known; and the kernels' own limits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.machine_code import LOOP, SASS

from benchmarks.common import environment
from benchmarks.machine_code import few_terms, reader, rows, sass
from benchmarks.machine_code.reader import Function, Usage
from benchmarks.machine_code.rules import Rule, cuda_rules
from benchmarks.machine_code.tools import ToolError

RULE = Rule("a kernel", "gaussian", 0, 4)


@pytest.fixture
def functions() -> list[Function]:
    return reader.parse(SASS)


@pytest.fixture
def row(functions: list[Function]) -> rows.Row:
    return rows.measure(functions[0], Usage(96, 0, 0), "sm_90", RULE)


def test_counts_of_a_row(row: rows.Row) -> None:
    assert row.instructions_per_element == len(LOOP) / 2
    per_element = {"FMA": 1, "conversion": 1, "integer": 1, "memory": 0.5, "control": 1.5, "uniform": 0.5}
    assert row.classes == per_element
    assert sum(row.classes.values()) == row.instructions_per_element
    assert row.barriers_on_hot_path == 0
    assert row.work == {"issue": 5.5, "wide": 0.5, "alu": 1.5, "fma": 1}
    assert row.bytes_per_element == 4
    # A loop over terms: the weights are read and written once for all of them.
    assert {(bound.chip, bound.limit, bound.copy) for bound in row.bounds} == {
        ("H100", "issue", None),
        ("H200", "issue", None),
    }


def test_the_loops_around_matrix_products_are_counted() -> None:
    """Products of 32 terms, inside a loop that makes their words, inside one that prepares its terms."""

    def lines(first: int, opcodes: list[str]) -> str:
        return "\n".join(f" /*{16 * (first + i):04x}*/ {opcode} ;" for i, opcode in enumerate(opcodes))

    prepare, words = ["IADD3 R1, R1, R2"] * 16, ["IMAD.WIDE.U32 R4, R4, 0x5, RZ"] * 32
    products = ["IMMA.16832.U8.S8 R4, R4.ROW, R6.COL, R4"] * 2 + ["LOP3.LUT R4, R4, 0x1"] * 5
    text = ".L_block:\n" + lines(0, prepare) + "\n.L_words:\n" + lines(16, words)
    text += "\n.L_products:\n" + lines(48, [*products, "@P0 BRA `(.L_products)"])
    text += "\n" + lines(56, ["BAR.SYNC 0x0", "@P1 BRA `(.L_words)", "@P2 BRA `(.L_block)"])
    rule = Rule("a kernel", "rademacher", 0, 4, elements_of_turn=0)
    row = rows.measure(reader.parse(text)[0], Usage(32, 0, 0), "sm_90", rule)
    words_turn, block_turn = rows.TURNS_AROUND_MATRICES
    assert row.instructions_per_element == pytest.approx(8 / 32 + 34 / words_turn + 17 / block_turn, abs=1e-3)
    assert row.barriers_on_hot_path == 0
    assert row.classes["matrix"] == pytest.approx(2 / 32, abs=1e-3)


def test_a_packed_fma_makes_two_elements() -> None:
    opcodes = ["FFMA2 R4, R4, R6, R8", "FFMA R4, R4, R6, R8", "IADD3 R1, R1, R2", "EXIT"]
    text = "\n".join(f" /*{16 * i:04x}*/ {opcode} ;" for i, opcode in enumerate(opcodes))
    function = reader.parse(".L_x:\n" + text)[0]
    for num_fmas, per_element in ((1, 4 / 3), (2, 8 / 3)):
        rule = Rule("a kernel", "rademacher", 1, 4, num_fmas)
        row = rows.measure(function, Usage(32, 0, 0), "sm_100", rule)
        assert row.instructions_per_element == pytest.approx(per_element, abs=1e-3)


def test_turns_around_matrices_are_those_of_the_source() -> None:
    folder = Path(environment.REPOSITORY, "csrc", "cuda")
    source = "".join((folder / name).read_text() for name in ("noise.h", "flat.h", "many_rademacher.h"))
    assert "kTermBlock = kThreads;" in source
    found = {
        name: int(number)
        for name, number in re.findall(r"constexpr int (kThreads|kWordChunk|kOctetShift) = (\d+);", source)
    }
    octet = 2 ** found["kOctetShift"]
    assert (octet * found["kWordChunk"], octet * found["kThreads"]) == rows.TURNS_AROUND_MATRICES


def test_rules_of_cuda_kernels() -> None:
    (many,) = cuda_rules("many_rademacher<Fp32>")
    assert many == Rule("cuda rademacher fp32, K loop", "rademacher", 0, 8, elements_of_turn=0)
    (runs,) = cuda_rules("strided<Bf16, Gaussian>")
    assert runs == Rule("cuda gaussian bf16, K loop, runs", "gaussian", 0, 4)
    names = {
        name: [rule.name for rule in cuda_rules(name)]
        for name in ("few_terms<Bf16, Gaussian, 2, 0>", "few_terms<Fp16, Rademacher, 1, 1>")
    }
    assert names == {
        "few_terms<Bf16, Gaussian, 2, 0>": [
            "cuda gaussian bf16, K = 2",
            "cuda gaussian bf16, K = 2, pair",
            "cuda gaussian bf16, K = 2, stochastic",
            "cuda gaussian bf16, K = 2, compensated",
        ],
        "few_terms<Fp16, Rademacher, 1, 1>": [
            "cuda rademacher fp16, K = 1, compensated",
            "cuda rademacher fp16, K = 1, out, compensated",
            "cuda rademacher fp16, K = 1, pair, compensated",
        ],
    }
    short, pair, noise = cuda_rules("few_terms<Fp32, Gaussian, 1, 0>")
    assert [rule.bytes_per_element for rule in (short, pair, noise)] == [8, 12, 4]
    assert [rule.elements_of_turn for rule in (short, pair, noise)] == [16, 8, 8]
    assert short.landmarks == few_terms.landmarks("fp32", "gaussian", 1, few_terms.ways("fp32", 1, False)[0])
    assert list(cuda_rules("_ZN12_GLOBAL__N_11philox_wordsE")) == []
    with pytest.raises(ToolError, match="has a rule for, got new_kernel<Bf16>; add one"):
        list(cuda_rules("new_kernel<Bf16>"))


def test_budget(row: rows.Row) -> None:
    budget = sass.make_budget([row])
    assert budget == {"sm_90": {"a kernel": {"instructions_per_element": 5.55, "registers": 96}}}
    assert sass.problems([row], budget, ["sm_90"]) == []
    worse = replace(row, instructions_per_element=5.57, registers=97, spills=1, barriers_on_hot_path=2)
    assert sass.problems([worse], budget, ["sm_90"]) == [
        "sm_90 a kernel: expected instructions_per_element at most 5.55, got 5.57",
        "sm_90 a kernel: expected registers at most 96, got 97",
        "sm_90 a kernel: expected no spills or stack, got 1, 0",
        "sm_90 a kernel: expected no barrier in the loop, got 2",
    ]
    assert "got no such kernel" in sass.problems([], budget, ["sm_90"])[0]
    assert "expected a budget, got none" in sass.problems([row], {}, ["sm_90"])[0]


def test_command(
    row: rows.Row, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sass, "BUDGET", tmp_path / "budget.json")
    rows = [replace(row, kernel="triton x")]
    monkeypatch.setattr(sass, "triton_rows", lambda arches: rows)
    target = tmp_path / "rows.json"
    arguments = ["--only", "triton", "--arch", "sm_90"]
    assert sass.main([*arguments, "--write-budget", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["rows"][0]["bounds"][0]["limit"] == "issue"
    assert "# What the machine code allows" in target.with_suffix(".md").read_text()
    assert sass.main([*arguments, "--check"]) == 0
    rows[0] = replace(rows[0], instructions_per_element=9.0)
    assert sass.main([*arguments, "--check"]) == 1
    assert "expected instructions_per_element at most 5.55, got 9.0" in capsys.readouterr().err
    rows[0] = replace(rows[0], kernel="triton y")
    assert sass.main([*arguments, "--check"]) == 1
    assert sass.main([*arguments, "--check", "--write-budget"]) == 0
    assert list(json.loads(sass.BUDGET.read_text())["sm_90"]) == ["triton y"]
    monkeypatch.setattr(sass, "RESULT", tmp_path / "results" / "sass.json")
    assert sass.main([*arguments, "--json"]) == 0
    assert [file.name for file in sorted(sass.RESULT.parent.iterdir())] == ["sass.json", "sass.md"]
    assert sass.main(["--only", "cuda", "--library", str(tmp_path / "none.so")]) == 2
    assert "expected the CUDA library at" in capsys.readouterr().err


#: Most instructions an element (and term, in a loop) that the kernels were designed to take on sm_90.
PROMISED = {
    "triton gaussian bf16, K loop": 26.5,
    "triton gaussian fp32, K loop": 26.5,
    "triton rademacher bf16, K loop": 3.5,
    "triton rademacher fp32, K loop": 3.5,
    "triton gaussian bf16, K = 1": 33,
    "triton gaussian bf16, K = 1, compensated": 36,
    "cuda gaussian bf16, K loop": 25.3,
    "cuda gaussian fp32, K loop": 25.3,
    "cuda rademacher bf16, K loop": 1.8,
    "cuda rademacher fp32, K loop": 1.8,
    "cuda gaussian bf16, K = 1": 31,
    "cuda gaussian bf16, K = 1, compensated": 37,
}


def test_the_committed_budget_is_within_what_was_promised() -> None:
    budget = json.loads(sass.BUDGET.read_text())
    assert set(budget) == set(rows.ARCHES)
    for kernel, limit in PROMISED.items():
        assert budget["sm_90"][kernel]["instructions_per_element"] <= limit, kernel


def test_each_case_stands_beside_its_other_compiler() -> None:
    """Pairs, stochastic rounding, noise and reads of residuals: Triton's rows have CUDA's beside them."""
    for arch, kernels in json.loads(sass.BUDGET.read_text()).items():
        cases = [name for name in kernels if name.startswith("triton") and re.search(r"K = \d, ", name)]
        beside = [name.replace("triton", "cuda", 1) for name in cases if "rows" not in name]
        assert len(beside) >= 12
        assert kernels.keys() >= set(beside), arch
