"""A stub, for the linker alone, of a library that glibc 2.34 moved into its libc.

    python glibc_stubs.py FOLDER/libpthread.so NVCC...

CUDA's static runtime calls threads, semaphores, shared memory and dlopen. Where the linker finds these in a
libc of 2.34 or later it asks for the versions that they got there, and the result loads on nothing older. In
a stub it finds the versions that they had before, in the library that they were in: later systems have these
too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OLDEST_GLIBC = (2, 28)
LIBC = "libc.so.6"
LIBRARIES = {
    "libdl.so": ("libdl.so.2", r"dl\w+"),
    "libpthread.so": ("libpthread.so.0", r"_*pthread_\w+|sem_\w+"),
    "librt.so": ("librt.so.1", r"shm_\w+"),
}


def run(command: Sequence[str], folder: Path) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed ({result.returncode})")
    return result.stdout


def old_versions(symbols: str, pattern: str) -> dict[str, str]:
    """The functions of that name in a table of readelf, with the newest version that the oldest glibc has."""
    found: dict[str, tuple[int, ...]] = {}
    entry = rf"FUNC +(?:GLOBAL|WEAK) +DEFAULT +\d+ ({pattern})@@?GLIBC_([\d.]+)$"
    for name, text in re.findall(entry, symbols, re.MULTILINE):
        version = tuple(int(part) for part in text.split("."))
        if version <= OLDEST_GLIBC:
            found[name] = max(version, found.get(name, version))
    return {name: ".".join(map(str, version)) for name, version in sorted(found.items())}


def symbols_of(library: str, compiler: Sequence[str], folder: Path) -> str:
    """readelf's table of a library, where the compiler's linker finds it; empty if it finds none."""
    ask = ["-x", "cu", "-E", f"-Xcompiler=-print-file-name={library}", "/dev/null"]
    path = Path(run([*compiler, *ask], folder).strip())
    return run(["readelf", "--wide", "--dyn-syms", str(path)], folder) if path.is_absolute() else ""


def make(target: Path, compiler: Sequence[str]) -> None:
    """Write the stub ``target`` by the versions of this machine's glibc."""
    soname, pattern = LIBRARIES[target.name]
    # Before 2.34 most are in the library itself.
    symbols = symbols_of(LIBC, compiler, target.parent) + symbols_of(soname, compiler, target.parent)
    versions = old_versions(symbols, pattern)
    if not versions:
        sys.exit(f"expected functions of {soname} in {LIBC} or in it, got none; nvcc needs a gcc for glibc")
    source, version_script = target.with_suffix(".cpp"), target.with_suffix(".map")
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in versions))
    nodes: dict[str, list[str]] = {}
    for name, version in versions.items():
        nodes.setdefault(version, []).append(name)
    version_script.write_text(
        "".join(f"GLIBC_{version} {{ {'; '.join(names)}; }};\n" for version, names in nodes.items())
    )
    compile_flags = ["-shared", "-cudart=none", "-Xcompiler=-fPIC,-fno-builtin,-nostdlib"]
    link_flags = f"-Xlinker=-soname={soname},--version-script={version_script.name}"
    run([*compiler, *compile_flags, link_flags, source.name, "-o", target.name], target.parent)


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve(), sys.argv[2:])
