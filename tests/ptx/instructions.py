"""An instruction of PTX as lines of Python over arrays of lanes.

The lines know R, the list of registers; M, the lanes that run (None for all); S, the `machine.Machine`. An
unknown opcode, modifier, type or operand raises `UnknownPtxError`: nothing is guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptx.arithmetic import U32, U64, UNSIGNED
from ptx.parser import SIZES, Statement, UnknownPtxError, operands_of

_SPECIAL = ("%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid")
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
# True for NaN too: the negation of these.
_OR_UNORDERED = {"neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_CACHE_HINTS = ("L1::evict_last", "L1::evict_first", "nc")
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_FLOAT_OPERATIONS = {"add": ("add", "+"), "sub": ("sub", "-"), "mul": ("mul", "*")}


class Constants:
    """Values that lines name: K0, K1, ... of a namespace."""

    def __init__(self, space: dict[str, Any]):
        self._space, self._count = space, 0

    def add(self, value: Any) -> str:
        name = f"K{self._count}"
        self._count += 1
        self._space[name] = value
        return name


class Instruction:
    """The lines of one statement. symbols: offsets of parameters and shared variables."""

    def __init__(
        self,
        statement: Statement,
        symbols: Mapping[str, int],
        constants: Constants,
        is_masked: bool,
        notes: Counter[str] | None = None,
    ):
        self._operands, self._names, self._text = statement.operands, statement.names, statement.text
        self._symbols, self._constants, self._notes = symbols, constants, notes
        self.lines: list[str] = []
        self._mask = "M" if is_masked else None
        if statement.guard:
            register, is_negated = statement.guard
            test = f"{'~' if is_negated else ''}R[{register}]"
            self.lines.append(f"P = {f'M & {test}' if is_masked else test}")
            self._mask = "P"
        self._parts = statement.opcode.split(".")
        self._kind = self._parts[-1]
        self._bits = SIZES.get(self._kind, 0)
        handler = getattr(self, f"_op_{self._parts[0]}", None)
        if handler is None:
            raise UnknownPtxError(self._text)
        handler()

    # --- operands and results

    def _value(self, text: str, bits: int) -> str:
        """Python for an operand as unsigned numbers of so many bits (1: bool)."""
        if text in self._names:
            register, width = self._names[text]
            if width == bits:
                return f"R[{register}]"
            if bits == 1 or width < bits:
                raise UnknownPtxError(f"{text} of {width} bits as {bits}: {self._text}")
            return f"R[{register}].astype(U{bits})"
        if text.startswith(_SPECIAL):
            return f"S.special[{text!r}]"
        if text in self._symbols:
            return self._constants.add(UNSIGNED[bits](self._symbols[text]))
        if pattern := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return self._constants.add(U32(int(pattern[1], 16)))
        if pattern := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
            return self._constants.add(U64(int(pattern[1], 16)))
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0)
            return self._constants.add(np.bool_(value) if bits == 1 else UNSIGNED[bits](value % (1 << bits)))
        raise UnknownPtxError(f"operand {text}: {self._text}")

    def _operand(self, i: int, bits: int | None = None) -> str:
        return self._value(self._operands[i], bits or self._bits)

    def _typed(self, i: int, bits: int | None = None, kind: str | None = None) -> str:
        """Operand i as numbers of its type: signed where it is."""
        bits, letter = bits or self._bits, (kind or self._kind)[0]
        value = self._operand(i, bits)
        if letter == "s":
            return f"{value}.view(I{bits})"
        return f"{value}.view(F{bits})" if letter == "f" else value

    def _put(self, name: str, expression: str) -> None:
        if name == "_":
            return
        register = self._names[name].place
        if self._mask:
            self.lines.append(f"R[{register}] = where({self._mask}, {expression}, R[{register}])")
        else:
            self.lines.append(f"R[{register}] = S.array({expression})")

    def _result(self, expression: str, bits: int | None = None) -> None:
        self._put(self._operands[0], f"({expression}).view(U{bits or self._bits})")

    def _modifiers(self, *known: str) -> list[str]:
        """The modifiers between opcode and type; each must be known."""
        got = self._parts[1:-1]
        if any(modifier not in known for modifier in got):
            raise UnknownPtxError(self._text)
        return got

    def _require(self, is_known: bool) -> None:
        if not is_known:
            raise UnknownPtxError(self._text)

    # --- numbers

    def _float_or_integer(self) -> None:
        function, symbol = _FLOAT_OPERATIONS[self._parts[0]]
        if self._kind[0] != "f":
            self._require(self._kind[0] in "us")
            self._result(f"{self._typed(1)} {symbol} {self._typed(2)}")
            return
        self._require(self._kind in ("f32", "f64", "f32x2"))
        if self._modifiers("rn") != ["rn"] and self._notes is not None:
            # Without it a compiler may contract, whatever its flags were.
            self._notes[f"{self._parts[0]}.{self._kind} without .rn"] += 1
        if self._kind == "f32":
            self._put(self._operands[0], f"{function}32({self._operand(1)}, {self._operand(2)})")
        elif self._kind == "f32x2":
            self._packed(f"{function}32", 2)
        else:
            self._result(f"{self._typed(1)} {symbol} {self._typed(2)}")

    def _op_add(self) -> None:
        self._modifiers(*["rn"] * (self._kind[0] == "f"))
        self._float_or_integer()

    _op_sub = _op_add

    def _packed(self, function: str, num_operands: int) -> None:
        """A function of fp32 numbers on the two halves of 64-bit registers."""
        operands = (f"S.array({self._operand(i + 1)}).view(U32)" for i in range(num_operands))
        self._put(self._operands[0], f"{function}({', '.join(operands)}).view(U64)")

    def _wide(self) -> str:
        big = f"{'I' if self._kind[0] == 's' else 'U'}{2 * self._bits}"
        return f"{self._typed(1)}.astype({big}) * {self._typed(2)}.astype({big})"

    def _op_mul(self) -> None:
        if self._kind[0] == "f":
            self._float_or_integer()
            return
        (how,) = self._modifiers("lo", "wide", "hi")
        if how == "lo":
            self._result(f"{self._typed(1)} * {self._typed(2)}")
        elif how == "wide":
            self._result(self._wide(), 2 * self._bits)
        else:
            self._require(self._bits <= 32)
            self._put(self._operands[0], f"(({self._wide()}) >> {self._bits}).astype(U{self._bits})")

    def _op_mad(self) -> None:
        (how,) = self._modifiers("lo", "wide")
        self._require(self._kind[0] in "us")
        if how == "lo":
            self._result(f"{self._typed(1)} * {self._typed(2)} + {self._typed(3)}")
        else:
            self._result(f"{self._wide()} + {self._typed(3, 2 * self._bits)}", 2 * self._bits)

    def _op_fma(self) -> None:
        self._require(self._modifiers("rn") == ["rn"] and self._kind in ("f32", "f64", "f32x2"))
        if self._kind == "f32x2":
            self._packed("fma32", 3)
            return
        a, b, c = (self._operand(i) for i in (1, 2, 3))
        self._put(self._operands[0], f"fma{self._bits}({a}, {b}, {c})")

    def _op_neg(self) -> None:
        self._modifiers()
        if self._kind in ("f32", "f64"):
            self._put(self._operands[0], f"{self._operand(1)} ^ U{self._bits}(1 << {self._bits - 1})")
        else:
            self._require(self._kind[0] == "s")
            self._result(f"-{self._typed(1)}")

    def _op_abs(self) -> None:
        self._modifiers()
        if self._kind in ("f32", "f64"):
            self._put(self._operands[0], f"{self._operand(1)} & U{self._bits}({(1 << self._bits - 1) - 1})")
        else:
            self._require(self._kind[0] == "s")
            self._result(f"np.abs({self._typed(1)})")

    def _op_min(self) -> None:
        self._modifiers()
        self._require(self._kind[0] in "us")
        self._result(f"np.{self._parts[0]}imum({self._typed(1)}, {self._typed(2)})")

    _op_max = _op_min

    def _op_div(self) -> None:
        self._modifiers()
        self._require(self._kind[0] in "us")
        is_remainder = self._parts[0] == "rem"
        self._result(f"divide(S.array({self._typed(1)}), {self._typed(2)}, {is_remainder})")

    _op_rem = _op_div

    # --- bits

    def _op_and(self) -> None:
        self._modifiers()
        self._put(self._operands[0], f"{self._operand(1)} {_LOGIC[self._parts[0]]} {self._operand(2)}")

    _op_or = _op_xor = _op_and

    def _op_not(self) -> None:
        self._modifiers()
        self._put(self._operands[0], f"~{self._operand(1)}")

    def _op_shl(self) -> None:
        self._modifiers()
        self._put(
            self._operands[0], f"shl(S.array({self._operand(1)}), {self._operand(2, 32)}, {self._bits})"
        )

    def _op_shr(self) -> None:
        self._modifiers()
        self._result(f"shr(S.array({self._typed(1)}), {self._operand(2, 32)}, {self._bits})")

    def _op_shf(self) -> None:
        side, mode = self._modifiers("l", "r", "wrap")
        self._require(mode == "wrap" and self._kind == "b32")
        low, high, n = (self._operand(i) for i in (1, 2, 3))
        both = f"({low}.astype(U64) | {high}.astype(U64) << U64(32))"
        amount = f"({n} & U32(31)).astype(U64)"
        shifted = f"{both} << {amount} >> U64(32)" if side == "l" else f"{both} >> {amount}"
        self._put(self._operands[0], f"({shifted}).astype(U32)")

    def _op_lop3(self) -> None:
        self._modifiers()
        a, b, c = (self._operand(i, 32) for i in (1, 2, 3))
        self._put(self._operands[0], f"lop3({a}, {b}, {c}, {int(self._operands[4], 0)})")

    def _op_prmt(self) -> None:
        self._modifiers()
        a, b, c = (self._operand(i, 32) for i in (1, 2, 3))
        self._put(self._operands[0], f"prmt({a}, {b}, {c})")

    def _op_bfi(self) -> None:
        self._modifiers()
        a, b = self._operand(1), self._operand(2)
        position, length = self._operand(3, 32), self._operand(4, 32)
        self._put(self._operands[0], f"bfi({a}, {b}, {position}, {length}, {self._bits})")

    def _op_bfe(self) -> None:
        self._modifiers()
        a, position, length = self._operand(1), self._operand(2, 32), self._operand(3, 32)
        self._put(self._operands[0], f"bfe({a}, {position}, {length}, {self._bits}, {self._kind[0] == 's'})")

    # --- predicates

    def _comparison(self, how: str) -> str:
        a, b, letter = self._typed(1), self._typed(2), self._kind[0]
        both_numbers = f"({a} == {a}) & ({b} == {b})"
        if letter != "f":
            known = _COMPARISONS | (_UNSIGNED_COMPARISONS if letter == "u" else {})
            self._require(how in known)
            return f"{a} {known[how]} {b}"
        if how == "ne":
            return f"({a} != {b}) & {both_numbers}"
        if how in ("num", "nan"):
            return both_numbers if how == "num" else f"~({both_numbers})"
        if how == "equ":
            return f"({a} == {b}) | ~({both_numbers})"
        if how in _OR_UNORDERED:
            return f"~({a} {_OR_UNORDERED[how]} {b})"
        self._require(how in _COMPARISONS)
        return f"{a} {_COMPARISONS[how]} {b}"

    def _op_setp(self) -> None:
        how, *join = self._parts[1:-1]
        test = self._comparison(how)
        if join:
            self._require(len(join) == 1 and join[0] in _LOGIC and not self._operands[3].startswith("!"))
            test = f"({test}) {_LOGIC[join[0]]} {self._operand(3, 1)}"
        self._put(self._operands[0], test)

    def _op_selp(self) -> None:
        self._modifiers()
        self._put(self._operands[0], f"where({self._operand(3, 1)}, {self._operand(1)}, {self._operand(2)})")

    # --- moves and conversions

    def _op_mov(self) -> None:
        self._modifiers()
        to, source = self._operands
        if to.startswith("{"):
            pieces = operands_of(to[1:-1])
            bits = self._bits // len(pieces)
            self.lines.append(f"T = {self._value(source, self._bits)}")
            for i, name in enumerate(pieces):
                self._put(name, f"(T >> U{self._bits}({bits * i})).astype(U{bits})")
        elif source.startswith("{"):
            pieces = operands_of(source[1:-1])
            bits = self._bits // len(pieces)
            self._put(
                to,
                " | ".join(
                    f"{self._value(piece, bits)}.astype(U{self._bits}) << U{self._bits}({bits * i})"
                    for i, piece in enumerate(pieces)
                ),
            )
        else:
            self._put(to, self._value(source, self._bits))

    def _op_cvt(self) -> None:
        *how, to, source = self._parts[1:]
        self._require(how in ([], ["rn"]))
        target, bits, width = self._operands[0], SIZES[to], SIZES[source]
        if to in ("bf16x2", "f16x2") and source == "f32" and how:
            narrow = f"{to[:-2]}_from_f32"
            high, low = self._operand(1, 32), self._operand(2, 32)
            self._put(target, f"{narrow}({high}).astype(U32) << U32(16) | {narrow}({low}).astype(U32)")
        elif to in ("bf16", "f16") and source == "f32" and how:
            self._put(target, f"{to}_from_f32({self._operand(1, 32)})")
        elif (to, source) == ("f32", "f16"):
            self._put(target, f"f32_from_f16({self._operand(1, 16)})")
        elif (to, source) == ("f32", "bf16"):
            self._put(target, f"canonical32(({self._operand(1, 16)}.astype(U32) << U32(16)).view(F32))")
        elif to[0] == "f" and bits >= 32 and (source[0] != "f" or width >= 32):
            # Widening is exact and takes no rounding mode; everything else must name one.
            self._require(bool(how) != (source == "f32" and to == "f64"))
            made = f"S.array({self._typed(1, width, source)}).astype(F{bits})"
            self._put(target, f"canonical32({made})" if bits == 32 else f"{made}.view(U64)")
        else:
            self._require(to[0] in "us" and source[0] in "us" and not how)
            sign, register = "I" if to[0] == "s" else "U", self._names[target].bits
            value = f"S.array({self._typed(1, width, source)})"
            self._put(target, f"{value}.astype({sign}{bits}).astype({sign}{register}).view(U{register})")

    def _op_cvta(self) -> None:
        self._require(self._parts[1:] in (["to", "global", "u64"], ["global", "u64"]))
        self._put(self._operands[0], self._operand(1, 64))

    # --- memory

    def _address(self, i: int) -> str:
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", self._operands[i])
        if match is None:
            raise UnknownPtxError(self._text)
        name, offset = match[1], int(match[2] or 0)
        if name in self._names:
            register, bits = self._names[name]
            return f"R[{register}]" + (
                f" + {self._constants.add(UNSIGNED[bits](offset % (1 << bits)))}" if offset else ""
            )
        self._require(name in self._symbols)
        return self._constants.add(U64(self._symbols[name] + offset))

    def _space(self, *known: str) -> tuple[str, int]:
        """State space of a load or store, and how many elements it moves."""
        spaces, count = [], 1
        for modifier in self._parts[1:-1]:
            if modifier in known:
                spaces.append(modifier)
            elif modifier in ("v2", "v4"):
                count = int(modifier[1])
            else:
                self._require(modifier in _CACHE_HINTS)
        self._require(len(spaces) == 1)
        return spaces[0], count

    def _vector(self, i: int, count: int) -> list[str]:
        text = self._operands[i]
        names = operands_of(text[1:-1]) if text.startswith("{") else [text]
        self._require(len(names) == count)
        return names

    def _site(self) -> str:
        return self._constants.add(self._text)

    def _op_ld(self) -> None:
        space, count = self._space("global", "shared", "param")
        size = self._bits // 8
        self.lines.append(
            f"L = S.load_{space}({self._address(1)}, {size}, {count}, {self._mask}, {self._site()})"
        )
        for i, name in enumerate(self._vector(0, count)):
            width = self._names[name].bits
            value = f"L[{i}]"
            if width != self._bits:
                sign = "I" if self._kind[0] == "s" else "U"
                value = f"L[{i}].view({sign}{self._bits}).astype({sign}{width}).view(U{width})"
            self._put(name, value)

    def _op_st(self) -> None:
        space, count = self._space("global", "shared")
        address, size = self._address(0), self._bits // 8
        values = ", ".join(self._value(name, self._bits) for name in self._vector(1, count))
        self.lines.append(f"S.store_{space}({address}, {size}, ({values},), {self._mask}, {self._site()})")

    def _op_atom(self) -> None:
        space, how = self._parts[1], self._parts[2]
        self._require(space in ("global", "shared") and how in ("add", "max", "or") and self._kind[0] in "ub")
        self._require(len(self._parts) == 4)
        self.lines.append(
            f"L = S.atomic({space!r}, {how!r}, {self._address(1)}, {self._bits // 8}, {self._operand(2)}, "
            f"{self._mask}, {self._site()})"
        )
        self._put(self._operands[0], "L")

    # --- warps

    def _op_shfl(self) -> None:
        self._require(self._parts[1:] in (["sync", "bfly", "b32"], ["sync", "idx", "b32"]))
        to, _, flag = self._operands[0].partition("|")
        a, b, c, members = (self._operand(i, 32) for i in (1, 2, 3, 4))
        self.lines.append(f"L = S.shuffle({self._parts[2]!r}, {a}, {b}, {c}, {members}, {self._mask})")
        self._put(to, "L")
        if flag:
            self._put(flag, "S.array(np.bool_(True))")

    def _op_ldmatrix(self) -> None:
        self._require(self._parts[1:] == ["sync", "aligned", "m8n8", "x4", "shared", "b16"])
        self._require(self._mask != "P")
        self.lines.append(f"L = S.load_matrix({self._address(1)}, {self._mask}, {self._site()})")
        for i, name in enumerate(self._vector(0, 4)):
            self._put(name, f"L[{i}]")

    def _op_mma(self) -> None:
        self._require(".".join(self._parts[1:]) == "sync.aligned.m16n8k32.row.col.s32.u8.s8.s32")
        self._require(self._mask != "P")
        a, b, c = (
            ", ".join(f"S.array({self._value(name, 32)})" for name in self._vector(i, count))
            for i, count in ((1, 4), (2, 2), (3, 4))
        )
        self.lines.append(f"S.whole_warps({self._mask}, 'mma.sync')")
        self.lines.append(f"L = mma_u8s8([{a}], [{b}], [{c}])")
        for i, name in enumerate(self._vector(0, 4)):
            self._put(name, f"L[{i}]")
