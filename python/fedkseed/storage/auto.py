"""storage="auto": the storage mode that suits the weights, by their dtype, device and what is kept of a run.

docs/numerics.md says why. Weights of 16 bits would round at each of the passes in place, and drift.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from fedkseed.storage.inplace import Inplace
from fedkseed.storage.interface import (
    SIXTEEN_BIT,
    Evaluation,
    GroupUpdate,
    Storage,
    StorageOptions,
    TunedWeights,
)
from fedkseed.storage.streamed import Streamed
from fedkseed.storage.streamed.refusals import NotStreamableError

logger = logging.getLogger("fedkseed")


@dataclass(frozen=True)
class Tentative:
    """What "auto" resolved to elsewhere, and was said there: neither that nor a fallback is said again.

    Attributes:
        options: the mode; a model that it refuses in its first evaluation falls to `Inplace()`.
    """

    options: StorageOptions

    def open(self, weights: TunedWeights) -> AutoStorage:
        """See `StorageOptions.open`."""
        return AutoStorage(weights, False, self.options)


#: What an argument ``storage`` takes: a mode, or "auto" for the one that suits.
StorageChoice: TypeAlias = StorageOptions | Literal["auto"]

DEFAULT_STORAGE: Literal["auto"] = "auto"


def check_choice(storage: object) -> None:
    """Refuses what is no storage mode.

    Raises:
        TypeError: neither "auto" nor a mode; a mode's class.
    """
    if isinstance(storage, type) and hasattr(storage, "open"):
        raise TypeError(
            f"expected a storage mode, got the class {storage.__name__}; call it: {storage.__name__}()"
        )
    if not (storage == "auto" or hasattr(storage, "open")):
        raise TypeError(
            f"expected storage='auto', or a mode such as Inplace() or Streamed(), got {storage!r}; "
            "fedkseed.storage.storage_mode gives a mode by its name"
        )


def resolve(weights: TunedWeights, ledger_counts: bool) -> tuple[StorageOptions, str]:
    """The mode for these weights, and why; whether the model can be streamed is seen when it is opened.

    Args:
        weights: as they stand now.
        ledger_counts: whether the result is the model that the ledger defines, and not the weights as walked.
    """
    tensors = [tensor for group in weights.groups for tensor in group]
    short = [tensor for tensor in tensors if tensor.dtype in SIXTEEN_BIT]
    if not short:
        return suited(
            False, False, ledger_counts
        ), f"weights of {_listed(tensors)}, in which the roundings of a pass are small"
    dtypes = _listed(short)
    if weights.model is None:
        return Inplace(), f"weights of {dtypes} as tensors alone, without the model that would be streamed"
    on_processor = is_on_processor(short)
    place = "a processor" if on_processor else "an accelerator"
    result = "the ledger is the result" if ledger_counts else "the walked weights are the result"
    return suited(True, on_processor, ledger_counts), f"weights of {dtypes} on {place}, where {result}"


def suited(is_short: bool, on_processor: bool, ledger_counts: bool) -> StorageOptions:
    """The mode for a model that can be streamed.

    Args:
        is_short: whether any of the tuned weights has 16 bits.
        on_processor: whether one of those is on a processor.
        ledger_counts: as `resolve`.
    """
    if not is_short:
        return Inplace()
    return Streamed(compensated=not ledger_counts, compute_dtype=torch.float32 if on_processor else None)


def is_on_processor(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one of the tensors is on a processor, where arithmetic of 16 bits is slow."""
    return any(tensor.device.type == "cpu" for tensor in tensors)


def _listed(tensors: Iterable[torch.Tensor]) -> str:
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


class AutoStorage:
    """The mode that "auto" resolved to, at work; `Inplace()` once a model turns out not to be streamable.

    Args:
        weights: as a mode's `open` takes them.
        ledger_counts: as `resolve`.
        known: what was resolved and said elsewhere; if None, it is resolved here and said.

    Attributes:
        options: the resolved mode.
        refusal: why the model could not be streamed, one line; None if it could, or need not.

    Raises:
        TypeError, ValueError: weights that `Inplace()` refuses, too.
    """

    def __init__(
        self, weights: TunedWeights, ledger_counts: bool, known: StorageOptions | None = None
    ) -> None:
        self._weights = weights
        self._ledger_counts = ledger_counts
        self._is_quiet = known is not None
        #: Whether a measurement was made, or a state of one loaded: the mode stays from then on.
        self._is_for_good = False
        self._is_move_said = False
        self._resolved, reason = resolve(weights, ledger_counts)
        self.options = self._resolved if known is None else known
        self.refusal: str | None = None
        self._opened: Storage
        try:
            self._opened = self.options.open(weights)
        except NotStreamableError as error:
            self.options = Inplace()
            self._opened = self.options.open(weights)
            self.refusal = _line(error)
            reason = f"{reason}, but the model cannot be streamed: {self.refusal}"
        self._say(logging.INFO, 'storage="auto" is %r: %s', self.options, reason)

    def adopt(self, options: StorageOptions, state: dict[str, Any], is_for_good: bool) -> None:
        """Goes on in the mode of a state, where that was taken.

        Args:
            options: of the state.
            state: what the mode's `state` gave.
            is_for_good: whether the state is that of an optimizer that has made a step.

        Raises:
            ValueError: not a state of this mode, or the mode cannot serve the weights; nothing changes.
        """
        if options == self.options:
            self._opened.load_state(state)
        else:
            self._opened.restore()
            try:
                opened = options.open(self._weights)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    "expected a state of a storage mode that can serve this model, got one of "
                    f"{options}: {error}"
                ) from error
            opened.load_state(state)
            self._opened, self.options = opened, options
            self._say(logging.INFO, 'storage="auto" goes on in %r, that of the state loaded', options)
        self._is_for_good = self._is_for_good or is_for_good

    def prepare(self) -> bool:
        """See `Storage.prepare`; a move after which "auto" would be another mode is said once."""
        try:
            have_moved = self._opened.prepare()
        except NotStreamableError as error:
            self._fall(error)
            return True
        if have_moved and not self._is_move_said and self.options == self._resolved:
            suits, reason = resolve(self._weights, self._ledger_counts)
            if suits != self._resolved:
                self._is_move_said = True
                self._say(
                    logging.WARNING,
                    'storage="auto" stays %r, as resolved before the model was converted or moved; for %s a '
                    "new optimizer would take %r: convert and move the model first, then make the optimizer",
                    self.options,
                    reason,
                    suits,
                )
        return have_moved

    def measure(
        self, seeds: Sequence[int], evaluation: Evaluation, is_apart: bool
    ) -> list[tuple[float, float]]:
        """See `Storage.measure`; the first falls to `Inplace()` where the model turns out not streamable."""
        try:
            losses = self._opened.measure(seeds, evaluation, is_apart)
        except NotStreamableError as error:
            self._fall(error)
            losses = self._opened.measure(seeds, evaluation, is_apart)
        self._is_for_good = True
        return losses

    def update(
        self,
        seeds: Sequence[int],
        updates: Sequence[GroupUpdate],
        gs: Sequence[float | None],
        next_seed: int | None = None,
    ) -> None:
        """See `Storage.update`."""
        self._opened.update(seeds, updates, gs, next_seed)

    def check_unwritten(self) -> None:
        """See `Storage.check_unwritten`."""
        self._opened.check_unwritten()

    def restore(self) -> None:
        """See `Storage.restore`."""
        self._opened.restore()

    def state(self) -> dict[str, Any]:
        """See `Storage.state`; that of the resolved mode."""
        return self._opened.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Storage.load_state`; a state of the resolved mode."""
        self._opened.load_state(state)

    def _fall(self, error: NotStreamableError) -> None:
        """Raises the error where the mode stays."""
        if self._is_for_good:
            raise error
        self._opened = Inplace().open(self._weights)
        self.options, self.refusal = Inplace(), _line(error)
        self._say(
            logging.WARNING,
            'storage="auto" falls to %r: %s. In place each pass rounds weights of 16 bits, and they drift '
            "(docs/numerics.md)",
            self.options,
            self.refusal,
        )

    def _say(self, level: int, text: str, *arguments: object) -> None:
        if not self._is_quiet:
            logger.log(level, text, *arguments)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
