"""Tune a pretrained language model with FedKSeed: `fedkseed simulate` as `make demo` runs it.

`python -m fedkseed.scenarios.demo --help` lists the options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedkseed.cli import main as command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, with the arguments of the process if None."""
    return command(["simulate", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
