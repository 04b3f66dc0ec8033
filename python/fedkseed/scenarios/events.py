"""TensorBoard event files of a run's rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedkseed._extras import require_extra
from fedkseed.simulation.simulation import RoundResult


class Events:
    """A context that writes one event file.

    Args:
        folder: of the event files; None writes nothing.

    Raises:
        MissingExtraError: a folder is given, and the package tensorboard is not installed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: Any = None
        if folder is not None:
            require_extra("tensorboard", "tensorboard")

    def __enter__(self) -> Events:
        if self._folder is not None:
            require_extra("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, result: RoundResult) -> None:
        """One round's losses, scores and bytes."""
        if self._writer is None:
            return
        scalars = {"train_loss": result.train_loss, **result.evaluation, "seconds": result.seconds}
        scalars |= {"bytes_down": result.bytes_down, "bytes_up": result.bytes_up}
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, result.round + 1)
        self._writer.flush()
