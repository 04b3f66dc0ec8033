"""The reader of machine code and its budget, on text whose counts are known; and the kernels' own limits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.machine_code import LOOP, SASS

from benchmarks.common import environment
from benchmarks.machine_code import reader, sass
from benchmarks.machine_code.reader import Function, ToolError, Usage

RULE = sass.Rule("a kernel", "gaussian", 0, 4)


@pytest.fixture
def functions() -> list[Function]:
    return reader.parse(SASS)


@pytest.fixture
def row(functions: list[Function]) -> sass.Row:
    return sass.measure(functions[0], Usage(96, 0, 0), "sm_90", RULE)


def test_counts_of_a_row(row: sass.Row) -> None:
    assert row.instructions_per_element == len(LOOP) / 2
    per_element = {"FMA": 1, "conversion": 1, "integer": 1, "memory": 0.5, "control": 1.5, "uniform": 0.5}
    assert row.classes == per_element
    assert sum(row.classes.values()) == row.instructions_per_element
    assert row.barriers_on_hot_path == 0
    assert row.issue_ceiling == pytest.approx(132 * 128 * 1.755e9 / 5.5)
    assert row.memory_ceiling == pytest.approx(3.35e12 / 4)
    assert row.bound == "memory"


def test_the_loops_around_matrix_products_are_counted() -> None:
    """Products of 32 terms, inside a loop that makes their words, inside one that prepares its terms."""

    def lines(first: int, opcodes: list[str]) -> str:
        return "\n".join(f" /*{16 * (first + i):04x}*/ {opcode} ;" for i, opcode in enumerate(opcodes))

    prepare, words = ["IADD3 R1, R1, R2"] * 16, ["IMAD.WIDE.U32 R4, R4, 0x5, RZ"] * 32
    products = ["IMMA.16832.U8.S8 R4, R4.ROW, R6.COL, R4"] * 2 + ["LOP3.LUT R4, R4, 0x1"] * 5
    text = ".L_block:\n" + lines(0, prepare) + "\n.L_words:\n" + lines(16, words)
    text += "\n.L_products:\n" + lines(48, [*products, "@P0 BRA `(.L_products)"])
    text += "\n" + lines(56, ["BAR.SYNC 0x0", "@P1 BRA `(.L_words)", "@P2 BRA `(.L_block)"])
    rule = sass.Rule("a kernel", "rademacher", 0, 4, elements_of_turn=0)
    row = sass.measure(reader.parse(text)[0], Usage(32, 0, 0), "sm_90", rule)
    words_turn, block_turn = sass.TURNS_AROUND_MATRICES
    assert row.instructions_per_element == pytest.approx(8 / 32 + 34 / words_turn + 17 / block_turn, abs=1e-3)
    assert row.barriers_on_hot_path == 0
    assert row.classes["matrix"] == pytest.approx(2 / 32, abs=1e-3)


def test_a_packed_fma_makes_two_elements() -> None:
    opcodes = ["FFMA2 R4, R4, R6, R8", "FFMA R4, R4, R6, R8", "IADD3 R1, R1, R2", "EXIT"]
    text = "\n".join(f" /*{16 * i:04x}*/ {opcode} ;" for i, opcode in enumerate(opcodes))
    function = reader.parse(".L_x:\n" + text)[0]
    for num_fmas, per_element in ((1, 4 / 3), (2, 8 / 3)):
        rule = sass.Rule("a kernel", "rademacher", 1, 4, num_fmas)
        row = sass.measure(function, Usage(32, 0, 0), "sm_100", rule)
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
    assert (octet * found["kWordChunk"], octet * found["kThreads"]) == sass.TURNS_AROUND_MATRICES


def test_rules_of_cuda_kernels() -> None:
    assert sass.cuda_rule("many_rademacher<Fp32>") == sass.Rule(
        "cuda rademacher fp32, K loop", "rademacher", 0, 8, elements_of_turn=0
    )
    few = sass.cuda_rule("few_terms<Bf16, Gaussian, 2, 0>")
    assert few == sass.Rule("cuda gaussian bf16, K = 2", "gaussian", 2, 4)
    compensated = sass.cuda_rule("few_terms<Bf16, Gaussian, 1, 1>")
    assert compensated == sass.Rule("cuda gaussian bf16, K = 1, compensated", "gaussian", 1, 8)
    # The value of an fp16 weight and its residual is an fma of its own.
    assert [sass.cuda_rule(f"few_terms<{dtype}, Rademacher, 1, 1>") for dtype in ("Bf16", "Fp16")] == [
        sass.Rule(f"cuda rademacher {dtype}, K = 1, compensated", "rademacher", 1, 8, num_fmas)
        for dtype, num_fmas in (("bf16", 1), ("fp16", 2))
    ]
    assert sass.cuda_rule("_ZN12_GLOBAL__N_11philox_wordsE") is None
    with pytest.raises(ToolError, match="has a rule for, got new_kernel<Bf16>; add one"):
        sass.cuda_rule("new_kernel<Bf16>")


def test_budget(row: sass.Row) -> None:
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
    row: sass.Row, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sass, "BUDGET", tmp_path / "budget.json")
    rows = [replace(row, kernel="triton x")]
    monkeypatch.setattr(sass, "triton_rows", lambda arches: rows)
    target = tmp_path / "rows.json"
    arguments = ["--only", "triton", "--arch", "sm_90"]
    assert sass.main([*arguments, "--write-budget", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["rows"][0]["bound"] == "memory"
    assert sass.main([*arguments, "--check"]) == 0
    rows[0] = replace(rows[0], instructions_per_element=9.0)
    assert sass.main([*arguments, "--check"]) == 1
    assert "expected instructions_per_element at most 5.55, got 9.0" in capsys.readouterr().err
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
    assert set(budget) == set(sass.ARCHES)
    for kernel, limit in PROMISED.items():
        assert budget["sm_90"][kernel]["instructions_per_element"] <= limit, kernel
