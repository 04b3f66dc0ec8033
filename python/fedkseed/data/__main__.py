"""`python -m fedkseed.data`: bring built-in models, sentences and instruction tasks into the cache, once."""

from __future__ import annotations

import sys

from fedkseed._extras import MissingExtraError
from fedkseed.data import fetch
from fedkseed.data.architectures import ModelError
from fedkseed.data.built_in_models import BUILT_IN_MODELS, model_source


def main() -> int:
    """Fetch and convert; 1 with a message if that cannot be done."""
    try:
        folders = [model_source(name) for name in BUILT_IN_MODELS]
        sentences = fetch.fetch(fetch.VADER)
        tasks = fetch.fetch(fetch.EVALS)
    except (fetch.FetchError, ModelError, MissingExtraError) as error:
        print(f"fedkseed.data: {error}", file=sys.stderr)
        return 1
    models = "\n".join(f"Model: {folder}" for folder in folders)
    print(f"{models}\nSentences: {sentences}\nInstruction tasks: {tasks}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
