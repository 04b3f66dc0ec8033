"""The gate of the noise contract: instructions per normal as nvcc and Triton compile it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine_code import gate, paths, tools

SASS = """
.L_outer:
        /*0000*/                   IMAD.WIDE.U32 R2, R4, 0x3, RZ ;
.L_inner:
        /*0010*/                   IMAD.WIDE.U32 R2, R4, 0x5, RZ ;
        /*0020*/              @!P0 FFMA R5, R6, R7, R8 ;
        /*0030*/                   I2FP.F32.S32 R5, R6 ;
        /*0040*/               @P1 BRA `(.L_inner) ;
.L_tail:
        /*0050*/                   FADD R5, R6, R7 ;
        /*0060*/               @P1 BRA `(.L_tail) ;
        /*0070*/               @P2 BRA `(.L_outer) ;
        /*0080*/                   BRA `(.L_end) ;
.L_end:
        /*0090*/                   EXIT ;
"""


def _need(find: Any, *arguments: str) -> None:
    """Skip without a tool, with its reason; where all parts are required, its absence is a failure."""
    try:
        find(*arguments)
    except gate.GateError as error:
        if os.environ.get("CI") == "true" or os.environ.get("FEDKSEED_REQUIRE_CUDA") == "1":
            pytest.fail(f"required here, but {error}")
        pytest.skip(str(error))


@pytest.fixture
def a_count() -> gate.Count:
    return gate.Count("nvcc", "sm_90", 4, 22.0, 24.8, 72, 0, {"FFMA": 272})


@pytest.mark.slow
@pytest.mark.parametrize("groups_per_thread", gate.GROUPS_PER_THREAD)
def test_nvcc_stays_within_the_limit(groups_per_thread: int) -> None:
    _need(gate.find_nvcc)
    _need(tools.find_binary_tool, "nvdisasm")
    count = gate.count_nvcc("sm_90", groups_per_thread)
    assert count.spill_instructions == 0
    assert count.instructions_per_normal <= 24.8
    # The fp32 operations alone are 13.5: fewer would mean that something was not counted.
    assert count.instructions_per_normal > 13.5
    assert count.passed


@pytest.mark.slow
def test_triton_stays_within_the_limit() -> None:
    _need(tools.find_binary_tool, "nvdisasm")
    count = gate.count_triton("sm_90")
    assert count.spill_instructions == 0
    assert 13.5 < count.instructions_per_normal <= 26.0
    assert count.passed


@pytest.mark.slow
def test_nvcc_and_triton_do_the_same_arithmetic() -> None:
    _need(gate.find_nvcc)
    _need(tools.find_binary_tool, "nvdisasm")
    by_nvcc = gate.count_nvcc("sm_90", 4).instructions
    by_triton = gate.count_triton("sm_90").instructions
    for opcode in ("FFMA", "FMUL", "FADD", "I2FP.F32.S32", "SHF.R.U32.HI"):
        assert by_nvcc[opcode] == by_triton[opcode], opcode


def test_innermost_loop_is_philox_own() -> None:
    assert paths.innermost_loop(SASS) == ["IMAD.WIDE.U32", "FFMA", "I2FP.F32.S32", "BRA"]


def test_no_loop() -> None:
    with pytest.raises(gate.GateError, match="expected a loop with 64-bit multiplications"):
        paths.innermost_loop(SASS.replace("IMAD.WIDE", "IMAD"))


def test_architecture() -> None:
    with pytest.raises(gate.GateError, match="expected an architecture like sm_90, got 'hopper'"):
        gate.measure("hopper")


@pytest.mark.parametrize(
    ("change", "status"), [({}, 0), ({"limit": 21.9}, 1), ({"spill_instructions": 2}, 1)]
)
def test_status_and_result_file(
    change: dict[str, Any],
    status: int,
    a_count: gate.Count,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    count = gate.Count(**{**a_count.__dict__, **change})
    monkeypatch.setattr(gate, "measure", lambda arch: [count])
    monkeypatch.setattr(gate, "cpu_rates", lambda: {"avx512": {"reason": "this CPU does not have it"}})
    monkeypatch.setattr(gate, "find_nvcc", lambda: "true")
    target = tmp_path / "results" / "gate.json"
    assert gate.main(["--json", str(target)]) == status
    written = json.loads(target.read_text())
    assert written["gpu"][0]["passed"] is (status == 0)
    assert written["gpu"][0]["instructions_per_normal"] == 22.0
    assert {"date", "commit", "cpu", "python"} <= written["environment"].keys()
    printed = capsys.readouterr().out
    assert ("PAST THE LIMIT" in printed) is (status == 1)
    assert "cpu avx512: this CPU does not have it" in printed


def test_missing_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert gate.main([]) == 2
    assert "expected nvcc in $CUDA_HOME/bin or on PATH, got none" in capsys.readouterr().err
