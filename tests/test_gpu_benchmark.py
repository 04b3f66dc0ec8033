"""benchmarks/gpu/ as far as it goes without a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkseed_kernels
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import tools as gpu_tools
from benchmarks.step import __main__ as step
from benchmarks.step import contestants as step_contestants


def test_the_weights_are_about_a_model_of_1_4_billion() -> None:
    shapes = gpu_cases.model_shapes()
    assert len(shapes) == 292
    assert sum(math.prod(shape) for shape in shapes) == 1_414_647_808


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main([])
    assert caught.value.code == 2
    assert "expected a GPU, got none" in capsys.readouterr().err


def test_a_tool_that_refuses_is_recorded() -> None:
    missing = gpu_tools.run(["/nonexistent/tool"], 5)
    assert (missing["passed"], missing["status"]) == (False, "could not start")
    failing = gpu_tools.run([sys.executable, "-c", "print('no'); raise SystemExit(3)"], 60)
    assert (failing["passed"], failing["status"], failing["output"]) == (False, "3", "no\n")
    slow = gpu_tools.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert slow["status"] == "over 0 s"


def _cases(dtype: torch.dtype, **options: Any) -> dict[str, list[gpu_cases.Pass]]:
    weights = gpu_cases.make_weights([(3,)], dtype, "cpu")
    options = {"rebuild_seeds": (1, 64), "num_official_seeds": 16} | options
    return {case.name: case.passes for case in gpu_cases.cases(weights, **options)}


def test_every_case_names_its_contestants_once() -> None:
    found = _cases(torch.float32)
    assert {"perturb", "restore and update", "chained", "pair"} < set(found)
    for passes in found.values():
        names = [entry.contestant for entry in passes]
        assert len(set(names)) == len(names)
        assert names[:2] == ["cuda", "triton"]
    (official,) = [entry for entry in found["rebuild, K = 64, gaussian"] if entry.contestant == "official"]
    assert (official.num_terms, official.repeats) == (16, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensated_weights_of_16_bits_have_cases(dtype: torch.dtype) -> None:
    found = _cases(dtype)
    # w and residual are read, the perturbed w written; the update writes both
    assert [entry.num_accesses for entry in found["perturb, compensated"]] == [3, 3]
    assert [entry.num_accesses for entry in found["update, compensated"]] == [4, 4]
    assert not {"perturb, compensated", "update, compensated"} & set(_cases(torch.float32))


def test_a_backend_that_cannot_serve_has_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases.fedkseed_kernels, "unavailable", lambda *_: "it is not here")
    found = [row for row in _rows() if row["contestant"] in ("cuda", "triton")]
    assert {row["refused"] for row in found} == {"it is not here"}
    assert all("it is not here" in gpu_rows.line(row) for row in found)


def _rows() -> list[dict[str, Any]]:
    options: dict[str, Any] = {"device": "cpu", "rebuild_seeds": (1, 2), "num_official_seeds": 1}
    return list(gpu_rows.measure([(40, 16), (16,)], "bf16", 1e9, **options))


def test_a_contestant_that_raises_costs_its_own_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_cases.torch_ways, "axpy_", fail)
    rows = _rows()
    failed = [row for row in rows if "error" in row]
    assert {row["contestant"] for row in failed} == {"randn_like + add_"}
    assert {row["error"] for row in failed} == {"RuntimeError: out of memory"}
    assert all(row["seconds"]["median"] > 0 for row in rows if row["contestant"] == "official")
    run = gpu.Run(dataclasses.replace(gpu.DRY_RUN, dtypes=("bf16",)), None)
    run.do({name: part for name, part in run.parts().items() if name in ("copy", "weights, bf16")})
    assert list(run.document["failed"]) == ["weights, bf16"]
    assert "randn_like + add_ (perturb)" in run.document["failed"]["weights, bf16"]


def test_a_dry_run_has_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert gpu.main(["--dry-run", "--dtypes", "bf16,fp32", "--json", str(path)]) == 0
    document = json.loads(path.read_bytes())
    parts = ["copy", "weights, bf16", "steps, batch 1", "steps, batch 2", "weights, fp32"]
    assert list(document["seconds"]) == parts
    assert document["failed"] == {}
    assert document["copy_bytes_per_s"] > 0
    assert {row["dtype"] for row in document["rows"]} == {"bf16", "fp32"}
    assert all("seconds" in row for row in document["rows"] if row["contestant"] == "official")
    found = [(row["batch_size"], row["family"], row["contestant"]) for row in document["steps"]["rows"]]
    assert found == [
        (size, family, name)
        for size in (1, 2)
        for family in fedkseed_kernels.FAMILIES
        for name in step_contestants.names(torch.bfloat16, family)
    ]
    assert "| 2 | rademacher | inplace |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before it is in the file, what comes after it runs, and the exit status says so."""
    path, seen = tmp_path / "result.json", []

    def steps(settings: step.StepSettings, _: int) -> dict[str, Any]:
        seen.append(json.loads(path.read_bytes()))
        if settings.batch_sizes == (1,):
            raise torch.OutOfMemoryError("no room for the model")
        return {"rows": []}

    monkeypatch.setattr(step, "measure", steps)
    assert gpu.main(["--dry-run", "--dtypes", "fp32", "--json", str(path)]) == 1
    assert len(seen[0]["rows"]) > 10
    document = json.loads(path.read_bytes())
    assert document["failed"] == {"steps, batch 1": "OutOfMemoryError: no room for the model"}
    assert document["steps"]["rows"] == []
    assert list(document["seconds"])[-1] == "steps, batch 2"


@pytest.mark.slow
def test_no_part_begins_after_the_limit() -> None:
    run = gpu.Run(dataclasses.replace(gpu.DRY_RUN, seconds=0.0), None)
    run.do(run.parts())
    assert list(run.document["failed"]) == list(run.parts())
    assert run.document["failed"]["copy"] == "TimeoutError: not begun: 0 s were over"
    assert "copy_bytes_per_s" not in run.document


def test_failed_tests_and_found_errors_are_failures_and_a_refusal_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"passed": False, "status": "1", "seconds": 1.0, "output": "1 failed"}
    refused = {**found, "status": "255", "output": "not permitted"}
    monkeypatch.setattr(gpu_tools, "run_tests", lambda _: found)
    monkeypatch.setattr(gpu_tools, "sanitize", lambda _: {"memcheck": refused, "racecheck": refused})
    monkeypatch.setattr(gpu_tools, "profile", lambda _: refused)
    run = gpu.Run(dataclasses.replace(gpu.DRY_RUN, has_tools=True), None)
    tools = {name: run.parts()[name] for name in ("tests", "sanitizer", "profile")}
    run.do(tools)
    assert run.document["failed"] == {"tests": "RuntimeError: expected tests/gpu to pass, got status 1"}
    assert run.document["profile"] == refused
    monkeypatch.setattr(gpu_tools, "sanitize", lambda _: {"memcheck": {**found, "status": "9"}})
    run.do(tools)
    assert run.document["failed"]["sanitizer"] == "RuntimeError: expected no errors, got some of memcheck"


def test_the_parts_of_a_whole_run_and_their_order() -> None:
    settings = gpu.GpuSettings()
    assert math.prod(settings.step.batch_sizes) == 8
    assert settings.step.families == ("gaussian", "rademacher")
    parts = list(gpu.Run(dataclasses.replace(settings, device="cpu"), None).parts())
    assert parts == [
        *("tests", "copy", "weights, bf16", "steps, batch 1", "steps, batch 8"),
        *("weights, fp16", "weights, fp32", "sanitizer", "profile"),
    ]
