"""Peak memory: a perturbation and a rebuild make no temporary of parameter size, a step its mode's."""

from __future__ import annotations

import pytest

from benchmarks.common import memory
from benchmarks.models import bare
from benchmarks.step import memory as step_memory
from fedkseed_kernels.backends import native_cpu

NUM_ELEMENTS = 1 << 26

pytestmark = pytest.mark.skipif(not memory.can_measure(), reason="needs Linux's /proc/self/clear_refs")
needs_native = pytest.mark.skipif(
    native_cpu.unavailable() is not None, reason="the native library is not built"
)


@needs_native
@pytest.mark.parametrize("dtype", [pytest.param("bf16"), pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("operation", "num_elements", "num_seeds"),
    [
        ("perturb", NUM_ELEMENTS, 1),
        pytest.param("rebuild", NUM_ELEMENTS, 16, marks=pytest.mark.slow),
        pytest.param("rebuild", 1 << 20, 4096, marks=pytest.mark.slow),
    ],
)
def test_grows_by_less_than_a_megabyte(operation: str, num_elements: int, num_seeds: int, dtype: str) -> None:
    growth = memory.measure(operation, num_elements, num_seeds=num_seeds, dtype=dtype)
    assert 0 <= growth < memory.LIMIT_BYTES


@pytest.mark.slow
def test_the_measurement_sees_a_temporary() -> None:
    """The control: randn_like makes one, of the tensor's 2 bytes an element."""
    growth = memory.measure("randn_like", NUM_ELEMENTS, dtype="bf16")
    assert growth > 2 * NUM_ELEMENTS - memory.LIMIT_BYTES


UNIT, RESIDUALS = 2 * bare.UNIT_NUMEL, 2 * bare.NUMEL


@needs_native
@pytest.mark.parametrize(
    ("mode", "num_bytes"),
    [
        pytest.param("inplace", 0, marks=pytest.mark.slow),
        pytest.param("inplace, chained", 0, marks=pytest.mark.slow),
        ("streamed", UNIT),
        pytest.param("streamed, fp32 forward", 2 * UNIT, marks=pytest.mark.slow),
        pytest.param("streamed, paired", 2 * UNIT, marks=pytest.mark.slow),
        pytest.param("streamed, compensated", UNIT + RESIDUALS, marks=pytest.mark.slow),
        pytest.param(
            "streamed, paired, compensated, fp32 forward", 4 * UNIT + RESIDUALS, marks=pytest.mark.slow
        ),
    ],
)
def test_a_step_takes_the_largest_unit_and_no_more(mode: str, num_bytes: int) -> None:
    """In bf16; the embedding is larger than a unit, and none of it but the rows looked up is perturbed."""
    options = {"model": "bare", "dtype": "bf16", "device": "cpu", "batch_size": 2, "num_tokens": 3}
    growth = step_memory.beyond_inference(mode, **options, family="gaussian", num_threads=2)
    assert growth is not None
    assert abs(growth - num_bytes) < memory.LIMIT_BYTES


def test_a_failing_call_says_why() -> None:
    with pytest.raises(RuntimeError, match="invalid choice: 'nothing'"):
        memory.measure("nothing", 64)
