"""What the CUDA kernels decide on a GPU, and the backend that calls them: the host's memory is the GPU's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_shim
import numpy as np
import pytest
import torch
from cuda_shim import MODES, assert_same, options, terms, weights
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels.arguments import tensors as tensor_checks
from fedkseed_kernels.backends import c_abi, native_cuda
from fedkseed_kernels.conformance.checks import poisoned, stored_of, tensor_of
from fedkseed_kernels.contract import reference
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms
from fedkseed_kernels.self_test import cases as golden_cases
from fedkseed_kernels.self_test.arena import Arena
from fedkseed_kernels.self_test.remembered import DIGESTS_PATH

pytestmark = pytest.mark.skipif(cuda_shim.COMPILER is None, reason="needs a C++ compiler")

all_modes = pytest.mark.parametrize(("dtype", "rounding"), MODES)
all_families = pytest.mark.parametrize("family", reference.FAMILIES)


def device_terms(seeds: Sequence[int], coeffs: Sequence[float], **chosen: Any) -> DeviceTerms:
    """Terms as a GPU has them: here the device's memory is the host's."""
    signed = [s - 2**64 if s >= 2**63 else s for s in seeds]
    defaults: dict[str, Any] = {"alpha": 1.0, "family": "gaussian", "rounding": "nearest", "rounding_seed": 0}
    return DeviceTerms(
        torch.tensor(signed, dtype=torch.int64),
        torch.tensor(coeffs, dtype=torch.float64),
        **defaults | chosen,
    )


def run_in_place(shim: cuda_shim.ShimBackend, tensors: list[Tensor], terms: DeviceTerms) -> None:
    shim.seed_axpy(tensor_checks.check_operands(tensors, None, None, None, [], [], []), terms)


def test_nothing_to_do_launches_nothing(shim: cuda_shim.ShimBackend) -> None:
    before = shim.num_launches
    operands = tensor_checks.check_operands([torch.empty(0), torch.empty(3, 0)], None, None, None, [], [], [])
    shim.seed_axpy(operands, device_terms([1], [0.5]))
    assert shim.num_launches == before


@pytest.mark.parametrize("device", [0, 1])
def test_a_device_is_set_only_where_it_is_another(shim: cuda_shim.ShimBackend, device: int) -> None:
    """Setting the one that is set makes a context on it (0.5 GB of each rank on GPU 0)."""
    table = c_abi.pointer_table(
        tensor_checks.check_operands([weights(9, "float32")], None, None, None, [], [], [])
    )
    shim.devices_set()
    native_cuda.check(shim.handle, shim.handle.fk_cuda_load(device))
    native_cuda.launch(shim.handle, table, None, 0, device_terms([1], [0.5]), device, 0)
    assert shim.devices_set() == [1, 0, 1, 0][: 4 * device]


@all_families
@pytest.mark.parametrize("num_terms", [0, 1, 2, 3, 64, 65])
@pytest.mark.parametrize("on_device", ["seeds", "coeffs"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_some_terms_by_value_and_some_on_the_device(
    shim: cuda_shim.ShimBackend, on_device: str, num_terms: int, family: str, dtype: str
) -> None:
    seeds, coeffs = terms(num_terms)
    given = device_terms(seeds, coeffs, family=family)
    if on_device == "seeds":
        given.coeffs = np.array(coeffs)
    else:
        given.seeds = np.array(seeds, np.int64).view(np.uint64)
    tensors, expected = ([weights(9000, dtype), weights(64, dtype).reshape(8, 8).t()] for _ in range(2))
    run_in_place(shim, tensors, given)
    fk.seed_axpy_(expected, seeds, coeffs, family=family)
    for got, want in zip(tensors, expected, strict=True):
        assert_same(stored_of(got), stored_of(want), dtype)


GOLDEN_CALLS = [call for call in golden_cases.calls() if call.form != "wide"]
DIGESTS: dict[str, str] = json.loads(Path(DIGESTS_PATH).read_bytes())["gpu"]


def golden_digests(call: golden_cases.Call, seed_axpy: Callable[..., None]) -> dict[str, str]:
    """Those of a self-test on a GPU, where terms are in the memory of the device for the second time."""
    return Arena(call, call.cases("gpu"), "gpu", torch.device("cpu")).run(seed_axpy, on_device=True)


@pytest.mark.few(8)
@pytest.mark.parametrize("call", GOLDEN_CALLS, ids=lambda call: "-".join(call).replace(" ", "_"))
def test_golden_cases_pass(shim: cuda_shim.ShimBackend, call: golden_cases.Call) -> None:
    found = golden_digests(call, shim.seed_axpy)
    assert found == {name: DIGESTS[name] for name in found}
    assert len(found) == len(call.cases("gpu"))


@pytest.mark.parametrize("field", ["seeds", "coeffs", "alpha", "rounding_seed"])
@pytest.mark.parametrize("terms", ["1 term", "2 terms", "70 terms"])
def test_golden_cases_show_what_is_read_wrongly_on_the_device(
    shim: cuda_shim.ShimBackend, terms: str, field: str
) -> None:
    def misreading(operands: Operands, given: Terms | DeviceTerms) -> None:
        if isinstance(given, DeviceTerms):
            getattr(given, field).mul_(3)
        shim.seed_axpy(operands, given)

    call = golden_cases.Call("gaussian", terms, "in place", "stochastic")
    assert all(digest != DIGESTS[name] for name, digest in golden_digests(call, misreading).items())


@all_families
@pytest.mark.parametrize("num_terms", [1, 2, 70])
def test_nan_and_infinite_coefficients_are_skipped_and_counted(
    shim: cuda_shim.ShimBackend, num_terms: int, family: str
) -> None:
    """Once a call, however many blocks, tensors and launches there are."""
    seeds, coeffs = terms(num_terms)
    bad = [c if k % 3 else (np.nan, np.inf, -np.inf, 1e39)[k // 3 % 4] for k, c in enumerate(coeffs)]
    clean = [c if k % 3 else 0.0 for k, c in enumerate(coeffs)]
    num_skipped = torch.tensor([5], dtype=torch.int32)
    tensors, expected = (
        [weights(9000, "float32"), weights(33, "bfloat16"), weights(64, "float32").reshape(8, 8).t()]
        for _ in range(2)
    )
    run_in_place(shim, tensors, device_terms(seeds, bad, family=family, num_skipped=num_skipped))
    fk.seed_axpy_(expected, seeds, clean, family=family)
    for got, want in zip(tensors, expected, strict=True):
        assert_same(stored_of(got), stored_of(want), str(got.dtype).removeprefix("torch."))
    assert num_skipped.item() == 5 + len(range(0, num_terms, 3))
    run_in_place(shim, tensors, device_terms(seeds, bad, family=family))


@all_modes
@pytest.mark.parametrize("num_terms", [1, 2, 3])
def test_no_term_left_changes_no_byte(
    shim: cuda_shim.ShimBackend, num_terms: int, dtype: str, rounding: str
) -> None:
    """Every pattern of 16 bits stays, NaN payloads too."""
    tensor = tensor_of(
        np.arange(2**16, dtype=np.uint16).view(f"u{torch.finfo(getattr(torch, dtype)).bits // 8}"), dtype
    )
    before = tensor.clone()
    chosen = {"rounding": rounding, "rounding_seed": torch.tensor(3)}
    strided = tensor.reshape(-1, 4).t().clone().t()
    run_in_place(
        shim,
        [tensor, strided],
        device_terms([1, 2, 3][:num_terms], [np.nan, 0.0, -0.0][:num_terms], **chosen),
    )
    assert stored_of(tensor).tobytes() == stored_of(before).tobytes()
    assert stored_of(strided).tobytes() == stored_of(before).tobytes()


@all_modes
def test_scalars_on_the_device(shim: cuda_shim.ShimBackend, dtype: str, rounding: str) -> None:
    """alpha is rounded to fp32 there, a rounding seed is a bit pattern."""
    seeds, coeffs = terms(3)
    tensor, want = weights(5000, dtype), weights(5000, dtype)
    chosen = {"alpha": torch.tensor(0.1, dtype=torch.float64), "rounding": rounding}
    run_in_place(shim, [tensor], device_terms(seeds, coeffs, rounding_seed=torch.tensor(-9), **chosen))
    fk.seed_axpy_(want, seeds, coeffs, **options(rounding, "gaussian", alpha=0.1))
    assert_same(stored_of(tensor), stored_of(want), dtype)


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_rows_out_of_range_give_nan_and_are_not_read(shim: cuda_shim.ShimBackend, dtype: str) -> None:
    tensor = weights(6 * 20, dtype).reshape(6, 20)
    out, want = (poisoned((4, 20), dtype) for _ in range(2))
    operands = tensor_checks.check_operands([tensor], [out], None, torch.tensor([2, 0, 0, 5]), [], [], [])
    operands.rows = torch.tensor([2, 6, -(2**40), 5])
    shim.seed_axpy(operands, device_terms([3], [0.5]))
    fk.seed_axpy(tensor, [3], [0.5], rows=torch.tensor([2, 0, 0, 5]), out=want)
    assert out[1:3].isnan().all()
    assert_same(stored_of(out[::3]), stored_of(want[::3]), dtype)


def test_unknown_codes_are_refused(shim: cuda_shim.ShimBackend) -> None:
    table = np.zeros(1, c_abi.TABLE_DTYPE)
    table["dtype"] = 9
    with pytest.raises(RuntimeError, match="does not know a code or a size of this call"):
        native_cuda.launch(shim.handle, table, None, 0, device_terms([1], [0.5]), 0, 0)
    many = Terms(np.zeros(65, np.uint64), np.ones(65), 1.0, "gaussian", "nearest", 0)
    with pytest.raises(RuntimeError, match="does not know a code or a size of this call"):
        native_cuda.launch(shim.handle, table[:0], None, 0, many, 0, 0)


# --- the backend of cuda tensors, with the host in the place of a GPU


@pytest.fixture
def backend(shim: cuda_shim.ShimBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """`native_cuda` on the shim; `capturing` says whether a graph is being captured."""
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    state = SimpleNamespace(capturing=False, seed_axpy=native_cuda.seed_axpy)
    monkeypatch.setattr(native_cuda, "_load", lambda: shim.handle)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    native_cuda.load_kernels.cache_clear()
    yield state
    native_cuda.load_kernels.cache_clear()


def test_a_load_that_failed_is_no_error_of_the_next_launch(
    backend: SimpleNamespace, shim: cuda_shim.ShimBackend
) -> None:
    """CUDA remembers the last error of a thread; the launch may be on a device that loads."""
    shim.handle.fk_shim_load_status(222)
    try:
        with pytest.raises(native_cuda.CudaError) as caught:
            native_cuda.load_kernels(0)
    finally:
        shim.handle.fk_shim_load_status(0)
    assert caught.value.status == 222
    tensor, want = weights(50, "float32"), weights(50, "float32")
    backend.seed_axpy(tensor_checks.check_operands([tensor], None, None, None, [], [], []), host_terms(3))
    fk.seed_axpy_(want, *terms(3))
    assert_same(stored_of(tensor), stored_of(want), "float32")


def host_terms(count: int) -> Terms:
    seeds, coeffs = terms(count)
    signed = np.array(seeds, np.int64).view(np.uint64)
    return Terms(signed, np.array(coeffs), 1.0, "gaussian", "nearest", 0)


@pytest.mark.parametrize("num_terms", [64, 65])
def test_terms_by_value_and_through_memory(backend: SimpleNamespace, num_terms: int) -> None:
    tensor, want = weights(1000, "float32"), weights(1000, "float32")
    operands = tensor_checks.check_operands([tensor], None, None, None, [], [], [])
    backend.seed_axpy(operands, host_terms(num_terms))
    fk.seed_axpy_(want, *terms(num_terms))
    assert_same(stored_of(tensor), stored_of(want), "float32")
    backend.seed_axpy(operands, host_terms(num_terms))  # the table is kept
    fk.seed_axpy_(want, *terms(num_terms))
    assert_same(stored_of(tensor), stored_of(want), "float32")


def test_many_terms_of_the_host_cannot_be_captured(backend: SimpleNamespace) -> None:
    tensor = torch.ones(5)
    operands = tensor_checks.check_operands([tensor], None, None, None, [], [], [])
    backend.capturing = True
    with pytest.raises(
        RuntimeError, match="at most 64 terms from the host while a CUDA graph .*, got 65; pass"
    ):
        backend.seed_axpy(operands, host_terms(65))
    assert torch.equal(tensor, torch.ones(5))
    backend.seed_axpy(operands, host_terms(64))


@pytest.mark.parametrize("on_host", ["seeds", "coeffs"])
def test_terms_of_both_places_are_captured_where_they_go_by_value(
    backend: SimpleNamespace, on_host: str
) -> None:
    backend.capturing = True
    for num_terms in (64, 65):
        tensor, want = weights(50, "float32"), weights(50, "float32")
        operands = tensor_checks.check_operands([tensor], None, None, None, [], [], [])
        host, given = host_terms(num_terms), device_terms(*terms(num_terms))
        setattr(given, on_host, getattr(host, on_host))
        if num_terms == 64:
            backend.seed_axpy(operands, given)
            fk.seed_axpy_(want, *terms(num_terms))
        else:
            with pytest.raises(RuntimeError, match="at most 64 terms from the host"):
                backend.seed_axpy(operands, given)
        assert_same(stored_of(tensor), stored_of(want), "float32")


def test_rows_count_those_of_the_input(backend: SimpleNamespace) -> None:
    tensor, out = weights(60, "float32").reshape(20, 3), poisoned((2, 3), "float32")
    operands = tensor_checks.check_operands([tensor], [out], None, torch.tensor([19, 4]), [], [], [])
    backend.seed_axpy(operands, host_terms(1))
    (want,) = fk.seed_axpy(tensor, *terms(1), rows=torch.tensor([19, 4]))
    assert_same(stored_of(out), stored_of(want), "float32")
