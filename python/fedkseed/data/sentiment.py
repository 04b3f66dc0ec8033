"""Sentiment of sentences as four unlike clients: the human-rated sets of VADER.

C. J. Hutto, E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014. The sets are a compressed tar inside the pinned source archive, and are read where they lie.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkseed.data import fetch
from fedkseed.data.errors import DataError
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.templates import Template

#: Texts lose their words from here on: short rows make short steps.
MAX_WORDS = 24
#: Held-out rows of each client that a demo is scored on.
NUM_SCORED = 100
#: One document in so many is held out.
HELD_OUT_PART = 5

LABELS = ("negative", "positive")
WORDS = (" terrible", " great")
TEMPLATE = Template.custom("{text} It was")

_TAR = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
#: Client -> file of its sentences in the tar. An id ``document_sentence`` names a document.
FILES = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "nyt": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}
_MAX_BYTES = 8 << 20  # of the tar; the pinned archive has 6.1 MiB
_MAX_FILE_BYTES = 2 << 20  # of a file that is read from it; the largest has 1.3 MiB


@dataclass(frozen=True)
class Sentence:
    """A sentence of a document; ``rating`` is the mean of its raters, from -4 (negative) to 4."""

    document: str
    rating: float
    text: str


def load_sentiment() -> FederatedData:
    """The four clients; the first call fetches the pinned archive.

    Sentences rated between -1 and 1 are left out, and of equal texts (cut to `MAX_WORDS` words) all but the
    first. Whole documents are held out. A client's rows stand in the order of a hash, so the first ones of
    ``held_out`` are a sample of all.

    Raises:
        FetchError: the archive cannot be fetched.
        DataError: its content is not what it should be.
    """
    return read_sentiment(fetch.fetch(fetch.VADER))


def read_sentiment(archive: Path) -> FederatedData:
    """The same from a given archive.

    Raises:
        DataError: as `load_sentiment`.
    """
    texts = _read_files(archive, tuple(FILES.values()))
    seen: set[str] = set()
    clients, notes = [], []
    for name, text in zip(FILES, texts, strict=True):
        sentences = parse_sentences(text, FILES[name])
        rated = [sentence for sentence in sentences if abs(sentence.rating) >= 1]
        kept = []
        for sentence in rated:
            cut = shorten(sentence.text)
            if cut and cut not in seen:
                seen.add(cut)
                kept.append(sentence)
        clients.append(_split(name, kept))
        notes.append(
            f"{name}: of {len(sentences):,} sentences {len(sentences) - len(rated):,} left out, rated "
            f"between -1 and 1, and {len(rated) - len(kept)} repeated ones"
        )
    return FederatedData(
        kind="classification",
        clients=tuple(clients),
        unseen=(),
        template=TEMPLATE,
        labels=LABELS,
        words=WORDS,
        notes=tuple(notes),
    )


def parse_sentences(text: str, where: str) -> list[Sentence]:
    """The sentences of one file: id, rating and text, a tab between them.

    Raises:
        DataError: a line of another form; the message names ``where`` and the line.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        try:
            identifier, rating, sentence = cells
            value = float(rating)
        except ValueError as error:
            raise DataError(
                f"{where} line {number}: expected an id, a rating and a sentence with tabs between, "
                f"got {line[:120]!r}"
            ) from error
        if not math.isfinite(value):
            raise DataError(f"{where} line {number}: expected a finite rating, got {rating!r}")
        found.append(Sentence(identifier.partition("_")[0], value, sentence.strip()))
    return found


def shorten(text: str) -> str:
    """The first `MAX_WORDS` words, a space between them."""
    return " ".join(text.split()[:MAX_WORDS])


def _split(name: str, sentences: Sequence[Sentence]) -> ClientRows:
    """Holds out every document whose hash is a multiple of `HELD_OUT_PART`."""
    ordered = sorted(sentences, key=lambda sentence: _hash(name, shorten(sentence.text)))
    parts: tuple[list[Row], list[Row]] = ([], [])
    for sentence in ordered:
        held_out = _hash(name, sentence.document) % HELD_OUT_PART == 0
        row = Row({"text": shorten(sentence.text)}, LABELS[sentence.rating > 0])
        parts[held_out].append(row)
    train, held = parts
    if not train or not held:
        raise DataError(
            f"{FILES[name]}: expected sentences rated beyond -1 and 1 for training and beside it, "
            f"got {len(train)} and {len(held)}"
        )
    return ClientRows(name, tuple(train), tuple(held))


def _hash(*texts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:8], "little")


def _read_files(archive: Path, members: Sequence[str]) -> list[str]:
    """Files of the tar inside the archive, as text; nothing is unpacked to disk, and no more than a bound."""
    what = f"{archive.name}: expected a zip archive with {_TAR}, which holds"
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            fetch.open_member(opened, _TAR) as inner,
            gzip.open(inner) as plain,
        ):
            content = plain.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise DataError(f"{what} at most {_MAX_BYTES >> 20} MiB, got more")
        texts = []
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in members:
                file = tar.extractfile(member)
                if file is None:
                    raise DataError(f"{what} {member} as a file, got something else")
                text = file.read(_MAX_FILE_BYTES + 1)  # a sparse one may be larger than the tar
                if len(text) > _MAX_FILE_BYTES:
                    raise DataError(f"{what} {member} of at most {_MAX_FILE_BYTES >> 20} MiB, got more")
                texts.append(text.decode("utf-8"))
    except DataError:
        raise
    except (*fetch.ARCHIVE_ERRORS, tarfile.TarError) as error:
        raise DataError(f"{what} {', '.join(members)}, got {error}") from error
    return texts
