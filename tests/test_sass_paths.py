"""The reader of machine code: where control goes, which loops there are, where a kernel spends its time."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support.machine_code import LOOP, SASS, lines

from benchmarks.machine_code import opcodes, paths, reader, tools
from benchmarks.machine_code.reader import Function
from benchmarks.machine_code.rows import ARCHES
from benchmarks.machine_code.sass import LIBRARY
from benchmarks.machine_code.tools import ToolError

CONVERSION = re.compile(r"I2FP?(\.F32\.S32)?$")


@pytest.fixture
def functions() -> list[Function]:
    return reader.parse(SASS)


def test_functions_loops_and_names(functions: list[Function]) -> None:
    assert [len(function.instructions) for function in functions] == [19, 6]
    assert functions[0].loops == [(0, 1), (3, 13), (18, 18)]
    assert functions[0].innermost_loops() == [(0, 1), (3, 13)]
    assert reader.readable_name(functions[0].name) == "many_gaussian<Bf16>"
    assert reader.readable_name(functions[1].name) == "straight"
    few = "_Z9few_termsI4Bf1610RademacherLi2EEv10FlatLaunch"
    assert reader.readable_name(few) == "few_terms<Bf16, Rademacher, 2>"


def test_an_outer_loop_is_not_innermost() -> None:
    text = lines(".L_a:", "NOP", ".L_b:", "NOP", "@P0 BRA `(.L_b)", "@P1 BRA `(.L_a)")
    function = reader.parse(text)[0]
    assert function.loops == [(1, 2), (0, 3)]
    assert function.innermost_loops() == [(1, 2)]


def test_the_hot_path_is_the_loop_without_its_side_ways(functions: list[Function]) -> None:
    path = paths.hot_path(functions[0], CONVERSION)
    assert (path.opcodes, path.num_made, path.is_loop) == (LOOP, 2, True)


def test_the_hot_path_of_straight_code(functions: list[Function]) -> None:
    path = paths.hot_path(functions[1], CONVERSION)
    assert path.opcodes == ["EXIT", "I2F", "MUFU.RSQ", "F2FP.BF16.F32.PACK_AB", "HFMA2.MMA", "EXIT"]
    assert not path.is_loop
    with pytest.raises(ToolError, match="expected DADD in the machine code of straight, got none"):
        paths.hot_path(functions[1], re.compile("DADD"))


# As sm_80 leaves its loops: CALL of a label never comes back. The loop behind it, for an octet with a zero,
# makes fewer normals and holds no CALL.
LEFT_BY_CALL = lines(
    ".L_terms:",
    "LDS.128 R4, [UR4]",
    *["I2F R5, R6"] * 4,
    "ISETP.GE.AND P0, PT, R2, UR4, PT",
    "@P0 CALL.REL.NOINC `(.L_sums)",
    "BRA `(.L_terms)",
    ".L_sums:",
    "STG.E.128 [R2.64], R4",
    ".L_zero:",
    *["I2F R5, R6"] * 2,
    "LDG.E.64 R4, [R2.64]",
    "@P1 BRA `(.L_zero)",
    "EXIT",
)


def test_a_loop_that_is_left_by_call_is_the_hot_one() -> None:
    (function,) = reader.parse(LEFT_BY_CALL)
    assert function.loops == [(0, 7), (9, 12)]
    path = paths.hot_path(function, CONVERSION)
    assert path.opcodes == ["LDS.128", *["I2F"] * 4, "ISETP.GE.AND", "CALL.REL.NOINC", "BRA"]
    assert not path.has_calls


def test_an_outer_loop_goes_on_behind_a_call_that_leaves_the_inner_one() -> None:
    text = lines(
        ".L_block:",
        "IMAD.WIDE.U32 R4, R4, 0x5, RZ",
        "@!P2 BRA `(.L_next)",
        ".L_products:",
        "IMMA.16832.U8.S8 R4, R4.ROW, R6.COL, R4",
        "@P0 CALL.REL.NOINC `(.L_next)",
        "BRA `(.L_products)",
        ".L_next:",
        "IADD3 R1, R1, R2, RZ",
        "@P1 BRA `(.L_block)",
        "EXIT",
    )
    inner, outer = paths.nested_loops(reader.parse(text)[0], re.compile("IMMA"))
    assert inner == ["IMMA.16832.U8.S8", "CALL.REL.NOINC", "BRA"]
    # Of the block's own way the inner loop's CALL is taken off, and its last BRA, which is not on it.
    assert sorted(outer) == ["BRA", "IADD3", "IMAD.WIDE.U32"]


def test_a_subroutine_comes_back_and_its_loop_comes_last() -> None:
    text = lines(
        ".L_addresses:",
        *["IMAD.WIDE.U32 R4, R4, 0x5, RZ"] * 3,
        "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)",
        "@P0 BRA `(.L_addresses)",
        ".L_terms:",
        "IMAD.WIDE.U32 R4, R4, 0x5, RZ",
        "@P1 BRA `(.L_terms)",
        "EXIT",
        "RET.REL.NODEC R4 `(straight)",
    )
    (function,) = reader.parse(text)
    assert [i.goes_on for i in function.instructions] == [*[True] * 7, False, False]
    assert paths.hot_path(function, re.compile(r"IMAD\.WIDE")).opcodes == ["IMAD.WIDE.U32", "BRA"]


@pytest.mark.parametrize(
    ("line", "goes_on", "targets"),
    [
        ("BRA `(.L_a)", False, (0,)),
        ("@!P0 BRA `(.L_a)", True, (0,)),
        ("@P2 BRA P3, `(.L_b)", True, (1,)),
        ("BRA P3, `(.L_b)", True, (1,)),
        ("BRA.U !UP0, `(.L_b)", True, (1,)),
        ('BRX R20 -0x4f0     (*"BRANCH_TARGETS .L_a,.L_b"*)', False, (0, 1)),
        ("CALL.REL.NOINC `(.L_a)", False, (0,)),
        ("@P0 CALL.REL.NOINC `(.L_a)", True, (0,)),
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_s64)", True, ()),
        ("BSSY.RECONVERGENT B0, `(.L_b)", True, ()),
        ("BSYNC B0", True, ()),
        ("@P5 BREAK.RELIABLE B1", True, ()),
        ("WARPSYNC.ALL", True, ()),
        ("EXIT", False, ()),
        ("@P0 EXIT", True, ()),
        ("RET.REL.NODEC R4 `(strided)", False, ()),
    ],
)
def test_where_control_goes(line: str, goes_on: bool, targets: tuple[int, ...]) -> None:
    text = lines(".L_a:", "YIELD", ".L_b:", line, "EXIT")
    instruction = reader.parse(text)[0].instructions[1]
    assert (instruction.goes_on, instruction.targets) == (goes_on, targets)


@pytest.mark.parametrize("line", ["JMX R4 -0x10", "@P0 BRXU UR4", "KILL", "WHAT.IS.THIS R4, R5"])
def test_an_instruction_that_is_not_known_is_an_error(line: str) -> None:
    opcode = line.removeprefix("@P0 ").split()[0]
    with pytest.raises(ToolError, match=rf"opcodes.py knows, got {opcode}; add it there"):
        reader.parse(lines("NOP", line, "EXIT"))


@pytest.mark.parametrize("line", ["BRX R20 -0x4f0", "BRA `(.L_elsewhere)", "BRA 0x1230"])
def test_a_jump_without_known_targets_is_an_error(line: str) -> None:
    with pytest.raises(ToolError, match=f"that a jump may go to, got {re.escape(line)}"):
        reader.parse(lines(".L_a:", line))


def test_an_address_without_an_instruction_is_an_error() -> None:
    with pytest.raises(ToolError, match=re.escape("expected an instruction in , got '/*0010*/ { FFMA R1 ;'")):
        reader.parse(" /*0000*/ NOP ;\n /*0010*/ { FFMA R1 ;\n")


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("HFMA2.MMA", "move"),
        ("HFMA2.BF16_V2", "FMA"),
        ("HADD2.F32", "conversion"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"),
        ("I2FP.F32.S32", "conversion"),
        ("IMAD.WIDE.U32", "integer"),
        ("ISETP.GE.AND", "integer"),
        ("VIADD", "integer"),
        ("UIMAD.WIDE.U32", "uniform"),
        ("R2UR", "uniform"),
        ("REDUX.OR", "uniform"),
        ("RED.E.ADD.STRONG.GPU", "memory"),
        ("STL", "memory"),
        ("BAR.SYNC", "control"),
        ("BREAK.RELIABLE", "control"),
        ("BREV", "integer"),
        ("FMUL", "other float"),
    ],
)
def test_classes(opcode: str, name: str) -> None:
    assert opcodes.classify(opcode) == name


@pytest.mark.slow
def test_the_control_instructions_are_those_of_the_library(tmp_path: Path) -> None:
    """No kernel holds another one, and none stands in the list for nothing."""
    if not LIBRARY.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"required here, but {LIBRARY.name} is not built")
        pytest.skip(f"{LIBRARY.name} is not built")
    cubins = tools.extract_cubins(LIBRARY, tmp_path)
    found = {
        opcodes.base(instruction.opcode)
        for arch in ARCHES
        for cubin in cubins[arch]
        for function in reader.parse(tools.disassembly(cubin))
        for instruction in function.instructions
        if opcodes.classify(instruction.opcode) == "control"
    }
    assert found == set(opcodes.CONTROL)
