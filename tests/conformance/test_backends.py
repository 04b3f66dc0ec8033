"""Every backend and instruction set of this machine against the golden vectors, and the command for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.conformance import __main__ as conformance
from fedkseed_kernels.conformance import exhaustive, golden
from fedkseed_kernels.conformance.checks import CHECKS, Comparison, Target, derived_values
from fedkseed_kernels.contract import reference

TARGETS, _ = conformance.find_targets()
HAS_NATIVE = native_cpu.unavailable() is None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason=f"no native library: {native_cpu.unavailable()}")


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    return golden.load()


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_backend_equals_golden(target: Target, name: str, vectors: dict[str, Any]) -> None:
    result = conformance.run_check(name, CHECKS[name], target, vectors)
    assert result.status == "pass", result.detail


def test_derived_values_equal_golden(vectors: dict[str, Any]) -> None:
    result = conformance.run_check("derived values", derived_values, Target("NumPy"), vectors)
    assert result.status == "pass", result.detail


def test_reference_and_baseline_are_among_the_targets() -> None:
    assert Target("reference") in TARGETS
    assert not HAS_NATIVE or Target("native", "baseline") in TARGETS


def _damaged(vectors: dict[str, Any], name: str) -> dict[str, Any]:
    """Vectors with one bit of one expected value flipped in the part that a check reads."""
    damaged: dict[str, Any] = json.loads(json.dumps(vectors))

    def flip(case: dict[str, Any], key: str) -> None:
        last = case[key][-1]
        case[key] = case[key][:-1] + f"{int(last, 16) ^ 1:x}"

    if name == "Philox words":
        flip(damaged["philox"][-1], "words")
    elif name == "Gaussian transform":
        flip(damaged["normals"], "odd")
    elif name == "noise":
        flip(damaged["noise"][-1], "z")
    elif name == "primitive, views, rows, strides":
        flip(next(case for case in damaged["layouts"] if case["minus"]), "minus")
    elif name == "primitive, compensated":
        flip(damaged["compensated"][-1], "residuals_after")
    elif name == "primitive, fp32 outputs":
        flip(damaged["wide"][-1], "minus")
    else:
        rounding = "nearest" if name.endswith("nearest") else "stochastic"
        flip([case for case in damaged["primitive"] if case["rounding"] == rounding][-1], "plus")
    return damaged


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_can_fail(name: str, vectors: dict[str, Any]) -> None:
    result = conformance.run_check(name, CHECKS[name], Target("reference"), _damaged(vectors, name))
    assert result.status == "fail"
    assert "expected" in result.detail


def test_comparison_names_the_first_difference() -> None:
    got, expected = np.array([1, 2, 3], np.uint32), np.array([1, 5, 4], np.uint32)
    assert Comparison("x", expected, expected).first_difference() is None
    found = Comparison("x", got, expected).first_difference()
    assert found == "x: value 1 of 3: got 00000002, expected 00000005 (2 differ)"
    assert "shape" in str(Comparison("x", got[:2], expected).first_difference())


def test_command_passes_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert conformance.main(["--backend", "reference", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["passed"] is True
    assert {result["target"] for result in report["results"]} == {"reference", "NumPy"}
    assert "0 failed" in capsys.readouterr().out


def test_command_fails_on_a_difference(
    monkeypatch: pytest.MonkeyPatch, vectors: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = _damaged(vectors, "noise")
    monkeypatch.setattr(golden, "load", lambda *_: damaged)
    assert conformance.main(["--backend", "reference"]) == 1
    assert "FAIL  reference         noise" in capsys.readouterr().out


def test_missing_backend_is_an_error_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["--backend", "triton"]) == 1
    assert "FAIL  triton" in capsys.readouterr().out
    _, missing = conformance.find_targets()
    assert "fail" not in {result.status for result in missing}
    assert "triton" in {result.target for result in missing}


@needs_native
def test_missing_instruction_set_is_an_error_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cpu, "usable_isas", lambda: ["baseline"])
    monkeypatch.setattr(native_cpu, "built_isas", lambda: ["baseline", "avx2"])
    _, missing = conformance.find_targets(["native"])
    reasons = {result.target: result for result in missing}
    assert {result.status for result in missing} == {"skip"}
    assert "this CPU" in reasons["native/avx2"].detail
    assert "built without" in reasons["native/avx512"].detail
    _, missing = conformance.find_targets(isas=["avx512"])
    assert [result.status for result in missing] == ["fail"]


def test_instruction_sets_belong_to_native() -> None:
    with pytest.raises(SystemExit):
        conformance.main(["--backend", "reference", "--isa", "avx2"])
    with pytest.raises(SystemExit):
        conformance.main(["--isa", "mmx"])


@needs_native
def test_exhaustive_names_block_and_word(monkeypatch: pytest.MonkeyPatch) -> None:
    words = 1000
    digests = [f"{reference.normal_digest(block * words, words):016x}" for block in range(3)]
    content = {"block_words": words, "digests": digests}
    monkeypatch.setattr(golden, "load", lambda *_: content)
    assert exhaustive.all_words("baseline").difference is None

    right_digest, right_normals = native_cpu.normal_digest, native_cpu.normal_from_words

    def wrong_digest(first: int, count: int, isa: str) -> int:
        return right_digest(first, count, isa) ^ (first >= words)

    def wrong_normals(chosen: Any, isa: str) -> Any:
        normals = right_normals(chosen, isa)
        normals[chosen == 1234] += 1
        return normals

    monkeypatch.setattr(native_cpu, "normal_digest", wrong_digest)
    monkeypatch.setattr(native_cpu, "normal_from_words", wrong_normals)
    difference = exhaustive.all_words("baseline").difference
    assert difference is not None
    assert difference.startswith("2 blocks differ, first block 1: word 000004d2: got ")


@needs_native
def test_spread_words_are_compared_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "SPREAD_NUM_WORDS", 1 << 12)
    monkeypatch.setattr(exhaustive, "_WORDS_AT_ONCE", 1 << 10)
    isas = native_cpu.usable_isas()
    assert [outcome.difference for outcome in exhaustive.spread_words(isas)] == [None] * len(isas)
    right = native_cpu.normal_from_words
    monkeypatch.setattr(native_cpu, "normal_from_words", lambda words, isa: right(words ^ np.uint32(1), isa))
    assert all("got" in str(outcome.difference) for outcome in exhaustive.spread_words(isas))
