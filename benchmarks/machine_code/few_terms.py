"""The ways of csrc/cuda/few_terms.h, and what tells one from another in machine code.

A kernel of one or two terms decides at run time, for each tile, between a short way (in place, one side,
rounded to nearest), two octets at a time, and a long way that serves everything else, one octet at a time.
Each is a loop, and the long way's cases share theirs. So a way is named by what a turn does: so many 16-byte
reads and writes, calls of Philox, normals or signs, and roundings. Of all paths that do exactly that, the
shortest is the turn for whole octets of ordinary numbers: ragged ends have narrow accesses, an octet with a
zero sum makes its normals twice, copying makes none, and NaN, infinities and what is too large fail a test of
rounding early.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.machine_code.ways import Landmark

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
#: Elements of an octet; octets of a turn of the short way (kOctet, kFewOctets of csrc/cuda).
OCTET = 8
SHORT_OCTETS = 2
#: Products of a call of Philox whose first rounds are shared by the tile (folded_philox with low_product).
#: Calls for one group may share the first.
_PRODUCTS = 18
#: Comparisons that stochastic rounding makes of an ordinary number: with NaN and infinity (bf16); with NaN,
#: 65536 and the smallest normal number (fp16). `At least` may be compiled as `more than` the number before.
_ROUNDING_TESTS = {
    "bf16": (2, "7f800000|7f7fffff|7f800001"),
    "fp16": (3, "7f800000|7f800001|477fffff|47800000|387fffff|38800000"),
}


@dataclass(frozen=True)
class Way:
    """What a turn does with each octet.

    name: as rows call it, "" for a kernel's own way.
    writes_residuals: compensated weights are updated in place.
    """

    name: str
    num_octets: int = 1
    num_sides: int = 1
    reads_weights: bool = True
    reads_residuals: bool = False
    writes_residuals: bool = False
    is_stochastic: bool = False

    def bytes_per_element(self, dtype: str) -> int:
        """Bytes read and written for an element. A second read of the same residuals is from a cache."""
        weights = ITEMSIZES[dtype] * (self.num_sides + self.reads_weights)
        return weights + 2 * (self.reads_residuals + self.writes_residuals)

    @property
    def num_elements(self) -> int:
        """Elements of a turn."""
        return OCTET * self.num_octets


_SHORT = Way("", SHORT_OCTETS)
_SHORT_COMPENSATED = Way("compensated", SHORT_OCTETS, reads_residuals=True, writes_residuals=True)
_PAIR = Way("pair", num_sides=2)
_STOCHASTIC = Way("stochastic", is_stochastic=True)


def ways(dtype: str, num_terms: int, is_compensated: bool) -> tuple[Way, ...]:
    """What a kernel serves, the short way first. is_compensated: that way is for compensated weights."""
    if is_compensated:
        return (
            _SHORT_COMPENSATED,
            Way("out, compensated", reads_residuals=True),
            Way("pair, compensated", num_sides=2, reads_residuals=True),
        )
    if ITEMSIZES[dtype] != 2:
        return (_SHORT, _PAIR, *([Way("noise", reads_weights=False)] if num_terms == 1 else []))
    if num_terms == 1:
        return (_SHORT, _PAIR, _STOCHASTIC)
    compensated = Way("compensated", reads_residuals=True, writes_residuals=True)
    return (_SHORT, _PAIR, _STOCHASTIC, compensated)


def landmarks(dtype: str, family: str, num_terms: int, way: Way) -> tuple[Landmark, ...]:
    """What a turn goes past."""

    def mark(what: str, pattern: str, least: int, most: int | None = None) -> Landmark:
        most = least if most is None else most
        return Landmark(what, re.compile(pattern), way.num_octets * least, way.num_octets * most)

    accesses = OCTET * ITEMSIZES[dtype] // 16
    num_calls = num_terms + way.is_stochastic
    is_gaussian = family == "gaussian"
    marks = [
        mark("16-byte writes", r"STG\.E\.128", accesses * (way.num_sides + way.writes_residuals)),
        mark("narrow writes", r"STG\.E(?!\.128)", 0),
        mark(
            "Philox products",
            r"IMAD\.WIDE\.U32 .*0x(2daee0ad|326172a9)",
            _PRODUCTS * num_calls - (num_calls - 1),
            _PRODUCTS * num_calls,
        ),
        mark("normals", r"I2FP?(\.F32\.S32|\.S32)? ", OCTET * num_terms if is_gaussian else 0),
        mark("signs", r"(LOP3\.LUT|IMAD\.U32) .*0x80000000", 0 if is_gaussian else OCTET),
    ]
    if way.reads_weights:
        num_reads = accesses * (1 + way.num_sides * way.reads_residuals)
        marks += [
            mark("16-byte reads", r"LDG\.E\.128", num_reads),
            mark("narrow reads", r"LDG\.E(?!\.128)", 0),
        ]
    else:  # an octet without weights goes past the reads of ragged ends, switched off, perhaps not the last
        marks.append(mark("narrow reads", r"LDG\.E(?!\.128)", OCTET - 1, OCTET))
    if ITEMSIZES[dtype] == 2 and not way.writes_residuals:
        tests_of_one, bounds = _ROUNDING_TESTS[dtype]
        num_rounded = OCTET * way.num_sides
        num_tests = num_rounded * tests_of_one * way.is_stochastic
        marks += [
            mark("tests of rounding", rf"ISETP.*, 0x({bounds}),", num_tests),
            mark("roundings to nearest", r"F2FP\.", 0 if way.is_stochastic else num_rounded // 2),
        ]
    return tuple(marks)
