"""Rouge-L as in the figures of the FedKSeed paper: by the package rouge, whose rule is not that of `rouge_l`.

Case counts, words are what stands between spaces, sentences what stands between full stops, and each distinct
word counts once. So only these scores may stand beside published ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedkseed._extras import require_extra

#: Calls of the package itself around its recursion, with room to spare.
_FRAMES = 50


def require_paper_rouge() -> None:
    """Raises unless answers can be scored.

    Raises:
        MissingExtraError: the package rouge is not installed.
    """
    require_extra("scenarios", "rouge")


def paper_rouge_l(prediction: str, reference: str) -> float:
    """Rouge-L F-measure of the package rouge, in [0, 1]; 0 of an empty answer and where it finds no sentence.

    The rule of the authors' code (github.com/zhenqincn/FedKSeed at commit ebf8216, module evaluations).

    Args:
        prediction: as the model wrote it: white space around it is not removed first.
        reference: the right answer.

    Raises:
        MissingExtraError: the package rouge is not installed.
    """
    require_extra("scenarios", "rouge")
    from rouge import Rouge

    with _room_for_recursion(len(prediction.split()) + len(reference.split())):
        try:
            scores = Rouge(metrics=["rouge-l"], stats=["f"]).get_scores(prediction, reference)
        except ValueError:
            return 0.0
    return float(scores[0]["rouge-l"]["f"])


@contextmanager
def _room_for_recursion(num_calls: int) -> Iterator[None]:
    """Room for so many calls below this one: the package goes back over two texts a word a call, and long
    ones would end it, depending on who called."""
    before = sys.getrecursionlimit()
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    sys.setrecursionlimit(max(before, depth + num_calls + _FRAMES))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
