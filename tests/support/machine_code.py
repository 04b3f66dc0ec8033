"""A disassembly whose loops and counts are known."""

from __future__ import annotations

# A search, then a loop over terms that may skip one, a side way behind the exit, and padding.
SASS = """
	.section	.text._Z13many_gaussianI4Bf16Ev10FlatLaunch,"ax",@progbits
.L_search:
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_search) ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_loop:
        /*0030*/                   LDS.128 R4, [R2] ;
        /*0040*/               @P2 BRA `(.L_skip) ;
        /*0050*/                   IMAD.WIDE.U32 R4, R4, 0x5, RZ ;
        /*0060*/                   LOP3.LUT R6, R4, R5, RZ, 0x3c, !PT ;
        /*0070*/                   I2FP.F32.S32 R5, R6 ;
        /*0080*/                   I2FP.F32.S32 R7, R6 ;
        /*0090*/                   FFMA R5, R6, R7, R8 ;
        /*00a0*/              @!P1 FFMA R9, R6, R7, R8 ;
        /*00b0*/                   BRA P3, `(.L_aside) ;
.L_skip:
        /*00c0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00d0*/               @P1 BRA `(.L_loop) ;
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/                   EXIT ;
.L_aside:
        /*0100*/                   STL [R1], R4 ;
        /*0110*/                   BRA `(.L_skip) ;
.L_padding:
        /*0120*/                   BRA `(.L_padding);
	.section	.text.straight,"ax",@progbits
        /*0000*/               @P0 EXIT ;
        /*0010*/                   I2F R5, R6 ;
        /*0020*/                   MUFU.RSQ R5, R6 ;
        /*0030*/                   F2FP.BF16.F32.PACK_AB R5, R6, R7 ;
        /*0040*/                   HFMA2.MMA R5, -RZ, RZ, 0, 0 ;
        /*0050*/                   EXIT ;
"""
# The loop over terms without its side ways.
LOOP = [
    "LDS.128",
    "BRA",
    "IMAD.WIDE.U32",
    "LOP3.LUT",
    *["I2FP.F32.S32"] * 2,
    *["FFMA"] * 2,
    "BRA",
    "UIADD3",
    "BRA",
]


def lines(*instructions: str) -> str:
    """A disassembly: instructions at consecutive addresses; what ends with a colon is a label."""
    found = []
    at = 0
    for instruction in instructions:
        if instruction.endswith(":"):
            found.append(instruction)
        else:
            found.append(f" /*{at:04x}*/ {instruction} ;")
            at += 16
    return "\n".join(found)
