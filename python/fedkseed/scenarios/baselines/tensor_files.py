"""Weights in safetensors files: written, read back into a model, and averaged over the files of clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedkseed._extras import require_extra


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Writes them as they stand; returns the file's size in bytes.

    Raises:
        MissingExtraError: safetensors is not installed.
        OSError: no space, no permission.
    """
    require_extra("hf", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(whole, path, dict(metadata))
    except SafetensorError as error:  # of a full disk, too
        raise OSError(f"expected to write {path}, got: {error}") from error
    path.chmod(mode)  # the library's files are for their owner alone
    return path.stat().st_size


@torch.no_grad()
def read_into(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives the tensors of these names the values in the file, which may hold more.

    Raises:
        ValueError: it does not hold one of them with this shape and dtype, which is named, or is damaged.
        OSError: it cannot be opened.
    """
    with opened(path) as file:
        known = set(file.keys())
        for name, tensor in tensors.items():
            found = file.get_tensor(name) if name in known else None
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                got = "none" if found is None else f"{list(found.shape)} of {found.dtype}"
                raise ValueError(
                    f"expected {name} as {list(tensor.shape)} of {tensor.dtype} in {path}, got {got}"
                )
            tensor.copy_(found)


@torch.no_grad()
def average_into(tensors: Mapping[str, torch.Tensor], paths: Sequence[Path], shares: Sequence[int]) -> None:
    """Gives each tensor the mean of the files' ones, weighted by shares, in fp64, rounded once.

    Tensor by tensor, added in the order of the files, of which one is open at a time: what has been read of
    a file counts as memory until it is closed.

    Raises:
        ValueError, OSError: as `opened`.
    """
    whole = sum(shares)
    for name, tensor in tensors.items():
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for path, share in zip(paths, shares, strict=True):
            with opened(path) as file:
                total += file.get_tensor(name).double() * (share / whole)
        tensor.copy_(total)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A context whose value is the file, of the library's class, for reading tensors one by one.

    Raises:
        MissingExtraError: safetensors is not installed.
        ValueError: it is not whole, or no such file.
        OSError: it cannot be opened.
    """
    require_extra("hf", "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"expected a whole safetensors file at {path}, got: {error}") from error
