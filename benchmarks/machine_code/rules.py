"""How to read each kernel of csrc/cuda: names of its rows, what makes an element, what memory one moves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.machine_code import few_terms, paths
from benchmarks.machine_code.few_terms import ITEMSIZES
from benchmarks.machine_code.tools import ToolError
from benchmarks.machine_code.ways import Landmark

_INTEGER_TO_FLOAT = re.compile(r"I2FP?(\.F32\.S32|\.S32)?$")  # two a word, which gives two normals
_FMA = re.compile(r"[FD]FMA")  # of a short Rademacher kernel: alpha w + acc, and Rule.num_fmas says what else
_PHILOX = re.compile(r"IMAD\.WIDE")  # 16 to 20 a call
_MATRIX = re.compile(r"IMMA")  # of 16 elements and 32 terms, by 32 threads
_ELEMENTS_OF_MATRIX = 16


@dataclass(frozen=True)
class Rule:
    """How to read one kernel, or one way through it.

    num_terms 0: a loop over any number of terms; the count is then per element and term.
    num_fmas: of a short Rademacher kernel without landmarks, fma that an element takes (`num_fmas_of`).
    elements_of_turn: of a loop over Rademacher terms, elements times terms of a turn; 0 if they are summed
    as matrix products. Of a way, elements of a turn.
    landmarks: of a way through a loop that serves several cases, what a turn goes past.
    """

    name: str
    family: str
    num_terms: int
    bytes_per_element: int
    num_fmas: int = 1
    elements_of_turn: int = 8
    landmarks: tuple[Landmark, ...] = ()

    @property
    def makes(self) -> re.Pattern[str]:
        """The opcode that is there once for each element of the hot path."""
        if self.family == "gaussian":
            return _INTEGER_TO_FLOAT
        if not self.is_loop:
            return _FMA
        return _PHILOX if self.elements_of_turn else _MATRIX

    @property
    def is_loop(self) -> bool:
        return self.num_terms == 0

    @property
    def is_matrix_product(self) -> bool:
        return self.makes is _MATRIX

    @property
    def counts_fmas(self) -> bool:
        return self.makes is _FMA

    def num_elements(self, num_made: int) -> float:
        """Elements (times terms, in a loop) of a hot path that makes so many.

        Raises:
            ToolError: a turn of the loop makes no noise.
        """
        if self.family == "gaussian":
            return num_made / max(self.num_terms, 1)
        if not self.is_loop:
            return num_made / self.num_fmas
        if not self.elements_of_turn:
            return num_made * _ELEMENTS_OF_MATRIX
        if num_made < paths.PHILOX_PRODUCTS:
            raise ToolError(f"expected Philox in a turn of the loop of {self.name}, got {num_made} products")
        return self.elements_of_turn


def num_fmas_of(dtype: str, num_sides: int, is_compensated: bool) -> int:
    """alpha w + acc on each side, and w itself where it is a compensated fp16 weight."""
    return num_sides + (is_compensated and dtype == "fp16")


_CUDA_NAME = re.compile(r"(\w+)<(\w+)(?:, (\w+))?(?:, (\d+))?(?:, ([01]))?>$")


def cuda_rules(name: str) -> Iterator[Rule]:
    """The rules of a kernel of csrc/cuda by its readable name; none for the test-only ones, without a dtype.

    Raises:
        ToolError: the name is none that this tool knows.
    """
    found = _CUDA_NAME.match(name)
    if found is None:
        return
    kernel, storage, family, num_terms, compensated = found.groups()
    dtype = storage.lower()
    if kernel in ("many_gaussian", "many_rademacher") and family is None:
        family = kernel.removeprefix("many_")
    elif kernel not in ("few_terms", "strided") or family is None:
        raise ToolError(
            f"expected a kernel that benchmarks/machine_code/rules.py has a rule for, got {name}; add one"
        )
    family = family.lower()
    terms = int(num_terms or 0)
    label = f"cuda {family} {dtype}, " + (f"K = {terms}" if terms else "K loop")
    if kernel != "few_terms":
        suffix = ", runs" if kernel == "strided" else ""
        of_turn = 0 if kernel == "many_rademacher" else 8
        yield Rule(label + suffix, family, terms, 2 * ITEMSIZES[dtype], elements_of_turn=of_turn)
        return
    for way in few_terms.ways(dtype, terms, compensated == "1"):
        yield Rule(
            f"{label}, {way.name}".removesuffix(", "),
            family,
            terms,
            way.bytes_per_element(dtype),
            elements_of_turn=way.num_elements,
            landmarks=few_terms.landmarks(dtype, family, terms, way),
        )
