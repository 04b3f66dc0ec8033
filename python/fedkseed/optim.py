"""FedKSeedSGD: zeroth-order SGD whose every step is one (seed, scalar) pair.

Qin et al., ICML 2024, arXiv 2312.06353. A step draws a candidate seed s, measures the loss on both sides of
the weights along the noise z(s), and moves the weights along it:

    g = (L(w + eps z(s)) - L(w - eps z(s))) / (2 eps),      w <- w - lr g z(s)
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedkseed._checks import check_count, check_eps, check_learning_rate
from fedkseed.manifest import Manifest, manifest_parameters
from fedkseed.seeds import MAX_STEPS, SeedPool
from fedkseed.storage import InplaceStorage, Storage

#: What a closure returns: the loss of one batch, a number or a tensor of one element.
Loss = torch.Tensor | float
Params = nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]

_REBUILD = (
    "a model tuned by FedKSeed is w0 plus one coefficient a seed for all of its parameters, and could not be "
    "rebuilt from seeds and scalars otherwise"
)


class FedKSeedSGD(torch.optim.Optimizer):
    """Zeroth-order SGD over a pool of candidate seeds, in place: the memory of inference.

    A step makes three passes over the weights: +eps z; -2 eps z; restore and update in one, (eps - lr g) z.
    Each pass rounds to the weights' dtype, so stored weights of 16 bits drift from w0 + sum_k c_k z(s_k).

    eps is rounded to fp32 once and that value is used everywhere; g = fp32((fp64 L+ - fp64 L-) / (2 eps));
    the coefficients handed to the kernels are fp64 products and sums, without fma, of fp32 eps, fp32 g and
    the Python float lr (contract, section 6.1). lr may change between steps (schedulers).

    A step whose loss on either side, or whose g, is NaN or infinite updates nothing, stands in the history
    with g = 0 and is counted in ``num_skipped``. If the closure raises (Ctrl-C included), the perturbation is
    taken back first.

    Args:
        params: a model (a parameter's stream is then its index in the manifest), or ``named_parameters()``, a
            list of tensors, or a list of groups (the stream is then the position among all given). Parameters
            with ``requires_grad=False`` are frozen: left alone, but counted; plain tensors are always tuned.
        lr: learning rate, finite, at least 0.
        eps: scale of the perturbation, above 0.
        seed_pool: the candidate seeds.
        schedule: indices into the pool for the steps to come; if None, they are drawn from the pool,
            uniformly.
        weight_decay: must be 0.

    Attributes:
        eps: as rounded to fp32.
        history: one (index into the pool, g) for each step since construction.
        coefficients: fp64 [K], the sum of -lr g over the steps that drew each seed.
        num_skipped: how many steps had a loss that is not finite.

    Raises:
        TypeError: a tensor that is not floating point or is sharded; lr, eps or the pool of another type.
        ValueError: lr, eps or the schedule out of range, nothing to tune, a tensor twice, weight decay, a
            group with options of its own.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        eps: float,
        seed_pool: SeedPool,
        *,
        schedule: Sequence[int] | NDArray[np.uint16] | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(seed_pool, SeedPool):
            raise TypeError(f"expected a SeedPool, got {type(seed_pool).__name__}")
        if weight_decay != 0:
            raise ValueError(f"expected weight_decay 0, got {weight_decay}: {_REBUILD}")
        lr = check_learning_rate(lr)
        self.eps = check_eps(eps)
        self.seed_pool = seed_pool
        self.history: list[tuple[int, float]] = []
        self.coefficients: NDArray[np.float64] = np.zeros(seed_pool.num_seeds)
        self.num_skipped = 0
        self._num_drawn = 0
        self._schedule = None if schedule is None else [self._check_index(index) for index in schedule]
        groups, streams = _groups_and_streams(params, lr)
        self._is_complete = False
        super().__init__(groups, {"lr": lr})
        self._is_complete = True
        tensors: list[torch.Tensor] = [tensor for group in self.param_groups for tensor in group["params"]]
        self._storage: Storage = InplaceStorage(tensors, streams, self.eps)
        self._devices = sorted({tensor.device for tensor in tensors} - {torch.device("cpu")}, key=str)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer exists.

        Raises:
            RuntimeError: always, after construction.
        """
        if self._is_complete:
            raise RuntimeError(
                "expected all parameters at construction, got a further group: what noise a tensor gets "
                "depends on its place among them; make a new FedKSeedSGD"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Loss], seed_index: int | None = None
    ) -> float:
        """One step along the noise of one candidate seed.

        The closure is called twice, without gradients, with the same state of torch's random number
        generators (of the CPU and of the parameters' devices), so dropout agrees on both sides. It must take
        the same batch both times and leave the weights alone.

        Args:
            closure: evaluates the loss.
            seed_index: index into the pool; the schedule's next entry if None.

        Returns:
            (L+ + L-) / 2 in fp64: NaN or infinite if a loss was.

        Raises:
            ValueError: an index out of range, an exhausted schedule, learning rates that differ between
                groups, a loss of more than one element.
            TypeError: a loss that is neither a tensor nor a number.
        """
        lr = self._learning_rate()
        index = self._next_index() if seed_index is None else self._check_index(seed_index)
        states = self._rng_states()

        def evaluate() -> float:
            self._set_rng_states(states)
            return _loss_value(closure())

        def record(g: float) -> None:
            if not math.isfinite(g):
                self.num_skipped += 1
                g = 0.0
            if seed_index is None:
                self._num_drawn += 1
            self.coefficients[index] -= lr * g
            self.history.append((index, g))

        plus, minus = self._storage.walk(int(self.seed_pool.seeds[index]), lr, evaluate, record)
        return (plus + minus) / 2

    def state_dict(self) -> dict[str, Any]:
        """The base class's state and, as "fedkseed", what was walked so far and where the schedule stands."""
        state = super().state_dict()
        state["fedkseed"] = {
            "base_seed": self.seed_pool.base_seed,
            "num_seeds": self.seed_pool.num_seeds,
            "eps": self.eps,
            "schedule": self._schedule,
            "num_drawn": self._num_drawn,
            "num_skipped": self.num_skipped,
            "history": list(self.history),
            "coefficients": torch.from_numpy(self.coefficients.copy()),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; the weights are the caller's to load.

        Raises:
            ValueError: the state of another optimizer, seed pool or eps.
        """
        if "fedkseed" not in state_dict:
            raise ValueError("expected a state_dict of FedKSeedSGD, got one of another optimizer")
        own = state_dict["fedkseed"]
        found = (own["base_seed"], own["num_seeds"], own["eps"])
        wanted = (self.seed_pool.base_seed, self.seed_pool.num_seeds, self.eps)
        if found != wanted:
            raise ValueError(
                f"expected the state of base seed, number of seeds and eps {wanted}, got {found}; "
                "construct the optimizer with those of the state"
            )
        super().load_state_dict(state_dict)
        self._schedule = None if own["schedule"] is None else list(own["schedule"])
        self._num_drawn = int(own["num_drawn"])
        self.num_skipped = int(own["num_skipped"])
        self.history = [(int(index), float(g)) for index, g in own["history"]]
        self.coefficients = own["coefficients"].double().numpy().copy()

    def _learning_rate(self) -> float:
        rates = [check_learning_rate(group["lr"]) for group in self.param_groups]
        if len(set(rates)) != 1:
            raise ValueError(f"expected one lr for all groups, got {rates}: {_REBUILD}")
        return rates[0]

    def _check_index(self, index: Any) -> int:
        return check_count("seed index", index, 0, self.seed_pool.num_seeds - 1)

    def _next_index(self) -> int:
        step = self._num_drawn
        if self._schedule is None:
            # A run of its own is client 0; every MAX_STEPS steps start another round of the index layout.
            return int(self.seed_pool.schedule(step // MAX_STEPS, 0, 1, first_step=step % MAX_STEPS)[0])
        if step >= len(self._schedule):
            raise ValueError(
                f"expected at most {len(self._schedule)} steps, the length of the schedule, got one more; "
                "pass seed_index, or a longer schedule at construction"
            )
        return self._schedule[step]

    def _rng_states(self) -> list[torch.Tensor]:
        states = [torch.get_device_module(device).get_rng_state(device) for device in self._devices]
        return [torch.get_rng_state(), *states]

    def _set_rng_states(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


def _groups_and_streams(params: Params, lr: float) -> tuple[list[dict[str, Any]], list[int]]:
    """Groups as the base class takes them, without frozen parameters, and the stream of each tensor."""
    if isinstance(params, torch.Tensor):
        raise TypeError("expected a model or an iterable of tensors, got one tensor; put it into a list")
    given: list[Any]
    if isinstance(params, nn.Module):
        given = manifest_parameters(params)
        _check_whole(given, Manifest.of(params))
    else:
        given = list(params)
    if given and isinstance(given[0], dict):
        listed = [_group_members(group, lr) for group in given]
    else:
        listed = [given]
    groups, streams, seen, position = [], [], set(), 0
    for members in listed:
        tuned = []
        for member in members:
            name, tensor = member if isinstance(member, tuple) else (f"tensor {position}", member)
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"expected tensors or (name, tensor) pairs, got {type(tensor).__name__} as {name}"
                )
            if id(tensor) in seen:
                raise ValueError(f"expected every tensor once, got {name} twice")
            seen.add(id(tensor))
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter):
                _check_tunable(name, tensor)
                tuned.append(member)
                streams.append(position)
            position += 1
        groups.append({"params": tuned})
    if not streams:
        raise ValueError(
            f"expected at least one tensor to tune, got {position}, all of them frozen (requires_grad=False)"
            if position
            else "expected at least one tensor to tune, got none"
        )
    return groups, streams


def _group_members(group: Any, lr: float) -> list[Any]:
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"expected groups that are all dicts with 'params', got {type(group).__name__}")
    same = {"lr": lr, "weight_decay": 0}
    for key, value in group.items():
        if key != "params" and not (key in same and value == same[key]):
            raise ValueError(f"expected groups without options of their own, got {key}={value!r}: {_REBUILD}")
    members = group["params"]
    return [members] if isinstance(members, torch.Tensor) else list(members)


def _check_whole(parameters: list[tuple[str, nn.Parameter]], manifest: Manifest) -> None:
    for (name, parameter), shape in zip(parameters, manifest.shapes, strict=True):
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"expected whole parameters, got shape {tuple(parameter.shape)} of {name} {shape}; "
                "sharded models are not supported here"
            )


def _check_tunable(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"expected floating-point tensors, got {name} of {tensor.dtype}; leave it out")
    if type(tensor.data) is not torch.Tensor:
        raise TypeError(
            f"expected ordinary tensors, got {name} of type {type(tensor.data).__name__}; "
            "sharded and wrapped tensors are not supported here"
        )


def _loss_value(loss: Any) -> float:
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"expected a loss of one element, got shape {tuple(loss.shape)}; reduce it in the closure"
            )
        return float(loss.detach().double())
    if not isinstance(loss, numbers.Real):
        raise TypeError(
            f"expected the closure to return the loss, a tensor or a number, got {type(loss).__name__}"
        )
    return float(loss)
