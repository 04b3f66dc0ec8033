"""The CUDA library linked with a stub of the runtime, and the PTX of its kernels, as nvcc makes both."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.native_build import load_setup

from benchmarks.machine_code import reader
from ptx.parser import Source, sources_of

ROOT = Path(__file__).resolve().parents[2]
#: Where compiled files are kept, in folders named by a hash of all that they are made of.
CACHE = ROOT / "build" / "ptx"
STUB = Path(__file__).with_name("cudart_stub.cpp")
LIBRARY = "libfedkseed_cuda.so"
HOST_COMPILER = "g++"


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message says which."""


def find_nvcc() -> str:
    """The CUDA compiler.

    Raises:
        BuildError: there is none.
    """
    found = load_setup().find_nvcc()
    if found is None:
        raise BuildError("expected nvcc in $CUDA_HOME/bin or on PATH, got none; install the CUDA toolkit")
    return str(found)


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        output = result.stderr or result.stdout
        raise BuildError(f"{' '.join(command)} failed ({result.returncode}):\n{output}")
    return result.stdout


def _flags() -> list[str]:
    """Those of setup.py that say how code is compiled, not for which GPUs; and one that notes lines in it."""
    return [*(flag for flag in load_setup().NVCC_FLAGS if not flag.startswith("-gencode")), "-lineinfo"]


def digest_of(files: Iterable[Path], *texts: str) -> str:
    """A hash of files, by name and content, and of texts."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def build(architecture: int, sources: Path = ROOT / "csrc", cache: Path = CACHE) -> Path:
    """The folder with the library and the PTX of one architecture, made where it is not there yet.

    Raises:
        BuildError: a compiler is missing or failed.
    """
    nvcc, setup = find_nvcc(), load_setup()
    files = [path for name in ("cuda", "include") for path in (sources / name).iterdir() if path.is_file()]
    version = _run([nvcc, "--version"])
    digest = digest_of([*files, STUB], version, *_flags(), HOST_COMPILER)
    folder = cache / f"cuda-{architecture}-{digest}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".cuda-{architecture}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that want the same, one compiles
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory(prefix=".cuda-", dir=cache, ignore_cleanup_errors=True) as temporary:
            made = Path(temporary, "made")
            made.mkdir()
            _compile(nvcc, architecture, sources, setup.find_sources(sources / "cuda", "*.cu"), made)
            made.rename(folder)
    return folder


def _compile(nvcc: str, architecture: int, sources: Path, files: list[Path], folder: Path) -> None:
    target = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    objects = [folder / f"{file.stem}.o" for file in files]

    def compile_one(file: Path, made: Path) -> None:
        keep = folder / file.stem
        keep.mkdir()
        flags = [*_flags(), target, f"-I{sources / 'include'}", "--keep", "--keep-dir", str(keep)]
        _run([nvcc, *flags, "-c", str(file), "-o", str(made)])
        (text,) = keep.glob("*.ptx")
        text.rename(folder / f"{file.stem}.ptx")
        shutil.rmtree(keep)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, files, objects))
    stub = folder / "cudart_stub.o"
    _run([HOST_COMPILER, "-O1", "-fPIC", "-c", str(STUB), "-o", str(stub)])
    library = str(folder / LIBRARY)
    # All that the library asks of the runtime must be in the stub.
    command = [HOST_COMPILER, "-shared", "-Wl,--no-undefined", *map(str, objects), str(stub)]
    _run([*command, "-o", library])
    for made in [*objects, stub]:
        made.unlink()


def sources_in(folder: Path) -> dict[str, Source]:
    """The kernels of a folder of `build`, by their mangled names."""
    found: dict[str, Source] = {}
    for path in sorted(folder.glob("*.ptx")):
        found |= sources_of(path.read_text())
    return found


def readable_name(symbol: str) -> str:
    """few_terms<Bf16, Gaussian, 1, 0> of a mangled name; philox_words of one without template."""
    plain = re.search(r"(?<=\d)([a-z_]+)ENS_", symbol)
    return plain[1] if plain else reader.readable_name(symbol)
