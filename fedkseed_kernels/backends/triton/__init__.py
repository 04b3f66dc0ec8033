"""The Triton backend: for GPUs, and on the CPU in Triton's interpreter.

Triton is imported at the first call that needs it: importing the package stays light.
"""

from __future__ import annotations

import functools
import os
import re
from importlib import util
from importlib.abc import InspectLoader
from typing import TYPE_CHECKING, Any

import torch

from fedkseed_kernels.self_test.gate import SelfTest

if TYPE_CHECKING:
    from fedkseed_kernels.operands import Operands

WRITES_FP32 = False
SELF_TEST: SelfTest | None = None  # `self_test` tests each kernel when it is first launched

INTERPRET_VARIABLE = "TRITON_INTERPRET"
# Releases that the kernels are compiled with in the tests.
OLDEST, NEWEST = (3, 6), (3, 9)

# Why it cannot be used on a GPU any more: a kernel failed its self-test there, in this process.
_failures: dict[torch.device, str] = {}


def _installed_version() -> str | None:
    """The version of the package that `import triton` would find; None if there is none.

    Distributions have several names for it (triton, triton-rocm, triton-windows), so their records are not
    asked. Its source is read, not run: importing takes a quarter of a second, and fixes for the whole process
    whether kernels are interpreted.
    """
    try:
        spec = util.find_spec("triton")
    except ValueError:  # someone's empty module of that name
        return None
    if spec is None or not isinstance(spec.loader, InspectLoader) or spec.origin is None:
        return None  # a folder named triton, of a checkout say, is not the package either
    line = re.search(r"""^__version__\s*=\s*["']([^"']*)""", spec.loader.get_source("triton") or "", re.M)
    return line.group(1) if line else f"one without a version in {spec.origin}"


@functools.cache
def _why_not_installed() -> str | None:
    known = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    version = _installed_version()
    if version is None:
        return f"the package triton is not installed; pip install 'triton>={OLDEST[0]}.{OLDEST[1]}'"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= tuple(map(int, found.groups())) <= NEWEST:
        return f"expected triton {known}, got {version}; install one of those"
    return None


def is_interpreting() -> bool:
    """Whether the kernels run on the CPU: TRITON_INTERPRET=1, set before Triton was first imported."""
    return os.environ.get(INTERPRET_VARIABLE) == "1"


def unavailable(device: torch.device | None = None) -> str | None:
    """Why it cannot be used, with what to do about it; None when it can."""
    if device is not None and device in _failures:
        return _failures[device]
    if (reason := _why_not_installed()) is not None:
        return reason
    if not is_interpreting() and not torch.cuda.is_available():
        return (
            "torch finds no GPU; on the CPU it runs only in Triton's interpreter, thousands of times slower: "
            f"set {INTERPRET_VARIABLE}=1 for that"
        )
    return None


def seed_axpy(operands: Operands, terms: Any) -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`).

    Raises:
        RuntimeError: cpu tensors, and Triton was imported before TRITON_INTERPRET=1 was set; or a kernel
            fails its self-test. Then nothing is written.
    """
    from fedkseed_kernels.backends.triton import launch, self_test

    outs = operands.outs.tensors
    if outs and outs[0].device.type == "cpu" and not launch.IS_INTERPRETED:
        raise RuntimeError(
            f"expected {INTERPRET_VARIABLE}=1 before Triton is imported: its interpreter serves cpu tensors, "
            "but Triton was there already; start Python with it set"
        )
    try:
        launch.seed_axpy(operands, terms, before=self_test.ensure)
    except self_test.SelfTestError as error:
        _failures[operands.device] = str(error)
        raise RuntimeError(f"the Triton backend cannot be used: {error}") from None
