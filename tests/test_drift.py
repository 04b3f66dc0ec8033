"""The drift benchmark measures what docs/numerics.md says, and the page shows what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.baselines import official
from benchmarks.common import pages
from benchmarks.common.places import RESULTS_FOLDER
from benchmarks.drift import __main__ as drift
from benchmarks.drift import report as drift_report
from benchmarks.drift import walks
from benchmarks.models import modes, workloads
from fedkseed import SeedPool
from fedkseed.model.manifest import manifest_parameters
from fedkseed_kernels.contract import reference

PAGE = Path(__file__).resolve().parent.parent / "docs" / "numerics.md"
RESULT = RESULTS_FOLDER / "drift.json"

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def _model(dtype: torch.dtype) -> Any:
    return workloads.load("random-tiny", dtype, num_rows=1, num_tokens=8).model


def _bits(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for _, parameter in manifest_parameters(model)]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_the_official_walk_has_the_official_passes_bits(dtype: torch.dtype) -> None:
    model, rebuilt = _model(dtype), _model(dtype)
    walk = walks.OfficialWalk(_model(dtype), lr=1e-4, eps=1e-3)
    named, start = list(model.named_parameters()), _bits(model)
    for seed, g in ((7, 3.5), (8, -0.25)):
        torch_seed = official.official_seed(seed)
        for factor in (1, -2, 1):
            official.perturb_(named, torch_seed, factor, 1e-3)
        official.update_(named, torch_seed, g, 1e-4)
        official.rebuild_(list(rebuilt.named_parameters()), {torch_seed: g}, 1e-4)
        walk.step(seed, g)
    for index, (walked, from_pool) in enumerate(zip(_bits(model), _bits(rebuilt), strict=True)):
        assert torch.equal(walk.stored(index)[0], walked)
        assert torch.equal(walk.rebuilt[index], from_pool)
        assert not torch.equal(walked, start[index])
        off = walk.exact[index] - (from_pool.double() - start[index].double())
        assert off.abs().max() <= torch.finfo(dtype).eps * start[index].abs().max()


def test_the_official_walk_counts_what_kept_its_value() -> None:
    walk = walks.OfficialWalk(_model(torch.bfloat16), lr=0.0, eps=1e-30)
    num_elements = sum(parameter.numel() for parameter in walk.parameters)
    assert walk.step(7, 1.0) == (num_elements, num_elements)
    assert walk.step(7, 0.0) == (0, 0), "no update is due"
    walk = walks.OfficialWalk(_model(torch.bfloat16), lr=10.0, eps=1e-3)
    assert walk.step(7, 1.0)[0] < num_elements / 100


def test_the_exact_sum_is_the_references() -> None:
    model = _model(torch.bfloat16)
    exact = walks.ExactSum(model)
    exact.add_(5, 0.25)
    exact.add_(6, -3.0)
    for stream, tensor in enumerate(exact.tensors):
        elements = np.arange(tensor.numel())
        wanted = 0.25 * reference.gaussian(5, stream, elements).astype(np.float64)
        wanted -= 3.0 * reference.gaussian(6, stream, elements).astype(np.float64)
        np.testing.assert_allclose(tensor.flatten().numpy(), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_a_weight_and_its_residual_stand_for_the_number_that_was_split(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(10_000, generator=generator) * torch.logspace(-7, 2, 10_000)
    if dtype == torch.bfloat16:
        bits = y.view(torch.int32).to(torch.int64)
        high = (bits + 0x8000) >> 16
        weight = high.to(torch.int16).view(torch.bfloat16)
        residual = (bits - (high << 16)).to(torch.int16)
    else:
        weight = y.half()
        exponent = torch.where(weight.abs() < 2.0**-14, -14, torch.frexp(weight.double())[1] - 1)
        residual = torch.ldexp((y - weight.float()).double(), 25 - exponent).round().to(torch.int16)
    assert residual.unique().numel() > 1000
    off = (walks.value64((weight, residual)) - y.double()).abs()
    assert off.max() <= (0.0 if dtype == torch.bfloat16 else 2.0**-40)
    assert torch.equal(walks.value64((weight, None)), weight.double())


def test_distance_is_relative_to_what_was_moved() -> None:
    w0 = [torch.tensor([1.0, 2.0]), torch.tensor([0.0])]
    exact = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    walked = [torch.tensor([4.0, 2.5]), torch.tensor([4.0])]
    assert walks.distance(lambda index: (walked[index], None), w0, exact) == pytest.approx(0.1)


@pytest.mark.parametrize("name", modes.ONE_SIDED)
def test_with_fp64_weights_every_mode_walks_the_exact_sum(name: str) -> None:
    if "compensated" in name:
        pytest.skip("residuals belong to weights of 16 bits")
    pool = SeedPool(11, 5)
    walk = walks.StorageWalk(_model(torch.float64), modes.ONE_SIDED[name], pool, lr=1e-3, eps=1e-3)
    w0, exact = _bits(walk.model), walks.ExactSum(walk.model)
    for step, g in enumerate((3.5, -1.0, 0.5, 2.0)):
        walk.step(g)
        assert walk.optimizer.history[-1] == (step, g)
        exact.add_(int(pool.seeds[step]), -1e-3 * g)
        assert walks.distance(walk.stored, w0, exact.tensors) < 1e-12


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_what_a_chained_walk_stores_is_what_a_flush_leaves(dtype: torch.dtype) -> None:
    walk = walks.StorageWalk(
        _model(dtype), modes.ONE_SIDED["inplace, chained"], SeedPool(11, 3), lr=1e-3, eps=1e-3
    )
    walk.step(2.0)
    seen = [walk.stored(index)[0].clone() for index in range(len(walk.parameters))]
    assert any(not torch.equal(a, b.detach()) for a, b in zip(seen, walk.parameters, strict=True))
    walk.optimizer.flush()
    assert all(torch.equal(a, b.detach()) for a, b in zip(seen, walk.parameters, strict=True))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return drift.run(drift.QUICK, 1, drift.ALGORITHMS)


class TestRun:
    def test_every_algorithm_and_dtype_has_a_row(self, document: dict[str, Any]) -> None:
        found = [(row["dtype"], row["algorithm"]) for row in document["rows"]]
        wanted = [(dtype, name) for dtype in drift.QUICK.dtypes for name in drift.ALGORITHMS]
        assert sorted(found) == sorted(wanted)
        table = drift_report.table(document).splitlines()
        assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == [dtype for dtype, _ in wanted]
        assert document["settings"]["points"] == [2, 4, 6, 8]
        assert len(document["recorded_g"]) == 8

    def test_figures_are_those_of_arithmetic(self, document: dict[str, Any]) -> None:
        rows = {(row["dtype"], row["algorithm"]): row for row in document["rows"]}
        for dtype in drift.QUICK.dtypes:
            one_rounding = rows[dtype, "streamed"]
            assert one_rounding["distance"][-1] < rows[dtype, drift.OFFICIAL]["distance"][-1]
            assert rows[dtype, "streamed, fp32 forward"]["distance"] == one_rounding["distance"]
            assert rows[dtype, "streamed, fp32 forward"]["g"]["relative_error"] < 1e-3
            assert rows[dtype, "streamed"]["g"]["relative_error"] > 1e-3
        for row in rows.values():
            assert 0 < row["kept"] < 1
            assert len(row["g"]["measured"]) == drift.QUICK.num_g_steps
            losses = row["held_out_loss"]
            assert abs(losses["walked"] - losses["ledger"]) < 0.01 < losses["start"]

    def test_a_later_run_adds_to_an_earlier_one(self, document: dict[str, Any]) -> None:
        earlier = json.loads(json.dumps(document))
        earlier["rows"] = [row for row in earlier["rows"] if row["algorithm"] != "streamed"]
        extended = drift.run(drift.QUICK, 1, ["streamed"], earlier)
        assert [row["run"] for row in extended["rows"] if row["algorithm"] == "streamed"] == [1, 1]
        assert len(extended["rows"]) == len(document["rows"])
        joined = drift.merged([earlier, extended])
        key = lambda row: (row["dtype"], row["algorithm"])  # noqa: E731
        assert sorted(joined["rows"], key=key) == sorted(extended["rows"], key=key)
        assert joined["runs"] == extended["runs"]

    def test_other_settings_are_refused(self, document: dict[str, Any]) -> None:
        other = dataclasses.replace(drift.QUICK, num_steps=9)
        with pytest.raises(ValueError, match="expected a result of the settings"):
            drift.run(other, 1, ["streamed"], json.loads(json.dumps(document)))
        with pytest.raises(ValueError, match="expected results of one recorded walk"):
            drift.merged([document, {**document, "recorded_g": []}])
        with pytest.raises(ValueError, match="expected algorithms out of official"):
            drift.run(drift.QUICK, 1, ["sideways"])

    def test_a_page_takes_the_result_between_its_marks(self, document: dict[str, Any]) -> None:
        begin, end = drift_report.MARK, pages.END
        page = drift_report.with_result(f"before\n{begin}\nold\n{end}\nafter\n", document)
        assert page.startswith(f"before\n{begin}\n\n| weights |")
        assert page.endswith(f"|\n\n{end}\nafter\n")
        assert "old" not in page
        assert drift_report.facts(document) in page
        assert drift_report.with_result(page, document) == page
        with pytest.raises(ValueError, match="expected a page with"):
            drift_report.with_result("nothing", document)

    def test_the_plot_is_a_png(self, document: dict[str, Any], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        drift_report.draw(document, tmp_path / "drift.png")
        assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_committed_result() -> None:
    document, page = json.loads(RESULT.read_text()), PAGE.read_text()
    assert drift_report.with_result(page, document) == page
    assert {row["algorithm"] for row in document["rows"]} == set(drift.ALGORITHMS)


def test_what_the_page_says_of_it_in_words() -> None:
    document = json.loads(RESULT.read_text())
    distance = {(row["dtype"], row["algorithm"]): row["distance"][-1] for row in document["rows"]}
    error = {(row["dtype"], row["algorithm"]): row["g"]["relative_error"] for row in document["rows"]}
    for dtype in ("bf16", "fp16"):
        assert 0.9 < distance[dtype, "streamed"] < 1.1
        assert 0.001 < distance[dtype, "streamed, compensated"] < 0.0025
        assert error[dtype, "streamed, fp32 forward"] < 1e-6
        assert min(distance[dtype, name] for name in ("inplace", "official")) > 30
    assert min(distance["bf16", name] for name in ("inplace", "inplace, chained", "official")) > 100
    forwards = {key: value for key, value in error.items() if key[1] != "streamed, fp32 forward"}
    assert min(value for (dtype, _), value in forwards.items() if dtype == "bf16") > 0.5
    assert min(value for (dtype, _), value in forwards.items() if dtype == "fp16") > 0.08
    assert max(value for (dtype, _), value in forwards.items() if dtype == "fp16") < 0.2
    kept = {(row["dtype"], row["algorithm"]): row["kept"] for row in document["rows"]}
    assert max(kept[dtype, "streamed, compensated"] for dtype in ("bf16", "fp16")) < 0.006
