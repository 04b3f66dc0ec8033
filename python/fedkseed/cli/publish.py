"""`fedkseed publish`: a ledger with a card, as a folder that others load the tuned model from."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedkseed.cli.apply import add_trust_remote_code, say


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parents: list[argparse.ArgumentParser]
) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "publish",
        parents=parents,
        help="a ledger with a model card, to publish",
        description="Writes a new folder with the ledger of a run and a card that says what it was made of: "
        "base with revision and hash, data, rounds, bytes, versions, signature, licence of the base. Nothing "
        "of the weights is in it. The base is loaded once, to see that the ledger fits it.",
        epilog="fedkseed.load, apply and ask take such a folder, or the hub id that it was uploaded to; "
        "docs/publishing.md shows the upload.",
    )
    parser.add_argument(
        "folder", type=Path, help="folder of a run, or one with a ledger and its origin.json", metavar="RUN"
    )
    parser.add_argument("out", type=Path, help="new folder", metavar="DIR")
    parser.add_argument(
        "--best", action="store_true", help="of a run: its round with the least held-out loss, not the last"
    )
    parser.add_argument("--key", type=Path, help="sign the ledger with this key (PEM)", metavar="FILE")
    parser.add_argument(
        "--base",
        default="",
        help="base model, if it lies elsewhere, or to name it as others can load it: OWNER/NAME@REVISION",
        metavar="MODEL",
    )
    parser.add_argument(
        "--license",
        help="of the base, an identifier such as apache-2.0; by default what the base's own card says",
        metavar="ID",
    )
    add_trust_remote_code(parser, "base")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes it, and says what is in it and how it is loaded."""
    from fedkseed.scenarios.publishing import publish

    written = publish(
        options.folder,
        options.out,
        best=options.best,
        base=options.base,
        license=options.license,
        key=options.key,
        trust_remote_code=options.trust_remote_code,
        say=say,
    )
    published = written.published
    origin = published.origin
    flag = "" if origin.loaded_by else " --base FOLDER_OF_THE_BASE"
    print(f"Written: {options.out}, {written.num_bytes:,} bytes in all, nothing of the weights")
    print(f"Tuned model: content {published.hashes.tuned}")
    print(f"Base: {origin.base} ({origin.source}), content {published.hashes.base}")
    if origin.license is None:
        print("The licence of the base is not known: name it with --license")
    if origin.loaded_by is None:
        print(f"Others cannot load {origin.base}, a folder of yours: --base names it as on the hub")
    print(f"To ask it: fedkseed ask {options.out} TEXT{flag}")
    return 0
