"""Runs the golden cases through a backend and compares their digests with those of the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fedkseed_kernels.self_test.arena import Arena
from fedkseed_kernels.self_test.cases import calls
from fedkseed_kernels.self_test.remembered import DIGESTS_PATH


class Mismatch(NamedTuple):
    """A case with another digest than the reference's."""

    case: str
    expected: str
    got: str


class Report(NamedTuple):
    """How many cases were run, and those that differ."""

    num_cases: int
    mismatches: list[Mismatch]


def digests_of(
    seed_axpy: Callable[..., None], kind: str, device: torch.device, writes_fp32: bool = True
) -> dict[str, str]:
    """The digest of every golden case of a kind of machine, as a backend's primitive computes it.

    Args:
        seed_axpy: takes operands and terms.
        kind: one of `cases.KINDS`.
        writes_fp32: whether it writes fp32 outputs of 16-bit weights; else those cases are left out.
    """
    found: dict[str, str] = {}
    for call in calls():
        if call.form != "wide" or writes_fp32:
            on_device = device.type == "cuda"  # backends of other tensors take no DeviceTerms
            found |= Arena(call, call.cases(kind), kind, device).run(seed_axpy, on_device)
    return found


def compare(seed_axpy: Callable[..., None], kind: str, device: torch.device, writes_fp32: bool) -> Report:
    """Every golden case of a kind of machine beside the reference's digest; arguments as for `digests_of`."""
    expected = json.loads(Path(DIGESTS_PATH).read_bytes())[kind]
    found = digests_of(seed_axpy, kind, device, writes_fp32)
    mismatches = [Mismatch(case, expected[case], got) for case, got in found.items() if got != expected[case]]
    return Report(len(found), mismatches)
