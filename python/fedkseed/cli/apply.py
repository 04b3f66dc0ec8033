"""`fedkseed apply`: a ledger and its base model make the tuned model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "apply",
        parents=parents,
        help="rebuild a tuned model from a ledger",
        description="Rebuilds the model that a ledger describes from the very weights it was made from, and "
        "writes it as an ordinary model folder. Another base model, or one in another precision, is refused. "
        "Of a published LoRA ledger the tuned adapter is written, as peft saves it.",
    )
    parser.add_argument(
        "ledger",
        help="the ledger, a run's folder, or folder or hub id of a published ledger",
        metavar="LEDGER",
    )
    parser.add_argument(
        "--base",
        help="folder, hub id or built-in name of the base model; of a published ledger the one that its "
        "card names will do",
        metavar="MODEL",
    )
    parser.add_argument("--out", required=True, type=Path, help="new folder for the model", metavar="DIR")
    parser.add_argument(
        "--public-key", type=Path, help="refuse a ledger not signed with this key (PEM)", metavar="FILE"
    )
    add_trust_remote_code(parser, "base")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Rebuilds and writes it."""
    from fedkseed.data.asking import FILE, NOTE
    from fedkseed.data.built_in_models import model_source
    from fedkseed.ledger.card import CARD
    from fedkseed.ledger.published import Published
    from fedkseed.ledger.sources import open_source
    from fedkseed.ledger.tuned_model import write_tuned_model
    from fedkseed.simulation.run_folder import LEDGER

    folder = Path(options.ledger)
    of_run = (folder / LEDGER).is_file() and not (folder / CARD).is_file()
    ledger = str(folder / LEDGER) if of_run else options.ledger
    identity = write_tuned_model(
        ledger,
        None if options.base is None else model_source(options.base),
        options.out,
        public_key=options.public_key,
        trust_remote_code=options.trust_remote_code,
        say=say,
    )
    opened = open_source(ledger)
    notes = opened.ledger.notes if isinstance(opened, Published) else opened.notes
    if not (options.out / FILE).exists() and NOTE in notes:
        print(
            f"The folder lacks the template that the model was tuned with: no {FILE} lies beside "
            f"{ledger}; `fedkseed ask` needs --template or takes the tokenizer's own",
            file=sys.stderr,
        )
    print(f"Written: {options.out}, content {identity.content.hex()}")
    return 0


def add_trust_remote_code(parser: argparse.ArgumentParser, whose: str) -> None:
    """Adds the flag; ``whose`` weights they are, in one word."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help=f"run code that lies beside the {whose}'s weights; without it, such a {whose} is refused",
    )


def say(line: str) -> None:
    """What takes its time, on the standard error of a terminal."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
