"""The best untuned prompt for the sentences of `fedkseed.data.sentiment`, as measured once.

`python -m benchmarks.sentiment_prompts` measures it and writes the file that is read here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

FILE = "untuned_prompt.json"


@dataclass(frozen=True)
class UntunedPrompt:
    """What SmolLM2-135M-Instruct answers to a prompt as it comes, without any tuning.

    Attributes:
        template: text of the prompt.
        words: what answers "negative" and "positive".
        rows_per_client: held-out rows of each of the four clients, the first ones.
        accuracy: on all of them, with its 95 % interval: estimate, low, high.
        clients: the accuracy of each client.
    """

    template: str
    words: tuple[str, str]
    rows_per_client: int
    accuracy: tuple[float, float, float]
    clients: dict[str, float]


def best_untuned_prompt() -> UntunedPrompt:
    """The committed measurement."""
    found = json.loads(resources.files("fedkseed.scenarios").joinpath(FILE).read_text("utf-8"))
    negative, positive = found["words"]
    estimate, low, high = found["accuracy"]
    return UntunedPrompt(
        template=found["template"],
        words=(negative, positive),
        rows_per_client=found["rows_per_client"],
        accuracy=(estimate, low, high),
        clients=found["clients"],
    )
