"""Buffers that a forward pass moves: running statistics, counters, caches."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkseed.model.registries import registry_of

#: Bytes up to which buffers without fractions are copied too. Larger ones are packed weights or tables, which
#: no forward pass writes: they are only watched.
MAX_COPIED_INTEGERS = 2**22
#: Bytes up to which buffers without fractions are counters that a forward pass may write by ``.data``, which
#: torch does not count; larger ones are masks and indices.
_MAX_COUNTER = 2**10

_Registry = MutableMapping[str, Tensor | None]


@dataclass
class _Kept:
    """A buffer as it was.

    ``version`` is None if torch counts no writes of it at all; ``is_counted`` says that it counts every one.
    """

    registry: _Registry
    name: str
    full_name: str
    tensor: Tensor | None
    version: int | None
    is_counted: bool
    copy: Tensor | None

    def stands(self) -> bool:
        """Whether the same tensor is held, in which the same values stand; False if only reading it tells."""
        tensor, copy = self.tensor, self.copy
        if self.registry.get(self.name) is not tensor:
            return False
        if tensor is None:
            return self.name in self.registry
        if copy is None and self.version is None:
            return True  # of inference mode and not to be written, or too large to be looked at
        if self.version is not None and self.version != tensor._version:
            return False
        return self.is_counted or (
            # Not on an accelerator, which the comparison would wait for.
            copy is not None and tensor.dtype == copy.dtype and tensor.is_cpu and _are_equal(tensor, copy)
        )


class Buffers:
    """The buffers of modules, which can be put back to earlier values.

    Args:
        modules: all that hold them, by name, as ``model.named_modules()``.

    Attributes:
        owners: (name of a module, what it holds its buffers in).
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.owners = [(name, registry_of(module._buffers)) for name, module in modules]
        self._registries = [registry for _, registry in self.owners]

    def keep(self, earlier: KeptBuffers | None = None) -> KeptBuffers:
        """What they hold now.

        Args:
            earlier: of the same buffers; what is kept there of those that have not moved is used again.
        """
        standing = {} if earlier is None else earlier.standing()
        if earlier is not None and len(standing) == len(earlier.entries) == self.count():
            return earlier
        entries = [
            standing.get((id(registry), name)) or _keep(registry, name, prefix)
            for prefix, registry in self.owners
            for name in registry
        ]
        return KeptBuffers(entries, self)

    def count(self) -> int:
        """How many there are now; asked for before each side, so without a line of Python for each module."""
        return sum(map(len, self._registries))


class KeptBuffers:
    """What buffers held at a time: their tensors, and copies of the values of those that may be written.

    Args:
        entries: one for each buffer.
        buffers: as they are now.

    Attributes:
        entries: as given.
    """

    def __init__(self, entries: list[_Kept], buffers: Buffers) -> None:
        self.entries = entries
        self._buffers = buffers

    @torch.no_grad()
    def restore(self) -> None:
        """Puts exchanged tensors back, and their values into those that were written; takes new ones out.

        What stands is not written, for it may lie in memory that must only be read.

        Raises:
            RuntimeError: one that is too large to keep a copy of was written; names it.
        """
        for kept in self.entries:
            if not kept.stands():
                _put_back(kept)
        for _, registry, name in self._new():
            del registry[name]

    def standing(self) -> dict[tuple[int, str], _Kept]:
        """Those that have not moved, by registry and name."""
        return {(id(kept.registry), kept.name): kept for kept in self.entries if kept.stands()}

    def first_moved(self) -> str | None:
        """The name of a buffer that holds something else by now, or of one that is new; None if all stand."""
        for kept in self.entries:
            if not _stands(kept, kept.registry.get(kept.name)):
                return kept.full_name
        return next((_full_name(prefix, name) for prefix, _, name in self._new()), None)

    def _new(self) -> list[tuple[str, _Registry, str]]:
        """Those that modules hold beside the ones of then, which they hold all."""
        if self._buffers.count() == len(self.entries):
            return []
        known = {(id(kept.registry), kept.name) for kept in self.entries}
        return [
            (prefix, registry, name)
            for prefix, registry in self._buffers.owners
            for name in registry
            if (id(registry), name) not in known
        ]


def _keep(registry: _Registry, name: str, prefix: str) -> _Kept:
    tensor, full_name = registry[name], _full_name(prefix, name)
    if tensor is None:
        return _Kept(registry, name, full_name, None, None, True, None)
    version = None if tensor.is_inference() else tensor._version
    return _Kept(registry, name, full_name, tensor, version, _is_counted(tensor), _copy(tensor))


def _put_back(kept: _Kept) -> None:
    """Raises: see `KeptBuffers.restore`."""
    tensor, copy = kept.tensor, kept.copy
    kept.registry[kept.name] = tensor
    if tensor is None or (kept.is_counted and kept.version == tensor._version):
        return
    if copy is None:
        if kept.version is None or kept.version == tensor._version:
            return
        raise RuntimeError(
            f"expected the forward pass to leave the buffer {kept.full_name} alone, "
            f"{tensor.nbytes} bytes of {tensor.dtype}, got it written: both sides of a "
            "step have to meet the same values, and no copy is kept of one so large; put the module "
            "that writes it into eval mode"
        )
    if tensor.shape != copy.shape:  # exchanged by .data
        tensor.data = torch.empty_like(copy)
    with torch.inference_mode() if tensor.is_inference() else nullcontext():
        tensor.copy_(copy)
    kept.version = None if kept.version is None else tensor._version


def _full_name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _stands(kept: _Kept, now: Tensor | None) -> bool:
    """Whether what a module holds now is what was kept, or equal to it."""
    if now is None or kept.tensor is None:
        return now is kept.tensor
    if now is kept.tensor and kept.is_counted and kept.version == now._version:
        return True
    copy = kept.tensor if kept.copy is None and now is not kept.tensor else kept.copy
    if copy is None or (now.shape, now.dtype, now.device) != (copy.shape, copy.dtype, copy.device):
        return False
    return _are_equal(now, copy) or (
        now.is_floating_point() and now.allclose(copy, rtol=0, atol=0, equal_nan=True)
    )


def _are_equal(tensor: Tensor, copy: Tensor) -> bool:
    try:
        return torch.equal(tensor, copy)
    except RuntimeError:  # of a dtype that torch can copy and not compare
        return False


def _is_counted(tensor: Tensor) -> bool:
    """Whether its version counter moves whenever it is written; not through ``.data`` or by batch norm."""
    if tensor.is_inference():
        return False
    if tensor.layout is not torch.strided:
        return True
    has_fractions = tensor.is_floating_point() or tensor.is_complex()
    return not (has_fractions or tensor.nbytes <= _MAX_COUNTER) or not _is_writable(tensor)


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
