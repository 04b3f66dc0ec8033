"""Support for tests of bad input: an error is expected, and no byte may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fedkseed_kernels as fk

ALL = ("seed_axpy_", "seed_axpy", "seed_axpy_pair", "prepare")
OUT_OF_PLACE = ("seed_axpy", "seed_axpy_pair")


def call(name: str, tensors: Any, seeds: Any = (1, 2), coeffs: Any = (0.5, 0.25), **options: Any) -> None:
    """A public function by name; "prepare" prepares and then calls `seed_axpy_` of the handle."""
    if name == "prepare":
        layout = {k: options.pop(k) for k in ("streams", "offsets", "views", "family") if k in options}
        fk.prepare(tensors, **layout).seed_axpy_(seeds, coeffs, **options)
    else:
        getattr(fk, name)(tensors, seeds, coeffs, **options)


def stored_bytes(tensor: Tensor) -> bytes:
    """All bytes of a tensor's storage, also those outside the tensor."""
    if tensor.device.type != "cpu":
        return b""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
    return whole.numpy().tobytes()


class Watch:
    """Expects an error from a block and that the storages of the given tensors have not changed."""

    def __init__(self, error: Any, match: str, *tensors: Tensor) -> None:
        self._raises = pytest.raises(error, match=match)
        self._tensors = tensors
        self._before = [(stored_bytes(t), t._version) for t in tensors]

    def __enter__(self) -> None:
        self._raises.__enter__()

    def __exit__(self, *exc_info: Any) -> bool:
        caught = self._raises.__exit__(*exc_info)
        assert [(stored_bytes(t), t._version) for t in self._tensors] == self._before
        return bool(caught)


def pair_of_tensors() -> list[Tensor]:
    return [torch.full((3, 4), 0.5), torch.full((6,), 0.25)]
