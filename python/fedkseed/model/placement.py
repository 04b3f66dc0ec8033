"""Where tensors are: a call of the kernels takes those of one device, a model may be spread over several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

import fedkseed_kernels
from fedkseed.model.named_errors import errors_named


def by_device(tensors: Iterable[torch.Tensor]) -> dict[torch.device, list[int]]:
    """Positions of the tensors on each device, devices in the order of their first tensor."""
    positions: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        positions.setdefault(tensor.device, []).append(position)
    return positions


def input_device(model: nn.Module) -> torch.device:
    """Where a model reads its inputs: where its first parameter is; the processor if it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


class Places:
    """Where tensors lie in memory and in which dtype, to notice that they were moved.

    Args:
        tensors: as they are now.
        names: of each, for messages.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        self._tensors, self._names = tensors, names
        self._places = self._current()
        self._shapes = [tensor.shape for tensor in tensors]

    def have_changed(self) -> bool:
        """Whether one is elsewhere, or of another dtype, by now.

        Raises:
            RuntimeError: one has another shape; names the first.
        """
        if self._places == self._current():
            return False
        for name, shape, tensor in zip(self._names, self._shapes, self._tensors, strict=True):
            if tensor.shape != shape:
                raise RuntimeError(
                    f"expected {name} of shape {tuple(shape)} as when the optimizer was made, got "
                    f"{tuple(tensor.shape)}: it was resized, and its noise and the model's ledger belong to "
                    "the shape that it had; make a new optimizer"
                )
        return True

    def _current(self) -> tuple[list[int], list[torch.dtype]]:
        return list(map(torch.Tensor.data_ptr, self._tensors)), [tensor.dtype for tensor in self._tensors]


class PreparedTensors:
    """Tensors checked once for calls in place, one call for each device that they are on.

    Args:
        tensors: on any devices.
        streams: the noise stream of each.
        family: of the noise.
        residuals: for each tensor None or its residual (contract, section 6.5).
        names: of each tensor, by which errors call it; "tensors[i]" of its device if there are none.

    Raises:
        TypeError, ValueError: as `fedkseed_kernels.prepare`.
        RuntimeError: no backend serves a device.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        streams: Sequence[int],
        family: str,
        residuals: Sequence[torch.Tensor | None] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        residuals = [None] * len(tensors) if residuals is None else residuals
        given = list(zip(tensors, streams, residuals, strict=True))
        self._handles: list[tuple[fedkseed_kernels.Prepared, list[str]]] = []
        for positions in by_device(tensors).values() or [[]]:  # without tensors too, arguments are checked
            chosen = [given[position] for position in positions]
            chosen_names = [names[position] for position in positions] if names else []
            with errors_named(chosen_names):
                handle = fedkseed_kernels.prepare(
                    [tensor for tensor, _, _ in chosen],
                    streams=[stream for _, stream, _ in chosen],
                    family=family,
                    residuals=[residual for _, _, residual in chosen],
                )
            self._handles.append((handle, chosen_names))
        with torch.no_grad():
            self.check()

    def check(self) -> None:
        """Moves nothing.

        Raises:
            RuntimeError: a tensor is not where, or what, it was at construction; a device cannot be served.
        """
        for handle, names in self._handles:
            with errors_named(names):
                handle.check()

    def seed_axpy_(self, seeds: Any, coeffs: Any, **options: Any) -> None:
        """`fedkseed_kernels.seed_axpy_` on all of the tensors.

        Raises: as that; what `check` raises comes before any tensor has moved.
        """
        if len(self._handles) > 1:
            self.check()
        for handle, names in self._handles:
            with errors_named(names):
                handle.seed_axpy_(seeds, coeffs, **options)
