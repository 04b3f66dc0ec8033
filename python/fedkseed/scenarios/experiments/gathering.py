"""The finished runs at the places that a comparison names: runs by themselves, and those of sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkseed.documents import DocumentError, read_toml, shown
from fedkseed.scenarios.experiments.entries import ComparisonError
from fedkseed.scenarios.experiments.finished_runs import FinishedRun, UnfinishedRunError, read_run
from fedkseed.scenarios.experiments.runner import SCENARIO
from fedkseed.scenarios.run import SUMMARY
from fedkseed.simulation.run_folder import METRICS, SETTINGS

_SEED_FOLDER = re.compile(r"seed-\d+")
_RUN_FILES = (SETTINGS, SUMMARY, METRICS)
#: Runs of a kind that a note names.
_MOST_NAMED = 4


@dataclass(frozen=True)
class Gathered:
    """What is compared, and what of the places is not.

    Attributes:
        runs: finished ones, at least one.
        unfinished: a line on the runs of sweeps that were begun and are left out; empty if there are none.
        not_begun: a line on the runs that a sweep's description has and its folder has not; empty alike.
        repeated: places that lie in others or are named more than once; they are read once.
    """

    runs: tuple[FinishedRun, ...]
    unfinished: str = ""
    not_begun: str = ""
    repeated: tuple[Path, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Lines that belong below the tables."""
        notes = [line for line in (self.unfinished, self.not_begun) if line]
        if self.repeated:
            notes.append(f"Named more than once and counted once: {', '.join(map(str, self.repeated))}.")
        return notes

    def check_whole(self) -> None:
        """Raises ComparisonError unless every run of every sweep is finished."""
        if missing := "; ".join(line for line in (self.unfinished, self.not_begun) if line):
            raise ComparisonError(
                f"expected finished sweeps for a result file, got missing runs: {missing}; leave out "
                "--json to see the table of what is finished, or name the finished runs themselves"
            )


def gather(paths: Sequence[Path]) -> Gathered:
    """The runs at these places, each once.

    Args:
        paths: folders of runs, of a sweep's variants, or of sweeps.

    Raises:
        ComparisonError: a place without a run, a run that is named itself and not finished, a damaged one,
            or sweeps of which nothing is finished.
    """
    runs: dict[Path, FinishedRun] = {}
    unfinished: dict[Path, UnfinishedRunError] = {}
    repeated: dict[Path, None] = {}
    not_begun: list[str] = []
    for path in paths:
        is_named = _is_run(path)
        folders = [path] if is_named else list(_runs_of_sweep(path))
        if not folders:
            raise ComparisonError(
                f"expected the folder of a run, or of a sweep with VARIANT/seed-N in it, got {path} without "
                "either; name the folder that `fedkseed simulate --out` or `fedkseed scenarios run --out` had"
            )
        not_begun += [] if is_named else _not_begun(path)
        for folder in folders:
            place = folder.resolve()
            if place in runs or (place in unfinished and not is_named):
                repeated[path] = None
                continue
            variant = place.parent.name if _SEED_FOLDER.fullmatch(place.name) else ""
            title = sweep_variants(place.parent.parent).get(variant, "") if variant else ""
            try:
                runs[place] = read_run(folder, variant, title)
            except UnfinishedRunError as error:
                if is_named:
                    raise
                unfinished[place] = error
    lines = {_name(place): error.goes_on for place, error in unfinished.items()}
    said = _unfinished_line(lines)
    missing = _not_begun_line(list(dict.fromkeys(not_begun)))
    if not runs:
        raise ComparisonError(f"expected at least one finished run, got none: {said}")
    return Gathered(tuple(runs.values()), said, missing, tuple(repeated))


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _RUN_FILES)


def _name(place: Path) -> str:
    return f"{place.parent.name}/{place.name}"


def _unfinished_line(goes_on: dict[str, str]) -> str:
    if not goes_on:
        return ""
    names, first = _listed(list(goes_on)), next(iter(goes_on.values()))
    if len(goes_on) == 1:
        return f"1 run is not finished and left out: {names}; this goes on with it: {first}"
    return (
        f"{len(goes_on)} runs are not finished and left out: {names}; the command that began the sweep goes "
        f"on with them, this with the first: {first}"
    )


def _not_begun_line(names: list[str]) -> str:
    if not names:
        return ""
    count = "1 run of the sweep is" if len(names) == 1 else f"{len(names)} runs of the sweep are"
    return f"{count} not begun: {_listed(names)}; the command that began the sweep goes on with it"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _runs_of_sweep(path: Path) -> Iterator[Path]:
    """The folders of the runs of a sweep or of a variant of one, in the order of its description."""
    if not path.is_dir():
        return
    variants = [entry for entry in path.iterdir() if entry.is_dir()]
    place = {name: number for number, name in enumerate(sweep_variants(path))}
    variants.sort(key=lambda entry: (place.get(entry.name, len(place)), entry.name))
    for folder in (path, *variants):
        seeds = [entry for entry in folder.iterdir() if _SEED_FOLDER.fullmatch(entry.name) and _is_run(entry)]
        yield from sorted(seeds, key=lambda entry: int(entry.name.partition("-")[2]))


def _not_begun(sweep: Path) -> list[str]:
    """The names of the runs that a sweep's description has and its folder has not."""
    seeds = _description(sweep).get("seeds", [])
    planned = [f"{name}/seed-{seed}" for seed in seeds for name in sweep_variants(sweep)]
    return [name for name in planned if not _is_run(sweep / name)]


def sweep_variants(folder: Path) -> dict[str, str]:
    """The titles of a sweep's variants by their names, in its order; none where no sweep is described.

    Raises:
        ComparisonError: the description is damaged.
    """
    titles = {name: entry.get("title", "") for name, entry in _description(folder)["variants"].items()}
    return {name: "" if title == name else " ".join(str(title).split()) for name, title in titles.items()}


def _description(folder: Path) -> dict[str, Any]:
    """What a sweep's folder says of its variants and seeds; of none if it is no sweep's."""
    path = folder / SCENARIO
    if not path.is_file():
        return {"variants": {}}
    try:
        found = {"variants": {}, **read_toml(path)}
    except (OSError, DocumentError) as error:
        raise ComparisonError(f"expected the description of a sweep in {path}, got: {error}") from error
    variants, seeds = found["variants"], found.get("seeds", [])
    if not isinstance(variants, dict) or not all(isinstance(entry, dict) for entry in variants.values()):
        raise ComparisonError(f"expected [variants.NAME] tables in {path}, got {shown(variants)}")
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise ComparisonError(f"expected seeds as a list of integers in {path}, got {shown(seeds)}")
    return found
