"""The tests of what others release, with the newest releases of the index: `make newest`.

It makes an environment of its own, installs the dependencies of the extras without constraints.txt, runs both
tiers of the tests of `TESTS` on this checkout, and writes `benchmarks/results/newest.json`: versions, and how
many tests passed. Not part of CI: what the index has changes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.common.places import REPOSITORY, RESULTS_FOLDER
from fedkseed.files import write_atomically

EXTRAS = ("hf", "trl", "scenarios", "data", "sign", "test")
#: What is told of: the releases that the adapters stand on.
TOLD = ("transformers", "trl", "accelerate", "peft", "lightning", "torch", "datasets", "huggingface-hub")
TESTS = (
    "tests/test_accelerate.py",
    "tests/test_load_source.py",
    "tests/test_pages.py",
    "tests/test_publish.py",
    "tests/test_publish_lora.py",
    "tests/test_zo_trainer.py",
    "tests/test_zo_trainer_arguments.py",
    "tests/test_zo_trainer_ends.py",
    "tests/test_zo_trainer_processes.py",
    "tests/test_zo_trainer_published.py",
    "tests/test_zo_trainer_refusals.py",
    "tests/test_zo_trainer_resumed.py",
    "tests/test_zo_trainer_trl.py",
)
RESULT = RESULTS_FOLDER / "newest.json"
_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


def requirements() -> list[str]:
    """What the extras of pyproject.toml ask for, this package itself left out; and Lightning, of dev."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(entry for extra in EXTRAS for entry in extras[extra])]
    named += [entry for entry in extras["dev"] if entry.startswith("lightning")]
    return sorted({entry for entry in named if not entry.startswith("fedkseed-kernels")})


def tested(python: Path, report: Path) -> dict[str, int]:
    """Numbers of tests by what became of them, of this checkout in another environment."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "python", REPOSITORY / "tests")))
    subprocess.run(
        [python, "-m", "pytest", "--quiet", f"--junitxml={report}", *TESTS],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    suites = list(xml.etree.ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors")}
    skipped = sum(int(suite.get("skipped", 0)) for suite in suites)
    failed = counts["failures"] + counts["errors"]
    return {"passed": counts["tests"] - failed - skipped, "failed": failed, "skipped": skipped}


def main() -> int:
    """Installs, tests, writes the result; the exit status is 1 if a test failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.newest", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--keep", type=Path, help="folder for the environment, used again if it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / "venv"
        python = folder / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--upgrade"]
        subprocess.run([*pip, *requirements()], check=True)
        found = subprocess.run(
            [python, "-c", _VERSIONS, *TOLD], stdout=subprocess.PIPE, text=True, check=True
        )
        versions = json.loads(found.stdout)
        print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
        counts = tested(python, Path(scratch) / "report.xml")
    described = environment.describe(1)
    document: dict[str, Any] = {
        "command": "make newest",
        **{key: described[key] for key in ("date", "commit", "python", "system")},
        "versions": versions,
        "tests": list(TESTS),
        **counts,
    }
    write_atomically(RESULT, (json.dumps(document, indent=2) + "\n").encode())
    print(f"{counts}; written to {RESULT.relative_to(REPOSITORY)}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
