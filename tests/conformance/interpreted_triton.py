"""The Triton kernels in Triton's interpreter, loaded beside the compiled ones of the same process."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

import pytest

from fedkseed_kernels import backends, dispatch
from fedkseed_kernels.backends import triton as triton_backend
from fedkseed_kernels.conformance.checks import Target

PACKAGE = "fedkseed_kernels.backends.triton"


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
            backends.triton = triton_backend  # type: ignore[attr-defined]


def damaged(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of the kernels' sources in which one piece of a file, which stands there once, is another."""
    copy = shutil.copytree(Path(triton_backend.__file__).parent, folder / "triton")
    text = (copy / file).read_text()
    assert text.count(right) == 1
    (copy / file).write_text(text.replace(right, wrong))
    return copy


class InterpretedTriton(Target):
    """The Triton kernels beside the targets that `conformance.find_targets` finds."""

    @contextmanager
    def forced(self) -> Iterator[None]:
        with interpreted():
            yield


def with_interpreted_triton(targets: list[Target]) -> list[Target]:
    """The targets, and the Triton kernels where they are not among them and the package is there."""
    triton = InterpretedTriton("triton")
    return targets if triton in targets or util.find_spec("triton") is None else [*targets, triton]
