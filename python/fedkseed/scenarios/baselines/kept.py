"""What a run of another method than FedKSeed keeps in its folder: one state, and a line for each round.

The state is one safetensors file, replaced as a whole after each round: the tuned weights under their names,
the tensors of the optimizer's state where it goes on from round to round, and in its metadata the number of
rounds that are complete, a hash of the settings and one of the content. It says which lines of metrics and
timings count, as the server's state does for FedKSeed (`fedkseed.simulation.kept_run`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedkseed._checks import check_count
from fedkseed.documents import parse_json
from fedkseed.federation.state import StateError
from fedkseed.files import folder_for_a_while, put_in_place
from fedkseed.model.identity import content_hash
from fedkseed.scenarios.baselines.tensor_files import opened, read_into, write_tensors
from fedkseed.seeds import MAX_ROUNDS
from fedkseed.simulation.round_log import LISTS, RoundLog, check_metrics, check_timings
from fedkseed.simulation.run_folder import (
    BASELINE,
    CLIENTS,
    METRICS,
    TIMINGS,
    RunFolder,
    check_client_settings,
    write_client_settings,
)

_FORMAT = 1
#: The one name in the file's metadata: of several, the library changes the order from file to file.
_METADATA = "fedkseed"
#: What begins the names of the optimizer's tensors, before a slash, which no parameter's name has.
_OPTIMIZER = "optimizer"
_KEYS = {"format", "round", "settings", "content", "optimizer"}


class KeptBaseline:
    """The files of such a run.

    Args:
        folder: of the run.
        parameters: what is tuned; where the folder holds a state, they are given its values.
        settings: what the rounds depend on, by name, ready for JSON.
        task: the task's settings, by name.

    Attributes:
        num_complete: rounds that are complete.
        optimizer_state: what was kept of it; None in a new folder, or if nothing was.

    Raises:
        StateError: the folder's state is damaged, of other settings, or of FedKSeed.
        RunFolderError: a file is not what a run left there.
        OSError: the folder cannot be read.
    """

    def __init__(
        self,
        folder: RunFolder,
        parameters: Mapping[str, nn.Parameter],
        settings: Mapping[str, Any],
        task: Mapping[str, Any],
    ) -> None:
        self._folder, self._parameters = folder, parameters
        self._settings, self._task = settings, task
        self._path = folder.path / BASELINE
        self.num_complete = 0
        self.optimizer_state: dict[str, Any] | None = None
        if folder.resumes:
            self._read()
        self._metrics = RoundLog(folder.path / METRICS, self.num_complete, check_metrics)
        self._timings = RoundLog(folder.path / TIMINGS, self.num_complete, check_timings)

    def open(self, optimizer_state: Mapping[str, Any] | None) -> None:
        """Writes the first state, and brings all files to it.

        Raises:
            LockLostError: the folder is not this run's any more.
            OSError: the folder cannot be written.
        """
        if not self._folder.resumes:
            self._write(optimizer_state)
        self._folder.lock.check()
        write_client_settings(self._folder.path / CLIENTS, self._settings, self._task)
        for log in (self._metrics, self._timings):
            log.cut()

    def add(
        self,
        metrics: Mapping[str, Any],
        timings: Mapping[str, Any],
        optimizer_state: Mapping[str, Any] | None,
    ) -> None:
        """Writes a round down: its lines, then the state that makes them count.

        Raises:
            LockLostError: the folder is not this run's any more; nothing was written.
            OSError: the folder cannot be written; the state is that of the round before.
        """
        self._folder.lock.check()
        self._metrics.append(metrics)
        self._timings.append(timings)
        self.num_complete += 1
        self._write(optimizer_state)

    def past_metrics(self) -> list[dict[str, Any]]:
        """The metrics of the rounds that are complete.

        Raises:
            RunFolderError: somebody has changed their file.
        """
        return [{**row, **{name: tuple(row[name]) for name in LISTS}} for row in self._metrics.rows]

    @property
    def _digest(self) -> str:
        text = json.dumps([dict(self._settings), dict(self._task)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _write(self, optimizer_state: Mapping[str, Any] | None) -> None:
        tensors: dict[str, torch.Tensor] = dict(self._parameters)
        described = _without_tensors(optimizer_state, tensors, _OPTIMIZER)
        said: dict[str, Any] = {
            "format": _FORMAT,
            "round": self.num_complete,
            "settings": self._digest,
            "optimizer": described,
        }
        said["content"] = _content_of(said, tensors)
        self._folder.lock.check()
        # A folder of its own, for what the library leaves behind if it is killed.
        with folder_for_a_while(self._path) as folder:
            written = folder / BASELINE
            write_tensors(written, tensors, {_METADATA: json.dumps(said, allow_nan=False)})
            put_in_place(written, self._path)

    def _read(self) -> None:
        if not self._path.exists():
            raise StateError(
                f"expected {BASELINE} in {self._folder.path}, got the state of another method; resume it "
                "with the method that it was begun with"
            )
        check_client_settings(self._folder.path / CLIENTS, self._settings, self._task)
        try:
            with opened(self._path) as file:
                said = parse_json((file.metadata() or {})[_METADATA], "the metadata")
                names = [name for name in file.keys() if name.startswith(f"{_OPTIMIZER}/")]  # noqa: SIM118
                own = {name: file.get_tensor(name) for name in names}
            if not isinstance(said, dict) or said.keys() != _KEYS or said["format"] != _FORMAT:
                raise ValueError(f"expected metadata of format {_FORMAT}, got others")
            if said["settings"] != self._digest:
                raise ValueError(
                    "expected the state of a run with these settings, got one with others; take those"
                )
            read_into(self._path, self._parameters)
            if said.pop("content") != _content_of(said, {**self._parameters, **own}):
                raise ValueError("expected the content that it states, got another")
            self.num_complete = check_count("round", said["round"], 0, MAX_ROUNDS - 1)
            self.optimizer_state = _with_tensors(said["optimizer"], own)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StateError(f"{self._path}: {error}; move the run's folder away to begin it anew") from error


def _content_of(said: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    digest.update(content_hash([(name, tensors[name].detach()) for name in sorted(tensors)]))
    return digest.hexdigest()


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """The value as JSON has it, each tensor in it as the name under which it is added to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        pairs = [[key, _without_tensors(item, tensors, f"{name}/{key}")] for key, item in value.items()]
        return {"pairs": pairs}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, tensors, f"{name}/{index}") for index, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `_without_tensors` was given; tuples are lists."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _with_tensors(item, tensors) for key, item in value["pairs"]}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
