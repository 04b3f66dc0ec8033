"""The model that a machine tunes, and the read-only w0 that it is rebuilt from."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import fedkseed_kernels
from fedkseed._progress import pieces
from fedkseed.model.buffers import Buffers
from fedkseed.model.held import HeldParameters
from fedkseed.model.identity import ModelIdentity
from fedkseed.model.manifest import ModelParameters
from fedkseed.model.named_errors import errors_named
from fedkseed.model.overlaps import check_overlaps, refuse_overlap
from fedkseed.model.placement import PreparedTensors, by_device
from fedkseed.model.randomness import GivenGenerators, OwnGenerators
from fedkseed.model.round_model_file import RoundModelFile
from fedkseed.model.tunable import check_buffers, check_tunable
from fedkseed.model.waiting import flush_waiting
from fedkseed.seeds import SeedPool

#: The lock of each model that working copies have been made of: copies of one model share its weights.
_locks: WeakKeyDictionary[nn.Module, AbstractContextManager[bool]] = WeakKeyDictionary()
_locks_change = threading.Lock()


class WorkingCopy:
    """A model whose tuned parameters can be set to any w0 + sum_k c_k z(seed_k).

    Frozen parameters (``requires_grad=False``) are left alone. Buffers, which a forward pass in training mode
    may move (batch norm), are put back to what they were at construction, and so are random number generators
    that modules own.

    Several threads may use it, and several working copies of one model: `load`, `fedkseed.Client.step` and
    what runs under `exclusive` wait for each other. Random number generators are the process's: where the
    loss draws from them (dropout), replies depend on which thread comes first, and between threads with a
    model each the two sides of a step may see other numbers. Take processes there.

    Args:
        model: its weights are w0 as they stand now; from then on the working weights.
        w0: the tuned parameters' read-only weights in manifest order, shared between working copies; a clone
            of the model's if None.
        round_model: room for what was rebuilt last, in tensors like w0's, so that loading the same
            coefficients again copies instead of rebuilding; "own" to make room here (one more model of
            memory), None to always rebuild. Working copies of several processes may share it: one of them
            rebuilds, the others are told by `adopt_round_model`. A `RoundModelFile`: in a file, which
            processes that are started for one message find.

    Attributes:
        model: the model given.
        manifest: of the model.
        w0: the read-only weights.
        seconds_rebuild, seconds_reset: time spent in rebuilding and in copying, in all.

    Raises:
        ValueError: nothing to tune, w0 of other shapes or dtypes, or what shares memory with the weights.
        TypeError, ValueError, RuntimeError: weights as `check_tunable` and `PreparedTensors`, buffers as
            `check_buffers`: named.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        w0: Sequence[torch.Tensor] | None = None,
        round_model: Sequence[torch.Tensor] | RoundModelFile | Literal["own"] | None = None,
    ) -> None:
        self.model = model
        known = ModelParameters.of(model)
        self.manifest = known.manifest
        self._identity: ModelIdentity | None = None
        tuned = [
            (stream, parameter)
            for stream, parameter in enumerate(known.parameters)
            if parameter.requires_grad
        ]
        if not tuned:
            raise ValueError("expected at least one parameter to tune, got all frozen (requires_grad=False)")
        self._streams = [stream for stream, _ in tuned]
        self._weights = [parameter for _, parameter in tuned]
        self._names = [self.manifest.names[stream] for stream in self._streams]
        self._held = HeldParameters(model, list(zip(self._names, self._weights, strict=True)), "WorkingCopy")
        with self.exclusive():
            check_tunable(self._names, self._weights)
            check_buffers(model)
            check_overlaps(self._names, self._weights, model, known)
            PreparedTensors(self._weights, self._streams, "gaussian", names=self._names)  # or it raises
            flush_waiting(self._weights)
            self.w0 = [weight.detach().clone() for weight in self._weights] if w0 is None else list(w0)
            self._buffers = Buffers(model.named_modules()).keep()
            self._generators = GivenGenerators(OwnGenerators(model).now())
            self._states = self._generators.states()
        self._check_like_weights("w0", self.w0)
        self._round_model: list[torch.Tensor] | None = None
        self._round_file = round_model if isinstance(round_model, RoundModelFile) else None
        if round_model == "own":
            self._round_model = [torch.empty_like(weight) for weight in self.w0]
        elif round_model is not None and not isinstance(round_model, RoundModelFile):
            self._round_model = list(round_model)
            self._check_like_weights("round_model", self._round_model)
        refuse_overlap(
            [*self._called("{}", self._weights), *self._called("round_model's {}", self._round_model or ())],
            self._called("w0's {}", self.w0),
            "give w0 and round_model tensors of their own",
        )
        self._kept: tuple[SeedPool, bytes, str] | None = None  # what the round model holds
        self.seconds_rebuild = 0.0
        self.seconds_reset = 0.0

    def exclusive(self) -> AbstractContextManager[bool]:
        """Keeps other threads off the working weights; for whoever reads or writes them beside clients.

            with working.exclusive():
                working.load(pool, coefficients)
                score = evaluate(working.model)

        The thread that holds it may ask for it again: for `load`, or a client's whole step.
        """
        with _locks_change:
            return _locks.setdefault(self.model, threading.RLock())

    @property
    def identity(self) -> ModelIdentity:
        """Identity of w0 and the frozen parameters; read and hashed when first asked for.

        Raises:
            ValueError: a parameter that is sharded or on the meta device.
        """
        if self._identity is None:
            with self.exclusive():  # a step may have stand-ins where frozen parameters are
                self._identity = self._hashed()
        return self._identity

    def _hashed(self) -> ModelIdentity:
        tuned = dict(zip(self._streams, self.w0, strict=True))
        weights = [
            tuned.get(stream, parameter.detach())
            for stream, parameter in enumerate(ModelParameters.of(self.model).parameters)
        ]
        flags = [stream in tuned for stream in range(len(weights))]
        return ModelIdentity.of_weights(self.manifest, flags, weights)

    @torch.no_grad()
    def load(
        self,
        pool: SeedPool,
        coefficients: NDArray[np.float32] | NDArray[np.float64],
        family: str = "gaussian",
    ) -> None:
        """Sets the working weights to w0 + sum_k coefficients_k z(seed_k), in one pass over w0.

        Buffers and generators that modules own are again as they were at construction.

        Args:
            family: of the noise z.

        Raises:
            ValueError: not one finite coefficient a seed, or an unknown family; nothing changes.
            RuntimeError: the model holds another Parameter than one of those tuned (named); a buffer was
                written that is too large to keep a copy of (`KeptBuffers.restore`).
        """
        self._held.check()
        if coefficients.shape != (pool.num_seeds,):
            raise ValueError(f"expected {pool.num_seeds} coefficients, got shape {coefficients.shape}")
        wanted = (pool, coefficients.astype(np.float64).tobytes(), family)
        with self.exclusive():
            flush_waiting(self._weights)  # later it would be taken from the weights loaded now
            torch.clear_autocast_cache()  # casts of the weights that are overwritten now
            start = perf_counter()
            self._buffers.restore()
            self._generators.restore(self._states)
            if self._round_model is not None and self._kept == wanted:
                for weight, kept in zip(self._weights, self._round_model, strict=True):
                    weight.copy_(kept)
                self.seconds_reset += perf_counter() - start
                return
            if self._round_file is not None and self._is_loaded_from(self._round_file, wanted):
                self.seconds_reset += perf_counter() - start
                return
            self._rebuild(pool, coefficients, family)
            self.seconds_rebuild += perf_counter() - start
            if self._round_file is not None:
                self._round_file.save(self._w0_hash(), _parts(wanted), self._weights)
            if self._round_model is not None:
                start = perf_counter()
                self._kept = None
                for kept, weight in zip(self._round_model, self._weights, strict=True):
                    kept.copy_(weight)
                self._kept = wanted
                self.seconds_reset += perf_counter() - start

    def _is_loaded_from(self, file: RoundModelFile, wanted: tuple[SeedPool, bytes, str]) -> bool:
        """Whether a file held the round's model; then the working weights are set to it."""
        return file.load(self._w0_hash(), _parts(wanted), self._weights)

    def _w0_hash(self) -> bytes:
        """A hash of w0 and of which parameters are tuned; that of the content does not tell the latter."""
        return hashlib.sha256(self.identity.structure + self.identity.content).digest()

    def adopt_round_model(
        self,
        pool: SeedPool,
        coefficients: NDArray[np.float32] | NDArray[np.float64],
        family: str = "gaussian",
    ) -> None:
        """Says that another process has rebuilt these coefficients into the shared round model."""
        with self.exclusive():
            self._kept = (pool, coefficients.astype(np.float64).tobytes(), family)

    def _rebuild(
        self, pool: SeedPool, coefficients: NDArray[np.float32] | NDArray[np.float64], family: str
    ) -> None:
        seeds = torch.from_numpy(pool.seeds.view(np.int64).copy())
        coeffs = torch.from_numpy(coefficients.astype(np.float64))
        for places in by_device(self._weights).values():
            sizes = [self._weights[position].numel() for position in places]
            for piece in pieces(sizes, "rebuilding the round's model"):
                positions = [places[index] for index in piece]
                with errors_named([self._names[position] for position in positions], "w0's {}"):
                    fedkseed_kernels.seed_axpy(
                        [self.w0[position] for position in positions],
                        seeds,
                        coeffs,
                        streams=[self._streams[position] for position in positions],
                        out=[self._weights[position] for position in positions],
                        family=family,
                    )

    def _called(self, form: str, tensors: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        return [(form.format(name), tensor) for name, tensor in zip(self._names, tensors, strict=False)]

    def _check_like_weights(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        pairs = list(zip(self._names, tensors, self._weights, strict=False))
        others = [
            f", {called} {_kind(tensor)} for {_kind(weight)}"
            for called, tensor, weight in pairs
            if _kind(tensor) != _kind(weight)
        ]
        if others or len(tensors) != len(self._weights):
            raise ValueError(
                f"expected {name} with the shapes and dtypes of the model's {len(self._weights)} tuned "
                f"parameters, got {len(tensors)} tensors, {len(others)} others{''.join(others[:1])}"
            )


def _parts(wanted: tuple[SeedPool, bytes, str]) -> tuple[bytes, ...]:
    """What a round's model follows from, beside w0, as bytes."""
    pool, coefficients, family = wanted
    numbers = f"{fedkseed_kernels.CONTRACT_VERSION} {pool.base_seed} {pool.num_seeds} {family}"
    return numbers.encode(), coefficients


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
