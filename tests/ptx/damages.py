"""Damage to the kernels' PTX, none of which may stay unseen: each changes one kernel in one place or kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ptx.calls import Case, Driver, Verdict, run_case
from ptx.cases import SMALL, STRIDED

# Places of a pattern that are tried, spread over the kernel: not all are run by the case, and some decide
# nothing of it.
_MOST_PLACES = 24


class DamagedDriver(Driver, Protocol):
    """A driver that can run a kernel from another text."""

    def body(self, name: str) -> str:
        """The text of the kernel that was launched last under this name."""

    def damaged(self, name: str, change: Callable[[str], str]) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Damage:
    """A pattern of a kernel's text and what takes its place. call: fields of the case that must show it."""

    name: str
    kernel: str
    pattern: str
    replacement: str
    call: dict[str, Any] = field(default_factory=dict)
    everywhere: bool = False

    @property
    def case(self) -> Case:
        dtype = re.search(r"<(\w+)", self.kernel)
        made = {"dtype": dtype[1].lower() if dtype else "bf16", "k": 5, "specs": SMALL, "name": "small"}
        made["family"] = "rademacher" if "ademacher" in self.kernel else "gaussian"
        return Case(**{**made, **self.call})

    def changes(self, body: str) -> Iterator[Callable[[str], str]]:
        """The changes to try, one place each unless it is to be everywhere."""
        if self.everywhere:
            yield lambda text: re.sub(self.pattern, self.replacement, text)
            return
        places = list(re.finditer(self.pattern, body))
        spread = places[:: max(1, len(places) // 10)]
        for place in [*spread, *(other for other in places if other not in spread)][:_MOST_PLACES]:
            changed = body[: place.start()] + place.expand(self.replacement) + body[place.end() :]
            yield {body: changed}.__getitem__


_BARRIER = r"\n\s*bar\.sync\s+0;"
_OPERANDS = r"\{.*?\}, "
FEW_GAUSSIAN, FEW_RADEMACHER = "few_terms<Bf16, Gaussian, {}, {}>", "few_terms<Fp16, Rademacher, {}, {}>"
_PAIR = {"k": 5, "form": "pair"}
_COMPENSATED = {"k": 1, "residuals": True}
CUDA = (
    Damage("a multiplier of Philox", "many_gaussian<Fp32>", r"-766435501;", "-766435503;"),
    Damage("the square root of 2", "many_gaussian<Fp32>", r"0f3FB504F3", "0f3FB504F4"),
    Damage("the radius' centre", "many_gaussian<Fp32>", r"0fC27FFFFF", "0fC2800000"),
    Damage(
        "sums that begin at +0",
        *("many_gaussian<Bf16>", r"0f80000000;", "0f00000000;", {"k": 0, "alpha": 0.75}),
        everywhere=True,
    ),
    Damage(
        "a store that is 4 bytes off",
        *("many_gaussian<Bf16>", r"st\.global\.v4\.u32(\s+)\[(%rd\d+)\]", r"st.global.v4.u32\1[\2+4]"),
    ),
    Damage(
        "round keys of another place",
        *("many_gaussian<Bf16>", r"ld\.shared\.v4\.u32(.*)\[(%r\d+)\+16\]", r"ld.shared.v4.u32\1[\2+32]"),
    ),
    Damage("no barrier (Gaussian, many)", "many_gaussian<Bf16>", _BARRIER, "\n", {"k": 70}),
    Damage(
        "a fragment of bits, registers exchanged",
        *("many_rademacher<Bf16>", rf"(mma\S+ {_OPERANDS}\{{)(%r\d+), (%r\d+)", r"\1\3, \2", {"k": 70}),
    ),
    Damage(
        "a fragment of digits, registers exchanged",
        *("many_rademacher<Bf16>", rf"(mma\S+ {_OPERANDS * 2}\{{)(%r\d+), (%r\d+)", r"\1\3, \2", {"k": 70}),
    ),
    Damage(
        "another lane's sums",
        *("many_rademacher<Bf16>", r"(shfl\.sync\.bfly\.b32\s+\S+\s+\S+) %r\d+", r"\1 3", {"k": 70}),
    ),
    Damage(
        "another digit",
        *("many_rademacher<Bf16>", r"(mov\.u32\s+%r\d+), 21520;", r"\1, 21536;", {"k": 70}),
    ),
    Damage(
        "bytes of the other register",
        *("many_rademacher<Bf16>", r"(prmt\.b32\s+%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2", {"k": 70}),
    ),
    Damage("no barrier (Rademacher, many)", "many_rademacher<Bf16>", _BARRIER, "\n", {"k": 70}),
    Damage(
        "neighbours exchanged",
        FEW_GAUSSIAN.format(1, 0),
        r"cvt\.rn\.bf16x2\.f32 (\S+) (%f\d+), (%f\d+);",
        r"cvt.rn.bf16x2.f32 \1 \3, \2;",
        {"k": 1},
    ),
    Damage(
        "signs joined by and",
        FEW_RADEMACHER.format(2, 0),
        *(r"xor\.b32(\s+%r\d+, %r\d+, %r\d+);", r"and.b32\1;", {"k": 2}),
    ),
    Damage("no barrier (few)", FEW_GAUSSIAN.format(2, 0), _BARRIER, "\n", {"k": 2}),
    Damage(
        "the tag of rounding",
        *(FEW_GAUSSIAN.format(1, 0), r"(xor\.b32\s+%r\d+, %r\d+), 3;", r"\1, 4;"),
        {"k": 1, "rounding": "stochastic"},
    ),
    Damage(
        "residuals one element off",
        FEW_GAUSSIAN.format(1, 1),
        *(r"st\.global\.u16(\s+)\[(%rd\d+)\+2\]", r"st.global.u16\1[\2+4]", _COMPENSATED),
    ),
    Damage(
        "the minus side not negated",
        *("many_gaussian<Bf16>", r"neg\.f32(\s+%f\d+), (%f\d+);", r"mov.f32\1, \2;", _PAIR),
    ),
    Damage("no barrier (strided)", "strided<Bf16, Gaussian>", _BARRIER, "\n", {"k": 5, "specs": STRIDED}),
)
TRITON = (
    Damage("a multiplier of Philox", "segments_kernel", r"-766435501;", "-766435503;"),
    Damage(
        "the square root of 2",
        *("runs_kernel", r"0f3FB504F3", "0f3FB504F4", {"dtype": "fp32", "specs": STRIDED}),
    ),
    Damage(
        "sums that begin at +0",
        *("segments_kernel", r"0f80000000|-2147483648", "0", {"k": 0, "alpha": 0.75}),
        everywhere=True,
    ),
    Damage("no barrier", "segments_kernel", _BARRIER, "\n", {"dtype": "fp32", "family": "rademacher"}),
    Damage(
        "a store past the tensor's end",
        "runs_kernel",
        r"@%p\d+ (st\.global)",
        r"\1",
        {"k": 5},
        everywhere=True,
    ),
    Damage(
        "weights of the next place",
        *("segments_kernel", r"(@%p\d+ ld\.global\.\S+ \{.*?\}, \[ %rd\d+ \+) 0", r"\1 16", {"k": 1}),
    ),
)


def run_damage(driver: DamagedDriver, damage: Damage) -> Verdict:
    """ "seen" if a case that is equal turns out otherwise in the damaged kernel, else "unseen"."""
    words = [run_case(driver, damage.case).word]
    if words == ["equal"]:
        for change in damage.changes(driver.body(damage.kernel)):
            with driver.damaged(damage.kernel, change):
                words.append(run_case(driver, damage.case).word)
            if words[-1] in ("differs", "fault"):
                return Verdict("seen", f"{words[-1]}, in place {len(words) - 1} that was tried")
    return Verdict("unseen", f"without it and in each place: {', '.join(words)}")
