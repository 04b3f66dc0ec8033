"""`python -m fedkseed.data`: bring the demo's model, sentences and instruction tasks into the cache, once."""

from __future__ import annotations

import sys

from fedkseed._extras import MissingExtraError
from fedkseed.data import fetch
from fedkseed.data.models import ModelError, smollm2_folder


def main() -> int:
    """Fetch and convert; 1 with a message if that cannot be done."""
    try:
        folder = smollm2_folder()
        sentences = fetch.fetch(fetch.VADER)
        tasks = fetch.fetch(fetch.EVALS)
    except (fetch.FetchError, ModelError, MissingExtraError) as error:
        print(f"fedkseed.data: {error}", file=sys.stderr)
        return 1
    print(f"Model: {folder}\nSentences: {sentences}\nInstruction tasks: {tasks}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
