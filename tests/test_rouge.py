"""Rouge-L twice: ours beside the package rouge-score, and the paper's beside the authors' rule."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

from fedkseed.data.federated import ClientRows, Row
from fedkseed.data.paper_rouge import paper_rouge_l
from fedkseed.data.scores import majority_answer_scores, rouge_l

#: What texts are made of: cases, repeats, stems, punctuation, letters and digits beyond ASCII.
WORDS = (
    *("the", "The", "cat", "cats", "sat", "a", "b", "12", "1.5", "it's", "x-y", "snake_case", "Straße"),
    *("naïve", "İs", "٣", "—", ".", "...", "?", "\n", "\t", "  "),
)


def random_texts(seed: int, count: int) -> list[str]:
    generator = np.random.default_rng([15, seed])
    lengths = generator.integers(0, 14, count)
    return ["".join(part for word in generator.choice(WORDS, n) for part in (word, " ")) for n in lengths]


def test_ours_is_that_of_rouge_score_without_its_stemmer() -> None:
    """Where there are words: of two texts without any that package scores 0, ours whether they agree."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = list(zip(random_texts(1, 600), random_texts(2, 600), strict=True))
    pairs += [(text, text) for text in random_texts(3, 20)]
    num_equal = 0
    for prediction, reference in pairs:
        theirs = scorer.score(reference, prediction)["rougeL"].fmeasure
        if any(character.isascii() and character.isalnum() for character in prediction + reference):
            num_equal += 1
            assert rouge_l(prediction, reference) == pytest.approx(theirs, abs=1e-12), (prediction, reference)
    assert num_equal > 500


def official(hypothesis: str, reference: str) -> float:
    """The authors' evaluations.py at ebf8216, from the two texts on."""
    if len(hypothesis) == 0:
        return 0.0
    try:
        return Rouge().get_scores([hypothesis], [reference])[0]["rouge-l"]["f"]
    except ValueError:
        return 0.0


def test_the_paper_s_is_that_of_the_authors_code() -> None:
    pairs = list(zip(random_texts(4, 300), random_texts(5, 300), strict=True))
    found = [paper_rouge_l(*pair) for pair in pairs]
    assert found == [official(*pair) for pair in pairs]
    ours = [rouge_l(*pair) for pair in pairs]
    assert sum(abs(left - right) > 0.01 for left, right in zip(found, ours, strict=True)) > 100


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Yes", "yes", 0.0),  # case counts
        ("the the the cat", "the cat", 1.0),  # each distinct word once
        ("a cat. a dog", "a dog. a cat", 1.0),  # sentence by sentence
        ("yes,", "yes", 0.0),  # words are what stands between spaces
        ("", "yes", 0.0),
        (".", "yes", 0.0),  # the package raises
        ("yes", "", 0.0),  # here too
        ("  ", "yes", 0.0),
        (" yes\n", "yes", 1.0),
        ("yes. \n", "yes.", 2 / 3),  # white space behind a full stop is a sentence of one empty word
    ],
)
def test_the_paper_s_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert paper_rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-7)


def test_texts_of_any_length_are_scored_whoever_calls() -> None:
    reference = " ".join(f"w{number}" for number in range(2 * sys.getrecursionlimit()))
    prediction = " ".join(reference.split()[:9])
    limit = sys.getrecursionlimit()
    expected = 2 * 9 / (9 + len(reference.split()))
    assert paper_rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-7)
    assert sys.getrecursionlimit() == limit
    with pytest.raises(RecursionError):
        official(prediction, reference)


def test_majority_answers_are_scored_by_it_where_that_is_asked_for() -> None:
    rows = [tuple(Row({}, text) for text in texts) for texts in (["Yes", "Yes", "no"], ["yes", "Yes"])]
    client = ClientRows("c", *rows)
    (score,) = majority_answer_scores([client], with_paper_rouge=True)
    assert (score.rouge_l, score.paper_rouge) == pytest.approx((1.0, 0.5), abs=1e-7)
    (score,) = majority_answer_scores([client])
    assert score.paper_rouge is None
