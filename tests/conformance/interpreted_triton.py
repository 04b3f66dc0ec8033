"""The Triton kernels in Triton's interpreter, loaded beside the compiled ones of the same process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedkseed_kernels import dispatch, triton_backend

PACKAGE = "fedkseed_kernels.triton"


def _take_modules() -> dict[str, object]:
    names = [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def interpreted(source: Path | None = None) -> Iterator[None]:
    """Have FEDKSEED_BACKEND=triton serve cpu tensors by the interpreter within a block.

    Triton decides when a kernel is defined: its modules are imported anew. source: a folder to take them from
    instead of the package's own (a damaged copy).
    """
    before = _take_modules()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(triton_backend.INTERPRET_VARIABLE, "1")
        try:
            package = importlib.import_module(PACKAGE)
            if source is not None:
                package.__path__[:] = [str(source)]
            launch = importlib.import_module(f"{PACKAGE}.launch")
            assert launch.IS_INTERPRETED
            with dispatch.backend("triton"):
                yield
        finally:
            _take_modules()
            sys.modules.update(before)  # type: ignore[arg-type]
