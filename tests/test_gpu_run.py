"""A run of the GPU benchmark: what its parts and their processes may do, and what is left of it then."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.gpu_tools import STAND_INS, write_stand_ins, write_tool
from support.running import SECONDS, is_running, wait_for

from benchmarks.gpu import part as gpu_part
from benchmarks.gpu import plan, processes
from benchmarks.gpu.channel import Channel, LineReader, append
from benchmarks.gpu.run import Run
from fedkseed_kernels.self_test import gate

ROOT = Path(__file__).resolve().parent.parent

#: A tool that leaves a row, starts a process of its own, notes both processes' numbers, and does not end.
HANGING = """
import json, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
path = next((sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--gpu-rows"), None)
if path:
    with open(path, "a") as file:
        file.write(json.dumps({"row": {"test": "one", "outcome": "failed"}}) + "\\n")
        file.write(json.dumps({"note": {"tests": {"passed": 3, "failed": 1}}}) + "\\n")
print("it hangs", flush=True)
with open(PIDS + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.replace(PIDS + ".part", PIDS)
time.sleep(600)
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH; no other has the tools."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return folder


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    """Where a hanging tool notes its processes."""
    return tmp_path / "pids"


def write_hanging(tools: Path, name: str, pids: Path) -> None:
    write_tool(tools, name, f"PIDS = {str(pids)!r}\n{HANGING}")


def part(name: str, **changes: Any) -> plan.Part:
    return replace(plan.BY_NAME[name], **({"estimate": 1, "bound": 40} | changes))


def run_parts(path: Path, *parts: plan.Part, seconds: float = SECONDS) -> tuple[bool, dict[str, Any]]:
    """Whether a dry run of the parts is good, and what its file has of them."""
    is_good = Run(parts, plan.Settings(is_dry_run=True), path, {}, seconds).do()
    return is_good, json.loads(path.read_bytes())["parts"]


# --- what ends a part


def test_a_part_that_hangs_is_ended_with_its_grandchildren_and_leaves_its_rows(
    tmp_path: Path, tools: Path, pids: Path
) -> None:
    write_hanging(tools, "compute-sanitizer", pids)
    write_tool(tools, "ncu", STAND_INS["ncu"])
    path = tmp_path / "result.json"
    is_good, found = run_parts(path, part("memcheck", bound=8), part("ncu"))
    assert not is_good
    hung = found["memcheck"]
    assert hung["status"] == "over time"
    assert hung["reason"] == "its process was ended after 8 s, without a result"
    assert hung["rows"] == [{"test": "one", "outcome": "failed"}]
    assert hung["tests"] == {"passed": 3, "failed": 1}
    assert found["ncu"]["status"] == "passed"
    assert [pid for pid in map(int, pids.read_text().split()) if is_running(pid)] == []
    assert "it hangs" in (tmp_path / "result-sanitizer.log").read_text()


def test_what_a_process_leaves_running_is_ended_too(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    program += f"; open({str(pid)!r}, 'w').write(str(p.pid))"
    with (tmp_path / "log").open("wb") as log:
        group = processes.Group([sys.executable, "-c", program], log)
        assert group.wait(SECONDS)
        assert is_running(int(pid.read_text()))
        assert group.end() == 0
    wait_for(lambda: not is_running(int(pid.read_text())))
    assert group.end() == 0


#: A part's process in which a baseline is broken.
BROKEN = """
import sys, time
from benchmarks.baselines import torch_ways
from benchmarks.gpu.part import main

def axpy_(*_):
    {body}

torch_ways.axpy_ = axpy_
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("raise RuntimeError('it raises')", "failed", "got errors of randn_like + add_ (perturb, bf16), "),
        ("time.sleep(600)", "over time", "its process was ended after 40 s, without a result"),
    ],
)
def test_a_measurement_that_raises_or_hangs_leaves_the_rows_of_the_others(
    tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, body: str, status: str, reason: str
) -> None:
    made = gpu_part.command

    def command(name: str, *arguments: Any) -> list[str]:
        line = made(name, *arguments)
        if name != "passes":
            return line
        return [sys.executable, "-c", BROKEN.format(body=body), *line[line.index(name) :]]

    monkeypatch.setattr(gpu_part, "command", command)
    path = tmp_path / "result.json"
    is_good, found = run_parts(path, part("passes"), part("ncu"), seconds=100)
    assert not is_good
    assert found["passes"]["status"] == status
    assert reason in found["passes"]["reason"]
    rows = [row for row in found["passes"]["rows"] if row.get("case") == "perturb"]
    assert "official" in {row["contestant"] for row in rows if "seconds" in row}
    assert found["ncu"]["status"] == "skipped"  # the next part had its turn


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("print('==ERROR== ERR_NVGPUCTRPERM'); raise SystemExit(1)", "refused", "ncu: ERR_NVGPUCTRPERM"),
        (
            "print('==WARNING== No kernels were profiled.')",
            "failed",
            "measured nothing: no kernel was profiled",
        ),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "failed", "a result: ended by SIGKILL"),
        ("raise SystemExit(MISUSED)", "failed", "ncu measured nothing"),
    ],
)
def test_a_tool_that_gives_nothing(
    tmp_path: Path, tools: Path, source: str, status: str, reason: str
) -> None:
    write_tool(tools, "ncu", source)
    is_good, found = run_parts(tmp_path / "result.json", part("ncu"))
    assert (found["ncu"]["status"], is_good) == (status, status == "refused")
    assert reason in found["ncu"]["reason"]


def test_a_tool_that_is_not_there_is_skipped_by_name(tmp_path: Path, tools: Path) -> None:
    is_good, found = run_parts(tmp_path / "result.json", part("ncu"), part("memcheck"))
    assert is_good
    for name, tool in (("ncu", "ncu"), ("memcheck", "compute-sanitizer")):
        assert found[name]["status"] == "skipped"
        assert found[name]["reason"].startswith(f"{tool} is neither on PATH nor in ")


def test_a_part_that_does_not_fit_is_not_begun_and_a_smaller_one_behind_it_runs(
    tmp_path: Path, tools: Path
) -> None:
    write_stand_ins(tools)
    parts = (part("memcheck", estimate=75), part("ncu", estimate=20))
    is_good, found = run_parts(tmp_path / "result.json", *parts, seconds=50)
    assert not is_good
    assert found["memcheck"]["status"] == "not begun"
    assert re.fullmatch(r"it takes about 75 s, \d+ s were left", found["memcheck"]["reason"])
    assert found["ncu"]["status"] == "passed"


def test_a_result_that_the_process_does_not_survive_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends as one whose driver crashes at exit."""
    code = "import os, signal, sys; sys.argv[1:]\n"
    code += "from benchmarks.gpu.channel import append\n"
    code += "append(sys.argv[1], {'note': {'status': 'passed'}}); os.kill(os.getpid(), signal.SIGSEGV)"
    command = lambda name, settings, path, seconds: [sys.executable, "-c", code, str(path)]  # noqa: E731
    monkeypatch.setattr(gpu_part, "command", command)
    _, found = run_parts(tmp_path / "result.json", part("smoke"))
    assert found["smoke"]["status"] == "failed"
    assert found["smoke"]["reason"] == "its process ended after its result, 'passed': ended by SIGSEGV"


# --- what ends a run


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_run_that_is_ended_leaves_a_whole_file_and_no_process(
    tmp_path: Path, tools: Path, pids: Path, number: signal.Signals
) -> None:
    write_tool(tools, "nvidia-smi", STAND_INS["nvidia-smi"])
    write_hanging(tools, "compute-sanitizer", pids)
    path = tmp_path / "out" / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--parts", "memcheck,ncu"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    with subprocess.Popen(
        [*command, "--json", str(path)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    ) as process:

        def rows() -> Any:
            return path.exists() and json.loads(path.read_bytes())["parts"]["memcheck"].get("rows")

        wait_for(lambda: rows() and pids.exists())
        process.send_signal(number)
        status = process.wait(SECONDS)
    document = json.loads(path.read_bytes())
    parts = document["parts"]
    assert parts["memcheck"]["rows"] == [{"test": "one", "outcome": "failed"}]
    assert parts["ncu"]["status"] == "not begun"
    assert document["environment"]["nvidia_smi"][0]["name"] == "Stand-in 1/2 GPU"
    if number is signal.SIGTERM:
        assert status == 1
        assert document["stopped"] == "SIGTERM"
        assert (parts["memcheck"]["status"], parts["memcheck"]["reason"]) == (
            "stopped",
            "the run was stopped by SIGTERM",
        )
    else:
        assert parts["memcheck"]["status"] == "running"
    wait_for(lambda: not any(map(is_running, map(int, pids.read_text().split()))))


# --- what parts hand over


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    reader = LineReader(path)
    assert reader.new() == []
    append(path, {"row": 1})
    with path.open("ab") as file:
        file.write(b'{"row"')
        file.flush()
        assert reader.new() == [{"row": 1}]
        file.write(b": 2}\n")
    assert reader.new() == [{"row": 2}]
    with path.open("ab") as file:
        file.write(b'{"row": cut off by a ki\n')
    append(path, {"row": 3})
    assert reader.new() == [{"row": 3}]


def test_a_row_replaces_the_one_of_its_key(tmp_path: Path) -> None:
    channel = Channel(tmp_path / "lines", 1.0)
    run = Run((part("smoke"),), plan.Settings(), tmp_path / "result.json", {"device": "cpu"}, 1.0)
    kept: dict[str, Any] = {"rows": []}
    keys: dict[str, int] = {}
    reader = LineReader(channel.path)
    for value in (1, 2):
        channel.row({"a": value}, key="a")
        channel.row({"b": value})
        channel.note(status="passed", value=value)
        run._fold(reader.new(), kept, keys)
    channel.facts(device="a GPU")
    run._fold(reader.new(), kept, keys)
    assert kept == {"rows": [{"a": 2}, {"b": 1}, {"b": 2}], "status": "passed", "value": 2}
    assert run.document["environment"] == {"device": "a GPU"}
    assert channel.noted("value") == 2
    assert channel.noted("other") is None


def test_a_document_does_not_say_where_the_repository_lies(tmp_path: Path, tools: Path) -> None:
    write_tool(tools, "ncu", f"print('==ERROR== no {ROOT}/fedkseed_kernels'); raise SystemExit(1)")
    _, found = run_parts(tmp_path / "result.json", part("ncu"))
    assert found["ncu"]["reason"] == "ncu: no fedkseed_kernels"


def test_parts_and_what_they_start_run_no_self_test(
    tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gate.SELF_TEST_VARIABLE, "1")
    write_tool(tools, "ncu", f"import os; print('==ERROR== got', os.environ['{gate.SELF_TEST_VARIABLE}'])")
    _, found = run_parts(tmp_path / "result.json", part("ncu"))
    assert found["ncu"]["reason"] == "ncu: got 0"


def test_a_file_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        run_parts(tmp_path / "missing" / "result.json", part("ncu"))


def test_a_reader_that_is_gone_ends_no_run(
    tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    write_tool(tools, "ncu", STAND_INS["ncu"])
    monkeypatch.setattr(sys, "stdout", Closed())
    is_good, found = run_parts(tmp_path / "result.json", part("ncu"))
    assert is_good
    assert found["ncu"]["status"] == "passed"
