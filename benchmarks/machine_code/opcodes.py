"""The instructions of sm_80, sm_90 and sm_100: what kind each is, and where control goes after it."""

from __future__ import annotations

from enum import Enum

from benchmarks.machine_code.tools import ToolError


class Flow(Enum):
    """Where control goes after a control instruction."""

    ON = "to the next instruction"
    JUMP = "to one of its labels"
    CALL = "to a label of its function for good, or to a subroutine and back to the next instruction"
    END = "out of the function"


#: Every control instruction that nvcc and Triton make of the kernels. BSSY names where the threads of a warp
#: meet again, BSYNC waits for them there, BREAK leaves the waiting ones: none of them jumps.
CONTROL = {
    "BAR": Flow.ON,
    "BRA": Flow.JUMP,
    "BREAK": Flow.ON,
    "BRX": Flow.JUMP,
    "BSSY": Flow.ON,
    "BSYNC": Flow.ON,
    "CALL": Flow.CALL,
    "EXIT": Flow.END,
    "NOP": Flow.ON,
    "RET": Flow.END,
    "WARPSYNC": Flow.ON,
    "YIELD": Flow.ON,
}

#: Kinds of all other instructions, by the beginnings of their opcodes; the first that fits counts.
CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("move", ("HFMA2.MMA", "MOV", "CS2R", "S2R", "P2R", "R2P", "PLOP3", "SHFL", "VOTE")),
    ("conversion", ("I2F", "F2F", "F2I", "HADD2.F32")),
    ("FMA", ("FFMA", "DFMA", "HFMA2")),
    ("matrix", ("IMMA",)),
    (
        "other float",
        ("FADD", "FMUL", "FSEL", "FSET", "FMNMX", "FCHK", "MUFU", "DADD", "DMUL", "DSET", "HADD2"),
    ),
    ("uniform", ("U", "R2UR", "S2UR", "REDUX", "CREDUX")),
    ("memory", ("LD", "ST", "ATOM", "RED", "CCTL", "MEMBAR")),
    (
        "integer",
        ("I", "LOP", "SHF", "PRMT", "LEA", "SEL", "VI", "POPC", "FLO", "BMSK", "SGXT", "BREV", "VABS"),
    ),
)


def base(opcode: str) -> str:
    """An opcode without its modifiers."""
    return opcode.partition(".")[0]


def classify(opcode: str) -> str:
    """The kind of an instruction, a name of CLASSES.

    Raises:
        ToolError: an instruction that stands neither in CLASSES nor in CONTROL. It could be a jump.
    """
    if base(opcode) in CONTROL:
        return "control"
    for name, beginnings in CLASSES:
        if opcode.startswith(beginnings):
            return name
    raise ToolError(
        f"expected an instruction that benchmarks/machine_code/opcodes.py knows, got {opcode}; "
        "add it there: to CONTROL if it may change where control goes, else to CLASSES"
    )


def is_philox(opcode: str) -> bool:
    """A 64-bit product of 32-bit words, which Philox is made of."""
    return opcode.startswith("IMAD.WIDE")
