"""The gate's loop in Triton: the kernel of gate.cu once more, with the package's device functions.

Triton's compiler would fuse products and sums: it is told not to, and every fma is written out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedkseed_kernels.backends.triton import noise

BLOCK = 512
NUM_WARPS = 4
NUM_STAGES = 3
THREADS_PER_WARP = 32
GROUPS_PER_THREAD = BLOCK // (NUM_WARPS * THREADS_PER_WARP)

group_words = noise.group_words
normal_pair = noise.normal_pair
TAG_GAUSSIAN = noise.TAG_GAUSSIAN


@triton.jit
def gate_kernel(
    out, keys, coefficients, num_seeds, stream, radius_base, one_bits, block: tl.constexpr
):  # radius_base and one_bits are arguments so that and-or stays one instruction
    group = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.uint32)
    start = tl.full((block,), -0.0, tl.float32)
    even0, odd0, even1, odd1 = start, start, start, start
    even2, odd2, even3, odd3 = start, start, start, start
    for i in range(num_seeds):
        k0 = tl.load(keys + 2 * i).to(tl.uint32, bitcast=True)
        k1 = tl.load(keys + 2 * i + 1).to(tl.uint32, bitcast=True)
        coefficient = tl.load(coefficients + i)
        x0, x1, x2, x3 = group_words(group, 0, stream.to(tl.uint32), TAG_GAUSSIAN, k0, k1)
        even, odd = normal_pair(x0, radius_base, one_bits)
        even0 = tl.fma(even, coefficient, even0)
        odd0 = tl.fma(odd, coefficient, odd0)
        even, odd = normal_pair(x1, radius_base, one_bits)
        even1 = tl.fma(even, coefficient, even1)
        odd1 = tl.fma(odd, coefficient, odd1)
        even, odd = normal_pair(x2, radius_base, one_bits)
        even2 = tl.fma(even, coefficient, even2)
        odd2 = tl.fma(odd, coefficient, odd2)
        even, odd = normal_pair(x3, radius_base, one_bits)
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
