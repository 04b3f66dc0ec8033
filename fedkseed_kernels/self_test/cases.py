"""The golden cases, defined here once: small calls of the primitive, all of whose bytes the contract fixes.

A call is what a backend is handed: a list of tensors with its terms. Each of its tensors is a case with a
digest of its own. All memory of a call is one arena, and what is no input is poison before the call: a digest
also covers what a kernel may not touch.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.contract import reference
from fedkseed_kernels.operands import Operands, TensorList, Terms, View

KINDS = ("processor", "gpu")

# A pattern that no result has; no NaN in any dtype.
POISON = 0xA5
ALIGNMENT = 16  # bytes of the widest access

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


class _Sizes(NamedTuple):
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
# own code: CUDA's kernels take steps of 4096 elements for few terms, and for many a tile whose last octets
# begin at element 6144; Triton's take 4096 elements of segments, and 256 octets of runs.
_SIZES = {"processor": _Sizes(384, 128, 8192, 5, 1), "gpu": _Sizes(4096, 6144 + 64, 8192, 70, 20)}


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
        may_split = self.form == "in place" and self.rounding == "stochastic"
        flat = [Case(dtype, "flat") for dtype in dtypes]
        flat += [Case(dtype, "flat", True) for dtype in halves if not may_split]
        if kind == "gpu":
            return (*flat, *(case._replace(memory="strided") for case in flat))
        turns = {"in place": ("float32", "float16"), "pair": ("bfloat16", "float64")}.get(self.form, ())
        strided = [Case(dtype, "strided", dtype == "float16") for dtype in turns if dtype in dtypes]
        return (*flat, *(strided if self.rounding == "nearest" else ()))


def calls() -> Iterator[Call]:
    """Every call of a self-test."""
    for family in reference.FAMILIES:
        yield Call(family, "unit term", "noise", "nearest")
        for terms in ("1 term", "2 terms", "70 terms"):
            for form in ("in place", "pair"):
                for rounding in reference.ROUNDINGS:
                    yield Call(family, terms, form, rounding)
            yield Call(family, terms, "rows", "stochastic")
            yield Call(family, terms, "wide", "nearest")
        yield Call(family, "1 small term", "in place", "nearest")
        # Sums that are zero, which have a sign of their own on the minus side.
        yield Call(family, "a seed twice" if family == "gaussian" else "opposite terms", "pair", "nearest")


def _many_terms() -> tuple[list[int], list[float], float]:
    """More terms than a kernel takes at a time; one of them does not count."""
    seeds = [k * 0x9E3779B97F4A7C15 % 2**64 for k in range(70)]
    coeffs = [(k * 0x9E3779B1 % 2**32 - 2**31) * 2.0**-37 for k in range(70)]
    coeffs[5] = 0.0
    return seeds, coeffs, 1 - 2.0**-9


# Seeds, coefficients, alpha. A small term leaves fp16 weights subnormal, two terms make large ones overflow.
TERMS: dict[str, tuple[list[int], list[float], float]] = {
    "unit term": ([SEED], [1.0], 1.0),
    "1 term": ([SEED], [0.7], 1.0),
    "1 small term": ([SEED], [3.7e-5], 1.0),
    "2 terms": ([2**64 - 1, 2**63 + 5], [-7.3, 13.9], 1 - 2.0**-10),
    "70 terms": _many_terms(),
    "a seed twice": ([5, 5], [0.5, -0.5], 1.0),
    "opposite terms": ([5, 6], [0.5, -0.5], 1.0),
    # For what a processor computes anew in each process: see backends/triton/self_test.py.
    "3 terms": ([3, 2**64 - 5, 7], [0.37, -0.021, 5.3e-3], 1 - 2.0**-9),
}

_PATTERN = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16, "float64": np.uint64}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float64": 0x7FF0000000000000}
# Elements that any tensor reaches over in memory.
_MOST_ELEMENTS = 1 << 13


def _quiet_nan(dtype: str) -> int:
    infinity = _INFINITY[dtype]
    return infinity | (infinity & -infinity) >> 1


@functools.cache
def _weights(dtype: str) -> NDArray[Any]:
    """Patterns of weights: NaN, infinite, subnormal, large, ordinary ones of several sizes; half are 0."""
    infinity, bits = _INFINITY[dtype], 8 * np.dtype(_PATTERN[dtype]).itemsize
    last_of_exponent, sign = infinity & -infinity, 1 << (bits - 1)
    special = [infinity, 0, 1, last_of_exponent - 1, last_of_exponent, infinity - 1]
    special += [number | sign for number in special] + [_quiet_nan(dtype)]
    one = infinity // last_of_exponent // 2 * last_of_exponent
    ordinary = []
    for k in range(48):
        word = (k + 1) * 0x9E3779B97F4A7C15 % 2**64
        exponent = one - k % 12 * last_of_exponent  # 1 down to 2^-11, normal numbers in every dtype
        ordinary.append((word >> 63) * sign | exponent | word & (last_of_exponent - 1))
    # 127 in turn, a prime: each comes to every place of a vector.
    numbers = [number for pair in zip(ordinary, special, strict=False) for number in pair]
    numbers += ordinary[len(special) :]
    table = np.zeros(127, dtype=_PATTERN[dtype])
    table[1 : 2 * len(numbers) : 2] = numbers
    table[::6] = sign  # -0
    return np.resize(table, _MOST_ELEMENTS)


@functools.cache
def _residuals() -> NDArray[Any]:
    return (np.arange(_MOST_ELEMENTS) * 0x9E37).astype(np.uint16)


class _Piece(NamedTuple):
    """One tensor in the arena. fill: patterns that it begins with; None for poison."""

    role: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    fill: NDArray[Any] | None


def _pieces(call: Call, case: Case, sizes: _Sizes) -> list[_Piece]:
    """The tensors of a case."""
    length = sizes.many if call.terms in ("70 terms", "3 terms") else sizes.few
    if call.form == "noise":
        length = sizes.noise if case.dtype == "float32" else sizes.few
    if case.memory == "flat":
        length += HEAD + TAIL
    strides = {  # transposed; every second element of wider rows; rows one after the other
        "in": (1, sizes.num_rows),
        "out": (2 * NUM_COLUMNS + 3, 2),
        "out_minus": (NUM_COLUMNS, 1),
    }
    dtype = getattr(torch, case.dtype)
    out_dtype = torch.float32 if call.form == "wide" else dtype

    def piece(role: str, of: torch.dtype, fill: NDArray[Any] | None) -> _Piece:
        where = "in" if role == "residual" else role
        if case.memory == "strided":
            return _Piece(role, of, (sizes.num_rows, NUM_COLUMNS), strides[where], fill)
        if case.memory == "rows":
            num_rows = ROWS_SHAPE[0] if where == "in" else len(ROWS) * sizes.repeats
            return _Piece(role, of, (num_rows, ROWS_SHAPE[1]), (ROWS_SHAPE[1], 1), fill)
        return _Piece(role, of, (length,), (1,), fill)

    found = []
    if call.form != "noise":
        found.append(piece("in", dtype, _weights(case.dtype)))
    if case.has_residual:
        found.append(piece("residual", torch.int16, _residuals()))
    if call.form != "in place":
        found.append(piece("out", out_dtype, None))
    if call.form in ("pair", "rows, pair", "wide"):
        found.append(piece("out_minus", out_dtype, None))
    return found


class Arena:
    """A call laid out in the memory of a device, for a backend to compute once: `operands` and `terms`."""

    def __init__(self, call: Call, cases: Sequence[Case], kind: str, device: torch.device):
        """cases: the tensors of the list; those of the call on that kind of machine, or others."""
        sizes = _SIZES[kind]
        self._kind, self._call, self._names = kind, call, [call.name_of(case) for case in cases]
        pieces = [
            (position, piece) for position, case in enumerate(cases) for piece in _pieces(call, case, sizes)
        ]
        pieces.sort(key=lambda entry: str(entry[1].dtype))  # so that all numbers of a dtype lie together
        # Bytes of each case in the arena, with the poison around; bytes of each dtype.
        self._bytes: list[list[slice]] = [[] for _ in cases]
        self._of_dtype: dict[torch.dtype, slice] = {}
        places, end = [], 0
        for position, piece in pieces:
            begin, itemsize = end, piece.dtype.itemsize
            # The first whole octet of a flat tensor is aligned.
            lead = -HEAD * itemsize % ALIGNMENT if cases[position].memory == "flat" else 0
            start = begin + ALIGNMENT + lead
            extent = 1 + sum([(n - 1) * step for n, step in zip(piece.shape, piece.strides, strict=True)])
            stop = start + extent * itemsize
            end = -(-stop // ALIGNMENT) * ALIGNMENT
            places.append((position, piece, start, stop, extent))
            self._bytes[position].append(slice(begin, end))
            self._of_dtype[piece.dtype] = slice(self._of_dtype.get(piece.dtype, slice(begin, 0)).start, end)
        memory = torch.full((end,), POISON, dtype=torch.uint8, device="cpu")
        image = memory.numpy()
        for _, piece, start, stop, extent in places:
            if piece.fill is not None:
                image[start:stop] = piece.fill[:extent].view(np.uint8)
        self._memory = memory.to(device)
        views = {dtype: self._memory.view(dtype) for dtype in self._of_dtype}
        tensors: dict[str, dict[int, Tensor]] = {"in": {}, "residual": {}, "out": {}, "out_minus": {}}
        for position, piece, start, _, _ in places:
            tensors[piece.role][position] = views[piece.dtype].as_strided(
                piece.shape, piece.strides, start // piece.dtype.itemsize
            )
        self.operands = self._operands(cases, sizes, tensors)
        self.terms = self._terms()

    def _operands(
        self, cases: Sequence[Case], sizes: _Sizes, tensors: dict[str, dict[int, Tensor]]
    ) -> Operands:
        def in_order(role: str) -> TensorList | None:
            found = tensors[role]
            return TensorList([found[position] for position in range(len(cases))]) if found else None

        inputs, outs = in_order("in"), in_order("out")
        made = inputs if outs is None else outs
        assert made is not None
        residuals = [tensors["residual"].get(position) for position in range(len(cases))]
        first = FIRST if self._call.terms in ("unit term", "1 term") else CROSSING - 8
        first_of = {"flat": first - HEAD, "whole": first, "strided": 0, "rows": ROWS_FIRST}
        views: list[View | None] = [STRIDED_VIEW if case.memory == "strided" else None for case in cases]
        rows = None
        if self._call.form in ("rows", "rows, pair"):
            rows = torch.tensor(ROWS * sizes.repeats, dtype=torch.int64, device=self._memory.device)
        return Operands(
            inputs,
            made,
            in_order("out_minus"),
            rows,
            [self._stream_of(case) for case in cases],
            [first_of[case.memory] for case in cases],
            views,
            residuals if tensors["residual"] else None,
            writes_residuals=bool(tensors["residual"]) and self._call.form == "in place",
        )

    def _stream_of(self, case: Case) -> int:
        """Its own for each case, whatever others are in the list, but where the noise was chosen."""
        is_chosen = self._call.terms in ("unit term", "1 term") and case.memory in ("flat", "whole")
        return STREAM if is_chosen else zlib.crc32(self._call.name_of(case).encode())

    def _terms(self) -> Terms:
        seeds, coeffs, alpha = TERMS[self._call.terms]
        return Terms(
            np.array(seeds, dtype=np.uint64),
            np.array(coeffs, dtype=np.float64),
            float(np.float32(alpha)),
            self._call.family,
            self._call.rounding,
            ROUNDING_SEED if self._call.rounding == "stochastic" else 0,
        )

    def run(self, seed_axpy: Callable[[Operands, Terms], None]) -> dict[str, str]:
        """Have a backend compute the call; the digest of each case by its name.

        On a GPU, where the kernels of each dtype have constants of their own, results that may be weights are
        negated and serve as such for a second time: where weights were 0, y nearly vanishes then, and shows
        the last places of the noise in 16 bits too.
        """
        seed_axpy(self.operands, self.terms)
        inputs, outs = self.operands.inputs, self.operands.outs
        if self._kind == "gpu" and self._call.form in ("in place", "out", "pair") and inputs is not None:
            for weight, result in zip(inputs.tensors, outs.tensors, strict=True):
                if weight is not result:
                    weight.copy_(result)
                bits = weight.view(_INTEGER[weight.element_size()])
                bits.bitwise_xor_(torch.iinfo(bits.dtype).min)
            seed_axpy(self.operands, self.terms)
        return self._digests()

    def _digests(self) -> dict[str, str]:
        """64 bits of BLAKE2b over the memory of each case, each NaN in it made the positive quiet one."""
        image = self._memory.cpu().numpy()
        for dtype, where in self._of_dtype.items():
            if dtype.is_floating_point:
                name = str(dtype).removeprefix("torch.")
                numbers = image[where].view(_PATTERN[name])
                numbers[numbers << 1 > 2 * _INFINITY[name]] = _quiet_nan(name)
        found = {}
        for name, parts in zip(self._names, self._bytes, strict=True):
            digest = hashlib.blake2b(digest_size=8)
            for part in parts:
                digest.update(image[part].data)
            found[name] = digest.hexdigest()
        return found
