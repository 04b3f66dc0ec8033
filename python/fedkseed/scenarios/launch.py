"""The way from settings by name to a run: findable paths, rows, the settings that a folder keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkseed.data.built_in_models import BUILT_IN_MODELS
from fedkseed.data.federated import FederatedData
from fedkseed.data.models import is_local
from fedkseed.scenarios.built_in import load_data, num_clients
from fedkseed.scenarios.options import checked_values
from fedkseed.scenarios.presets import BUILT_IN
from fedkseed.scenarios.settings import OPTIONS, RunSettings
from fedkseed.seeds import MAX_CLIENTS
from fedkseed.simulation.run_folder import SETTINGS, RunFolder

#: What may differ from the run's beginning when it is resumed.
FREE = ("workers", "worker_timeout", "device", "trust_remote_code")
#: Where what a run was begun with lies by now; that it is the same is checked.
MOVED = ("model", "data", "template_file")


def findable(name: str, value: Any) -> Any:
    """The setting as it is kept: a path as it is found from any folder, where the run may go on."""
    if value in {"data": BUILT_IN, "model": BUILT_IN_MODELS}.get(name, ()):
        return value
    is_path = name == "model" and value and is_local(value)
    is_path = is_path or (name in ("data", "template_file") and Path(value).expanduser().exists())
    return str(Path(value).expanduser().resolve()) if is_path else value


def with_data(values: Mapping[str, Any]) -> tuple[RunSettings, FederatedData | None]:
    """The settings of a run and its rows; some settings follow from how many clients there are.

    Raises:
        SettingsError: a value out of range.
        DataError, FetchError, MissingExtraError: the rows cannot be had.
    """
    # What is wrong whatever the data are is refused before they are read.
    seed = RunSettings.of(values, MAX_CLIENTS).federation.seed
    data = load_data(values, seed)
    return RunSettings.of(values, num_clients(data)), data


def kept_values(folder: RunFolder, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that a folder has, to go on with.

    Args:
        folder: of the run.
        changed: what is free to differ by now, and where its files lie.

    Raises:
        RunFolderError, SettingsError: the folder's settings are damaged.
    """
    values = checked_values(folder.read_settings(), OPTIONS, str(folder.path / SETTINGS))
    values.setdefault("autocast", "off")  # version 0.1 knew no other
    # What lies in a folder may be of anybody: code that it names is trusted by a flag alone.
    return {**values, "trust_remote_code": False, **changed}
