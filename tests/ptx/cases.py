"""Which cases there are: the calls of one dtype and family, and all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ptx.calls import DTYPES, Case
from ptx.world import Spec

# Offsets at which the high word of a counter changes: Gaussian noise and random bits; Rademacher noise.
G, H = 1 << 35, 1 << 39
FAMILIES = ("gaussian", "rademacher")

FLAT = (
    Spec((5,), 3),
    Spec((2 * 16384 + 77,), G - 16391, 1),
    Spec((4096 + 8,), 64, 8),
    Spec((1,), H - 1, 3),
    Spec((8192 + 40,), H - 4096),
)
SMALL = (
    Spec((2048 + 9,), G - 1000, 2),
    Spec((64,), 8, 8),
    Spec((700,), (1 << 62) + 5),
    Spec((1030,), H - 520),
)
# Whole tiles of the kernels for many terms, aligned to 16 bytes and not: each octet of a thread is written in
# every way.
WIDE = (
    Spec((8192 + 3000,), 5, 1),
    Spec((3 * 4096 + 8,), G - 8192, 8),
    Spec((6 * 1024 + 3,), 8 * 1021 + 6),
)
STRIDED = (
    Spec((37, 29), 11, 1, "transposed"),
    Spec((20, 50), G - 333, 0, "gaps"),
    Spec((301,), 5, 1, "every second"),
    Spec((9, 64), view=((1 << 20, 1 << 17), (300000, 1000))),
    Spec((3, 5, 16), view=((1 << 12, 1 << 13, 1 << 12), (4000, 8000, 4080))),
)
# More tensors than the table of a launch holds.
MANY = tuple(Spec((i % 19 + 1,), 13 * i, i % 3) for i in range(400))
MANY_STRIDED = tuple(Spec((i % 5 + 2, 3), 13 * i, i % 3, "transposed") for i in range(80))
# The beginning and end of a tensor within each octet of a thread, aligned to 16 bytes and not.
EDGES = tuple(Spec((29,), 2048 * octet + 3, skew) for octet in range(4) for skew in (3, 0))
DIMS = (
    Spec((2, 1, 3, 2, 3, 4), view=((4, 2, 5, 4, 5, 6), (1, 0, 1, 1, 1, 1))),
    Spec((2,) * 9, view=((3,) * 9, (1,) * 9)),
    Spec((2, 3, 2, 3, 5), 17, 1, "padded"),
)
TABLES_OF_DIMS = tuple(
    Spec((30, *[2] * dims, 3), G - 100 * dims, dims % 3, "padded") for dims in (1, 2, 3, 4)
)
STRIDED_EDGES = (
    Spec((3, 29), 3, 3, "gaps"),
    Spec((4, 16), 8, 0, "gaps"),
    Spec((7, 5), G - 9, 1, "transposed"),
    Spec((5, 24), view=((16, 48), (3, 8))),
)
TABLES = (Spec((30, 48), 7), Spec((30, 3, 5), G - 100, 1), Spec((30, 33), 0, 0, "gaps"))
ROWS = (3, 29, 0, 3, 17, 5)


def vary(case: Case, **values: Any) -> Iterator[Case]:
    """The case with each combination of values; one that is no tuple is given to all."""
    several = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    for chosen in itertools.product(*several.values()):
        yield replace(case, **dict(zip(several, chosen, strict=True)))


class _Calls:
    """The cases of one dtype and family."""

    def __init__(self, dtype: str, family: str):
        self.flat = Case("flat", dtype, family, 1, FLAT)
        self.small = replace(self.flat, name="small", specs=SMALL)
        self.wide = replace(self.flat, name="wide", specs=WIDE, k=6)
        self.strided = replace(self.flat, name="strided", specs=STRIDED)
        self.rows = replace(self.flat, name="rows", specs=TABLES, rows=ROWS)
        self.is_half = dtype in ("bf16", "fp16")

    def plain(self) -> Iterator[Case]:
        """Rounded to nearest, without residuals."""
        flat, small, wide = self.flat, self.small, self.wide
        yield from vary(flat, k=(1, 2), alpha=(1.0, 0.75))
        yield from vary(small, k=(3, 5, 33, 64, 70))
        yield replace(small, k=300, alpha=-0.5)
        yield from vary(small, k=0, alpha=(1.0, 0.75, -0.0))
        yield from vary(small, k=(0, 1, 2, 5), device="all", alpha=1.25)
        for coeffs, counts in (("cancel", (2, 6)), ("tiny", (1, 7)), ("zeros", 9), ("dyadic", 6)):
            yield from vary(small, k=counts, coeffs=coeffs)
        yield from vary(small, k=(1, 5), form="out")
        yield from vary(small, k=(1, 2, 5), form=("pair", "pair in place"))
        for k, coeffs in ((2, "cancel"), (4, "cancel"), (4, "dyadic")):
            yield replace(small, k=k, form="pair", coeffs=coeffs)
        yield replace(small, form="noise")
        yield replace(flat, form="noise")
        yield from vary(wide, k=(6, 0))
        yield replace(wide, form="pair", coeffs="dyadic")
        yield replace(wide, form="pair", k=0)
        yield from vary(flat, k=(1, 2), form=("pair", "out"))
        yield replace(flat, k=2, form="pair", coeffs="cancel")
        yield from vary(flat, k=(1, 2), device="all")
        yield from self._strided_and_rows()

    def _strided_and_rows(self) -> Iterator[Case]:
        strided, rows = self.strided, self.rows
        yield from vary(strided, k=(1, 2, 70))
        yield replace(strided, k=5, alpha=0.75)
        yield replace(strided, k=3, form="pair", coeffs="dyadic")
        yield replace(strided, k=2, form="out")
        yield replace(strided, k=0, alpha=0.75)
        yield replace(strided, k=4, device="all")
        yield from vary(rows, k=(1, 5), form=("out", "pair"))
        yield from vary(rows, k=(0, 1, 2, 5), form="out", bad_rows=True)
        yield replace(rows, k=5, form="pair", bad_rows=True)

    def many_tensors(self) -> Iterator[Case]:
        yield from vary(self.flat, name="many tensors", specs=(MANY,), k=(1, 5))
        yield replace(self.flat, name="many strided tensors", specs=MANY_STRIDED)

    def stochastic(self) -> Iterator[Case]:
        flat, small, wide = self.flat, self.small, self.wide
        chosen = [
            *(flat, replace(flat, k=2), *vary(small, k=(5, 70)), replace(small, k=5, form="pair")),
            *(wide, replace(wide, form="pair"), *vary(flat, k=(1, 2), form="pair")),
            *(replace(small, k=2, device="all"), *vary(self.strided, k=5, form=("in place", "pair"))),
            *(replace(self.rows, k=2, form="out"), replace(small, k=0, alpha=0.75)),
        ]
        for case in chosen:
            yield replace(case, rounding="stochastic")

    def compensated(self) -> Iterator[Case]:
        flat, small, wide, strided = self.flat, self.small, self.wide, self.strided
        chosen = [
            *(flat, replace(flat, k=2), replace(flat, alpha=0.75), *vary(small, k=(5, 70)), wide),
            *(replace(wide, form="pair"), replace(wide, form="out", rounding="stochastic")),
            *(replace(wide, k=0), *vary(flat, k=(1, 2), form="pair", rounding=("nearest", "stochastic"))),
            replace(flat, form="pair", rounding="stochastic", alpha=1.25),  # results past the largest
            *(replace(flat, form="out", rounding="stochastic"), replace(flat, device="all")),
            *(*vary(small, k=0, alpha=(1.0, 0.75)), *vary(small, k=(1, 5), form="pair")),
            *(replace(small, k=1, form="out", rounding="stochastic"), replace(small, k=2, device="all")),
            *(*vary(strided, k=(1, 5)), replace(strided, k=2, form="pair")),
            replace(self.rows, k=2, form="out"),
        ]
        for case in chosen:
            yield replace(case, residuals=True)

    def edges(self) -> Iterator[Case]:
        """Every way in which an octet is written, by every loop over terms."""
        flat = replace(self.flat, name="edges", specs=EDGES)
        strided = replace(self.flat, name="strided edges", specs=STRIDED_EDGES, k=2)
        yield from self._edges(flat, (1, 2, 5))
        yield from self._edges(strided, (2,))
        if self.is_half:
            both, rounding = (False, True), ("nearest", "stochastic")
            yield from vary(self.rows, form=("out", "pair"), k=(1, 5), residuals=both, rounding=rounding)

    def _edges(self, case: Case, counts: tuple[int, ...]) -> Iterator[Case]:
        residuals = (False, True) if self.is_half else (False,)
        rounding = ("nearest", "stochastic") if self.is_half else ("nearest",)
        all_forms, in_place_pair, out_pair = (
            ("in place", "out", "pair"),
            ("in place", "pair"),
            ("out", "pair"),
        )
        every = {"k": counts, "residuals": residuals}
        yield from vary(case, **every, rounding=rounding, form=all_forms)
        yield from vary(case, **every, rounding=rounding, form="pair", coeffs=("smallest", "dyadic"))
        yield from vary(case, **every, device="alone", form=out_pair, coeffs="smallest")
        yield from vary(case, **every, device="skipped", form=all_forms)
        yield from vary(case, **every, rounding=rounding, device="skipped", form=in_place_pair, alpha=0.75)
        yield from vary(case, k=2, residuals=residuals, device="half", form=in_place_pair)
        yield from vary(case, k=counts, device=("seeds", "coeffs", "all"), alpha=0.75)
        if self.is_half:
            yield from vary(case, k=counts, rounding="stochastic", device=("coeffs", "all"), form=out_pair)
        else:  # for which rounding makes no difference
            yield from vary(case, k=counts, rounding="stochastic", device=("", "coeffs"), form="out")

    def counts(self) -> Iterator[Case]:
        """Numbers of terms about the chunks that kernels prepare them in, also on both sides."""
        one = replace(self.small, name="one tensor", specs=SMALL[:1], special=False)
        yield from vary(one, k=(63, 65, 128, 255, 257))
        yield from vary(one, k=(33, 129, 300), form="pair")
        yield from vary(one, k=(65, 300), device="all")
        if self.flat.family == "gaussian":
            return
        # More than one for each thread of the block that surveys them.
        few = replace(one, name="few elements", specs=EDGES[:1])
        for case in (few, replace(one, name="few strided elements", specs=STRIDED_EDGES[:1])):
            yield from vary(case, k=1100, device=("", "all", "half"))
        if self.flat.dtype == "fp32":
            yield replace(few, k=(1 << 16) + 1)  # more than the integer sums of a flat tensor take

    def dimensions(self) -> Iterator[Case]:
        """Tensors of many dimensions, none of which can be merged."""
        yield from vary(self.flat, name="dimensions", specs=(DIMS,), k=(1, 5), form=("in place", "pair"))
        residuals = (False, True) if self.is_half else (False,)
        rows = replace(self.rows, name="rows of dimensions", specs=TABLES_OF_DIMS)
        yield from vary(rows, k=(1, 2, 5), form=("out", "pair"), residuals=residuals)


def all_cases() -> list[Case]:
    """Every case, once."""
    made: list[Case] = []
    for dtype, family in itertools.product(DTYPES, FAMILIES):
        calls = _Calls(dtype, family)
        made += calls.plain()
        if calls.is_half:
            made += [*calls.stochastic(), *calls.compensated()]
        made += [*calls.many_tensors(), *calls.edges(), *calls.counts(), *calls.dimensions()]
    return list({str(case): case for case in made if not _is_refused(case)}.values())


def _is_refused(case: Case) -> bool:
    """Weights and residuals are split by rounding to nearest alone."""
    return case.residuals and case.form == "in place" and case.rounding == "stochastic"
