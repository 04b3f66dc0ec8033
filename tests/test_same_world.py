"""Both sides of a step meet the same world in every storage mode: generators, buffers, the autocast cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import storage_reference as reference_of
from support.moving_models import Block, make_model
from support.same_world import (
    DRAWING,
    EVERY,
    KINDS,
    MODES,
    MOVING,
    PAIRED,
    PLAIN_MODES,
    ROWS,
    SEED,
    SOME,
    Case,
    World,
    directions,
    global_states,
    is_refused,
    loss_of,
    set_global_states,
)
from support.streamed_models import projected
from torch import nn

import fedkseed_kernels
from fedkseed import ZOSGD, Inplace
from fedkseed_kernels.contract import derived

pytestmark = pytest.mark.filterwarnings("ignore:the model is in train mode with dropout")


@pytest.mark.few(120)
@pytest.mark.parametrize(
    ("kind", "mode", "precision"),
    [
        (kind, mode, precision)
        for kind in KINDS
        for mode, precision in EVERY
        if not is_refused(kind, mode) and not (kind in DRAWING and precision == "autocast in the closure")
    ],
)
def test_g_is_that_of_copies_in_the_same_world(kind: str, mode: str, precision: str) -> None:
    case = Case(kind, mode, precision)
    for step in range(2):
        with case.by_reference():
            losses = case.reference.losses(case.seeds[step], case.world)
        with case.around():
            case.optimizer.step(case.closure)
        (g,) = case.optimizer.projected_grads
        assert g == projected(list(losses), case.eps) != 0
        case.check_world(case.world)
        case.reference.update(case.seeds[step], g, case.seeds[step + 1])
        case.world = case.world.next(case.model)


@pytest.mark.few(30)
@pytest.mark.parametrize("mode", PLAIN_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_g_is_the_slope_between_copies_that_were_perturbed(kind: str, mode: str) -> None:
    if is_refused(kind, mode):
        return
    case = Case(kind, mode, "fp64")
    states, losses = global_states(), []
    for sign in (1, -1):
        side = copy.deepcopy(case.model)
        set_global_states(states)
        with torch.no_grad():
            fedkseed_kernels.perturb_(list(side.parameters()), case.seeds[0], sign * case.eps)
            losses.append(float(loss_of(side)))
    set_global_states(states)
    case.optimizer.step(case.closure)
    (g,) = case.optimizer.projected_grads
    assert g == pytest.approx(projected(losses, case.eps), rel=0.01)
    assert abs(g) > 1e-3


@pytest.mark.few(30)
@pytest.mark.parametrize(("mode", "precision"), [pair for pair in EVERY if pair[1] in ("fp32", "bf16")])
@pytest.mark.parametrize("kind", SOME)
def test_along_three_directions(kind: str, mode: str, precision: str) -> None:
    if is_refused(kind, mode):
        return
    case = Case(kind, mode, precision, num_directions=3)
    with case.by_reference():
        losses = directions(case, 3)
    with case.around():
        case.optimizer.step(case.closure)
    assert case.optimizer.projected_grads == tuple(projected(list(pair), case.eps) for pair in losses)
    case.check_world(case.world)


@pytest.mark.few(30)
@pytest.mark.parametrize(("mode", "precision"), [pair for pair in EVERY if pair[1] in ("fp32", "bf16")])
@pytest.mark.parametrize("kind", SOME)
def test_two_measures_and_a_step(kind: str, mode: str, precision: str) -> None:
    """The second begins in the world that the first left."""
    if is_refused(kind, mode):
        return
    case = Case(kind, mode, precision)
    reference, (seed, *_), eps, losses = case.reference, case.seeds, case.eps, []
    for number in range(2):
        with case.by_reference():
            if number and isinstance(reference, reference_of.ChainedReference):
                reference.move([seed], [2 * eps])
                losses.append(reference.both(seed, case.world))
            else:
                losses.append(reference.losses(seed, case.world))
                if type(reference).losses is reference_of.InplaceReference.losses:
                    reference.move([seed], [eps])
        with case.around():
            case.optimizer.measure(case.closure)
        case.check_world(case.world)
        case.world = case.world.next(case.model)
    case.optimizer.step()
    means = [(first + second) / 2 for first, second in zip(*losses, strict=True)]
    assert case.optimizer.projected_grads == (projected(means, eps),)
    case.check_world(case.world)


@pytest.mark.few(28)
@pytest.mark.parametrize("mode", [*PLAIN_MODES, "streamed in fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_to_nothing_leaves_the_world_as_it_was(kind: str, mode: str) -> None:
    if is_refused(kind, mode):
        return
    num_directions = 3 if kind in SOME else 1
    case = Case(kind, mode, "bf16", num_directions)
    calls: list[int] = []

    def no_number() -> Any:
        case.closure()
        return (float("nan"),) * 2 if case.is_paired else float("nan")

    def fails() -> Any:
        case.closure()
        calls.append(1)
        if len(calls) == (1 if case.is_paired else 2 * num_directions):
            raise OSError("gone")
        return case.closure()

    case.optimizer.step(no_number)
    assert case.optimizer.num_skipped == num_directions
    case.check_world(case.world)
    with pytest.raises(OSError, match="gone"):
        case.optimizer.step(fails)
    case.check_world(case.world)
    calls.clear()
    case.optimizer.measure(case.closure)
    with pytest.raises(OSError, match="gone"):
        case.optimizer.measure(fails)
    case.check_world(case.world)
    case.optimizer.measure(case.closure)
    case.optimizer.measure(case.closure)
    case.optimizer.discard()
    case.check_world(case.world)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", DRAWING)
def test_paired_refuses_random_numbers(kind: str, outside: bool) -> None:
    case = Case(kind, "paired", "fp32", outside=outside)
    with pytest.raises(RuntimeError, match="without random numbers in a paired step"):
        case.optimizer.step(case.closure)
    case.check_world(case.world)


@pytest.mark.parametrize("kind", [kind for kind in MOVING if kind != "spectral_norm"])
def test_paired_refuses_what_moves_outside_of_its_units(kind: str) -> None:
    """Both halves run through it at once; with weights of its own it is a unit.

    The old spectral_norm is refused in all streamed modes there: its hook reads the weight first.
    """
    case = Case(kind, "paired", "fp32", outside=True)
    if any(True for _ in case.model[2].parameters()):
        with case.by_reference():
            losses = case.reference.losses(case.seeds[0], case.world)
        case.optimizer.step(case.closure)
        assert case.optimizer.projected_grads == (projected(list(losses), case.eps),)
    else:
        name = r"2\.norm \(BatchNorm1d\)" if kind.startswith("batch") else r"its buffer 2\."
        with pytest.raises(RuntimeError, match=name):
            case.optimizer.step(case.closure)


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}])
def test_paired_refuses_frozen_batch_norm_in_train_mode(options: dict[str, Any]) -> None:
    model = make_model(lambda: nn.BatchNorm1d(6, **options), torch.float32, outside=True)
    model[2].requires_grad_(False)
    optimizer = ZOSGD(model, 0.0, 2.0**-10, seed=SEED, storage=PAIRED)
    with pytest.raises(RuntimeError, match=r"got 2 \(BatchNorm1d\) that normalises both halves together"):
        optimizer.step(lambda: loss_of(model, True))


def odd_buffers() -> dict[str, Callable[[], torch.Tensor]]:
    def inferred(make: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return make()

    return {
        "sparse": lambda: torch.eye(ROWS).to_sparse_coo(),
        "sparse in rows": lambda: torch.eye(ROWS).to_sparse_csr(),
        "meta": lambda: torch.ones(3, device="meta"),
        "of inference mode": lambda: inferred(lambda: torch.ones(6)),
        "of inference mode, expanded": lambda: inferred(lambda: torch.ones(1).expand(6)),
        "of inference mode, large": lambda: inferred(lambda: torch.ones(2**20, dtype=torch.long)),
    }


class Holding(nn.Module):
    """Has a buffer that a forward pass cannot write, or does not."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("buffer", buffer)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.mm(self.buffer, hidden) if self.buffer.shape == (ROWS, ROWS) else hidden


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("mode", ["in place", "chained", "streamed"])
@pytest.mark.parametrize("kind", odd_buffers())
def test_buffers_that_are_not_written_stand_in_no_ones_way(kind: str, mode: str) -> None:
    gs = []
    for held in (Holding(odd_buffers()[kind]()), nn.Identity()):
        model = make_model(lambda held=held: held, torch.float32)  # type: ignore[misc]
        optimizer = ZOSGD(model, 0.0, 2.0**-10, seed=SEED, storage=MODES[mode][0])
        for _ in range(2):
            optimizer.step(lambda model=model: loss_of(model))  # type: ignore[misc]
        gs.append(optimizer.projected_grads)
    assert gs[0] == gs[1]


class Following(nn.Module):
    """A target network that follows by an average, as frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Linear(6, 6)
        self.target = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.target.bias.mul_(0.5)
        found: torch.Tensor = self.online(hidden) + self.target(hidden)
        return found


@pytest.mark.parametrize("mode", ["in place", "chained", "streamed"])
def test_a_forward_that_writes_frozen_parameters_is_refused(mode: str) -> None:
    model = make_model(Following, torch.float64)
    optimizer = ZOSGD(model, 0.0, 2.0**-20, seed=SEED, storage=MODES[mode][0])
    with pytest.raises(RuntimeError, match=r"got 1.moved.target.bias written.*make it a buffer"):
        optimizer.step(lambda: loss_of(model))


class Recurrent(nn.Module):
    """Blocks of which one runs twice, and whose modules may share a buffer; the model may be called twice."""

    def __init__(self, kind: str, shares: bool) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block(MOVING[kind]), Block(MOVING[kind])])
        if shares:
            self.blocks[1].moved = self.blocks[0].moved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        for index in (0, 1, 0):
            hidden = self.blocks[index](hidden)
        return hidden  # type: ignore[no-any-return]


@pytest.mark.few(24)
@pytest.mark.parametrize("mode", PLAIN_MODES)
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(
    "kind",
    [kind for kind in MOVING if kind not in ("shared", "spectral_norm", "parametrizations.spectral_norm")],
)
def test_what_runs_several_times_meets_what_its_own_side_left(kind: str, shares: bool, mode: str) -> None:
    torch.manual_seed(3)
    model, is_paired = Recurrent(kind, shares), mode == "paired"
    storage, reference_kind, _ = MODES[mode]
    eps = 2.0**-10

    def twice(model: nn.Module, is_paired: bool = False) -> Any:
        with torch.no_grad():
            pairs = [loss_of(model, is_paired) for _ in range(2)]
        return [plus + minus for plus, minus in zip(*pairs, strict=True)] if is_paired else sum(pairs)

    reference = reference_kind(model, eps, 0.0, 0.0, SEED)
    seed = int(derived.candidate_seeds(SEED, 1)[0])
    with torch.no_grad():
        losses = reference.losses(seed, World(model, global_states(), twice))
    optimizer = ZOSGD(model, 0.0, eps, seed=SEED, storage=storage)
    optimizer.step(lambda: twice(model, is_paired))
    assert optimizer.projected_grads == (projected(list(losses), eps),)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_buffers_of_torchscript_are_put_back_too() -> None:
    gs = []
    for script in (torch.jit.script, lambda module: module):
        model = make_model(MOVING["batch norm"], torch.float64)
        model[1] = script(model[1])
        optimizer = ZOSGD(model, 0.0, 2.0**-20, seed=SEED, storage=Inplace())
        with torch.no_grad():
            for _ in range(2):
                optimizer.step(lambda model=model: loss_of(model))  # type: ignore[misc]
        gs.append(optimizer.projected_grads)
    assert gs[0] == gs[1]
