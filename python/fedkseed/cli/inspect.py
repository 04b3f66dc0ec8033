"""`fedkseed inspect`: what a ledger says."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "inspect",
        parents=parents,
        help="what a ledger says",
        description="Shows versions, seed pool, coefficients, hashes of the base model and signature of a "
        "ledger; of a published one also what its card says, and whether its files belong together.",
    )
    parser.add_argument("ledger", help="the ledger, or folder or hub id of a published one", metavar="LEDGER")
    parser.add_argument(
        "--public-key", type=Path, help="check the signature with this key (PEM)", metavar="FILE"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints it."""
    from fedkseed.ledger.describe import describe

    print(describe(options.ledger, public_key=options.public_key))
    return 0
