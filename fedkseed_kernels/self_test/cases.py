"""The golden cases, defined here once: small calls of the primitive, all of whose bytes the contract fixes.

A call is what a backend is handed: a list of tensors with its terms. Each of its tensors is a case, which has
a digest of its own. `arena` lays a call out in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fedkseed_kernels.contract import reference

KINDS = ("processor", "gpu")
MAIN_TERMS = ("1 term", "2 terms", "70 terms")

# "flat" tensors begin so many elements before an octet and end so many after one; "whole" ones do neither.
HEAD, TAIL = 3, 37
# In the noise of this seed and stream some of the 40 normals from element FIRST + 344 on change with the
# constant that matters least (the cosine's last, one unit in the last place up or down): one word in 16,000
# does. At FIRST begins a step of the CUDA kernels for few terms.
SEED, STREAM, FIRST = 0x0123456789ABCDEF, 7, 26009600
# The high word of every counter changes at this element, the second octet of "whole" tensors.
CROSSING = 2**39
ROUNDING_SEED = 2**64 - 3

NUM_COLUMNS, STRIDED_VIEW = 21, ((96, 32), (5, 3))
ROWS_SHAPE, ROWS, ROWS_FIRST = (9, 24), (8, 0, 3, 3, 5), 5 * 2**35 + 16


class Sizes(NamedTuple):
    """Sizes of tensors on one kind of machine.

    few, many, noise: elements of flat ones between head and tail, with one or two terms, with more, and of
    the noise itself in fp32. num_rows: of strided ones. repeats: how often a gather repeats its rows.
    """

    few: int
    many: int
    noise: int
    num_rows: int
    repeats: int


# A processor's loops treat all elements alike but those at both ends. On a GPU each octet of a thread has its
# own code: CUDA's kernels take steps of 4096 elements for few terms and tiles of 8192 for many; Triton's take
# 4096 elements of segments, and 256 octets of runs.
SIZES = {"processor": Sizes(384, 128, 8192, 5, 1), "gpu": Sizes(4096, 8192, 8192, 70, 20)}


class Case(NamedTuple):
    """One tensor of a call. memory: "flat", "whole", "strided" or "rows"; has_residual: it is compensated."""

    dtype: str
    memory: str
    has_residual: bool = False


class Call(NamedTuple):
    """What the cases of one call share.

    terms: a name of `TERMS`. form: "in place" (residuals are written too), "out", "pair", "rows",
    "rows, pair", "wide" (both sides of 16-bit weights in fp32) or "noise".
    """

    family: str
    terms: str
    form: str
    rounding: str

    def name_of(self, case: Case) -> str:
        """The case's name in messages and in the file of digests."""
        name = f"{self.family}, {self.terms}, {self.form}, {self.rounding}, {case.dtype}, {case.memory}"
        return f"{name}, residuals" if case.has_residual else name

    def cases(self, kind: str) -> tuple[Case, ...]:
        """The cases of the call on a processor or a GPU (KINDS), in the order of its list.

        All that a GPU's kernels tell apart; on a processor strides and residuals take turns.
        """
        halves = reference.COMPENSATED_DTYPES
        if self.form == "noise":
            return tuple(Case(dtype, "flat") for dtype in reference.DTYPES)
        if self.form == "rows":
            found = [Case(dtype, "rows") for dtype in reference.DTYPES]
            return (*found, *(Case(dtype, "rows", True) for dtype in halves if kind == "gpu"))
        dtypes = halves if self.rounding == "stochastic" or self.form == "wide" else reference.DTYPES
        if "fp64" in self.terms:  # which are none to the others
            dtypes = ("float64",)
        may_split = self.form == "in place" and self.rounding == "stochastic"
        flat = [Case(dtype, "flat") for dtype in dtypes]
        flat += [Case(dtype, "flat", True) for dtype in halves if dtype in dtypes and not may_split]
        if kind == "gpu":
            return (*flat, *(case._replace(memory="strided") for case in flat))
        turns = {"in place": ("float32", "float16"), "pair": ("bfloat16", "float64")}.get(self.form, ())
        takes_turns = self.rounding == "nearest" and self.terms in MAIN_TERMS
        strided = [Case(dtype, "strided", dtype == "float16") for dtype in turns if takes_turns]
        return (*flat, *strided)


def calls() -> Iterator[Call]:
    """Every call of a self-test."""
    for family in reference.FAMILIES:
        yield Call(family, "unit term", "noise", "nearest")
        for terms in MAIN_TERMS:
            for form in ("in place", "pair"):
                for rounding in reference.ROUNDINGS:
                    yield Call(family, terms, form, rounding)
            if terms != "2 terms":
                yield Call(family, terms, "rows", "stochastic")
            if terms != "70 terms":
                yield Call(family, terms, "wide", "nearest")
        for rounding in reference.ROUNDINGS:
            yield Call(family, "1 small term", "in place", rounding)
        yield Call(family, "no term", "in place", "nearest")
    # Sums that are zero here and there, whose minus side is not their negative.
    for terms in ("1 vanishing term", "2 vanishing terms", "3 vanishing terms", "2 vanishing fp64 terms"):
        yield Call("gaussian", terms, "pair", "nearest")
    yield Call("rademacher", "opposite terms", "pair", "nearest")
    for terms in ("smallest terms", "smallest fp64 terms"):
        yield Call("rademacher", terms, "in place", "nearest")


def _many_terms() -> tuple[list[int], list[float], float]:
    """More terms than a kernel takes at a time, of full precision and several sizes; one does not count."""
    seeds = [k * 0x9E3779B97F4A7C15 % 2**64 for k in range(70)]
    coeffs = [(2.0**52 + (seed >> 12)) * 2.0 ** (-58 - k % 12) for k, seed in enumerate(seeds)]
    coeffs = [-c if k % 2 else c for k, c in enumerate(coeffs)]
    coeffs[5] = 0.0
    return seeds, coeffs, 1 - 2.0**-9


# Seeds, coefficients, alpha. Without a term subnormal weights are halved, to ties; a small one leaves fp16
# weights subnormal, two make large ones overflow. The smallest terms: the least Rademacher coefficient that
# counts in fp32, or in fp64, and one that does not.
TERMS: dict[str, tuple[list[int], list[float], float]] = {
    "unit term": ([SEED], [1.0], 1.0),
    "1 term": ([SEED], [0.7], 1.0),
    "no term": ([], [], 0.5),
    "1 small term": ([SEED], [3.7e-5], 1.0),
    "2 terms": ([2**64 - 1, 2**63 + 5], [-7.3, 13.9], 1 - 2.0**-10),
    "70 terms": _many_terms(),
    "1 vanishing term": ([5], [2.0**-149], 1.0),
    "2 vanishing terms": ([5, 6], [2.0**-149, -3 * 2.0**-149], 1.0),
    "3 vanishing terms": ([5, 6, 7], [2.0**-149, -3 * 2.0**-149, 2.0**-148], 1.0),
    "1 vanishing fp64 term": ([5], [2.0**-1074], 1.0),
    "2 vanishing fp64 terms": ([5, 6], [2.0**-1074, -3 * 2.0**-1074], 1.0),
    "opposite terms": ([5, 6], [0.5, -0.5], 1.0),
    "smallest terms": ([5, 6], [2.0**-96, 1.9999 * 2.0**-97], 1.0),
    "smallest fp64 terms": ([5, 6], [2.0**-960, 1.9999 * 2.0**-961], 1.0),
    # For what a processor computes anew in each process: see backends/triton/self_test.py.
    "3 terms": ([3, 2**64 - 5, 7], [0.37, -0.021, 5.3e-3], 1 - 2.0**-9),
}
