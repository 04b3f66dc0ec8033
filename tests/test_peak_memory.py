"""The peak of a run's memory: what an earlier run of the process has freed is not in it."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Small tensors between one that stays: freed, they stay with the allocator until it is asked.
PROGRAM = """
import torch
from fedkseed.scenarios.peak_memory import peaks, reset_peaks

device = torch.device("cpu")
reset_peaks(device)
start = peaks(device)["process"]
tensors = [torch.ones(1 << 14) for _ in range(3200)]
kept = torch.ones(1 << 14)
high = peaks(device)["process"]
del tensors
reset_peaks(device)
print(start, high, peaks(device)["process"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counted by Linux alone")
def test_what_was_freed_before_a_run_is_not_in_its_peak() -> None:
    printed = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    start, high, after = map(int, printed.stdout.split())
    assert high - start > 180 << 20
    assert after - start < 60 << 20
