"""`fedkseed apply`: a ledger and its base model make the tuned model."""

from __future__ import annotations

import argparse
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
        "writes it as an ordinary model folder. Another base model, or one in another precision, is refused.",
    )
    parser.add_argument("ledger", type=Path, help="the ledger", metavar="LEDGER")
    parser.add_argument("--base", required=True, help="folder or hub id of the base model", metavar="MODEL")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the model", metavar="DIR")
    parser.add_argument(
        "--public-key", type=Path, help="refuse a ledger not signed with this key (PEM)", metavar="FILE"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Rebuilds and writes it."""
    from fedkseed.ledger.tuned_model import write_tuned_model

    identity = write_tuned_model(options.ledger, options.base, options.out, public_key=options.public_key)
    print(f"Written: {options.out}, content {identity.content.hex()}")
    return 0
