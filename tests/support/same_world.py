"""Support for tests of the world beside the weights: modes, modules that draw or move, their reference."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkseed import ZOSGD, Inplace, Streamed
from fedkseed.storage import StorageOptions
from fedkseed_kernels.contract import derived
from support import storage_reference as reference_of
from support.moving_models import drawing, make_model, moving
from support.small_model import same_bytes

SEED, ROWS = 5, 12
WIDE = Streamed(compute_dtype=torch.float32)
PAIRED = Streamed(paired=True)

#: Of each mode what happens to weights in memory, wider than 16 bits and of 16.
MODES: dict[str, tuple[StorageOptions, type[reference_of.Reference], type[reference_of.Reference]]] = {
    "in place": (Inplace(), reference_of.InplaceReference, reference_of.InplaceReference),
    "in place, stochastic": (
        Inplace(rounding="stochastic"),
        reference_of.InplaceReference,
        reference_of.stochastic(reference_of.InplaceReference),
    ),
    "chained": (Inplace(chained=True), reference_of.ChainedReference, reference_of.ChainedReference),
    "chained, stochastic": (
        Inplace(chained=True, rounding="stochastic"),
        reference_of.ChainedReference,
        reference_of.stochastic(reference_of.ChainedReference),
    ),
    "streamed": (Streamed(), reference_of.StreamedReference, reference_of.StreamedReference),
    "streamed, stochastic": (
        Streamed(rounding="stochastic"),
        reference_of.StreamedReference,
        reference_of.stochastic(reference_of.StreamedReference),
    ),
    "streamed in fp32": (WIDE, reference_of.StreamedReference, reference_of.StreamedFloatReference),
    "compensated": (
        Streamed(compensated=True),
        reference_of.StreamedReference,
        reference_of.CompensatedReference,
    ),
    "compensated in fp32": (
        Streamed(compensated=True, compute_dtype=torch.float32),
        reference_of.StreamedReference,
        reference_of.CompensatedFloatReference,
    ),
    "paired": (PAIRED, reference_of.StreamedReference, reference_of.StreamedReference),
    "paired in fp32": (
        Streamed(paired=True, compute_dtype=torch.float32),
        reference_of.StreamedReference,
        reference_of.StreamedFloatReference,
    ),
}
#: dtype of the weights, eps, and where autocast is.
PRECISIONS: dict[str, tuple[torch.dtype, float, str]] = {
    "fp64": (torch.float64, 2.0**-20, "nowhere"),
    "fp32": (torch.float32, 2.0**-10, "nowhere"),
    "bf16": (torch.bfloat16, 2.0**-5, "nowhere"),
    "autocast around the step": (torch.float32, 2.0**-5, "around"),
    "autocast in the closure": (torch.float32, 2.0**-5, "within"),
}
DRAWING, MOVING = drawing(), moving()
KINDS = {**DRAWING, **MOVING, "nothing": nn.Identity}
#: Modes that round, or widen, what is wider than 16 bits already do so no more.
PLAIN_MODES = ("in place", "chained", "streamed", "paired")


def served(mode: str, precision: str) -> bool:
    return precision == "bf16" or mode in PLAIN_MODES


EVERY = [(mode, precision) for precision in PRECISIONS for mode in MODES if served(mode, precision)]
#: Kinds that stand for the others where a step is not a plain one.
SOME = ("torch", "np.random.Generator", "Python", "batch norm", "in place", "exchanged", "counter", "shared")


def inputs() -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def loss_of(model: nn.Module, is_paired: bool = False) -> Any:
    x = inputs().to(next(model.parameters()).dtype)
    y = (model(torch.cat([x, x]) if is_paired else x).double() - 1).square()
    return tuple(half.mean() for half in y.chunk(2)) if is_paired else y.mean()


def global_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()


def set_global_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def seed_all() -> None:
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)


class World:
    """Evaluates each side on a copy of the model and its surroundings, as both were at construction.

    Attributes:
        model, states: what the last one left.
    """

    def __init__(
        self, model: nn.Module, states: tuple[Any, ...], evaluate: Callable[[nn.Module], Any]
    ) -> None:
        self._start, self._states, self._evaluate = copy.deepcopy(model), states, evaluate
        self.model, self.states = self._start, states

    def __call__(self, perturbed: nn.Module) -> float:
        dtype = next(perturbed.parameters()).dtype
        self.model = copy.deepcopy(self._start).to(dtype)
        self.model.load_state_dict(dict(perturbed.named_parameters()), strict=False)
        set_global_states(self._states)
        torch.clear_autocast_cache()
        loss = float(self._evaluate(self.model))
        self.states = global_states()
        return loss

    def next(self, model: nn.Module) -> World:
        """Goes on from what the last one left, in the dtypes in which the model stores it."""
        left = copy.deepcopy(self.model)
        for module, stored in zip(left.modules(), model.modules(), strict=True):
            for name, buffer in stored.named_buffers(recurse=False):
                module._buffers[name] = module._buffers[name].to(buffer.dtype)  # type: ignore[union-attr]
        return World(left, self.states, self._evaluate)


class Case:
    """A model, its closure, and what it has to come to."""

    def __init__(self, kind: str, mode: str, precision: str, num_directions: int = 1, **options: Any) -> None:
        self.dtype, eps, place = PRECISIONS[precision]
        self.storage, *references = MODES[mode]
        self.model = make_model(KINDS[kind], self.dtype, **options)
        self.reference = references[self.dtype == torch.bfloat16](self.model, eps, 0.0, 0.0, SEED)
        self.is_paired = getattr(self.storage, "paired", False)
        self._place = place
        seed_all()
        self.world = World(self.model, global_states(), lambda model: self._within(model, False))
        self.optimizer = ZOSGD(
            self.model, 0.0, eps, seed=SEED, storage=self.storage, num_directions=num_directions
        )
        self.seeds = [int(seed) for seed in derived.candidate_seeds(SEED, 2 * num_directions + 1)]
        self.eps = eps
        self._dtypes = {name: buffer.dtype for name, buffer in self.model.named_buffers()}

    def around(self) -> AbstractContextManager[Any]:
        return autocast() if self._place == "around" else nullcontext()

    def closure(self) -> Any:
        return self._within(self.model, self.is_paired)

    def _within(self, model: nn.Module, is_paired: bool) -> Any:
        with torch.no_grad(), autocast() if self._place == "within" else nullcontext():
            return loss_of(model, is_paired)

    @contextmanager
    def by_reference(self) -> Iterator[None]:
        """The world of the reference; the model's comes back."""
        states = global_states()
        with torch.no_grad(), self.around():
            yield
        set_global_states(states)
        torch.clear_autocast_cache()

    def check_world(self, world: World) -> None:
        """The model's surroundings are those."""
        for mine, theirs in zip(global_states(), world.states, strict=True):
            assert str(mine) == str(theirs)
            if isinstance(mine, torch.Tensor):
                assert torch.equal(mine, theirs)
        ours, theirs = dict(self.model.named_buffers()), dict(world.model.named_buffers())
        assert list(ours) == list(theirs)
        assert {name: ours[name].dtype for name in self._dtypes} == self._dtypes
        # Those of a copy that was widened are.
        assert same_bytes(list(ours.values()), [theirs[name].to(b.dtype) for name, b in ours.items()])
        for mine, other in zip(self.model.modules(), world.model.modules(), strict=True):
            if hasattr(mine, "owned"):
                assert drawn(mine) == drawn(other)


def drawn(module: Any) -> float:
    """What comes next of a module's generators, copied."""
    return module.draw(copy.deepcopy(module.owned)) if module.owned is not None else 0.0


def directions(case: Case, num_directions: int) -> list[tuple[float, float]]:
    """The losses of the reference along the first seeds, by the passes of a step along several."""
    reference, eps, losses = case.reference, case.eps, []
    standing: list[int] = []
    for seed in case.seeds[:num_directions]:
        if isinstance(reference, reference_of.InplaceReference):
            reference.move([*standing, seed], [eps] * (len(standing) + 1))
            losses.append(reference.both(seed, case.world))
            standing = [seed]
        else:
            losses.append(reference.losses(seed, case.world))
            reference.num_passes += 1
    return losses


def is_refused(kind: str, mode: str) -> bool:
    """Both halves of a doubled batch would draw different numbers."""
    return mode.startswith("paired") and kind in DRAWING
