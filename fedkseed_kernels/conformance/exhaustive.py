"""The Gaussian transform of all 2^32 words on every instruction set, against the scalar header and NumPy.

One set of digests, of all 256 blocks of 2^24 words, is package data (golden/normal_digests.json), and every
instruction set, the scalar header's included, must give it; where a block's digest differs, NumPy is run to
find the first word that does. 2^24 spread words are compared with NumPy bit by bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.contract import reference

SPREAD_NUM_WORDS = 1 << 24
SPREAD_STEP = 257  # the spread words run over the whole range and meet every value of the 17 low bits
SPREAD_FIRST = 0x5EED
_WORDS_AT_ONCE = 1 << 20

Item = TypeVar("Item")
Value = TypeVar("Value")


class Outcome(NamedTuple):
    """What came out for one instruction set: `difference` is None where everything is equal."""

    isa: str
    check: str
    difference: str | None
    detail: str


def _on_all_cores(
    work: Callable[[Item], Value], items: Iterable[Item], total: int, label: str
) -> Iterator[Value]:
    """work(item) in order, on a thread a core (the native library runs without the GIL), with progress."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from _with_progress(pool.map(work, items), total, label)


def _with_progress(values: Iterator[Value], total: int, label: str) -> Iterator[Value]:
    try:
        from tqdm import tqdm
    except ImportError:
        for done, value in enumerate(values, start=1):
            if done % max(1, total // 16) == 0:
                print(f"  {label}: {done} of {total}", flush=True)
            yield value
    else:
        yield from tqdm(values, total=total, desc=label, unit="block", leave=False)


def _describe(
    words: NDArray[np.uint32], got: NDArray[np.float32], expected: NDArray[np.float32]
) -> str | None:
    differs = (got.view(np.uint32) != expected.view(np.uint32)).any(axis=1)
    if not differs.any():
        return None
    first = int(np.argmax(differs))
    bits = f"got {golden.to_hex(got[first])}, NumPy gives {golden.to_hex(expected[first])}"
    return f"word {int(words[first]):08x}: {bits}"


def _reference_normals(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    return np.stack(reference.normals_from_words(words), axis=-1)


def _first_difference(first: int, count: int, isa: str) -> str:
    for start in range(first, first + count, _WORDS_AT_ONCE):
        stop = min(start + _WORDS_AT_ONCE, first + count)
        words = np.arange(start, stop, dtype=np.uint64).astype(np.uint32)
        found = _describe(words, native_cpu.normal_from_words(words, isa), _reference_normals(words))
        if found:
            return found
    return "its words are equal one by one: the digest itself is computed wrongly, or its golden value is"


def all_words(isa: str) -> Outcome:
    """All 2^32 words by blocks."""
    content = golden.load(golden.DIGESTS_FILE)
    block_words, expected = content["block_words"], content["digests"]

    def digest(block: int) -> int:
        return native_cpu.normal_digest(block * block_words, block_words, isa)

    began = time.perf_counter()
    digests = list(_on_all_cores(digest, range(len(expected)), len(expected), f"2^32 words, {isa}"))
    seconds = time.perf_counter() - began
    different = [block for block, got in enumerate(digests) if got != int(expected[block], 16)]
    detail = f"{len(expected)} blocks of {block_words} words in {seconds:.1f} s"
    difference = None
    if different:
        first = different[0]
        where = _first_difference(first * block_words, block_words, isa)
        difference = f"{len(different)} blocks differ, first block {first}: {where}"
    return Outcome(isa, "all 2^32 words give the golden digests", difference, detail)


def spread_words(isas: list[str]) -> Iterator[Outcome]:
    """2^24 spread words, every bit beside NumPy's, computed here once for all instruction sets."""

    def compare(start: int) -> dict[str, str | None]:
        index = np.arange(start, start + _WORDS_AT_ONCE, dtype=np.uint64)
        words = (index * np.uint64(SPREAD_STEP) + np.uint64(SPREAD_FIRST)).astype(np.uint32)
        expected = _reference_normals(words)
        return {isa: _describe(words, native_cpu.normal_from_words(words, isa), expected) for isa in isas}

    starts = range(0, SPREAD_NUM_WORDS, _WORDS_AT_ONCE)
    began = time.perf_counter()
    found = list(_on_all_cores(compare, starts, len(starts), "2^24 words, NumPy"))
    seconds = time.perf_counter() - began
    for isa in isas:
        difference = next((part[isa] for part in found if part[isa]), None)
        detail = f"words {SPREAD_STEP} i + {SPREAD_FIRST} mod 2^32, {seconds:.1f} s for all instruction sets"
        yield Outcome(isa, "2^24 spread words equal NumPy's", difference, detail)


def run(isas: list[str]) -> Iterator[Outcome]:
    """Both comparisons for the given instruction sets of the native library."""
    for isa in isas:
        yield all_words(isa)
    yield from spread_words(isas)
