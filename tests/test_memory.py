"""Peak memory: a perturbation and a rebuild make no temporary of parameter size."""

from __future__ import annotations

import pytest

from benchmarks import memory, memory_step
from fedkseed_kernels import native

NUM_ELEMENTS = 1 << 26

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not memory.can_measure(), reason="needs Linux's /proc/self/clear_refs"),
]
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="the native library is not built")


@needs_native
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("operation", "num_elements", "num_seeds"),
    [("perturb", NUM_ELEMENTS, 1), ("rebuild", NUM_ELEMENTS, 16), ("rebuild", 1 << 20, 4096)],
)
def test_grows_by_less_than_a_megabyte(operation: str, num_elements: int, num_seeds: int, dtype: str) -> None:
    growth = memory.measure(operation, num_elements, num_seeds=num_seeds, dtype=dtype)
    assert 0 <= growth < memory.LIMIT_BYTES


def test_the_measurement_sees_a_temporary() -> None:
    """The control: randn_like makes one, of the tensor's 2 bytes an element."""
    growth = memory.measure("randn_like", NUM_ELEMENTS, dtype="bf16")
    assert growth > 2 * NUM_ELEMENTS - memory.LIMIT_BYTES


UNIT, RESIDUALS = memory_step.UNIT_BYTES, 2 * memory_step.NUM_PARAMETERS


@needs_native
@pytest.mark.parametrize(
    ("storage", "num_bytes"),
    [
        ("inplace", 0),
        ("streamed", UNIT),
        ("streamed in fp32", 2 * UNIT),
        ("paired", 2 * UNIT),
        ("compensated", UNIT + RESIDUALS),
        ("compensated in fp32", 2 * UNIT + RESIDUALS),
    ],
)
def test_a_step_takes_the_largest_unit_and_no_more(storage: str, num_bytes: int) -> None:
    growth = memory_step.measure(storage)
    assert num_bytes <= growth < num_bytes + memory.LIMIT_BYTES


def test_a_failing_call_says_why() -> None:
    with pytest.raises(RuntimeError, match="invalid choice: 'nothing'"):
        memory.measure("nothing", 64)
