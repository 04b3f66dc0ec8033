"""Buffers that a forward pass moves: running statistics, counters, caches."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Bytes up to which buffers without fractions are copied too. Larger ones are packed weights or tables, which
#: no forward pass writes: they are only watched.
MAX_COPIED_INTEGERS = 2**22


@dataclass
class _Kept:
    """A buffer as it was: ``version`` is None if torch does not tell when it is written."""

    registry: MutableMapping[str, Tensor | None]
    name: str
    full_name: str
    tensor: Tensor | None
    version: int | None
    copy: Tensor | None


class Buffers:
    """The buffers of all modules that a model has at construction, which can be put back to earlier values.

    Args:
        model: whose modules they are of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = [(name, module) for name, module in model.named_modules() if module._buffers]

    def keep(self, earlier: KeptBuffers | None = None) -> KeptBuffers:
        """What they hold now.

        Args:
            earlier: of the same buffers; its copies of those that have not moved are used again.
        """
        known = {} if earlier is None else {(id(k.registry), k.name): k for k in earlier.entries}
        return KeptBuffers([_keep(*place, known) for place in self._places()])

    def _places(self) -> Iterator[tuple[MutableMapping[str, Tensor | None], str, str]]:
        for prefix, module in self._owners:
            registry = module._buffers
            for name in registry:
                yield registry, name, f"{prefix}.{name}" if prefix else name


class KeptBuffers:
    """What buffers held at a time: their tensors, and copies of the values of those that may be written.

    Attributes:
        entries: one for each buffer.
    """

    def __init__(self, entries: list[_Kept]) -> None:
        self.entries = entries

    @torch.no_grad()
    def restore(self) -> None:
        """Puts exchanged tensors back, and their values into those that were written.

        Raises:
            RuntimeError: one that is too large to keep a copy of was written; names it.
        """
        for kept in self.entries:
            if kept.registry.get(kept.name) is not kept.tensor:
                kept.registry[kept.name] = kept.tensor
            if kept.tensor is None or (kept.version is not None and kept.version == kept.tensor._version):
                continue
            if kept.copy is None:
                raise RuntimeError(
                    f"expected the forward pass to leave the buffer {kept.full_name} alone, "
                    f"{kept.tensor.nbytes} bytes of {kept.tensor.dtype}, got it written: both sides of a "
                    "step have to meet the same values, and no copy is kept of one so large; put the module "
                    "that writes it into eval mode"
                )
            kept.tensor.copy_(kept.copy)
            kept.version = None if kept.version is None else kept.tensor._version


def _keep(
    registry: MutableMapping[str, Tensor | None],
    name: str,
    full_name: str,
    known: dict[tuple[int, str], _Kept],
) -> _Kept:
    tensor = registry[name]
    if tensor is None:
        return _Kept(registry, name, full_name, None, None, None)
    version = None if _is_written_unseen(tensor) else tensor._version
    earlier = known.get((id(registry), name))
    has_moved = (
        earlier is None or earlier.tensor is not tensor or version is None or version != earlier.version
    )
    copy = _copy(tensor) if earlier is None or has_moved else earlier.copy
    return _Kept(registry, name, full_name, tensor, version, copy)


def _is_written_unseen(tensor: Tensor) -> bool:
    """Whether its version counter may stand still when it is written: batch norm writes its statistics so."""
    if tensor.is_inference():
        return True
    return tensor.is_floating_point() and tensor.dim() <= 1 and _is_writable(tensor)


def _copy(tensor: Tensor) -> Tensor | None:
    if tensor.layout is torch.strided and not _is_writable(tensor):
        return None  # torch refuses to write it in place
    has_fractions = tensor.is_floating_point() or tensor.is_complex()
    if not has_fractions and tensor.nbytes > MAX_COPIED_INTEGERS:
        return None
    return tensor.detach().clone()


def _is_writable(tensor: Tensor) -> bool:
    """Whether no two elements share memory by expansion."""
    return all(stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
