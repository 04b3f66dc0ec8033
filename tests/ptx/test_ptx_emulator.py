"""The PTX emulator, held to exact rationals, Python's integers, CUTLASS's layouts and faulty programs."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ptx import arithmetic, machine
from ptx.arithmetic import F32, F64, I32, U32, U64, Array
from ptx.kernel import Kernel
from ptx.memory import READ, WRITE, Memory
from ptx.parser import FaultError, UnknownPtxError, sources_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
Random = np.random.Generator


@pytest.fixture
def generator() -> Random:
    return np.random.default_rng(5)


def words(generator: Random, count: int) -> Array:
    return generator.integers(0, 1 << 32, count, dtype=U64).astype(U32)


def is_nearest(exact: Fraction, r: Any, kind: Any) -> bool:
    """Whether r is the nearest of its kind, the even one of two; infinite half a place past the last."""
    if not np.isfinite(r):
        top = Fraction(float(np.finfo(kind).max))
        place = top - Fraction(float(np.nextafter(np.finfo(kind).max, kind(0))))
        return abs(exact) >= top + place / 2 and (exact > 0) == (r > 0)
    off = abs(exact - Fraction(float(r)))
    for way in (-np.inf, np.inf):
        other = np.nextafter(kind(r), kind(way))
        if not np.isfinite(other):
            continue
        further = abs(exact - Fraction(float(other)))
        is_even = int(kind(r).view(U32 if kind is F32 else U64)) % 2 == 0
        if further < off or (further == off and not is_even):
            return False
    return True


@pytest.mark.parametrize("bits", [32, 64])
def test_fma_is_rounded_once(bits: int, generator: Random) -> None:
    kind, unsigned, fma, mantissa = {
        32: (F32, U32, arithmetic.fma32, 23),
        64: (F64, U64, arithmetic.fma64, 52),
    }[bits]
    bias, count = (1 << bits - mantissa - 2) - 1, 2000

    def numbers(spread: int) -> Array:
        exponent = generator.integers(max(0, bias - spread), bias + spread + 1, count)
        exponent = np.clip(exponent, 0, 2 * bias)
        fraction = generator.integers(0, 1 << 62, count) & ((1 << mantissa) - 1)
        fraction &= ~((1 << generator.integers(0, mantissa, count)) - 1)  # short ones make ties
        sign = generator.integers(0, 2, count).astype(U64) << U64(bits - 1)
        return (sign | exponent.astype(U64) << U64(mantissa) | fraction.astype(U64)).astype(unsigned)

    for spread in (3, 30, bias):
        a, b, c = numbers(spread), numbers(spread), numbers(spread)
        if spread == 30:  # sums that nearly vanish
            c[: count // 2] = (-(a.view(kind) * b.view(kind))).view(unsigned)[: count // 2]
            c = np.where(np.isfinite(c.view(kind)), c, unsigned(0))
        results = fma(a, b, c).view(kind)
        for x, y, z, got in zip(a.view(kind), b.view(kind), c.view(kind), results, strict=True):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            assert is_nearest(exact, got, kind), (x, y, z, got)


def test_bits_are_chosen_and_joined(generator: Random) -> None:
    a, b, c = (words(generator, 500) for _ in range(3))
    lists = a.tolist(), b.tolist(), c.tolist()
    for table in (0xEA, 0x96, 0x1B, 0xF8):
        want = [
            sum((table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i for i in range(32))
            for x, y, z in zip(*lists, strict=True)
        ]
        assert arithmetic.lop3(a, b, c, table).tolist() == want

    def permuted(x: int, y: int, selector: int) -> int:
        both, out = x | y << 32, 0
        for i in range(4):
            byte = both >> 8 * (selector >> 4 * i & 7) & 255
            out |= (255 * (byte >> 7) if selector >> 4 * i & 8 else byte) << 8 * i
        return out

    assert arithmetic.prmt(a, b, c).tolist() == [permuted(*three) for three in zip(*lists, strict=True)]


def test_bit_fields(generator: Random) -> None:
    a, low = words(generator, 500), generator.integers(0, 1 << 62, 500, dtype=U64)
    places, lengths = (generator.integers(0, 40, 500).astype(U32) for _ in range(2))

    def field(x: int, place: int, length: int, signed: bool) -> int:
        top = x >> min(place + length - 1, 31) & 1 if length and signed else 0
        bits = [x >> place + i & 1 if place + i < 32 else top for i in range(length)]
        out = sum(bit << i for i, bit in enumerate(bits[:32]))
        return (out | -top << min(length, 32)) & 0xFFFFFFFF

    arguments = list(zip(a.tolist(), places.tolist(), lengths.tolist(), strict=True))
    for signed in (False, True):
        got = arithmetic.bfe(a, places, lengths, 32, signed).tolist()
        assert got == [field(*three, signed) for three in arguments]
    at, count = (generator.integers(0, 65, 500).astype(U32) % n for n in (64, 65))
    want = []
    for x, y, place, length in zip(a.tolist(), low.tolist(), at.tolist(), count.tolist(), strict=True):
        mask = ((1 << min(length, 64 - place)) - 1) << place
        want.append((y & ~mask | x << place & mask) & (1 << 64) - 1)
    assert arithmetic.bfi(a.astype(U64), low, at, count, 64).tolist() == want


def test_division_is_towards_zero(generator: Random) -> None:
    a = words(generator, 500).view(I32)
    b = words(generator, 500).view(I32) >> generator.integers(0, 30, 500).astype(I32)
    b = np.where(b == 0, I32(-7), b)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    quotients = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]
    assert arithmetic.divide(a, b, False).tolist() == quotients
    remainders = [x - q * y for (x, y), q in zip(pairs, quotients, strict=True)]
    assert arithmetic.divide(a, b, True).tolist() == remainders


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_narrowing_is_to_nearest_even(kind: str, generator: Random) -> None:
    narrow, widen = {
        "bf16": (arithmetic.bf16_from_f32, lambda h: (h.astype(U32) << U32(16)).view(F32)),
        "fp16": (arithmetic.f16_from_f32, lambda h: h.view(np.float16).astype(F32)),
    }[kind]
    ties = (generator.integers(0, 1 << 16, 400) << 16 | 0x8000).astype(U32)
    x = np.concatenate([words(generator, 4000), ties, np.arange(0x33000000, 0x47900000, 65521, dtype=U32)])
    got = narrow(x)
    for bits, value, r in zip(got.tolist(), x.view(F32).tolist(), widen(got).tolist(), strict=True):
        if value != value:
            assert bits & 0x7FFF == 0x7FFF
            continue
        if not np.isfinite(r) or not np.isfinite(value):
            assert (r > 0) == (value > 0)
            continue
        for other in ((bits - 1) & 0xFFFF, (bits + 1) & 0xFFFF):
            w = float(widen(np.array([other], np.uint16))[0])
            if (other ^ bits) & 0x8000 or not np.isfinite(w):
                continue
            off, far = (abs(Fraction(value) - Fraction(to)) for to in (r, w))
            assert off < far or (off == far and bits % 2 == 0), (value, r, w)


def test_fragments_are_those_of_cutlass() -> None:
    """NVIDIA/cutlass, include/cute/atom/mma_traits_sm80.hpp, SM80_16x8x32_S32S8S8S32_TN: its strides lead
    from (lane % 4, lane / 4), (byte, register, ...) to an index."""
    for lane in range(32):
        t, g = lane % 4, lane // 4
        for byte in range(4):
            for r in range(4):
                index = 64 * t + g + 16 * byte + 8 * (r % 2) + 256 * (r // 2)  # row + 16 column
                assert arithmetic.mma_a(lane, r, byte) == (index % 16, index // 16)
            for r in range(2):
                index = 32 * t + g + 8 * byte + 128 * r  # column + 8 row
                assert arithmetic.mma_b(lane, r, byte) == (index // 8, index % 8)
        for r in range(4):
            index = 32 * t + g + 16 * (r % 2) + 8 * (r // 2)  # row + 16 column
            assert arithmetic.mma_c(lane, r) == (index % 16, index // 16)


@pytest.mark.parametrize("is_extreme", [False, True])
def test_products_of_matrices(is_extreme: bool, generator: Random) -> None:
    left, right = generator.integers(0, 256, (2, 16, 32)), generator.integers(-128, 128, (2, 32, 8))
    if is_extreme:
        left[:], right[:] = 255, -128
    add = generator.integers(-(1 << 31), 1 << 31, (2, 16, 8))
    a, b, c = (np.zeros((registers, 64), U32) for registers in (4, 2, 4))
    for thread in range(64):
        warp, lane = divmod(thread, 32)
        for r in range(4):
            for byte in range(4):
                a[r, thread] |= U32(int(left[warp][arithmetic.mma_a(lane, r, byte)]) << 8 * byte)
                if r < 2:
                    b[r, thread] |= U32((int(right[warp][arithmetic.mma_b(lane, r, byte)]) & 255) << 8 * byte)
            c[r, thread] = int(add[warp][arithmetic.mma_c(lane, r)]) & 0xFFFFFFFF
    results, want = arithmetic.mma_u8s8(list(a), list(b), list(c)), left @ right + add
    for thread in range(64):
        warp, lane = divmod(thread, 32)
        for r in range(4):
            assert int(results[r][thread]) == int(want[warp][arithmetic.mma_c(lane, r)]) & 0xFFFFFFFF


# --- programs

HEAD = """.version 9.0
.target sm_90
.visible .entry k(.param .u64 p)
{
.reg .pred %p<9>;
.reg .b32 %r<30>;
.reg .b64 %rd<9>;
"""
# %rd1: the address of the thread's own word of the output; %r1: the thread.
START = """ld.param.u64 %rd0, [p];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd1, %r1, 4;
add.s64 %rd1, %rd0, %rd1;
"""
SHARED = ".shared .align 16 .b8 s[256];\n"
THREADS = 64


def run(body: str) -> list[int]:
    """The output's words after a block of threads ran a body."""
    memory = Memory(1 << 16)
    raw = memory.allocate(THREADS * 4, READ | WRITE)
    (source,) = sources_of(HEAD + SHARED + START + body + "\nret;\n}\n").values()
    address = int(raw.ctypes.data).to_bytes(8, "little")
    machine.launch(Kernel(source), memory, 1, THREADS, address)
    return list(raw.view(U32).tolist())


LOOP = """mov.u32 %r2, 0; mov.u32 %r3, 0;
$L: setp.gt.u32 %p1, %r2, %r1;
@%p1 bra $E;
add.s32 %r3, %r3, %r2; add.s32 %r2, %r2, 1; bra.uni $L;
$E: st.global.u32 [%rd1], %r3;"""
SWAP = "shfl.sync.bfly.b32 %r2|%p1, %r1, 5, 31, -1; st.global.u32 [%rd1], %r2;"
# Each thread writes a word of shared memory, and reads the word of another.
WRITE_OWN = "shl.b32 %r2, %r1, 2; mov.u32 %r3, s; add.s32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1;"
READ_OTHER = "xor.b32 %r5, %r2, 252; add.s32 %r5, %r3, %r5; ld.shared.u32 %r6, [%r5];"
BARRIER = "bar.sync 0;"
OTHERS_OUTPUT = "xor.b32 %r2, %r1, 1; mul.wide.u32 %rd2, %r2, 4; add.s64 %rd2, %rd0, %rd2;"
FIRST_ONLY = "setp.ne.u32 %p1, %r1, 0; @%p1 bra $A;"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (LOOP, lambda thread: thread * (thread + 1) // 2),
        (SWAP, lambda thread: thread ^ 5),
        (f"{WRITE_OWN} {BARRIER} {READ_OTHER} st.global.u32 [%rd1], %r6;", lambda thread: thread ^ 63),
    ],
    ids=["loop", "shuffle", "shared memory"],
)
def test_a_program(body: str, word: Callable[[int], int]) -> None:
    assert run(body) == [word(thread) for thread in range(THREADS)]


ALL = 0xFFFFFFFF
BIG = 3_000_000_000  # negative as a signed number


def selected(test: str, *numbers: str) -> str:
    """Numbers in %r3 and so on, and 1 in %r2 where a test is true, else 0."""
    given = " ".join(f"mov.b32 %r{i}, {number};" for i, number in enumerate(numbers, 3))
    return f"{given} setp.{test}; selp.b32 %r2, 1, 0, %p1;"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("shl.b32 %r2, %r1, %r1;", lambda thread: thread << thread & ALL if thread < 32 else 0),
        (f"mov.u32 %r3, {BIG}; shr.u32 %r2, %r3, %r1;", lambda thread: BIG >> thread),
        (f"mov.u32 %r3, {BIG}; shr.s32 %r2, %r3, %r1;", lambda thread: BIG - (1 << 32) >> thread & ALL),
        (
            f"mov.u32 %r3, {BIG}; shf.l.wrap.b32 %r2, %r3, %r1, %r1;",
            lambda thread: (BIG | thread << 32) << thread % 32 >> 32 & ALL,
        ),
        (f"mov.u32 %r3, {BIG}; mul.hi.u32 %r2, %r3, %r3;", lambda thread: BIG**2 >> 32),
        (f"mov.u32 %r3, {BIG}; mul.hi.s32 %r2, %r3, %r3;", lambda thread: (BIG - (1 << 32)) ** 2 >> 32),
        (
            "mov.u32 %r2, 1; setp.lt.u32 %p1, %r1, 8; @!%p1 bra $A; mov.u32 %r2, 2;"
            "$A: @!%p1 add.s32 %r2, %r2, 4;",
            lambda thread: 2 if thread < 8 else 5,
        ),
        ("shfl.sync.idx.b32 %r2|%p1, %r1, 5, 31, -1;", lambda thread: thread // 32 * 32 + 5),
        (
            f"{WRITE_OWN} st.shared.u32 [%r4], %r2; ld.shared.s8 %r2, [%r4];",
            lambda thread: (thread * 4 + 128) % 256 - 128 & ALL,
        ),
        ("mov.b32 %r3, 0f7F800000; sub.rn.f32 %r2, %r3, %r3;", lambda thread: 0x7FFFFFFF),
        (selected("ne.f32 %p1, %r3, %r4", "0f7FC00000", "0f3F800000"), lambda thread: 0),
        (selected("neu.f32 %p1, %r3, %r4", "0f7FC00000", "0f3F800000"), lambda thread: 1),
        (selected("ltu.f32 %p1, %r3, %r4", "0f3F800000", "0f7FC00000"), lambda thread: 1),
        (selected("eq.f32 %p1, %r3, %r4", "0f80000000", "0f00000000"), lambda thread: 1),
        (selected("lt.u32 %p1, %r3, %r4", f"{BIG}", "1"), lambda thread: 0),
        (selected("lt.s32 %p1, %r3, %r4", f"{BIG}", "1"), lambda thread: 1),
    ],
)
def test_an_instruction(body: str, word: Callable[[int], int]) -> None:
    assert run(f"{body} st.global.u32 [%rd1], %r2;") == [word(thread) for thread in range(THREADS)]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (f"{WRITE_OWN} {READ_OTHER}", "race, read of another thread's write"),
        (f"{WRITE_OWN} {BARRIER} {READ_OTHER} st.shared.u32 [%r4], %r1;", "race, write of a byte"),
        # The kind that a flag makes: a thread writes it after the last barrier, the others read it.
        (f"{BARRIER} {FIRST_ONLY} st.shared.u32 [s], %r1; $A: ld.shared.u32 %r6, [s];", "race, read of"),
        (f"ld.shared.u32 %r6, [s]; {FIRST_ONLY} st.shared.u32 [s], %r1; $A: mov.u32 %r2, 0;", "race, write"),
        (f"{FIRST_ONLY} st.shared.u32 [s], %r1; $A: atom.shared.or.b32 %r2, [s], 1;", "race, atomic"),
        ("atom.shared.or.b32 %r2, [s], 1; ld.shared.u32 %r6, [s];", "race, read of"),
        # The same byte, by accesses of unlike sizes.
        (f"{FIRST_ONLY} st.shared.v4.u32 [s], {{%r1, %r1, %r1, %r1}}; $A: ld.shared.u8 %r6, [s+13];", "race"),
        ("st.shared.u32 [s], %r1;", "two threads write at once"),
        ("ld.shared.u32 %r2, [s+256];", "outside"),
        ("st.global.v2.u32 [%rd1], {%r1, %r1};", "misaligned"),
        ("st.global.u32 [%rd0], %r1;", "two threads write"),
        ("ld.global.u32 %r2, [%rd1+256];", "outside of memory"),
        ("ld.global.u32 %r2, [%rd0+-4];", "outside of memory"),
        (f"st.global.u32 [%rd1], %r1; {OTHERS_OUTPUT} ld.global.u32 %r3, [%rd2];", "another thread wrote"),
        (f"{OTHERS_OUTPUT} ld.global.u32 %r3, [%rd2]; st.global.u32 [%rd1], %r1;", "another thread read"),
        (f"{OTHERS_OUTPUT} ld.global.u16 %r3, [%rd2+2]; st.global.u32 [%rd1], %r1;", "another thread read"),
        ("atom.global.add.u32 %r2, [%rd0], 1; ld.global.u32 %r3, [%rd0];", "another thread updates"),
        ("atom.global.add.u32 %r2, [%rd0], 1; st.global.u32 [%rd1], %r1;", "another thread updates"),
        (f"{FIRST_ONLY} st.global.u32 [%rd0], %r1; $A: atom.global.add.u32 %r2, [%rd0], 1;", "race, atomic"),
        (f"{FIRST_ONLY} bar.sync 0; bra.uni $B; $A: bar.sync 0; $B: mov.u32 %r2, 0;", "different barriers"),
        (f"{FIRST_ONLY} {SWAP} $A: mov.u32 %r2, 0;", "part of a warp"),
    ],
)
def test_a_fault_is_found(body: str, what: str) -> None:
    with pytest.raises(FaultError, match=what):
        run(body)


def test_an_access_that_begins_inside_and_ends_outside_is_found() -> None:
    memory = Memory(1 << 16)
    address = np.array([memory.allocate(6, READ | WRITE).ctypes.data], U64)
    memory.begin_launch()
    one = np.array([1], I32)
    for size in (2, 4):
        memory.load(address, size, 1, one, "here")
    for count, size in ((1, 8), (2, 4)):
        with pytest.raises(FaultError, match="outside of memory"):
            memory.load(address, size, count, one, "here")
        with pytest.raises(FaultError, match="outside of memory"):
            memory.store(address, size, [one.astype(U64)] * count, one, "here")


@pytest.mark.parametrize(
    "text",
    [
        "sqrt.rn.f32 %r2, %r1;",
        "add.rn.ftz.f32 %r2, %r1, %r1;",
        "fma.rn.f16x2 %r2, %r1, %r1, %r1;",
        "fma.rn.ftz.f32x2 %rd2, %rd1, %rd1, %rd1;",
        "ld.volatile.global.u32 %r2, [%rd1];",
        "ld.u32 %r2, [%rd1];",
        "bar.warp.sync -1;",
        "atom.global.add.f32 %r2, [%rd1], %r1;",
        "cvt.rz.u32.f32 %r2, %r1;",
        "mov.u32 %r2, %clock;",
        "setp.lo.s32 %p1, %r1, %r1;",
    ],
)
def test_what_is_not_known_is_refused_even_where_it_never_runs(text: str) -> None:
    with pytest.raises(UnknownPtxError):
        run(f"bra.uni $E; {text} $E: mov.u32 %r2, 0;")


@pytest.mark.parametrize(
    ("operation", "results"),
    [
        ("add.rn.f32x2 %rd3, %rd2, %rd4", (1.5, -1.0)),
        ("mul.rn.f32x2 %rd3, %rd2, %rd4", (0.5, 0.25)),
        ("fma.rn.f32x2 %rd3, %rd2, %rd4, %rd2", (1.0, -0.25)),
    ],
)
def test_packed_numbers(operation: str, results: tuple[float, float]) -> None:
    first, second = "{0f3F000000, 0fBF000000}", "{0f3F800000, 0fBF000000}"  # (0.5, -0.5), (1, -0.5)
    body = f"mov.b64 %rd2, {first}; mov.b64 %rd4, {second}; {operation}; mov.b64 {{%r2, %r3}}, %rd3;"
    for register, result in zip(("%r2", "%r3"), results, strict=True):
        words = run(f"{body} st.global.u32 [%rd1], {register};")
        assert np.array(words, U32).view(F32).tolist() == [result] * THREADS


def test_registers_and_shared_memory_begin_as_noise() -> None:
    assert len(set(run("st.global.u32 [%rd1], %r7;"))) > THREADS // 2
    assert (
        len(set(run(f"{WRITE_OWN.partition('st.')[0]} ld.shared.u32 %r6, [%r4]; st.global.u32 [%rd1], %r6;")))
        > 1
    )
    assert run("mov.u32 %r9, %r8; sub.s32 %r9, %r9, %r7; st.global.u32 [%rd1], %r9;") != [0] * THREADS


def test_what_may_be_contracted_is_noted() -> None:
    body = HEAD + "mul.f32 %r2, %r3, %r4; add.rn.f32 %r2, %r2, %r4;\nret;\n}\n"
    (source,) = sources_of(body).values()
    assert Kernel(source).notes == {"mul.f32 without .rn": 1}


def test_the_digest_knows_the_code_alone() -> None:
    def digest(text: str) -> str:
        (source,) = sources_of(text).values()
        return source.digest

    text = HEAD + "mov.u32 %r2, 1;\nret;\n}\n"
    assert digest(text) == digest(text.replace("sm_90", "sm_80").replace("mov", "// a comment\n\tmov"))
    assert digest(text) != digest(text.replace(", 1;", ", 2;"))
