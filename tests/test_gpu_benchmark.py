"""benchmarks/gpu.py as far as it goes without a GPU."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from benchmarks import gpu, gpu_cases


def test_the_weights_are_about_a_model_of_1_4_billion() -> None:
    shapes = gpu_cases.model_shapes()
    assert len(shapes) == 292
    assert sum(math.prod(shape) for shape in shapes) == 1_414_647_808


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 2
    assert "expected a GPU, got none" in capsys.readouterr().err


def test_a_tool_that_refuses_is_recorded() -> None:
    missing = gpu._run(["/nonexistent/tool"], 5)
    assert (missing["passed"], missing["status"]) == (False, "could not start")
    failing = gpu._run([sys.executable, "-c", "print('no'); raise SystemExit(3)"], 60)
    assert (failing["passed"], failing["status"], failing["output"]) == (False, "3", "no\n")
    slow = gpu._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert slow["status"] == "over 0 s"


def test_every_case_names_its_contestants_once() -> None:
    weights = [torch.nn.Parameter(torch.zeros(3), requires_grad=False)]
    found = {
        case.name: case.passes
        for case in gpu_cases.cases(weights, rebuild_seeds=(1, 64), num_official_seeds=16)
    }
    assert {"perturb", "restore and update", "chained", "pair"} < set(found)
    for passes in found.values():
        names = [entry.contestant for entry in passes]
        assert len(set(names)) == len(names)
        assert names[:2] == ["cuda", "triton"]
    (official,) = [entry for entry in found["rebuild, K = 64, gaussian"] if entry.contestant == "official"]
    assert (official.num_terms, official.repeats) == (16, 4)
