"""A caller that flushes subnormals to zero changes no bit, and finds its mode as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fedkseed_kernels.conformance import __main__ as conformance
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.checks import CHECKS, Target
from fedkseed_kernels.contract import arithmetic

TARGETS, _ = conformance.find_targets()


def flushes() -> bool:
    return bool((torch.tensor([2.0**-126]) * 0.5 == 0).item())


@pytest.fixture
def _flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode that torch can set")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("_flushing")
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_caller_that_flushes(target: Target, name: str) -> None:
    assert flushes()
    result = conformance.run_check(name, CHECKS[name], target, golden.load())
    assert result.status == "pass", result.detail
    assert flushes()


@pytest.mark.usefixtures("_flushing")
def test_ieee_arithmetic_keeps_subnormals_and_restores() -> None:
    with arithmetic.ieee_arithmetic():
        assert not flushes()
        with arithmetic.ieee_arithmetic():
            assert not flushes()
        assert not flushes()
    assert flushes()
    with pytest.raises(KeyError), arithmetic.ieee_arithmetic():
        raise KeyError
    assert flushes()


WORKERS = """
import numpy as np, sys, torch
torch.set_flush_denormal(True)  # before the pool starts: its threads inherit the mode
torch.set_num_threads(7)
import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.contract import reference

n = 400_001
normal = torch.full((n,), 2.0**-126)
flushed = int((normal * 0.5 == 0).sum())
assert flushed == n, f"{flushed} of {n} flushed before"
bits = torch.arange(n, dtype=torch.int32)  # subnormals
tensor = bits.clone().view(torch.float32)
coefficient = 2.0**-140
with dispatch.backend("native"), dispatch.cpu_isa(sys.argv[1]):
    fk.seed_axpy_([tensor], [5], [coefficient])
want = reference.seed_axpy_array(
    bits.numpy().view(np.float32), np.arange(n), [5], [coefficient], dtype="float32"
)
assert (tensor.view(torch.int32).numpy() == want.view(np.int32)).all()
assert np.unique(want.view(np.int32)).size > n // 2
flushed = int((normal * 0.5 == 0).sum())
assert flushed == n, f"{flushed} of {n} flushed after"
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", [target.isa for target in reversed(TARGETS) if target.isa])
def test_workers_that_flush(isa: str) -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU has no flush-to-zero mode that torch can set")
    done = subprocess.run([sys.executable, "-c", WORKERS, isa], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
