"""The GPU benchmark's command on a processor, in an environment and a tree as bare as a lent machine's.

The environment holds torch, numpy, triton, pytest and pytest-xdist with what they need; the tree is a copy
without git that carries the built libraries. Tools of the GPU are stand-ins that check how they are called.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bare_environment import copy_of_the_tree, make, with_dependencies
from support.gpu_tools import write_stand_ins
from support.running import is_running, wait_for

from benchmarks.gpu import plan

NAMES = ("torch", "numpy", "triton", "pytest", "pytest-xdist")
#: What the project declares beside them, and more; imports must do without.
ABSENT = ("tqdm", "transformers", "tokenizers", "gguf", "matplotlib", "safetensors", "scipy")
SECONDS = 400.0

Document = dict[str, Any]


class Machine:
    """A bare environment, a copy of the tree and the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.tree = copy_of_the_tree(folder / "tree")
        self.python = make(folder / "environment", NAMES)
        self.tools = write_stand_ins(folder / "tools", str(self.python))

    def start(self, path: Path, *options: str) -> subprocess.Popen[str]:
        """A dry run whose result goes to a file; the commit is 0123abc."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))
        }
        environment = kept | {
            "PATH": f"{self.tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.tree / "python"),
            "FEDKSEED_COMMIT": "0123abc",
            "OMP_NUM_THREADS": "1",
        }
        command = [str(self.python), "-m", "benchmarks.gpu", "--dry-run", "--json", str(path), *options]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.tree, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


def read(path: Path) -> Document:
    return json.loads(path.read_bytes())


def test_the_environment_holds_what_is_named_and_no_more(machine: Machine) -> None:
    names = (*ABSENT, "fedkseed")
    code = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    done = subprocess.run([machine.python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    needed = {"torch", "numpy", "triton", "pytest", "pytest-xdist", "sympy", "execnet", "pluggy"}
    assert needed <= set(with_dependencies(NAMES))
    assert not (machine.tree / ".git").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu do not skip themselves on this machine")
def test_all_default_parts_run(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    with machine.start(path) as process:
        output, _ = process.communicate(timeout=SECONDS)
    document = read(path)
    assert list(document["parts"]) == list(plan.DEFAULT)
    found = {name: part["status"] for name, part in document["parts"].items()}
    # On a processor tests/gpu skip themselves, also under the sanitizer: no test ran.
    skipped = {"native-tests", "triton-tests", "memcheck"}
    assert found == {name: "skipped" if name in skipped else "passed" for name in plan.DEFAULT}, output
    assert process.returncode == 0
    for name in skipped:
        reason = document["parts"][name]["reason"]
        assert re.fullmatch(r"no test ran: \d+ skipped \(no GPU\)", reason)
    plan_is_printed_and_kept(document, output)
    document_says_where_it_comes_from(document["environment"], path.read_text(), machine)
    parts_have_their_rows(document["parts"])
    few_files_with_plain_names_come_back(tmp_path)


def plan_is_printed_and_kept(document: Document, output: str) -> None:
    assert plan.table() in output
    assert f"| the default parts with {plan.START_SECONDS} s to start | " in output
    assert document["expected_seconds"] == plan.estimate(plan.DEFAULT) <= 420
    assert {name: part["estimate"] for name, part in document["parts"].items()} == {
        name: plan.BY_NAME[name].estimate for name in plan.DEFAULT
    }
    assert document["dry_run"].endswith("figures mean nothing")


def document_says_where_it_comes_from(found: Document, text: str, machine: Machine) -> None:
    assert found["commit"] == "0123abc"
    assert found["nvidia_smi"][0]["driver_version"] == "580.1"
    assert found["transformers"] is None
    assert found["pytest_benchmark"] is None
    assert re.match(r"\d+\.\d+", found["triton"])
    for library in (machine.tree / "fedkseed_kernels" / "_lib").glob("*.so"):
        assert found["libraries"][library.name] == hashlib.sha256(library.read_bytes()).hexdigest()
    assert str(machine.tree) not in text


def parts_have_their_rows(parts: Document) -> None:
    assert parts["native-tests"]["tests"]["skipped"] > 100
    assert parts["native-tests"]["workers"] >= 1
    assert {row["dtype"] for row in parts["passes"]["rows"][1:]} == {"bf16"}
    assert {row["dtype"] for row in parts["other-dtypes"]["rows"][1:]} == {"fp16", "fp32"}
    # The program under ncu ran: its stand-in gives no kernels if it fails.
    assert [row["launch"] for row in parts["ncu"]["rows"]][:3] == ["K = 1", "K = 2", "pair"]
    assert "transformers is not installed" in parts["steps-1"]["model"]
    assert {row["batch_size"] for row in parts["steps-8"]["rows"]} == {3}
    assert all("error" not in row for part in parts.values() for row in part["rows"])


def few_files_with_plain_names_come_back(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["gpu-measure.log", "gpu-ncu.log", "gpu-sanitizer.log", "gpu-tests.log", "gpu.json"]
    log = (folder / "gpu-tests.log").read_text()
    assert "===== native-tests" in log
    assert "test_every_dtype_rounding_number_of_terms_and_odd_size[" in log  # each test by its name


@pytest.mark.slow
def test_a_kill_at_sixty_percent_leaves_what_was_found(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    goal = 0.6 * len(plan.DEFAULT)

    def ended() -> list[str]:
        parts = read(path)["parts"] if path.exists() else {}
        return [name for name, part in parts.items() if "seconds" in part]

    with machine.start(path) as process:
        wait_for(lambda: len(ended()) >= goal, SECONDS)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=SECONDS)
    parts = read(path)["parts"]
    done = ended()
    assert goal <= len(done) < len(plan.DEFAULT)
    assert all(parts[name]["status"] in ("passed", "skipped") for name in done)
    assert len(parts["passes"]["rows"]) > 20
    assert {part["status"] for name, part in parts.items() if name not in done} <= {"running", "not begun"}
    wait_for(lambda: not processes_of(machine))


def processes_of(machine: Machine) -> list[int]:
    """Processes of the bare environment's Python that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and is_running(int(folder.name)):
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(os.fsencode(machine.python)):
                found.append(int(folder.name))
    return found
