"""The ops compiled by torch: one graph, equal bits, no recompilation for new seeds, coefficients, alphas."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fedkseed_kernels as fk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
        ],
    ),
]


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4), torch.linspace(0, 1, 5, dtype=dtype)]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def assert_compiled_once(num_compilations: list[int]) -> None:
    """One compilation by the counts after each call. The first may count two: dynamo may restart there."""
    assert num_compilations[0] in (1, 2)
    assert set(num_compilations) == {num_compilations[0]}


def perturb(tensors: list[Tensor], seed: Tensor, scale: Tensor) -> None:
    fk.perturb_(tensors, seed, scale)


def update(tensors: list[Tensor], seeds: Tensor, coeffs: Tensor, alpha: Tensor) -> None:
    fk.seed_axpy_(tensors, seeds, coeffs, alpha=alpha, streams=[7, 3], views=[((9, 9), (1, 2)), None])


def out_of_place(tensors: list[Tensor], seeds: Tensor, coeffs: Tensor, alpha: Tensor) -> list[Tensor]:
    doubled = [t * 2 for t in tensors]
    return [t + 1 for t in fk.seed_axpy(doubled, seeds, coeffs, alpha=alpha)]


def both_sides(tensors: list[Tensor], seeds: Tensor, coeffs: Tensor, alpha: Tensor) -> list[Tensor]:
    plus, minus = fk.seed_axpy_pair(tensors, seeds, coeffs, alpha=alpha)
    return plus + minus


def gathered(tensors: list[Tensor], seeds: Tensor, coeffs: Tensor, alpha: Tensor) -> list[Tensor]:
    rows = (seeds * 2).abs() % 3
    return fk.seed_axpy(tensors[:1], seeds, coeffs, alpha=alpha, rows=rows)


def step(tensors: list[Tensor], seeds: Tensor, coeffs: Tensor, alpha: Tensor) -> Tensor:
    """A zeroth-order step as an optimizer makes it: perturb, evaluate, flip, evaluate, restore and update."""
    seed, eps = seeds[0], coeffs[0]
    fk.perturb_(tensors, seed, eps)
    plus = sum((t * t).sum() for t in tensors)
    fk.perturb_(tensors, seed, -2 * eps)
    minus = sum((t * t).sum() for t in tensors)
    g = (plus - minus) / (2 * eps)
    fk.perturb_(tensors, seed, eps - 0.01 * g, alpha=alpha)
    return g


def terms(k: int) -> tuple[Tensor, Tensor, Tensor]:
    seeds = torch.tensor([k, -k - 1])
    return (
        seeds,
        torch.tensor([0.5 + k, 0.25], dtype=torch.float64),
        torch.tensor(1.0 - k / 8, dtype=torch.float64),
    )


@pytest.mark.few
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [update, out_of_place, both_sides, gathered])
def test_one_graph_the_same_bits_no_recompilation(
    function: Callable[..., Any], dtype: torch.dtype, backend: str
) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    tensors, twins = weights(dtype), weights(dtype)
    num_compilations = []
    for k in range(4):
        got, expected = compiled(tensors, *terms(k)), function(twins, *terms(k))
        if expected is not None:
            assert_same(got, expected)
        assert_same(tensors, twins)
        num_compilations.append(counter.frame_count)
    assert_compiled_once(num_compilations)


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturb_with_tensors(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(perturb, fullgraph=True, backend=counter)
    tensors, twins = weights(), weights()
    num_compilations = []
    for k in range(4):
        seed, scale = torch.tensor(2**40 + k), torch.tensor(0.125 * k)
        compiled(tensors, seed, scale)
        perturb(twins, seed, scale)
        assert_same(tensors, twins)
        num_compilations.append(counter.frame_count)
    assert_compiled_once(num_compilations)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_step_on_parameters(backend: str) -> None:
    """Parameters that require grad, under no_grad inside the compiled function."""

    def guarded(tensors: list[Tensor], *rest: Tensor) -> Tensor:
        with torch.no_grad():
            return step(tensors, *rest)

    compiled = torch.compile(guarded, fullgraph=True, backend=backend)
    tensors = [torch.nn.Parameter(w) for w in weights()]
    twins = [torch.nn.Parameter(w) for w in weights()]
    for k in range(3):
        got, expected = compiled(tensors, *terms(k)), guarded(twins, *terms(k))
        # Sums of squares may be taken in another order by a compiled graph.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for t, twin in zip(tensors, twins, strict=True):
            torch.testing.assert_close(t, twin)


def test_python_numbers_are_right_too() -> None:
    def perturbed(tensors: list[Tensor], seed: int, scale: float) -> None:
        fk.perturb_(tensors, seed, scale)
        fk.seed_axpy_(tensors, [seed, 1], [scale, 0.5], alpha=0.5)

    compiled = torch.compile(perturbed, fullgraph=True, backend="aot_eager")
    tensors, twins = weights(), weights()
    for seed, scale in [(3, 0.5), (4, 0.25), (-1, 0.125), (2**64 - 1, 1.0), (2**63 + 5, 2.0)]:
        compiled(tensors, seed, scale)
        perturbed(twins, seed, scale)
        assert_same(tensors, twins)


def test_normal_in_a_graph() -> None:
    def noisy(x: Tensor, seed: Tensor) -> Tensor:
        return x + fk.normal(x.shape, seed, dtype=x.dtype, stream=2, offset=5)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(noisy, fullgraph=True, backend=counter)
    num_compilations = []
    for k in range(3):
        x = torch.ones(3, 4)
        assert torch.equal(compiled(x, torch.tensor(k)), noisy(x, torch.tensor(k)))
        num_compilations.append(counter.frame_count)
    assert_compiled_once(num_compilations)


def test_dynamic_shapes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both_sides, fullgraph=True, backend=counter, dynamic=True)
    num_compilations = []
    for rows in (3, 5, 9):
        tensors = [torch.ones(rows, 4), torch.ones(rows + 2)]
        assert_same(compiled(tensors, *terms(rows)), both_sides(tensors, *terms(rows)))
        num_compilations.append(counter.frame_count)
    assert_compiled_once(num_compilations)


def test_bad_values_raise_from_a_compiled_graph() -> None:
    compiled = torch.compile(perturb, fullgraph=True, backend="aot_eager")
    tensors = weights()
    compiled(tensors, torch.tensor(1), torch.tensor(0.5))
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError, match="expected coefficients that are finite"):
        compiled(tensors, torch.tensor(1), torch.tensor(float("nan")))
    assert_same(tensors, before)


def test_tensors_that_require_grad_are_refused_when_compiled() -> None:
    compiled = torch.compile(perturb, fullgraph=True, backend="aot_eager")
    tensors = [torch.nn.Parameter(w) for w in weights()]
    with pytest.raises(Exception, match=r"wrap the call in torch.no_grad\(\)"):
        compiled(tensors, torch.tensor(1), torch.tensor(0.5))
    assert_same([t.detach() for t in tensors], weights())
