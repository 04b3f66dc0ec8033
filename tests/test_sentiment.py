"""The rated sentences: an archive in the same layout, its clients, what they leave out, and bad archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fedkseed.data import fetch, sentiment
from fedkseed.data.errors import DataError
from fedkseed.data.fetch import FetchError
from fedkseed.data.sentiment import FILES, Sentence, parse_sentences, read_sentiment, shorten

TAR = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"


def make_archive(path: Path, files: Mapping[str, bytes], inner: str = TAR) -> Path:
    """A zip archive that holds a compressed tar with the files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(inner, packed.getvalue())
    return path


def lines(client: str, by_document: bool, count: int = 60) -> list[str]:
    ids = (f"{index // 3 + 1}_{index % 3 + 1}" if by_document else str(index + 1) for index in range(count))
    ratings = (1.5 if index % 2 else -2.25 for index in range(count))
    return [
        f"{identifier}\t{rating}\t{client}, sentence {index}"
        for index, (identifier, rating) in enumerate(zip(ids, ratings, strict=True))
    ]


def contents(**changes: list[str]) -> dict[str, bytes]:
    """The four files, CRLF line ends as in the archive; ``changes`` replaces a client's lines."""
    found = {}
    for client, name in FILES.items():
        listed = changes.get(client) or lines(client, by_document=client in ("amazon", "nyt"))
        found[name] = "".join(f"{line}\r\n" for line in listed).encode()
    return found


def texts(rows: tuple[sentiment.Row, ...]) -> set[str]:
    return {row.fields["text"] for row in rows}


def test_four_clients_with_words_for_their_labels(tmp_path: Path) -> None:
    data = read_sentiment(make_archive(tmp_path / "a.zip", contents()))
    assert [client.name for client in data.clients] == ["movie", "tweets", "amazon", "nyt"]
    assert data.kind == "classification"
    assert dict(zip(data.labels, data.words, strict=True)) == {"negative": " terrible", "positive": " great"}
    for client in data.clients:
        rows = (*client.train, *client.held_out)
        assert len(rows) == 60
        assert texts(client.train).isdisjoint(texts(client.held_out))
        for row in rows:
            number = int(row.fields["text"].rpartition(" ")[2])
            assert row.response == ("positive" if number % 2 else "negative")
    assert data.template.prompt(None, {"text": "Nice."}) == "Nice. It was"  # type: ignore[arg-type]


def test_documents_stay_whole(tmp_path: Path) -> None:
    data = read_sentiment(make_archive(tmp_path / "a.zip", contents()))
    for client in data.clients[2:]:
        documents = [
            {int(text.rpartition(" ")[2]) // 3 for text in texts(rows)}
            for rows in (client.train, client.held_out)
        ]
        assert documents[0].isdisjoint(documents[1])
        assert documents[0] | documents[1] == set(range(20))


def test_the_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    data = read_sentiment(make_archive(tmp_path / "a.zip", contents()))
    turned = contents(**{client: lines(client, client in ("amazon", "nyt"))[::-1] for client in FILES})
    assert read_sentiment(make_archive(tmp_path / "b.zip", turned)) == data
    listed = [row.fields["text"] for row in data.clients[0].train]
    assert listed == sorted(listed, key=lambda text: sha_order("movie", text))


def sha_order(client: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{client}\n{text}".encode()).digest()[:8], "little")


def test_doubtful_repeated_and_long_sentences(tmp_path: Path) -> None:
    long = " ".join(f"word{index}" for index in range(30))
    extra = [
        "61\t0.99\tnearly",
        "62\t-0.99\tnearly not",
        "63\t1.0\tjust",
        "64\t-1\tjust  not",
        "65\t2\tmovie, sentence 3",  # stands above, with another rating
        f"66\t3\t{long}",
        f"67\t-3\t{long} but not really",  # the same once it is cut
    ]
    movie = lines("movie", by_document=False) + extra
    data = read_sentiment(
        make_archive(tmp_path / "a.zip", contents(movie=movie, tweets=[*movie[:60], *lines("tweets", False)]))
    )
    found = {row.fields["text"]: row.response for row in (*data.clients[0].train, *data.clients[0].held_out)}
    assert len(found) == 63
    assert (found["just"], found["just not"]) == ("positive", "negative")
    assert found[" ".join(long.split()[:24])] == "positive"
    assert "nearly" not in found
    assert data.notes[0] == "movie: of 67 sentences 2 left out, rated between -1 and 1, and 2 repeated ones"
    # What one client has no other gets.
    assert (
        data.notes[1] == "tweets: of 120 sentences 0 left out, rated between -1 and 1, and 60 repeated ones"
    )


def test_shorten() -> None:
    assert shorten("  a \t b  ") == "a b"
    assert len(shorten("word " * 40).split()) == 24


def test_parse_sentences() -> None:
    assert parse_sentences("7_2\t-1.5\t Bad. \r\n\r\n", "file") == [Sentence("7", -1.5, "Bad.")]


@pytest.mark.parametrize("line", ["1\t2.0", "1\tgood\ttext", "1\t2.0\ttext\tmore"])
def test_a_line_of_another_form(line: str) -> None:
    with pytest.raises(DataError, match="file line 2: expected an id, a rating and a sentence with tabs"):
        parse_sentences(f"1\t1.0\tfine\n{line}", "file")


def test_a_rating_that_is_no_number() -> None:
    with pytest.raises(DataError, match="file line 1: expected a finite rating, got 'nan'"):
        parse_sentences("1\tnan\ttext", "file")


def test_archives_that_are_not_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "a.zip"

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            read_sentiment(archive)
        assert str(caught.value).startswith("a.zip: expected a zip archive with vaderSentiment-0.5/")

    refused("No such file")
    archive.write_bytes(b"no archive")
    refused("not a zip file")
    refused_inner = contents()
    make_archive(archive, refused_inner, inner="other.tar.gz")
    refused("no item named")
    make_archive(archive, {name: refused_inner[name] for name in list(refused_inner)[:3]})
    refused("nytEditorialSnippets_GroundTruth.txt' not found")
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(TAR, b"\x1f\x8b not compressed")
    refused("got ")
    make_archive(archive, {**refused_inner, FILES["nyt"]: b"1\t2.0\t\xff\n"})
    refused("can't decode byte 0xff")
    with monkeypatch.context() as patch:
        patch.setattr(sentiment, "_MAX_BYTES", 4096)
        refused("at most 0 MiB, got more")


def test_a_client_without_sentences(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a.zip", contents(movie=["1\t0.1\tneither"]))
    with pytest.raises(
        DataError, match="movieReviewSnippets_GroundTruth.txt: expected sentences rated beyond"
    ):
        read_sentiment(archive)


def test_a_source_archive_is_fetched_by_its_hash_and_another_is_never_run(index: Path, cache: Path) -> None:
    ran = cache.parent / "setup-ran"
    path = index / "tinysource-1.0.zip"
    with zipfile.ZipFile(path, "w") as archive:
        text = f"import pathlib; pathlib.Path({str(ran)!r}).touch(); raise SystemExit('not this one')"
        archive.writestr("tinysource-1.0/setup.py", text)
        archive.writestr("tinysource-1.0/PKG-INFO", "Metadata-Version: 1.0\nName: tinysource\nVersion: 1.0\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    artifact = replace(
        fetch.VADER, name="tinysource", version="1.0", filename=path.name, sha256="0" * 64, size=1000
    )
    with pytest.raises(FetchError, match="DO NOT MATCH THE HASHES"):
        fetch.fetch(artifact)
    assert not ran.exists()
    (cache / path.name).write_bytes(path.read_bytes())
    assert fetch.fetch(replace(artifact, sha256=digest)) == cache / path.name


def test_the_pinned_archive_where_it_is_cached() -> None:
    archive = fetch.cache_folder() / fetch.VADER.filename
    if not archive.is_file():
        pytest.skip("needs the archive in the cache: python -m fedkseed.data")
    data = sentiment.load_sentiment()
    sizes = {client.name: (len(client.train), len(client.held_out)) for client in data.clients}
    assert sizes == {"movie": (7346, 1825), "tweets": (2156, 511), "amazon": (1911, 536), "nyt": (1240, 295)}
    everything = [row.fields["text"] for c in data.clients for row in (*c.train, *c.held_out)]
    assert len(everything) == len(set(everything))
