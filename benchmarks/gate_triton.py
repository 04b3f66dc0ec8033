"""The gate's loop in Triton: the kernel of gate.cu once more, with the constants of csrc/include.

Triton's compiler would fuse products and sums: it is told not to, and every fma is written out.
"""

from __future__ import annotations

import re
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INCLUDE = Path(__file__).resolve().parent.parent / "csrc" / "include"
GROUP_SIZE = 8
BLOCK = 512
NUM_WARPS = 4
NUM_STAGES = 3
THREADS_PER_WARP = 32
GROUPS_PER_THREAD = BLOCK // (NUM_WARPS * THREADS_PER_WARP)


def header_constants(*names: str) -> dict[str, int | float]:
    """The numeric macros of the headers named, by their names."""
    constants: dict[str, int | float] = {}
    for name in names:
        text = (INCLUDE / name).read_text()
        for macro, value in re.findall(r"^#define (FK_\w+) (-?[0-9][^\s]*)", text, re.M):
            is_float = value.endswith("f") and ("p" in value or "." in value)
            constants[macro] = float.fromhex(value[:-1]) if is_float else int(value.rstrip("u"), 0)
    return constants


_FK = header_constants("philox4x32.h", "normal.h")


def _constant(name: str) -> tl.constexpr:
    return tl.constexpr(_FK[f"FK_{name}"])


M0 = _constant("PHILOX_M0")
M1 = _constant("PHILOX_M1")
W0 = _constant("PHILOX_W0")
W1 = _constant("PHILOX_W1")
ROUNDS = _constant("PHILOX_ROUNDS")
TAG = _constant("TAG_GAUSSIAN")
RADIUS_MASK = _constant("RADIUS_MASK")
RADIUS_CENTRE = _constant("RADIUS_CENTRE")
MANTISSA_MASK = _constant("MANTISSA_MASK")
LOG_SLOPE = _constant("LOG_SLOPE")
LOG_0 = _constant("LOG_0")
LOG_1 = _constant("LOG_1")
LOG_2 = _constant("LOG_2")
LOG_3 = _constant("LOG_3")
LOG_4 = _constant("LOG_4")
LOG_5 = _constant("LOG_5")
RSQRT_MAGIC = _constant("RSQRT_MAGIC")
SQRT_0 = _constant("SQRT_0")
SQRT_1 = _constant("SQRT_1")
SQRT_2 = _constant("SQRT_2")
ANGLE_SCALE = _constant("ANGLE_SCALE")
SIN_0 = _constant("SIN_0")
SIN_1 = _constant("SIN_1")
SIN_2 = _constant("SIN_2")
COS_0 = _constant("COS_0")
COS_1 = _constant("COS_1")
COS_2 = _constant("COS_2")
COS_3 = _constant("COS_3")
SQRT2 = _constant("SQRT2")


@triton.jit
def _multiply_wide(x, factor: tl.constexpr):
    product = x.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _normal_pair(word, radius_base, one_bits):
    u = ((word & RADIUS_MASK) | radius_base).to(tl.float32, bitcast=True) - RADIUS_CENTRE
    m = ((u.to(tl.uint32, bitcast=True) & MANTISSA_MASK) | one_bits).to(tl.float32, bitcast=True)
    e = tl.fma(u.to(tl.int32, bitcast=True).to(tl.float32), LOG_SLOPE, LOG_0)
    q = tl.fma(m, LOG_5, LOG_4)
    q = tl.fma(q, m, LOG_3)
    q = tl.fma(q, m, LOG_2)
    q = tl.fma(q, m, LOG_1)
    s = tl.fma(q, m, e)
    y = ((RSQRT_MAGIC - s.to(tl.uint32, bitcast=True)) >> 1).to(tl.float32, bitcast=True)
    a = s * y
    h = a * y
    p = tl.fma(tl.fma(h, SQRT_2, SQRT_1), h, SQRT_0)
    r = a * p
    b = word.to(tl.int32, bitcast=True).to(tl.float32) * ANGLE_SCALE
    t = b * b
    x = tl.fma(tl.fma(t, SIN_2, SIN_1), t, SIN_0) * b
    k = tl.fma(tl.fma(tl.fma(t, COS_3, COS_2), t, COS_1), t, COS_0)
    half_sin = x * k
    half_cos = tl.fma(-x, x, SQRT2)
    g = r * half_sin
    return tl.fma(-g, half_sin, r), g * half_cos


@triton.jit
def gate_kernel(
    out, keys, coefficients, num_seeds, stream, radius_base, one_bits, block: tl.constexpr
):  # radius_base and one_bits are arguments so that and-or stays one instruction
    group = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.uint32)
    zero = group ^ group
    start = tl.full((block,), -0.0, tl.float32)
    even0, odd0, even1, odd1 = start, start, start, start
    even2, odd2, even3, odd3 = start, start, start, start
    for i in range(num_seeds):
        k0 = tl.load(keys + 2 * i).to(tl.uint32, bitcast=True)
        k1 = tl.load(keys + 2 * i + 1).to(tl.uint32, bitcast=True)
        coefficient = tl.load(coefficients + i)
        x0 = group
        x1 = zero + stream.to(tl.uint32)
        x2 = zero
        x3 = zero + TAG
        for r in tl.static_range(ROUNDS):
            high0, low0 = _multiply_wide(x0, M0)
            high1, low1 = _multiply_wide(x2, M1)
            x0 = high1 ^ x1 ^ (k0 + (r * W0) % (1 << 32))
            x2 = high0 ^ x3 ^ (k1 + (r * W1) % (1 << 32))
            x1 = low1
            x3 = low0
        even, odd = _normal_pair(x0, radius_base, one_bits)
        even0 = tl.fma(even, coefficient, even0)
        odd0 = tl.fma(odd, coefficient, odd0)
        even, odd = _normal_pair(x1, radius_base, one_bits)
        even1 = tl.fma(even, coefficient, even1)
        odd1 = tl.fma(odd, coefficient, odd1)
        even, odd = _normal_pair(x2, radius_base, one_bits)
        even2 = tl.fma(even, coefficient, even2)
        odd2 = tl.fma(odd, coefficient, odd2)
        even, odd = _normal_pair(x3, radius_base, one_bits)
        even3 = tl.fma(even, coefficient, even3)
        odd3 = tl.fma(odd, coefficient, odd3)
    # [block, j >> 1, j & 1, even or odd]: word j's pair stands at 2 j, 2 j + 1
    even = tl.join(tl.join(even0, even2), tl.join(even1, even3))
    odd = tl.join(tl.join(odd0, odd2), tl.join(odd1, odd3))
    values = tl.reshape(tl.join(even, odd), (block, 8))
    tl.store(out + group[:, None] * 8 + tl.arange(0, 8)[None, :], values)


def compile_cubin(arch: int) -> bytes:
    """The kernel's machine code for a GPU architecture (90 for sm_90). Needs no GPU."""
    signature = {
        "out": "*fp32",
        "keys": "*i32",
        "coefficients": "*fp32",
        "num_seeds": "i32",
        "stream": "i32",
        "radius_base": "i32",
        "one_bits": "i32",
        "block": "constexpr",
    }
    source = ASTSource(fn=gate_kernel, signature=signature, constexprs={"block": BLOCK})
    target = GPUTarget("cuda", arch, THREADS_PER_WARP)
    options = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES, "enable_fp_fusion": False}
    cubin: bytes = triton.compile(source, target=target, options=options).asm["cubin"]
    return cubin
