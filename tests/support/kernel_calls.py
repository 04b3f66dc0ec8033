"""Support for tests of which passes over the weights are made: every run of the primitive, noted."""

from __future__ import annotations

import pytest

from fedkseed_kernels import dispatch
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms


def watch_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Operands, Terms | DeviceTerms]]:
    """Operands and terms of every run from now on."""
    calls: list[tuple[Operands, Terms | DeviceTerms]] = []
    original = dispatch.execute

    def execute(operands: Operands, terms: Terms | DeviceTerms) -> None:
        calls.append((operands, terms))
        original(operands, terms)

    monkeypatch.setattr(dispatch, "execute", execute)
    return calls
