"""The ledger of a run's best round, kept beside that of its last."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedkseed.files import read_bounded, write_atomically
from fedkseed.ledger.format import MAX_BYTES, LedgerError
from fedkseed.ledger.ledger import Ledger
from fedkseed.simulation.run_folder import BEST

logger = logging.getLogger("fedkseed")

OLDER_BEST = BEST + ".1"
#: The value of an evaluation that is compared; the lower, the better.
SCORE = "held_out_loss"


class BestLedger:
    """A file with the ledger after the round whose evaluation found the lowest `SCORE` so far, if any did.

    Of rounds that are equal the first counts. The file is written after the server's state, and the one
    before it is kept: with the last state and with the one before it, the ledger that belongs to it is there.

    Args:
        folder: of the run.
        rows: the metrics of the rounds that count.
        last: makes the ledger after the last of them.

    Attributes:
        round: the best round, counted from 0; None before any was scored.
        is_kept: whether the file is the ledger after that round: a run that began before there were such
            files has none until a round is better than all before it.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]], last: Callable[[], Ledger]) -> None:
        self._folder = folder
        self._lowest = math.inf
        self.round: int | None = None
        number = -1
        for number, row in enumerate(rows):
            self._is_better(number, row)
        self.is_kept = False
        if self.round is None:
            return
        if self._num_rounds(BEST) == self.round + 1:
            self.is_kept = True
        elif self._num_rounds(OLDER_BEST) == self.round + 1:
            write_atomically(folder / BEST, read_bounded(folder / OLDER_BEST, MAX_BYTES))
            self.is_kept = True
        elif self.round == number:
            last().save(folder / BEST)
            self.is_kept = True
        else:
            logger.warning(
                "%s holds no ledger of round %d, the best by %s so far; one that is better will be in %s",
                folder,
                self.round + 1,
                SCORE,
                BEST,
            )

    def add(self, row: Mapping[str, Any], ledger: Ledger) -> None:
        """Takes the next round; after the server's state was saved.

        Raises:
            OSError: the file stays as it was.
        """
        if not self._is_better(row["round"], row):
            return
        if self.is_kept:
            write_atomically(self._folder / OLDER_BEST, read_bounded(self._folder / BEST, MAX_BYTES))
        ledger.save(self._folder / BEST)
        self.is_kept = True

    def _is_better(self, round: int, row: Mapping[str, Any]) -> bool:
        score = row["evaluation"].get(SCORE)
        if score is None or not score < self._lowest:
            return False
        self._lowest, self.round = score, round
        return True

    def _num_rounds(self, name: str) -> int | None:
        """How many rounds the ledger in a file has seen; None if it is none."""
        try:
            return int(Ledger.load(self._folder / name).notes["num_rounds"])
        except (LedgerError, OSError, KeyError, ValueError):
            return None
