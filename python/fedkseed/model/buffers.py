"""Buffers that a forward pass moves: running statistics, counters, caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Bytes up to which buffers without fractions are copied too. Larger ones are packed weights or tables, which
#: no forward pass writes: they are only watched.
MAX_COPIED_INTEGERS = 2**22
#: Bytes up to which buffers without fractions are counters that a forward pass may write by ``.data``, which
#: torch does not count; larger ones are masks and indices.
_MAX_COUNTER = 2**10

_Registry = MutableMapping[str, Tensor | None]


@dataclass
class _Kept:
    """A buffer as it was: ``version`` is None if torch does not tell when it is written."""

    registry: _Registry
    name: str
    full_name: str
    tensor: Tensor | None
    version: int | None
    copy: Tensor | None


class Buffers:
    """The buffers of modules, which can be put back to earlier values.

    Args:
        modules: all that hold them, by name, as ``model.named_modules()``.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._owners = [(name, _registry(module)) for name, module in modules]

    def keep(self, earlier: KeptBuffers | None = None) -> KeptBuffers:
        """What they hold now.

        Args:
            earlier: of the same buffers; its copies of those that have not moved are used again.
        """
        known = {} if earlier is None else {(id(k.registry), k.name): k for k in earlier.entries}
        return KeptBuffers([_keep(*place, known) for place in self._places()], self._owners)

    def _places(self) -> Iterator[tuple[_Registry, str, str]]:
        for prefix, registry in self._owners:
            for name in registry:
                yield registry, name, _full_name(prefix, name)


class KeptBuffers:
    """What buffers held at a time: their tensors, and copies of the values of those that may be written.

    Args:
        entries: one for each buffer.
        owners: what all modules hold, as they do now, by their names.

    Attributes:
        entries: as given.
    """

    def __init__(self, entries: list[_Kept], owners: Sequence[tuple[str, _Registry]]) -> None:
        self.entries = entries
        self._owners = owners
        self._counts = [len(registry) for _, registry in owners]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts exchanged tensors back, and their values into those that were written; takes new ones out.

        Raises:
            RuntimeError: one that is too large to keep a copy of was written; names it.
        """
        if [len(registry) for _, registry in self._owners] != self._counts:
            for (_, registry), count in zip(self._owners, self._counts, strict=True):
                for name in list(registry)[count:]:  # registered since, behind those that were there
                    del registry[name]
        for kept in self.entries:
            if kept.registry.get(kept.name) is not kept.tensor:
                kept.registry[kept.name] = kept.tensor
            if kept.tensor is None or (kept.version is not None and kept.version == kept.tensor._version):
                continue
            if kept.copy is None and kept.version is None:
                continue  # of inference mode and not to be written, or too large to be looked at
            if kept.copy is None:
                raise RuntimeError(
                    f"expected the forward pass to leave the buffer {kept.full_name} alone, "
                    f"{kept.tensor.nbytes} bytes of {kept.tensor.dtype}, got it written: both sides of a "
                    "step have to meet the same values, and no copy is kept of one so large; put the module "
                    "that writes it into eval mode"
                )
            if kept.tensor.shape != kept.copy.shape:  # exchanged by .data
                kept.tensor.data = torch.empty_like(kept.copy)
            with torch.inference_mode() if kept.tensor.is_inference() else nullcontext():
                kept.tensor.copy_(kept.copy)
            kept.version = None if kept.version is None else kept.tensor._version

    def first_moved(self) -> str | None:
        """The name of a buffer that holds something else by now, or of one that is new; None if all stand."""
        for kept in self.entries:
            if not _stands(kept, kept.registry.get(kept.name)):
                return kept.full_name
        for (prefix, registry), count in zip(self._owners, self._counts, strict=True):
            for name in list(registry)[count:]:
                return _full_name(prefix, name)
        return None


def _registry(module: nn.Module) -> _Registry:
    """What a module holds its buffers in; a copy of that for TorchScript, which only writes them in place."""
    held = module._buffers
    return held if isinstance(held, dict) else dict(held.items())


def _keep(
    registry: _Registry,
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


def _full_name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _stands(kept: _Kept, now: Tensor | None) -> bool:
    """Whether what a module holds now is what was kept, or equal to it."""
    if now is None or kept.tensor is None:
        return now is kept.tensor
    if now is kept.tensor and kept.version is not None and kept.version == now._version:
        return True
    copy = kept.tensor if kept.copy is None and now is not kept.tensor else kept.copy
    if copy is None or (now.shape, now.dtype, now.device) != (copy.shape, copy.dtype, copy.device):
        return False
    return torch.equal(now, copy) or (
        now.is_floating_point() and now.allclose(copy, rtol=0, atol=0, equal_nan=True)
    )


def _is_written_unseen(tensor: Tensor) -> bool:
    """Whether its version counter may stand still when it is written, through ``.data`` or by batch norm."""
    if tensor.is_inference():
        return True
    if tensor.layout is not torch.strided:
        return False
    has_fractions = tensor.is_floating_point() or tensor.is_complex()
    return (has_fractions or tensor.nbytes <= _MAX_COUNTER) and _is_writable(tensor)


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
