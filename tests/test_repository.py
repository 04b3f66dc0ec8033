"""What the pages, the Makefile and the CI script promise, and what no committed file may hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.embedding_pages import files as shown_files

ROOT = Path(__file__).resolve().parent.parent
GIT_LIST = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")


def test_readme_examples_run_one_after_the_other() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    result = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_environment_variables_are_documented() -> None:
    used = set()
    for path in (
        ROOT / "setup.py",
        *(ROOT / "fedkseed_kernels").rglob("*.py"),
        *(ROOT / "python").rglob("*.py"),
    ):
        used |= set(re.findall(r"\bFEDKSEED_[A-Z_]+\b", path.read_text()))
    documented = set(re.findall(r"^\| `(FEDKSEED_[A-Z_]+)`", (ROOT / "README.md").read_text(), re.M))
    assert used == documented


def test_make_targets_are_documented() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: ([\w-]+)$", makefile, re.M))
    described = set(re.findall(r"^([\w-]+):.*## \w", makefile, re.M))
    assert phony == described
    pages = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run")]
    named = {name for page in pages for name in re.findall(r"(?:`|    )make ([\w-]+)", page.read_text())}
    assert named
    assert named <= phony


def test_pythons_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    classifiers = " ".join(project["project"]["classifiers"])
    pythons = re.findall(r"Python :: (3\.\d+)", classifiers)
    oldest, newest = pythons[0], pythons[-1]
    assert project["project"]["requires-python"] == f">={oldest}"
    assert project["tool"]["mypy"]["python_version"] == oldest
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert f"\nOLDEST := {oldest}\n" in (ROOT / "Makefile").read_text()
    assert f"Python {oldest} to {newest}," in (ROOT / "README.md").read_text()
    assert f"Python {oldest} or newer," in (ROOT / "CONTRIBUTING.md").read_text()


def test_ci_script() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def committed_files() -> list[Path]:
    """What a commit of this tree would hold; in an unpacked archive without git, nothing."""
    try:
        listed = subprocess.run(GIT_LIST, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    paths = (ROOT / name.decode() for name in listed.split(b"\0") if name)
    return [path for path in paths if path.is_file()]


def test_no_registry_and_no_path_of_a_machine_is_named() -> None:
    files = committed_files()
    if not files:
        pytest.skip("not a git checkout")
    # Written so that this file does not name them either.
    hosts = [r"pypi\.or[g]", r"pythonhoste[d]\.", r"registry\.npmj[s]", r"deb\.debia[n]", r"crates\.i[o]"]
    paths = [r"(?<![\w.:/~$}])/(?:wor[k]|roo[t]|hom[e]/\w+|User[s]/\w+)/"]
    forbidden = re.compile("|".join(hosts + paths))
    found = []
    for path in files:
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:  # a binary file: golden vectors
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if forbidden.search(line)
        ]
    assert found == []


def test_files_that_comments_and_pages_name_exist() -> None:
    """Names are ends of paths, or of files that the page itself shows.

    The changelog is not read, it also speaks of files of earlier versions.
    """
    files = committed_files()
    if not files:
        pytest.skip("not a git checkout")
    ends = set()
    for path in files:
        parts = path.relative_to(ROOT).parts
        ends |= {"/".join(parts[i:]) for i in range(len(parts))}
    rooms = ("csrc", "fedkseed_kernels", "python", "benchmarks", "docs", "README.md", "CONTRIBUTING.md")
    named = re.compile(r"[\w./-]*\w\.(?:py|inc|cuh?|cpp|h|md)\b")
    missing = []
    for path in files:
        if path.relative_to(ROOT).parts[0] in rooms and path.suffix in (
            ".py",
            ".inc",
            ".cu",
            ".cpp",
            ".h",
            ".md",
        ):
            shown = set(shown_files(path.stem)) if path.parent == ROOT / "docs" else set()
            for number, line in enumerate(path.read_text().splitlines(), 1):
                names = {name.lstrip("./") for name in named.findall(re.sub(r"#include <.*>", "", line))}
                missing += [f"{path.relative_to(ROOT)}:{number}: {name}" for name in names - ends - shown]
    assert missing == []
