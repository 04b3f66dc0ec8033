"""Ways through a loop that serves several cases: told apart by what they pass, no branch taken both ways."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.machine_code import lines

from benchmarks.common import environment
from benchmarks.machine_code import few_terms, reader, rules, ways
from benchmarks.machine_code.few_terms import Way
from benchmarks.machine_code.reader import Usage
from benchmarks.machine_code.rows import measure
from benchmarks.machine_code.tools import ToolError

PHILOX = ["IMAD.WIDE.U32 R4, R4, -0x2daee0ad, RZ", "IMAD.WIDE.U32 R6, R6, -0x326172a9, RZ"] * 9
# One number: NaN and infinity leave early.
ROUNDING = [
    "ISETP.GT.U32.AND P3, PT, R4, 0x7f800000, PT",
    "@P3 BRA `(.L_odd{0})",
    "ISETP.NE.AND P3, PT, R4, 0x7f800000, PT",
    "@P3 IADD3 R4, R4, R5, RZ",
    "@P3 SHF.R.U32.HI R4, RZ, 0x10, R4",
    ".L_odd{0}:",
]
# A pass of bf16 octets as nvcc makes it: P0 whole, P1 stochastic, P2 a minus side.
PASS = lines(
    ".L_pass:",
    "@P0 BRA `(.L_whole)",
    "@!P5 LDG.E.U16 R4, [R2.64]",
    "BRA `(.L_noise)",
    ".L_whole:",
    "LDG.E.128 R4, [R2.64]",
    ".L_noise:",
    *PHILOX,
    *["I2FP.F32.S32 R5, R6"] * 8,
    "@!P1 BRA `(.L_add)",
    "LDS.128 R8, [UR4]",
    *PHILOX,
    ".L_add:",
    "FFMA R4, R4, R5, R6",
    "@P1 BRA `(.L_random)",
    *["F2FP.BF16.F32.PACK_AB R4, R5, R6"] * 4,
    "BRA `(.L_write)",
    ".L_random:",
    *[line.format(i) for i in range(8) for line in ROUNDING],
    ".L_write:",
    "@!P0 BRA `(.L_narrow)",
    "STG.E.128 [R2.64], R4",
    "BRA `(.L_minus)",
    ".L_narrow:",
    "@!P5 STG.E.U16 [R2.64], R4",
    ".L_minus:",
    "@!P2 BRA `(.L_next)",
    *["F2FP.BF16.F32.PACK_AB R4, R5, R6"] * 4,
    "STG.E.128 [R2.64], R4",
    ".L_next:",
    "@P4 BRA `(.L_pass)",
    "EXIT",
)


def marked(*numbers: tuple[str, int]) -> tuple[ways.Landmark, ...]:
    return tuple(ways.Landmark(pattern, re.compile(pattern), n, n) for pattern, n in numbers)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (few_terms._PAIR, 2 + 26 + 1 + 2 + 5 + 3 + 1 + 5 + 1),
        (few_terms._STOCHASTIC, 2 + 26 + 1 + 19 + 2 + 8 * 5 + 3 + 1 + 1),
    ],
    ids=["pair", "stochastic"],
)
def test_the_way_of_a_case_is_counted(way: Way, expected: int) -> None:
    (function,) = reader.parse(PASS)
    found = ways.loop_past(function, few_terms.landmarks("bf16", "gaussian", 1, way))
    assert len(found) == expected
    rule = rules.Rule(
        "a way",
        "gaussian",
        1,
        4,
        elements_of_turn=8,
        landmarks=few_terms.landmarks("bf16", "gaussian", 1, way),
    )
    row = measure(function, Usage(64, 0, 0), "sm_90", rule)
    assert row.instructions_per_element == expected / 8


def test_a_case_that_is_not_there_is_an_error() -> None:
    (function,) = reader.parse(PASS)
    way = Way("out, compensated", reads_residuals=True)
    with pytest.raises(ToolError, match=r"2 to 2 16-byte reads, .* got none; read its disassembly"):
        ways.loop_past(function, few_terms.landmarks("bf16", "gaussian", 1, way))


def test_no_branch_is_taken_both_ways() -> None:
    """Philox of the rounding, but rounded to nearest: only P1 true and then false would do that."""
    (function,) = reader.parse(PASS)
    both = marked(("LDS", 1), ("F2FP", 4), (r"STG\.E\.128", 1), (r"STG\.E\.U16", 0))
    assert ways.way_past(function, *function.loops[0], both) == []
    text = PASS.replace("FFMA R4, R4, R5, R6", "ISETP.NE.AND P1, PT, R4, RZ, PT")
    (function,) = reader.parse(text)
    assert ways.way_past(function, *function.loops[0], both)


@pytest.mark.parametrize(
    ("branch", "writer", "is_possible"),
    [
        ("@P0 BRA P1, `({})", "NOP", True),  # not taken for one of them, taken for the other
        ("@P0 BRA `({})", "NOP", False),
        ("@P0 BRA `({})", "LOP3.LUT P0, RZ, R4, 0xf, RZ, 0xc0, !PT", True),
        ("@P0 BRA `({})", "IADD3 R4, P0, R4, R5, RZ", True),
        ("@P0 BRA `({})", "SEL R4, R5, RZ, P0", False),
        ("@P0 BRA `({})", "R2P PR, R4, 0x7f", True),
        ("BRA.U UP0, `({})", "UISETP.NE.AND UP0, UPT, UR4, URZ, UPT", True),
        ("BRA.U UP0, `({})", "ISETP.NE.AND P0, PT, R4, RZ, PT", False),
    ],
)
def test_a_predicate_keeps_its_value_until_it_is_written(branch: str, writer: str, is_possible: bool) -> None:
    other = branch.replace("P1,", "!P1,")
    text = lines(
        ".L_loop:",
        branch.format(".L_a"),
        "FADD R4, R4, R5",
        ".L_a:",
        writer,
        other.format(".L_b"),
        "FMUL R4, R4, R5",
        ".L_b:",
        "@P6 BRA `(.L_loop)",
        "EXIT",
    )
    (function,) = reader.parse(text)
    # The first branch is not taken, the second is.
    way = ways.way_past(function, *function.loops[0], marked(("FADD", 1), ("FMUL", 0)))
    assert bool(way) is is_possible


def test_signs_are_those_of_the_term_not_the_roundings_words() -> None:
    """The shortest way with one call of Philox would skip the term's and take the rounding's."""
    term = [*PHILOX, *["LOP3.LUT R4, R4, 0x80000000, R5, 0x78, !PT"] * 8]
    text = lines(
        ".L_pass:",
        "LDG.E.128 R4, [R2.64]",
        "@P0 BRA `(.L_skipped)",
        *term,
        ".L_skipped:",
        "ISETP.NE.AND P1, PT, R4, RZ, PT",
        "@!P1 BRA `(.L_nearest)",
        *PHILOX,
        ".L_nearest:",
        *["F2FP.BF16.F32.PACK_AB R4, R5, R6"] * 8,
        "STG.E.128 [R2.64], R4",
        "STG.E.128 [R2.64], R4",
        "@P4 BRA `(.L_pass)",
        "EXIT",
    )
    (function,) = reader.parse(text)
    found = ways.loop_past(function, few_terms.landmarks("bf16", "rademacher", 1, few_terms._PAIR))
    assert len(found) == 2 + len(term) + 2 + 8 + 3


def test_a_short_way_has_two_octets_a_turn() -> None:
    short, compensated = (few_terms.ways("bf16", 1, is_compensated)[0] for is_compensated in (False, True))
    assert (short.num_elements, compensated.num_elements) == (16, 16)
    assert (short.bytes_per_element("bf16"), compensated.bytes_per_element("bf16")) == (4, 8)
    marks = {mark.what: (mark.least, mark.most) for mark in few_terms.landmarks("bf16", "gaussian", 2, short)}
    assert marks["16-byte reads"] == (2, 2)
    assert marks["Philox products"] == (70, 72)
    assert marks["normals"] == (32, 32)
    assert marks["roundings to nearest"] == (8, 8)


def test_constants_are_those_of_the_source() -> None:
    folder = Path(environment.REPOSITORY, "csrc")
    flat, few, noise = (
        (folder / "cuda" / f"{name}.h").read_text() for name in ("flat", "few_terms", "noise")
    )
    assert f"constexpr int kFewOctets = {few_terms.SHORT_OCTETS};" in flat
    assert "constexpr int kOctet = 1 << kOctetShift;" in noise
    assert f"constexpr int kOctetShift = {few_terms.OCTET.bit_length() - 1};" in noise
    assert "constexpr int32_t kPass = kOctet * kThreads;" in few
    philox = (folder / "include" / "philox4x32.h").read_text()
    multipliers = re.findall(r"FK_PHILOX_M[01] (0x[0-9A-F]{8})u?", philox)
    assert len(multipliers) == 2
    (products,) = (
        mark
        for mark in few_terms.landmarks("bf16", "gaussian", 1, few_terms._PAIR)
        if mark.what == "Philox products"
    )
    for multiplier in multipliers:
        assert products.pattern.match(f"IMAD.WIDE.U32 R2, R2, -{2**32 - int(multiplier, 16):#x}, RZ")
    assert not products.pattern.match("IMAD.WIDE.U32 R2, R2, 0x4, RZ")
