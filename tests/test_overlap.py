"""Tensors that share memory are refused, tensors that only interleave are not: the search is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.unchanged import ALL, Watch, call
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels.arguments.overlap import _has_solution, overlaps_itself


def overlapping(kind: str) -> list[Tensor]:
    memory = torch.arange(64.0)
    matrix = memory.view(8, 8)
    return {
        "same": [memory, memory],
        "alias": [memory, memory.view(8, 8)],
        "last_element": [memory[:33], memory[32:]],
        "contained": [memory, matrix[3:5]],
        "far_apart_in_list": [memory[:8], memory[8:16], memory[20:30], memory[7:8]],
        "columns": [matrix[:, :4], matrix[:, 3:6]],
        "columns_of_other_steps": [matrix[:, ::2], matrix[::2, 4:5]],
        "row_and_transposed": [matrix[2:3], matrix.t()[5:6]],
        "half_an_element": [memory[:32], memory.view(torch.bfloat16)[63:]],
        "across_dtypes_strided": [matrix[:, :4], matrix.view(torch.float16)[:, 7:9]],
    }[kind]


OVERLAPPING = [
    "same",
    "alias",
    "last_element",
    "contained",
    "far_apart_in_list",
    "columns",
    "columns_of_other_steps",
    "row_and_transposed",
    "half_an_element",
    "across_dtypes_strided",
]


@pytest.mark.parametrize("kind", OVERLAPPING)
@pytest.mark.parametrize("name", ALL)
def test_overlapping_tensors(name: str, kind: str) -> None:
    tensors = overlapping(kind)
    with Watch(ValueError, "do not overlap, but .* share memory", *tensors):
        call(name, tensors)


def disjoint(kind: str) -> list[Tensor]:
    memory = torch.arange(64.0)
    matrix = memory.view(8, 8)
    return {
        "neighbours": [memory[:32], memory[32:]],
        "columns": [matrix[:, 4:], matrix[:, :4]],
        "every_other": [memory[::2], memory[1::2]],
        "checkers": [matrix[::2, ::2], matrix[1::2, 1::2], matrix[::2, 1::2], matrix[1::2, ::2]],
        "other_steps": [matrix[:, ::2], matrix[::2, 5:6]],
        "row_beside_transposed": [matrix[2:3, :5], matrix.t()[5:6]],
        "across_dtypes": [matrix[:, :4], matrix.view(torch.float16)[:, 8:]],
        "empty": [memory, memory[3:3], memory[5:5]],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "neighbours",
        "columns",
        "every_other",
        "checkers",
        "other_steps",
        "row_beside_transposed",
        "across_dtypes",
        "empty",
    ],
)
def test_tensors_that_only_interleave_are_accepted(kind: str) -> None:
    call("seed_axpy_", disjoint(kind))


def test_the_overlap_search_is_exact() -> None:
    """Random pairs of views of one storage against sets of addresses."""
    generator = np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for _ in range(300):
        memory = torch.zeros(60)
        views = []
        for _ in range(2):
            sizes = generator.integers(1, 4, size=3).tolist()
            strides = generator.integers(1, 9, size=3).tolist()
            if overlaps_itself(sizes, strides):
                continue
            views.append(memory.as_strided(sizes, strides, int(generator.integers(0, 10))))
        if len(views) < 2:
            continue
        addresses = [
            set(torch.arange(60).as_strided(v.shape, v.stride(), v.storage_offset()).flatten().tolist())
            for v in views
        ]
        expected = bool(addresses[0] & addresses[1])
        seen[expected] += 1
        try:
            fk.perturb_(views, 1, 0.0)
            assert not expected
        except ValueError:
            assert expected
    assert min(seen.values()) > 30


def test_the_self_overlap_search_is_exact() -> None:
    generator = np.random.default_rng(1)
    seen = {True: 0, False: 0}
    for _ in range(400):
        sizes = generator.integers(1, 5, size=3).tolist()
        strides = generator.integers(0, 12, size=3).tolist()
        elements = torch.arange(100).as_strided(sizes, strides).flatten().tolist()
        expected = len(set(elements)) < len(elements)
        seen[expected] += 1
        assert overlaps_itself(sizes, strides) is expected
    assert min(seen.values()) > 30


def test_the_overlap_found_is_of_a_changed_tensor() -> None:
    """Random views of one storage, of which some may share memory among themselves."""
    generator = np.random.default_rng(2)
    seen = {True: 0, False: 0}
    for _ in range(400):
        memory, views, addresses = torch.zeros(200), [], []
        while len(views) < 6:
            sizes, strides = (
                generator.integers(1, 4, size=2).tolist(),
                generator.integers(1, 9, size=2).tolist(),
            )
            if not overlaps_itself(sizes, strides):
                view = memory.as_strided(sizes, strides, int(generator.integers(0, 170)))
                views.append(view)
                place = torch.arange(200).as_strided(view.shape, view.stride(), view.storage_offset())
                addresses.append(set(place.flatten().tolist()))
        pairs = {
            (i, j) for i in range(2) for j in range(i + 1, 6) if addresses[i] & addresses[j]
        }  # of the last four nothing is changed
        found = fk.find_overlap(views[:2], views[2:])
        seen[found is None] += 1
        assert (found is None) == (not pairs)
        assert found is None or (found.is_certain and found[:2] in pairs)
    assert min(seen.values()) > 100


def test_a_search_that_would_be_long_gives_up() -> None:
    strides = [10007 + 2 * i for i in range(12)]
    unknowns = [(s, -50, 50) for s in strides]
    assert _has_solution(unknowns, 5 * sum(strides) + 1) is None
    assert _has_solution(unknowns, 51 * sum(strides)) is False
    # Divisibility settles this one at once.
    assert _has_solution([(2 * s, -50, 50) for s in strides], 5 * sum(strides) + 1) is False


def test_strides_too_irregular_are_refused() -> None:
    sizes, strides = (9, 9, 9, 9, 9, 9), (100, 101, 103, 107, 109, 113)
    memory = torch.zeros(6000)
    weights = memory.as_strided(sizes, strides)
    with Watch(ValueError, "expected each element to have memory of its own", memory):
        call("seed_axpy_", weights)


@pytest.mark.parametrize("name", ["seed_axpy_", "prepare"])
def test_self_overlapping_tensor_in_place(name: str) -> None:
    base = torch.ones(3, 1)
    for tensor in (base.expand(3, 4), torch.ones(8).as_strided((4, 4), (1, 1))):
        with Watch(ValueError, r"tensors\[0\] with elements that share memory", base, tensor):
            call(name, tensor)
        with Watch(ValueError, r"out\[0\] with elements that share memory", base, tensor):
            fk.seed_axpy(tensor, [1], [0.5], out=tensor)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0, 2])])
def test_inputs_that_are_only_read_may_repeat_memory(
    rows: torch.Tensor | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDKSEED_BACKEND", backend)
    for tensor in (
        torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 4),
        torch.arange(8.0).as_strided((4, 4), (1, 1)),
        torch.tensor(-0.0, dtype=torch.bfloat16).expand(5, 3),
    ):
        (got,) = fk.seed_axpy(tensor, [1], [0.5], rows=rows)
        (expected,) = fk.seed_axpy(tensor.clone(memory_format=torch.contiguous_format), [1], [0.5], rows=rows)
        assert torch.equal(got, expected)
        plus, minus = fk.seed_axpy_pair(tensor, [1], [-0.5], rows=rows)
        assert torch.equal(minus[0], expected)
        assert not torch.equal(plus[0], expected)


def test_outputs_that_overlap_inputs() -> None:
    memory = torch.arange(20.0)
    inputs = [memory[:8], memory[8:16]]
    for outs in ([memory[1:9], torch.ones(8)], [memory[8:16], torch.ones(8)], [memory[8:16], memory[:8]]):
        with Watch(ValueError, "do not overlap", memory, *outs):
            fk.seed_axpy(inputs, [1], [0.5], out=outs)
    square = torch.arange(16.0).view(4, 4)
    with Watch(ValueError, "do not overlap", square):
        fk.seed_axpy(square, [1], [0.5], out=square.t())


def test_both_sides_in_the_same_memory() -> None:
    tensor, out = torch.ones(4), torch.ones(4)
    with Watch(ValueError, "expected two outputs, got", tensor, out):
        fk.seed_axpy_pair(tensor, [1], [0.5], out_plus=out, out_minus=out)
    with Watch(ValueError, "expected two outputs, got", tensor):
        fk.seed_axpy_pair(tensor, [1], [0.5], out_plus=tensor, out_minus=tensor)
    longer = torch.ones(5)
    with Watch(ValueError, r"out_plus\[0\] and out_minus\[0\] share memory", tensor, longer):
        fk.seed_axpy_pair(tensor, [1], [0.5], out_plus=longer[1:], out_minus=longer[:4])
