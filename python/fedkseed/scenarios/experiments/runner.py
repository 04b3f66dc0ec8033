"""The runs of a scenario, one after the other in this process: a folder each, finished ones skipped.

    OUT/scenario.toml      what the runs are of, as changed by the call; another scenario is refused
    OUT/VARIANT/seed-N/    a run (`simulation.run_folder`); summary.json is the last file of a finished one

The same call goes on after a kill, at the round that was under way.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fedkseed.documents import DocumentError
from fedkseed.files import FolderLock, remove_leftovers, write_atomically
from fedkseed.scenarios import run as scenario_run
from fedkseed.scenarios.experiments.scenario import Planned, Scenario, Variant
from fedkseed.scenarios.launch import FREE, kept_values, with_data
from fedkseed.scenarios.options import SettingsError
from fedkseed.scenarios.wording import duration
from fedkseed.simulation.devices import choose_device
from fedkseed.simulation.run_folder import SETTINGS, RunFolder

SCENARIO = "scenario.toml"


@dataclass(frozen=True)
class Sweep:
    """The runs of a scenario in a folder.

    Attributes:
        scenario: with the settings, variants and seeds of this call.
        out: the folder.
    """

    scenario: Scenario
    out: Path

    def folder_of(self, planned: Planned) -> Path:
        """The folder of a run."""
        return self.out / planned.variant / f"seed-{planned.seed}"

    def run(self) -> list[str]:
        """Runs what is not finished; prints as it goes.

        A run that fails, of its data or later, is told and left as it is: the next one begins.

        Returns:
            The runs that failed, by variant and seed.

        Raises:
            SettingsError: the folder has another scenario.
            DeviceError: the device of all runs is not there.
            FolderInUseError: another process works in it.
            MissingExtraError: a package of an extra is not installed.
            OSError: the folder cannot be written.
        """
        if "device" in self.scenario.settings and self._unfinished():
            choose_device(self.scenario.settings["device"])  # refused once, not by each run
        self.out.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.out):
            remove_leftovers(self.out)
            self._keep_scenario()
            return list(self._run_all())

    def _unfinished(self) -> list[Planned]:
        return [planned for planned in self.scenario.runs() if not is_finished(self.folder_of(planned))]

    def _run_all(self) -> Iterator[str]:
        runs, left = self.scenario.runs(), self._unfinished()
        took: dict[str, float] = {}
        told: dict[str, str] = {}
        for number, planned in enumerate(runs, 1):
            name = f"{planned.variant}, seed {planned.seed}"
            head = f"\n== run {number} of {len(runs)}: {name}"
            if planned not in left:
                print(f"{head} (finished)", flush=True)
                continue
            print(head + _time_left(took, left), flush=True)
            left.remove(planned)
            start = perf_counter()
            try:
                _run(planned.values, self.folder_of(planned))
            except (ValueError, RuntimeError, OSError) as error:
                first = told.setdefault(str(error), name)
                why = f": {error}" if first == name else f" as {first} did"
                print(f"{name} failed{why}", file=sys.stderr, flush=True)
                yield name
            else:
                took[planned.variant] = perf_counter() - start
                print(f"\n{name} took {duration(took[planned.variant])}", flush=True)
            _release_memory()

    def _keep_scenario(self) -> None:
        """Writes the scenario, with the variants and seeds that earlier calls had if any run was begun.

        Raises:
            SettingsError: the folder's differs in what both have.
        """
        path, scenario = self.out / SCENARIO, self.scenario
        if path.exists() and any(self.out.glob(f"*/seed-*/{SETTINGS}")):
            kept = Scenario.read(path)
            if difference := _difference(kept, scenario):
                raise SettingsError(
                    f"expected the scenario that {path} keeps, got another one: {difference}; name another "
                    "folder with --out, or give the settings that it was begun with"
                )
            variants = _merged(kept.variants, scenario.variants)
            seeds = tuple(dict.fromkeys((*kept.seeds, *scenario.seeds)))
            # Not with what this call is free to change: it need not suit the others' variants.
            settings = {name: value for name, value in scenario.settings.items() if name not in FREE}
            scenario = dataclasses.replace(scenario, settings=settings, variants=variants, seeds=seeds)
        write_atomically(path, scenario.text().encode())


def _merged(kept: Mapping[str, Variant], given: Mapping[str, Variant]) -> dict[str, Variant]:
    """All variants, in the order of whoever has them all; as given now where both have one."""
    first, second = (given, kept) if kept.keys() <= given.keys() else (kept, given)
    return {**first, **second, **given}


def _time_left(took: Mapping[str, float], left: Sequence[Planned]) -> str:
    """What a heading says of the time that is left.

    Args:
        took: seconds of a run of each variant that this call has run.
        left: the runs that are to come; a variant that has not run yet may take as long as the others' mean.
    """
    if not took:
        return ""
    usual = statistics.fmean(took.values())
    return f"; about {duration(sum(took.get(planned.variant, usual) for planned in left))} left"


def is_finished(folder: Path) -> bool:
    """Whether a run's folder has a whole summary."""
    try:
        return isinstance(scenario_run.read_summary(folder), dict)
    except (OSError, DocumentError):
        return False


def _run(values: Mapping[str, Any], path: Path) -> None:
    """Begins the run of a folder, or goes on with it."""
    if (path / SETTINGS).exists():
        with RunFolder.reopen(path) as folder:
            changed = {name: values[name] for name in FREE if name in values}
            scenario_run.run(*with_data(kept_values(folder, changed)), folder)
        return
    settings, data = with_data(values)
    with RunFolder.start(path) as folder:
        try:
            folder.write_settings(settings.values())
            scenario_run.run(settings, data, folder)
        except Exception:
            folder.abandon()
            raise


def _release_memory() -> None:
    """What a run took is free for the plan of the next one."""
    gc.collect()  # a model may hang in a cycle
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _difference(kept: Scenario, given: Scenario) -> str:
    """The first setting in which two scenarios differ, "" if they agree in all that both have."""
    tables: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("settings", kept.settings, given.settings),
        *(
            (f"variants.{name}", kept.variants[name].settings, variant.settings)
            for name, variant in given.variants.items()
            if name in kept.variants
        ),
    ]
    for table, before, now in tables:
        for name in sorted({*before, *now} - set(FREE)):
            if before.get(name) != now.get(name):
                begun, wanted = (f"{found.get(name, 'left out')!s:.80}" for found in (before, now))
                return f"{name} in [{table}] is {wanted}, was {begun}"
    return ""
