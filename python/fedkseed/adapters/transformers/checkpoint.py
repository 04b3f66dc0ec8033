"""Which checkpoint a run goes on from, and what it has to hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedkseed._extras import require_extra
from fedkseed.simulation.run_folder import LEDGER

require_extra("hf", "transformers")

from transformers.trainer_utils import get_last_checkpoint

_OPTIMIZER_FILE = "optimizer.pt"


def checkpoint_of(resume_from_checkpoint: Any, output_dir: str, is_walk: bool) -> Path | None:
    """The folder that Trainer resumes from: the one given, or for True the last one of the run's folder.

    Args:
        is_walk: the run goes along a pool.

    Returns:
        None if the run begins anew, or if there is no checkpoint for True, which Trainer refuses.

    Raises:
        ValueError: the folder lacks the optimizer's state: the seeds of the steps before would come again; or
            the ledger, of a walk.
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
    if is_walk and not (folder / LEDGER).is_file():
        raise ValueError(
            f"expected {LEDGER} in the checkpoint {folder}, got none: it was not along a seed_pool; resume "
            "without one, or from a checkpoint of a run along this pool"
        )
    return folder
