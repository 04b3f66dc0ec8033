"""What the GPU benchmark asks of pytest, compute-sanitizer and ncu, and what it makes of their answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.gpu_tools import MISUSED, write_stand_ins

from benchmarks.gpu import ncu, tests
from benchmarks.gpu.channel import Channel, PartEnded

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    return Channel(tmp_path / "lines", 60.0)


class TestTools:
    @pytest.mark.parametrize(
        ("status", "found", "expected"),
        [
            (0, {"passed": 3, "skipped": 1, "skips": {"no room": 1}}, None),
            (0, {"skipped": 132, "skips": {"no GPU": 132}}, "skipped: no test ran: 132 skipped (no GPU)"),
            (5, {"skipped": 1, "skips": {"no GPU": 1}}, "skipped: no test ran: 1 skipped (no GPU)"),
            (5, None, "skipped: no test ran: no test was collected"),
            (
                1,
                {"passed": 3, "failed": 1},
                "failed: 3 passed, 1 failed; the command ended with exit status 1",
            ),
            (4, None, "failed: no test was collected; the command ended with exit status 4"),
        ],
    )
    def test_what_pytest_found(self, channel: Channel, status: int, found: Any, expected: str | None) -> None:
        if found is not None:
            channel.note(tests=found)
        if expected is None:
            tests.judge(status, channel)
            return
        with pytest.raises(PartEnded) as ended:
            tests.judge(status, channel)
        assert str(ended.value) == expected

    @pytest.mark.parametrize(
        ("status", "output", "expected"),
        [
            (0, ["========= ERROR SUMMARY: 0 errors"], None),
            (0, ["========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"], None),
            (0, [], "failed: compute-sanitizer ended without a summary"),
            (
                9,
                ["========= ERROR SUMMARY: 2 errors"],
                "failed: compute-sanitizer found errors: ERROR SUMMARY: 2",
            ),
            (1, ["========= ERROR SUMMARY: 2 errors"], "failed: compute-sanitizer found errors"),
            (
                1,
                ["========= Error: Device not supported. Please refer"],
                "refused: compute-sanitizer: Error: Dev",
            ),
        ],
    )
    def test_what_the_sanitizer_found(
        self, channel: Channel, status: int, output: list[str], expected: str | None
    ) -> None:
        channel.note(tests={"passed": 1})
        if expected is None:
            tests.judge_sanitizer(status, output, channel)
            return
        with pytest.raises(PartEnded) as ended:
            tests.judge_sanitizer(status, output, channel)
        assert str(ended.value).startswith(expected)

    def test_a_sanitizer_under_which_no_test_ran_is_skipped(self, channel: Channel) -> None:
        channel.note(tests={"skipped": 16, "skips": {"no GPU": 16}})
        with pytest.raises(PartEnded, match="skipped: no test ran"):
            tests.judge_sanitizer(0, ["========= ERROR SUMMARY: 0 errors"], channel)

    @pytest.mark.parametrize(
        ("tool", "right", "wrong"),
        [
            ("ncu", "regex:few_terms|many_gaussian|many_rademacher|strided", "regex:fk_"),
            ("ncu", "none", "base"),
            ("ncu", "off", "on"),
            ("ncu", "raw", "details"),
            ("ncu", "--csv", "--quiet"),
            ("ncu", "WarpStateStats", "Stalls"),
            ("compute-sanitizer", "kernel_substring=strided", "kernel_substring=fk_"),
            ("compute-sanitizer", "9", "0"),
            ("compute-sanitizer", "all", "application-only"),
            ("compute-sanitizer", tests.NATIVE, "tests/gpu"),
            ("compute-sanitizer", "PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_CUDA_MEMORY_CACHING"),
        ],
    )
    def test_the_stand_ins_refuse_a_call_that_measures_nothing(
        self, tool: str, right: str, wrong: str, channel: Channel, tmp_path: Path
    ) -> None:
        path = str(write_stand_ins(tmp_path / "tools") / tool)
        if tool == "ncu":
            line = ncu.command(path, "cpu", 1024)
        else:
            line = tests.sanitizer_command(path, "memcheck", tests.MEMCHECKED, channel)
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        changed = [wrong if word == right else word for word in line]
        changed_variables = {wrong if name == right else name: value for name, value in variables.items()}
        assert (changed, changed_variables) != (line, variables)
        done = subprocess.run(changed, env=os.environ | changed_variables, capture_output=True, text=True)
        assert done.returncode == MISUSED, done.stdout

    @pytest.mark.parametrize(
        ("chosen", "least", "most"),
        [(tests.MEMCHECKED, 20, 40), pytest.param(tests.RACECHECKED, 2, 2, marks=pytest.mark.slow)],
    )
    def test_tests_that_the_sanitizer_runs_are_there(self, chosen: str, least: int, most: int) -> None:
        command = [sys.executable, "-m", "pytest", tests.NATIVE, "-q", "--collect-only", "-k", chosen]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        names = [text for text in done.stdout.splitlines() if "::" in text]
        assert least <= len(names) <= most
        for word in chosen.split(" and ")[0].split(" or "):
            assert any(word in name for name in names), word


class TestNcu:
    OUTPUT = (
        "==PROF== Connected to process 1",
        '"ID","Process ID","Process Name","Host Name","Kernel Name","Block Size","dram__bytes.sum","grid"',
        '"","","","","","","byte",""',
        '"0","1","python","a-host","few_terms","(256, 1, 1)","1,234.5","n/a"',
    )

    def test_its_table_is_read_without_names_of_the_machine(self) -> None:
        (kernel,) = ncu.parse(list(self.OUTPUT))
        assert (kernel["kernel"], kernel["block"]) == ("few_terms", "(256, 1, 1)")
        assert kernel["metrics"] == {"dram__bytes.sum": [1234.5, "byte"], "grid": ["n/a", ""]}

    @pytest.mark.parametrize("lines", [0, 1, 3])
    def test_a_table_without_a_kernel_is_empty(self, lines: int) -> None:
        assert ncu.parse(list(self.OUTPUT[:lines])) == []

    def test_some_kernels_are_not_all(self) -> None:
        with pytest.raises(
            PartEnded, match="failed: expected 9 kernels, got 8; ncu ended with exit status 0"
        ):
            ncu.judge(0, [], 8)
        ncu.judge(0, [], len(ncu.LAUNCHES))

    def test_the_program_makes_its_launches(self) -> None:
        for call in ncu.launches("cpu", 1024).values():
            call()
