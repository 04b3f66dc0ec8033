"""Files and folders that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fedkseed.files import (
    FileTooLargeError,
    FolderInUseError,
    FolderLock,
    FolderNotEmptyError,
    LockLostError,
    held_folder,
    new_folder,
    read_bounded,
    remove_leftovers,
    remove_unless_held,
    write_atomically,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")
    write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["state"]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["state"]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real limit on the size of files: the write itself fails half way."""
    path = tmp_path / "state"
    write_atomically(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["state"]


def test_order_of_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is on the disk before the name points to it, and the name after."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append("flush " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition(".")[0])
        fsync(descriptor)

    def recorded_replace(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_atomically(tmp_path / "state", b"new")
    # Of the temporary file nothing stands before the first dot.
    assert events == ["flush ", "rename", f"flush {tmp_path.name}"]


_KILLED = """
import os, signal, sys
from fedkseed.files import write_atomically
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(sys.argv[1], b"new")
"""


def test_killed_before_the_rename(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")
    process = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    (tmp_path / ".folder.1-1.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["state"]


def test_leftovers_are_known_by_their_names_and_no_link_is_followed(tmp_path: Path) -> None:
    mine = tmp_path / "run"
    elsewhere = tmp_path / "elsewhere"
    for folder in (mine / ".notes.tmp", mine / ".x.1-1.tmp", mine / "x.1-1.tmp", elsewhere):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (mine / ".x.1-1.tmp" / "link").symlink_to(elsewhere)
    for name in (".y.12-34.tmp", ".tmp", ".z.tmp", ".z.1-a.tmp", ".1-1.tmp", ".w.1-1.tmp.kept"):
        (mine / name).touch()
    (mine / ".l.1-1.tmp").symlink_to(elsewhere)
    os.mkfifo(mine / ".pipe.1-1.tmp")
    before = names(mine)
    remove_leftovers(mine)
    assert set(before) - set(names(mine)) == {".x.1-1.tmp", ".y.12-34.tmp"}
    assert names(elsewhere) == names(mine / ".notes.tmp") == ["file"]


def test_a_folder_that_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
        remove_leftovers(tmp_path)
        assert names(folder) == ["file"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_is_removed_before_it_is_held_is_made_again(tmp_path: Path) -> None:
    made: list[Path] = []

    def make() -> Path:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(folder)
        return folder

    whole_flock = fcntl.flock

    def removed_first(descriptor: int, operation: int) -> None:
        if len(made) == 1:
            made[0].rmdir()
        whole_flock(descriptor, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", removed_first)
        with held_folder(make) as folder:
            assert folder == made[1]
            remove_unless_held(folder)
            assert folder.is_dir()
    remove_unless_held(folder)
    assert names(tmp_path) == []


def test_threads_that_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["state"]


def test_read_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(FileTooLargeError, match=r"expected at most 4 bytes in .*file, got more"):
        read_bounded(path, 4)
    with pytest.raises(FileTooLargeError):
        read_bounded("/dev/zero", 1000)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "absent", 4)


def test_new_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with new_folder(tmp_path / name) as folder:
            (folder / "below").mkdir()
            (folder / "below" / "file").write_text("content")
            assert not (tmp_path / name / "below").exists()
        assert (tmp_path / name / "below" / "file").read_text() == "content"
    assert names(tmp_path) == ["absent", "empty"]


def test_new_folder_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("content")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "absent" / "folder"):
        raise AssertionError("must not be entered")


def test_new_folder_where_something_is(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    before = names(tmp_path)
    for name in ("full", "file", "link"):
        with (
            pytest.raises(FolderNotEmptyError, match="expected a new or an empty folder"),
            new_folder(tmp_path / name),
        ):
            raise AssertionError("must not be entered")
    for meanwhile in ("empty/file", "later"):
        with (
            pytest.raises(FolderNotEmptyError, match="already"),
            new_folder(tmp_path / meanwhile.partition("/")[0]) as folder,
        ):
            (folder / "file").write_text("lost")
            (tmp_path / meanwhile).write_text("kept")
    assert names(tmp_path) == sorted([*before, "later"])
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"kept"}


_HOLDS = """
import sys
from fedkseed.files import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_owner_of_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        with (
            pytest.raises(FolderInUseError, match="another process works in; wait for it or choose another"),
            FolderLock(tmp_path),
        ):
            raise AssertionError("must not be entered")
        owner.kill()
    words = r"this process works in already; close\(\) the server or run that has it or choose another folder"
    for _ in range(2):
        with FolderLock(tmp_path), pytest.raises(FolderInUseError, match=words), FolderLock(tmp_path):
            raise AssertionError("must not be entered")


def test_a_lock_that_a_forked_child_was_left_is_another_process_s_there(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from fedkseed.files import FolderInUseError, FolderLock\n"
        "with FolderLock(sys.argv[1]):\n"
        "    if (child := os.fork()) == 0:\n"
        "        try:\n"
        "            FolderLock(sys.argv[1]).__enter__()\n"
        "        except FolderInUseError as error:\n"
        "            os._exit(0 if 'another process works in' in str(error) else 1)\n"
        "        os._exit(2)\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == 0


def test_a_lock_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), FolderLock(tmp_path / "absent"):
        raise AssertionError("must not be entered")


def test_a_lock_file_that_its_owner_deletes_is_no_lock_of_the_next_one(tmp_path: Path) -> None:
    first = FolderLock(tmp_path).__enter__()
    first.check()
    whole_open = os.open

    def slow_open(*arguments: Any) -> int:
        descriptor = whole_open(*arguments)
        if arguments[0] == tmp_path / ".lock" and first is not None:
            first.remove()
        return descriptor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", slow_open)
        with FolderLock(tmp_path) as second:
            second.check()
    with pytest.raises(LockLostError):
        first.check()
    assert names(tmp_path) == [".lock"]
