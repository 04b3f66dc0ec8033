"""Our terms as one call, and the check of its answer against the NumPy reference, on slices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

import fedkseed_kernels
from benchmarks.kernels.weights import Weights
from fedkseed_kernels.contract import reference

#: Elements of each checked slice.
SLICE_ELEMENTS = 96

_INTEGER_VIEWS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of the flattened parameter `index`, which is also its stream."""

    index: int
    start: int
    stop: int


def slices(weights: Weights) -> list[Slice]:
    """Odd starts in the first, the second and a middle parameter, and the last elements of the last one."""
    chosen = []
    last = len(weights.parameters) - 1
    for index in sorted({0, min(1, last), last // 2}):
        start = (weights.parameters[index].numel() // 3) | 1
        chosen.append(Slice(index, start, min(start + SLICE_ELEMENTS, weights.parameters[index].numel())))
    end = weights.parameters[last].numel()
    chosen.append(Slice(last, max(0, end - SLICE_ELEMENTS), end))
    return chosen


def own_variants() -> list[str]:
    """What `forced` takes here: the best instruction set, then AVX2 if that is another.

    Without the native library only "reference".
    """
    usable = fedkseed_kernels.info()["cpu_isas_usable"]
    if not usable:
        return ["reference"]
    return [usable[-1]] + (["avx2"] if "avx2" in usable[:-1] else [])


def forced(variant: str) -> AbstractContextManager[None]:
    """Our kernels use, within the block, this instruction set, or NumPy for "reference"."""
    return (
        fedkseed_kernels.backend("reference") if variant == "reference" else fedkseed_kernels.cpu_isa(variant)
    )


@dataclass(frozen=True)
class Terms:
    """w <- w + sum_k coeffs[k] z(seeds[k]) over all parameters of `weights`, streams by position."""

    weights: Weights
    seeds: Sequence[int]
    coeffs: Sequence[float]
    family: str = "gaussian"

    def apply_(self, variant: str, num_terms: int | None = None) -> None:
        """The whole operation in one call; num_terms cuts it short, for a warm-up."""
        tensors = [parameter.data for parameter in self.weights.parameters]
        with forced(variant):
            fedkseed_kernels.seed_axpy_(
                tensors, self.seeds[:num_terms], self.coeffs[:num_terms], family=self.family
            )

    def check_slices(self, variant: str) -> None:
        """All terms on copies of the slices. Raises AssertionError when a bit differs from the reference."""
        places = slices(self.weights)
        tensors = [_cut(self.weights.pristine, place).clone() for place in places]
        with forced(variant):
            fedkseed_kernels.seed_axpy_(
                tensors,
                self.seeds,
                self.coeffs,
                streams=[place.index for place in places],
                offsets=[place.start for place in places],
                family=self.family,
            )
        self._compare(places, tensors, variant)

    def check_weights(self, variant: str) -> None:
        """The slices of the weights as the last timed sample left them. Raises AssertionError likewise."""
        places = slices(self.weights)
        current = [parameter.data for parameter in self.weights.parameters]
        self._compare(places, [_cut(current, place) for place in places], variant)

    def _compare(self, places: Sequence[Slice], tensors: Sequence[torch.Tensor], variant: str) -> None:
        for place, tensor, expected in zip(places, tensors, self._expected, strict=True):
            if not np.array_equal(_bits(tensor), expected):
                raise AssertionError(
                    f"ours ({variant}), K = {len(self.seeds)}, {self.family}: expected the reference's bits "
                    f"in {place}, got others; run python -m fedkseed_kernels.conformance"
                )

    @cached_property
    def _expected(self) -> list[NDArray[np.unsignedinteger]]:
        return [self._expected_of(place) for place in slices(self.weights)]

    def _expected_of(self, place: Slice) -> NDArray[np.unsignedinteger]:
        piece = _cut(self.weights.pristine, place)
        stored = piece.numpy() if piece.dtype == torch.float32 else _bits(piece)
        result = reference.seed_axpy_array(
            stored,
            np.arange(place.start, place.stop),
            self.seeds,
            self.coeffs,
            dtype=str(piece.dtype).removeprefix("torch."),
            stream=place.index,
            family=self.family,
        )
        return result.view(np.uint32 if piece.dtype == torch.float32 else np.uint16)


def _cut(tensors: Sequence[torch.Tensor], place: Slice) -> torch.Tensor:
    return tensors[place.index].reshape(-1)[place.start : place.stop]


def _bits(tensor: torch.Tensor) -> NDArray[np.unsignedinteger]:
    size = tensor.element_size()
    return tensor.view(_INTEGER_VIEWS[size]).numpy().view(f"u{size}")
