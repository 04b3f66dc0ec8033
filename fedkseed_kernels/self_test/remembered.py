"""What has passed a self-test before, remembered in the cache folder: a small file for each.

A file holds the identity of the machine code that passed; its name is a checksum of that. Files are written
whole, so any number of processes may write at once. Where there is no such folder, or a file is damaged or of
other machine code, nothing is remembered: the machine code is tested again.
"""

from __future__ import annotations

import logging
import os
import threading
import zlib
from pathlib import Path

logger = logging.getLogger("fedkseed_kernels")

CACHE_VARIABLE = "FEDKSEED_CACHE"
#: Written from the reference by `python -m fedkseed_kernels.conformance.self_test`.
DIGESTS_PATH = os.path.join(os.path.dirname(__file__), "digests.json")


def cache_folder() -> Path:
    """Where all files live: $FEDKSEED_CACHE, else $XDG_CACHE_HOME/fedkseed, else ~/.cache/fedkseed.

    Raises:
        RuntimeError: this user has no home folder, and no variable names another one.
    """
    return Path(_cache_folder())


def _cache_folder() -> str:
    # Strings alone, and below no buffered file: every process comes here, and microseconds count.
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = f"{base}/fedkseed" if base else "~/.cache/fedkseed"
    if not folder.startswith("~"):
        return folder
    expanded = os.path.expanduser(folder)
    if expanded.startswith("~"):
        raise RuntimeError(
            f"expected a home folder for {folder}, got none; set {CACHE_VARIABLE} to a folder of yours"
        )
    return expanded


def _entry(identity: str) -> tuple[str, bytes]:
    """Path and content of the file that remembers this machine code, with these golden cases."""
    cases = os.stat(DIGESTS_PATH)
    content = f"{identity}; cases {cases.st_size} {cases.st_mtime_ns}\n".encode()
    return f"{_cache_folder()}/self-tests/{zlib.crc32(content):08x}.txt", content


def is_remembered(identity: str | None) -> bool:
    """Whether this very machine code has passed before; None is never remembered."""
    if identity is None:
        return False
    try:
        path, content = _entry(identity)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(file, len(content) + 1) == content
        finally:
            os.close(file)
    except (OSError, RuntimeError):
        return False


def remember(identity: str | None) -> None:
    """Note that this machine code has passed, if the cache folder can be written."""
    if identity is None:
        return
    try:
        name, content = _entry(identity)
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_native_id()}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        logger.debug("a self-test that passed is not remembered: %s", error)


def forget(identity: str | None) -> None:
    """Remove the note that `remember` made, if there is one."""
    if identity is None:
        return
    try:
        Path(_entry(identity)[0]).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        logger.debug("the note on a self-test is not removed: %s", error)
