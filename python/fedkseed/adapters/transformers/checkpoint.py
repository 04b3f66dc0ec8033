"""Which checkpoint a run goes on from, and what it has to hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedkseed._extras import require_extra

require_extra("hf", "transformers")

from transformers.trainer_utils import get_last_checkpoint

_OPTIMIZER_FILE = "optimizer.pt"


def checkpoint_of(resume_from_checkpoint: Any, output_dir: str) -> Path | None:
    """The folder that Trainer resumes from: the one given, or for True the last one of the run's folder.

    Returns:
        None if the run begins anew, or if there is no checkpoint for True, which Trainer refuses.

    Raises:
        ValueError: the folder lacks the optimizer's state: the seeds of the steps before would come again.
    """
    given = resume_from_checkpoint
    if given is True:
        given = get_last_checkpoint(output_dir)  # type: ignore[no-untyped-call]
    if not isinstance(given, (str, os.PathLike)):
        return None
    folder = Path(given)
    if not (folder / _OPTIMIZER_FILE).is_file():
        raise ValueError(
            f"expected {_OPTIMIZER_FILE} in the checkpoint {folder}, got none: the noise of its steps would "
            "come again; resume from a checkpoint that was saved without save_only_model"
        )
    return folder
