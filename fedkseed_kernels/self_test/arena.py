"""A call of golden cases in the memory of a device, and the digests of that memory.

All memory of a call is one arena, and what is no input is poison before the call: a digest also covers what a
kernel may not touch.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.operands import DeviceTerms, Operands, TensorList, Terms
from fedkseed_kernels.self_test import cases as golden
from fedkseed_kernels.self_test.cases import Call, Case

# A pattern that no result has; no NaN in any dtype.
POISON = 0xA5
ALIGNMENT = 16  # bytes of the widest access

_PATTERN = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16, "float64": np.uint64}
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float64": 0x7FF0000000000000}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements that any tensor reaches over in memory.
_MOST_ELEMENTS = 1 << 14


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
    """Patterns of residuals, in turn with the weights."""
    table = (np.arange(127) * 0x9E37).astype(np.uint16)
    table[23], table[47] = 0x7FFF, 0x8000  # half a unit beside the largest weights, which sums do not reach
    return np.resize(table, _MOST_ELEMENTS)


class _Layout(NamedTuple):
    """How a tensor lies in memory, in elements. extent: from its first element to its last."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    extent: int
    head: int  # elements before the first whole octet, which is aligned


@functools.cache
def _layout(kind: str, memory: str, role: str, length: int) -> _Layout:
    """role: "in", "out" or "out_minus". length: of flat tensors between head and tail."""
    sizes = golden.SIZES[kind]
    if memory in ("flat", "whole"):
        head = golden.HEAD if memory == "flat" else 0
        length += head + golden.TAIL if head else 0
        return _Layout((length,), (1,), length, head)
    if memory == "rows":
        num_rows, num_columns = golden.ROWS_SHAPE
        num_rows = num_rows if role == "in" else len(golden.ROWS) * sizes.repeats
        return _Layout((num_rows, num_columns), (num_columns, 1), num_rows * num_columns, 0)
    shape = sizes.num_rows, golden.NUM_COLUMNS
    strides = {  # transposed; every second element of wider rows; rows one after the other
        "in": (1, sizes.num_rows),
        "out": (2 * golden.NUM_COLUMNS + 3, 2),
        "out_minus": (golden.NUM_COLUMNS, 1),
    }[role]
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return _Layout(shape, strides, extent, 0)


# A tensor: the position of its case in the list, its role there, its layout, and the patterns that it begins
# with, None for poison.
_Piece = tuple[int, str, _Layout, NDArray[Any] | None]


def _pieces(call: Call, cases: Sequence[Case], kind: str) -> dict[torch.dtype, list[_Piece]]:
    """The tensors of a call, by dtype."""
    sizes, form = golden.SIZES[kind], call.form
    length = sizes.many if call.terms in ("70 terms", "3 terms") else sizes.few
    found: dict[torch.dtype, list[_Piece]] = {}
    for position, (name, memory, has_residual) in enumerate(cases):
        dtype = getattr(torch, name)
        if form == "noise":
            length = sizes.noise if name == "float32" else sizes.few
        else:
            layout = _layout(kind, memory, "in", length)
            found.setdefault(dtype, []).append((position, "in", layout, _weights(name)))
            if has_residual:
                found.setdefault(torch.int16, []).append((position, "residual", layout, _residuals()))
        out_dtype = torch.float32 if form == "wide" else dtype
        roles = ("out", "out_minus") if form in ("pair", "rows, pair", "wide") else ("out",)
        for role in roles if form != "in place" else ():
            layout = _layout(kind, memory, role, length)
            found.setdefault(out_dtype, []).append((position, role, layout, None))
    return found


class Arena:
    """A call laid out in the memory of a device, for a backend to compute once: `operands` and `terms`."""

    def __init__(self, call: Call, cases: Sequence[Case], kind: str, device: torch.device):
        """cases: the tensors of the list; those of the call on that kind of machine, or others."""
        self._call, self._kind = call, kind
        self._names = [call.name_of(case) for case in cases]
        pieces = _pieces(call, cases, kind)
        # Bytes of each case in the arena, with the poison around; bytes of each dtype.
        self._bytes: list[list[slice]] = [[] for _ in cases]
        self._of_dtype: dict[torch.dtype, slice] = {}
        starts, fills, end = [], [], 0
        for dtype, group in pieces.items():
            first, itemsize = end, dtype.itemsize
            for position, _, layout, fill in group:
                start = end + ALIGNMENT + -layout.head * itemsize % ALIGNMENT
                stop = start + layout.extent * itemsize
                begin, end = end, -(-stop // ALIGNMENT) * ALIGNMENT
                starts.append(start)
                self._bytes[position].append(slice(begin, end))
                if fill is not None:
                    fills.append((start, stop, fill[: layout.extent]))
            self._of_dtype[dtype] = slice(first, end)
        memory = torch.full((end,), POISON, dtype=torch.uint8, device="cpu")
        image = memory.numpy()
        for start, stop, fill in fills:
            image[start:stop] = fill.view(np.uint8)
        self._memory = memory.to(device)
        tensors: dict[str, dict[int, Tensor]] = {"in": {}, "residual": {}, "out": {}, "out_minus": {}}
        at = iter(starts)
        for dtype, group in pieces.items():
            view, itemsize = self._memory.view(dtype), dtype.itemsize
            for position, role, layout, _ in group:
                tensors[role][position] = view.as_strided(layout.shape, layout.strides, next(at) // itemsize)
        self.operands = self._operands(cases, tensors)
        self.terms = self._terms()

    def _operands(self, cases: Sequence[Case], tensors: dict[str, dict[int, Tensor]]) -> Operands:
        def in_order(role: str) -> TensorList | None:
            found = tensors[role]
            return TensorList([found[position] for position in range(len(cases))]) if found else None

        inputs, outs, residuals = in_order("in"), in_order("out"), tensors["residual"]
        made = inputs if outs is None else outs
        assert made is not None
        is_chosen = self._call.terms in ("unit term", "1 term")
        first = golden.FIRST if is_chosen else golden.CROSSING - 8
        firsts = {"flat": first - golden.HEAD, "whole": first, "strided": 0, "rows": golden.ROWS_FIRST}
        rows = None
        if self._call.form in ("rows", "rows, pair"):
            indices = golden.ROWS * golden.SIZES[self._kind].repeats
            rows = torch.tensor(indices, dtype=torch.int64, device=self._memory.device)
        return Operands(
            inputs,
            made,
            in_order("out_minus"),
            rows,
            # A stream of its own for each case, whatever others are in the list, but where it was chosen.
            [
                golden.STREAM if is_chosen and case.memory in ("flat", "whole") else zlib.crc32(name.encode())
                for name, case in zip(self._names, cases, strict=True)
            ],
            [firsts[case.memory] for case in cases],
            [golden.STRIDED_VIEW if case.memory == "strided" else None for case in cases],
            [residuals.get(position) for position in range(len(cases))] if residuals else None,
            writes_residuals=bool(residuals) and self._call.form == "in place",
        )

    def _terms(self) -> Terms:
        seeds, coeffs, alpha = golden.TERMS[self._call.terms]
        return Terms(
            np.array(seeds, dtype=np.uint64),
            np.array(coeffs, dtype=np.float64),
            float(np.float32(alpha)),
            self._call.family,
            self._call.rounding,
            golden.ROUNDING_SEED if self._call.rounding == "stochastic" else 0,
        )

    def run(self, seed_axpy: Callable[..., None], on_device: bool = False) -> dict[str, str]:
        """Have a backend compute the call; the digest of each case by its name.

        On a GPU, where the kernels of each dtype have constants of their own, results that may be weights are
        negated and serve as such for a second time: where weights were 0, y nearly vanishes then, and shows
        the last places of the noise in 16 bits too.

        Args:
            seed_axpy: takes operands and terms.
            on_device: whether the second time all terms are in the memory of the device (DeviceTerms).
        """
        seed_axpy(self.operands, self.terms)
        inputs, outs = self.operands.inputs, self.operands.outs
        if self._kind == "gpu" and self._call.form in ("in place", "out", "pair") and inputs is not None:
            for weight, result in zip(inputs.tensors, outs.tensors, strict=True):
                if weight is not result:
                    weight.copy_(result)
                bits = weight.view(_INTEGER[weight.element_size()])
                bits.bitwise_xor_(torch.iinfo(bits.dtype).min)
            seed_axpy(self.operands, self._device_terms() if on_device else self.terms)
        return self._digests()

    def _device_terms(self) -> DeviceTerms:
        terms, device = self.terms, self._memory.device
        rounding_seed = np.array([terms.rounding_seed], dtype=np.uint64).view(np.int64)
        return DeviceTerms(
            torch.tensor(terms.seeds.view(np.int64), device=device),
            torch.tensor(terms.coeffs, device=device),
            torch.tensor([terms.alpha], dtype=torch.float64, device=device),
            terms.family,
            terms.rounding,
            torch.tensor(rounding_seed, device=device),
        )

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
