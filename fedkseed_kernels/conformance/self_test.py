"""Writes the digests of a self-test: `python -m fedkseed_kernels.conformance.self_test`.

They are the reference's, of the golden cases in `fedkseed_kernels.self_test.cases`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fedkseed_kernels.backends import reference
from fedkseed_kernels.self_test.cases import KINDS
from fedkseed_kernels.self_test.remembered import DIGESTS_PATH
from fedkseed_kernels.self_test.run import digests_of


def build() -> dict[str, dict[str, str]]:
    """The content of the file: the digest of each case by its name, for each kind of machine."""
    return {kind: digests_of(reference.seed_axpy, kind, torch.device("cpu")) for kind in KINDS}


def main() -> None:
    """Write the file."""
    Path(DIGESTS_PATH).write_text(json.dumps(build(), indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
