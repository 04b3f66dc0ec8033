"""`fedkseed scenarios`: experiments that come with the package, or of one's own, as sweeps that go on."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedkseed.scenarios.experiments.scenario import Scenario

#: Flags that are settings of every run.
_SETTINGS = ("data", "model", "device", "workers")
_RUNS = Path("runs")


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    from fedkseed.scenarios.options import add_flags
    from fedkseed.scenarios.settings import OPTIONS

    parser = commands.add_parser(
        "scenarios",
        help="experiments: list, show and run them",
        description="Without an action: lists the scenarios that come with the package, runs of several "
        "methods or settings on the same rows, with several seeds. Each is a TOML file; one of your own runs "
        "alike.",
    )
    parser.set_defaults(run=_list)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    show = actions.add_parser("show", parents=parents, help="print a scenario's file")
    show.add_argument("name", help="a scenario's name, or a TOML file", metavar="NAME")
    show.set_defaults(run=_show)
    run = actions.add_parser(
        "run",
        parents=parents,
        help="run a scenario, or go on with it",
        description="Runs every variant with every seed, a folder each: OUT/VARIANT/seed-N. Finished runs "
        "are skipped, started ones go on: the same command goes on after a kill, and on another day.",
        epilog="Example: fedkseed scenarios run instructions --seeds 0,1 --set num_rounds=4 --set lr=1e-5",
    )
    run.add_argument("name", help="a scenario's name, or a TOML file", metavar="NAME")
    run.add_argument("--out", type=Path, help="folder of the runs (runs/NAME)", metavar="DIR")
    run.add_argument("--only", help="these variants alone", metavar="VARIANT,...")
    run.add_argument("--seeds", help="these base seeds in place of the scenario's", metavar="SEED,...")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        help="a setting of every run, before those of the file; repeated for more of them",
        metavar="KEY=VALUE",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="run nothing: print clients, bytes of a round, memory and an estimate of time of each variant",
    )
    add_flags(run.add_argument_group("settings of every run"), [OPTIONS[name] for name in _SETTINGS], {})
    run.set_defaults(run=_run)


def _list(options: argparse.Namespace) -> int:
    from fedkseed.scenarios.experiments.scenario import Scenario, library

    found = {name: Scenario.read(path) for name, path in library().items()}
    width = max(map(len, found))
    for name, scenario in found.items():
        print(f"{name:{width}}  {scenario.title}" + (" (needs --data)" if scenario.needs else ""))
    print("\nfedkseed scenarios show NAME prints one, fedkseed scenarios run NAME runs it.")
    return 0


def _show(options: argparse.Namespace) -> int:
    from fedkseed.scenarios.experiments.scenario import Scenario, file_of

    path = file_of(options.name)
    Scenario.read(path)  # whole, or refused
    print(path.read_text("utf-8"), end="")
    return 0


def _run(options: argparse.Namespace) -> int:
    from fedkseed.scenarios.experiments.dry_run import describe
    from fedkseed.scenarios.experiments.runner import Sweep
    from fedkseed.scenarios.report import command
    from fedkseed.scenarios.wording import counted

    scenario = _asked(options)
    if options.dry_run:
        for line in describe(scenario):
            print(line, flush=True)
        return 0
    out = options.out or _RUNS / scenario.name
    sweep = Sweep(scenario, out.resolve())
    try:
        failed = sweep.run()
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on in {sweep.out}", file=sys.stderr)
        return 130
    num_runs = len(scenario.runs())
    if len(failed) < num_runs:
        print(f"\nThe runs beside each other:\n  {command()} compare {shlex.quote(str(sweep.out))}")
    if failed:
        print(f"{len(failed)} of {counted(num_runs, 'run')} failed: {'; '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


def _asked(options: argparse.Namespace) -> Scenario:
    """The scenario with what the flags change.

    Raises:
        SettingsError: flags that cannot stand, or data that the user has to name.
    """
    from fedkseed.scenarios.experiments.scenario import Scenario, file_of
    from fedkseed.scenarios.options import SettingsError, parsed_values
    from fedkseed.scenarios.settings import OPTIONS

    only = options.only.split(",") if options.only is not None else []
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds is not None else []
    except ValueError:
        raise SettingsError(f"expected --seeds as integers, got {options.seeds[:80]!r}") from None
    # What flags change need not suit variants that are left out.
    scenario = Scenario.read(file_of(options.name)).limited(only, seeds)
    given = parsed_values(options.set, OPTIONS, "--set")
    if "seed" in given:
        raise SettingsError("expected --seeds in place of --set seed")
    given.update({name: value for name in _SETTINGS if (value := getattr(options, name)) is not None})
    scenario = scenario.changed(given)
    if scenario.needs and "data" not in scenario.settings:
        raise SettingsError(f"expected --data with the scenario {scenario.name}: {scenario.needs}")
    return scenario
