"""What a run keeps in its folder, opened at its start and written after each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedkseed.federation.server import Server
from fedkseed.ledger.ledger import Ledger
from fedkseed.simulation.best_ledger import BestLedger
from fedkseed.simulation.round_log import LISTS, RoundLog, check_metrics, check_timings
from fedkseed.simulation.run_folder import (
    CLIENTS,
    LEDGER,
    METRICS,
    TIMINGS,
    RunFolder,
    check_client_settings,
    write_client_settings,
)

#: Both lists of them, of seven digits each, fit into a line of the metrics.
_MAX_CLIENTS_PER_ROUND = 20_000


class KeptRun:
    """The files of a run in its folder, which the server's state holds together.

    Everything is compared before anything is written; then all files are brought to the server's round.

    Args:
        folder: of the run.
        server: the run's, new or resumed from the folder.
        clients, task: settings by name, see `run_folder.check_client_settings`.
        ledger: makes the ledger of the last round that is complete.
        resumes: whether the server was resumed from the folder.

    Attributes:
        best: the ledger of the best round.

    Raises:
        ValueError: more clients a round than a line of the metrics can name.
        StateError: the run in the folder has other settings.
        RunFolderError: a file is not what a run left there.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        server: Server,
        clients: Mapping[str, Any],
        task: Mapping[str, Any],
        ledger: Callable[[], Ledger],
        *,
        resumes: bool,
    ) -> None:
        if server.config.clients_per_round > _MAX_CLIENTS_PER_ROUND:
            raise ValueError(
                f"expected at most {_MAX_CLIENTS_PER_ROUND:,} clients a round in a run that keeps a folder, "
                f"got {server.config.clients_per_round:,}"
            )
        self._folder, self._server, self._task, self._ledger = folder, server, task, ledger
        folder.notice = server.notice
        if resumes:
            check_client_settings(folder.path / CLIENTS, clients, task)
        self._metrics = RoundLog(folder.path / METRICS, server.round, check_metrics)
        self._timings = RoundLog(folder.path / TIMINGS, server.round, check_timings)
        server.save(folder.path, lock=folder.lock)
        self.write_clients(clients)
        ledger().save(folder.path / LEDGER)
        for log in (self._metrics, self._timings):
            log.cut()
        self.best = BestLedger(folder.path, self._metrics.rows, ledger)

    def past_metrics(self) -> list[dict[str, Any]]:
        """The metrics of the rounds that are complete.

        Raises:
            RunFolderError: somebody has changed their file.
        """
        return [{**row, **{name: tuple(row[name]) for name in LISTS}} for row in self._metrics.rows]

    def write_clients(self, clients: Mapping[str, Any]) -> None:
        """Keeps the settings of clients and task.

        Raises:
            LockLostError: the folder is not this run's any more.
            OSError: the file stays as it was.
        """
        self._folder.lock.check()
        write_client_settings(self._folder.path / CLIENTS, clients, self._task)

    def add(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Writes the server's last round down; its state says which lines of metrics and timings count.

        The best ledger comes after the state: it is brought to it if this is cut off in between.

        Raises:
            LockLostError: the folder is not this run's any more; nothing was written.
            OSError: the folder cannot be written; the state is that of the round before.
        """
        folder, ledger = self._folder, self._ledger()
        folder.lock.check()
        self._metrics.append(metrics)
        self._timings.append(timings)
        ledger.save(folder.path / LEDGER)
        self._server.save(folder.path, lock=folder.lock)
        self.best.add(metrics, ledger)
