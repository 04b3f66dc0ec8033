"""Residuals of compensated weights in the public functions: what is taken, refused, mutated, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.unchanged import Watch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fedkseed_kernels as fk

SEEDS, COEFFS = [1, -2], [0.5, 2e-5]


def bf16(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float32).view(shape).bfloat16()


def residual_of(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int16)
    return made.copy_(torch.arange(tensor.numel(), dtype=torch.int16).view(tensor.shape) * 7)


def call(name: str, tensors: Any, residuals: Any, **options: Any) -> None:
    if name == "prepare":
        fk.prepare(tensors, residuals=residuals).seed_axpy_(SEEDS, COEFFS, **options)
    elif name == "perturb_":
        fk.perturb_(tensors, 1, 0.5, residuals=residuals, **options)
    else:
        getattr(fk, name)(tensors, SEEDS, COEFFS, residuals=residuals, **options)


IN_PLACE = ("seed_axpy_", "perturb_", "prepare")
ALL = (*IN_PLACE, "seed_axpy", "seed_axpy_pair")
in_every_function = pytest.mark.parametrize("name", ALL)


@in_every_function
def test_version_counters(name: str) -> None:
    tensor, other = bf16(3, 4), bf16(5)
    residual = residual_of(tensor)
    before = residual.clone()
    call(name, [tensor, other], [residual, None])
    in_place = name in IN_PLACE
    assert (tensor._version, other._version) == (in_place, in_place)
    assert torch.equal(residual, before) != in_place
    assert residual._version == 1 + in_place  # copied into once


@in_every_function
def test_bad_residuals(name: str) -> None:
    tensor, single = bf16(3, 4), torch.ones(4)
    good = residual_of(tensor)
    cases: list[tuple[Any, Any, Any, str]] = [
        (tensor, [good, good], ValueError, "expected 1 residuals, one .or None. for each tensor, got 2"),
        (tensor, 3, TypeError, "list or tuple of int16 tensors or None"),
        (tensor, [3], TypeError, "list or tuple of int16 tensors or None, got .'int'."),
        (tensor, [good.int()], TypeError, r"expected residuals\[0\] in torch.int16, got torch.int32"),
        (single, [torch.zeros(4, dtype=torch.int16)], TypeError, "in bfloat16 or float16 alone, .*float32"),
        (single.double(), [torch.zeros(4, dtype=torch.int16)], TypeError, "alone, .*float64"),
        (tensor, [good.reshape(4, 3)], ValueError, r"strided, of shape \(3, 4\), got \(4, 3\)"),
        (tensor, [good[:0]], ValueError, r"residuals\[0\] of shape \(3, 4\), got \(0, 4\)"),
        (tensor, [good.t().contiguous().t()], ValueError, r"strides of its tensor, \(4, 1\), got \(1, 3\)"),
        (tensor, [good.to("meta")], ValueError, "on cpu like its tensor, got meta"),
        (tensor, [tensor.view(torch.int16)], ValueError, r"residuals\[0\] share memory"),
    ]
    for weights, residuals, error, message in cases:
        with Watch(error, message, tensor, single, good):
            call(name, weights, residuals)
    with Watch(ValueError, r"residuals\[0\] and residuals\[1\] share memory", tensor, good):
        call(name, [tensor, bf16(3, 4)], [good, good])


@pytest.mark.parametrize("name", IN_PLACE)
def test_stochastic_rounding_in_place_is_refused(name: str) -> None:
    tensor = bf16(3, 4)
    residual = residual_of(tensor)
    with Watch(ValueError, "rounding='nearest' for tensors with residuals", tensor, residual):
        call(name, [tensor], [residual], rounding="stochastic", rounding_seed=1)
    call(name, [tensor], [None], rounding="stochastic", rounding_seed=1)


def test_outputs_over_the_input_are_refused() -> None:
    """The residual would no longer belong to the weight."""
    tensor, other = bf16(3, 4), bf16(3, 4)
    residual = residual_of(tensor)
    message = r"expected another output than tensors\[0\] itself, which has residuals; use seed_axpy_"
    with Watch(ValueError, message, tensor, residual):
        call("seed_axpy", [tensor], [residual], out=[tensor])
    for outs in ({"out_plus": [tensor], "out_minus": [other]}, {"out_plus": [other], "out_minus": [tensor]}):
        with Watch(ValueError, message, tensor, other, residual):
            call("seed_axpy_pair", [tensor], [residual], **outs)
    with Watch(
        ValueError, r"out\[0\] and residuals\[0\] share|residuals\[0\] and out\[0\] share", tensor, residual
    ):
        call("seed_axpy", [tensor], [residual], out=[residual.view(torch.bfloat16)])


def test_empty_and_scalar_tensors() -> None:
    tensors = [torch.empty(0, 3, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.float16)]
    residuals = [torch.empty(0, 3, dtype=torch.int16), torch.tensor(0, dtype=torch.int16)]
    fk.perturb_(tensors, 1, 1e-5, residuals=residuals)
    assert tensors[1] == 1
    value = 1 + torch.tensor(1e-5) * fk.normal((), 1, stream=1)
    assert int(residuals[1]) == float(value - 1) * 2**25 > 0


def test_prepared_is_the_function() -> None:
    shapes = [(3, 5), (7,)]
    tensors, twins = ([bf16(*shape) for shape in shapes] for _ in range(2))
    residuals, twins_residuals = ([residual_of(tensors[0]), None] for _ in range(2))
    prepared = fk.prepare(tensors, residuals=residuals)
    for seed in range(3):
        prepared.perturb_(seed, 1e-4)
        fk.perturb_(twins, seed, 1e-4, residuals=twins_residuals)
    assert all(torch.equal(a, b) for a, b in zip(tensors, twins, strict=True))
    assert residuals[0] is not None
    assert twins_residuals[0] is not None
    assert torch.equal(residuals[0], twins_residuals[0])
    keep = residuals[0].data
    residuals[0].data = keep.clone()
    with Watch(RuntimeError, r"expected residuals\[0\] as it was prepared, but its address", *tensors, keep):
        prepared.perturb_(9, 1e-4)


def opcheck_cases() -> dict[str, tuple[Any, ...]]:
    tensors = [bf16(4, 6), torch.linspace(0, 1, 5), bf16(10, 4)[::2, :3]]
    residuals = [
        residual_of(tensors[0]),
        torch.empty(0, dtype=torch.int16),
        torch.zeros(10, 4, dtype=torch.int16)[::2, :3],
    ]
    outs = [[torch.zeros_like(t) for t in tensors] for _ in range(2)]
    wide = [[torch.zeros_like(t, dtype=torch.float32) for t in tensors] for _ in range(2)]
    alpha = torch.tensor(0.75, dtype=torch.float64)
    terms = (torch.tensor(SEEDS), torch.tensor(COEFFS, dtype=torch.float64), alpha, [], [], [], "gaussian")
    nearest, random = (*terms, "nearest", None), (*terms, "stochastic", torch.tensor(9))
    return {
        "seed_axpy_": (tensors, residuals, *nearest),
        "seed_axpy_out": (tensors, residuals, outs[0], None, *random),
        "seed_axpy_pair_out": (tensors, residuals, *outs, None, *nearest),
        "seed_axpy_out, to fp32": (tensors, residuals, wide[0], None, *random),
        "seed_axpy_pair_out, to fp32": (tensors, residuals, *wide, None, *nearest),
    }


@pytest.mark.parametrize("name", sorted(opcheck_cases()))
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.fedkseed, name.partition(",")[0]).default
    assert set(torch.library.opcheck(op, opcheck_cases()[name]).values()) == {"SUCCESS"}


def test_fakes_check_too() -> None:
    """The same errors come under FakeTensorMode, without values."""
    with torch._subclasses.FakeTensorMode():
        tensor, residual = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int16)
        terms = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64))
        rest = (*terms, torch.ones((), dtype=torch.float64), [], [], [], "gaussian")
        one = torch.zeros((), dtype=torch.int64)
        op = torch.ops.fedkseed.seed_axpy_
        op([tensor], [residual], *rest, "nearest", None)
        with pytest.raises(ValueError, match="rounding='nearest'"):
            op([tensor], [residual], *rest, "stochastic", one)
        with pytest.raises(TypeError, match="alone"):
            op([tensor.float()], [residual], *rest, "nearest", None)
        with pytest.raises(ValueError, match="expected 1 residuals"):
            op([tensor], [residual, residual], *rest, "nearest", None)


def step(tensors: list[Tensor], residual: Tensor, seeds: Tensor, coeffs: Tensor) -> list[Tensor]:
    """Both sides read the compensated weights, the update writes them."""
    plus, minus = fk.seed_axpy_pair(tensors, seeds, coeffs, residuals=[residual, None])
    fk.seed_axpy_(tensors, seeds, 0.1 * coeffs, residuals=[residual, None])
    return [*plus, *minus]


def test_compiled() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    counts = []
    eager_tensors, tensors = ([bf16(3, 4), torch.linspace(0, 1, 5)] for _ in range(2))
    eager_residual, residual = (residual_of(eager_tensors[0]) for _ in range(2))
    for seed in range(3):
        seeds, coeffs = torch.tensor([seed, -seed]), torch.tensor([1e-3, 2e-3 * seed], dtype=torch.float64)
        expected = step(eager_tensors, eager_residual, seeds, coeffs)
        got = compiled(tensors, residual, seeds, coeffs)
        counts.append(counter.frame_count)
        for g, e in zip([*got, *tensors, residual], [*expected, *eager_tensors, eager_residual], strict=True):
            assert torch.equal(g, e)
    assert counts[0] in (1, 2)
    assert set(counts) == {counts[0]}
