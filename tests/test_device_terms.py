"""Terms on a GPU, as far as they can be checked where there is none: through fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fedkseed_kernels as fk
from fedkseed_kernels.arguments import terms as term_checks
from fedkseed_kernels.operands import DeviceTerms, Terms

CPU = torch.device("cpu")


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def on(device: str, **changed: Any) -> dict[str, Any]:
    terms = {
        "seeds": torch.zeros(3, dtype=torch.int64, device=device),
        "coeffs": torch.zeros(3, device=device),
        "alpha": torch.ones((), dtype=torch.float64, device=device),
        "rounding": "stochastic",
        "rounding_seed": torch.zeros((), dtype=torch.int64, device=device),
        "num_skipped": torch.zeros(1, dtype=torch.int32, device=device),
    }
    return terms | changed


@pytest.mark.usefixtures("fake")
def test_terms_may_be_on_the_gpu_of_the_tensors_or_on_the_host() -> None:
    tensors = [torch.zeros(5, device="cuda:0"), torch.zeros(2, dtype=torch.bfloat16, device="cuda:0")]
    fk.seed_axpy_(tensors, **on("cuda:0"))
    fk.seed_axpy_(tensors, **on("cuda:0", seeds=[1, 2, 3], alpha=0.5, rounding_seed=7, num_skipped=None))
    fk.seed_axpy_pair(tensors, **on("cuda:0", coeffs=[1.0, 2.0, 3.0]))
    fk.perturb_(tensors, torch.zeros((), dtype=torch.int64, device="cuda:0"), 0.5)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["seeds", "coeffs", "alpha", "rounding_seed", "num_skipped"])
@pytest.mark.parametrize(("tensors_on", "term_on"), [("cuda:0", "cuda:1"), ("cpu", "cuda:0")])
def test_terms_on_another_gpu_are_refused(name: str, tensors_on: str, term_on: str) -> None:
    tensor = torch.zeros(5, device=tensors_on)
    stray = {name: on(term_on)[name]}
    with pytest.raises(ValueError, match=f"expected {name} on .*, got {term_on}"):
        fk.seed_axpy_(tensor, **on(tensors_on, **stray))


@pytest.mark.usefixtures("fake")
def test_tensors_on_two_gpus_are_refused() -> None:
    tensors = [torch.zeros(5, device="cuda:0"), torch.zeros(5, device="cuda:1")]
    with pytest.raises(ValueError, match=r"tensors\[0\] on cuda:0 and tensors\[1\] on cuda:1; make one call"):
        fk.seed_axpy_(tensors, [1], [0.5])


@pytest.mark.parametrize(
    "num_skipped", [torch.zeros(1), torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)]
)
def test_a_counter_is_one_int32(num_skipped: torch.Tensor) -> None:
    tensor = torch.ones(3)
    with pytest.raises(ValueError, match="expected num_skipped int32 of one element, got"):
        fk.seed_axpy_(tensor, [1], [0.5], num_skipped=num_skipped)
    assert torch.equal(tensor, torch.ones(3))


def test_on_the_cpu_nothing_is_skipped() -> None:
    num_skipped = torch.tensor([4], dtype=torch.int32)
    tensor = torch.ones(3)
    with pytest.raises(ValueError, match="expected coefficients that are finite"):
        fk.seed_axpy_(tensor, [1], [float("nan")], num_skipped=num_skipped)
    fk.seed_axpy_(tensor, [1], [0.5], num_skipped=num_skipped)
    assert num_skipped.item() == 4
    assert torch.equal(tensor, 1 + 0.5 * fk.normal(3, 1))


@pytest.mark.usefixtures("fake")
def test_what_a_backend_is_handed() -> None:
    """Numbers stay numbers, tensors stay on the GPU, and only host values are looked at."""
    device = torch.device("cuda:0")
    given = on("cuda:0", num_skipped=None)
    arguments = term_checks.TermArguments(
        given["seeds"], given["coeffs"].double(), given["alpha"], [], [], [], "gaussian", "nearest", None
    )
    terms = term_checks.check_terms(arguments, all_fp64=False, device=device)
    assert isinstance(terms, DeviceTerms)
    assert isinstance(terms.seeds, torch.Tensor)
    assert isinstance(terms.coeffs, torch.Tensor)
    assert terms.seeds.device == terms.coeffs.device == device
    assert terms.alpha is given["alpha"]
    assert terms.rounding_seed == 0


def test_what_the_host_knows_stays_there() -> None:
    """The step of a device: seeds from the host beside coefficients that only the device knows. No copy of
    pageable memory, which a graph cannot capture and a driver may wait for."""
    device, seeds = torch.device("cuda:0"), torch.tensor([7, -1, 0])
    with FakeTensorMode():
        given = on("cuda:0", num_skipped=None)
        coeffs = given["coeffs"].double()
    arguments = term_checks.TermArguments(
        seeds, coeffs, given["alpha"], [], [], [], "gaussian", "nearest", None
    )
    terms = term_checks.check_terms(arguments, all_fp64=False, device=device)
    assert isinstance(terms, DeviceTerms)
    assert isinstance(terms.seeds, np.ndarray)
    assert terms.seeds.tolist() == [7, 2**64 - 1, 0]
    assert not np.shares_memory(terms.seeds, seeds.numpy())
    assert isinstance(terms.coeffs, torch.Tensor)
    assert terms.coeffs.device == device


def test_host_terms_move_to_a_device_unchanged() -> None:
    terms = Terms(
        np.array([1, 2**64 - 1], np.uint64), np.array([0.5, -2.0]), 0.75, "rademacher", "stochastic", 9
    )
    moved = terms.to(CPU)
    assert isinstance(moved.seeds, torch.Tensor)
    assert moved.seeds.tolist() == [1, -1]
    assert moved.coeffs.tolist() == [0.5, -2.0]
    assert (moved.alpha, moved.family, moved.rounding, moved.rounding_seed) == (
        0.75,
        "rademacher",
        "stochastic",
        9,
    )


def test_a_copy_to_a_gpu_is_from_pinned_memory_and_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without a GPU: what upload asks of torch."""
    asked: list[object] = []
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda tensor, device, non_blocking: asked.append((device, non_blocking)) or tensor,
    )
    seeds, device = np.array([1, 2], np.uint64), torch.device("cuda:1")
    terms = DeviceTerms(seeds, torch.ones(2), 1.0, "gaussian", "nearest", 0)
    assert isinstance(terms.to(device).seeds, torch.Tensor)
    assert asked == ["pinned", (device, True)]
    capturing = True
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured, but the seeds are on the host"):
        terms.to(device)
