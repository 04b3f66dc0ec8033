"""What a process knows of self-tests."""

from __future__ import annotations

import pytest

from fedkseed_kernels import dispatch
from fedkseed_kernels.self_test import gate


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what passed in this one."""
    monkeypatch.setattr(gate, "verdicts", {})
    monkeypatch.setattr(dispatch, "_settled", set())


def first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget all verdicts, and what was said of them; no switch is set."""
    another_process(monkeypatch)
    monkeypatch.setattr(gate, "failures", {})
    monkeypatch.setattr(gate, "_deferred", set())
    monkeypatch.setattr(dispatch, "_logged", set())
    for variable in (dispatch.BACKEND_VARIABLE, dispatch.CPU_ISA_VARIABLE, gate.SELF_TEST_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
