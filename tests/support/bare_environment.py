"""A virtual environment that holds some distributions of the running one and nothing else, made of links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def with_dependencies(names: Iterable[str]) -> list[str]:
    """The distributions of these names and what they declare to need here, extras apart."""
    found: dict[str, None] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found[name] = None
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return list(found)


def make(folder: Path, names: Iterable[str]) -> Path:
    """Makes the environment in a folder; returns its Python.

    Every top-level file and folder that the metadata of a distribution lists is linked.

    Raises:
        PackageNotFoundError: a distribution, or one that it needs, is not installed here.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    target = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in with_dependencies(names):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        assert tops, f"expected files of {name} in its metadata, got none"
        for top in tops:
            link = target / top
            if not link.exists():  # a namespace of several distributions
                link.symlink_to(str(distribution.locate_file(top)))
    return python


def copy_of_the_tree(folder: Path) -> Path:
    """A copy of what a run on another machine needs, built libraries included, without git; the folder."""
    unwanted = shutil.ignore_patterns("__pycache__", ".*", "results", "written_by_*")
    for name in ("benchmarks", "fedkseed_kernels", "python", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder
