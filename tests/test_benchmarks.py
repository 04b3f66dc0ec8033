"""The benchmarks measure what they say: official passes, equal terms, checked answers, a sound report."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkseed_kernels
from benchmarks.baselines import official, torch_ways
from benchmarks.common import measure
from benchmarks.kernels import answers, cases, report, settings, weights
from benchmarks.kernels import results as results
from benchmarks.server import __main__ as merge
from fedkseed.federation.config import Sampling
from fedkseed_kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent


def _named(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    made = weights.make_weights("tiny", dtype)
    return made.named


def _values(named: list[tuple[str, torch.nn.Parameter]]) -> list[torch.Tensor]:
    return [parameter.data.clone() for _, parameter in named]


def _noise_by_hand(named: list[tuple[str, torch.nn.Parameter]], seed: int) -> list[torch.Tensor]:
    """z of every parameter, drawn in order from one seeding of the global generator."""
    torch.manual_seed(seed)
    return [torch.empty_like(parameter.data).normal_(0, 1) for _, parameter in named]


class TestOfficial:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_perturb_is_the_step_written_by_hand(self, dtype: torch.dtype) -> None:
        named = _named(dtype)
        before, noise = _values(named), _noise_by_hand(named, 7)
        official.perturb_(named, 7, -2, 5e-4)
        for value, z, (_, parameter) in zip(before, noise, named, strict=True):
            assert torch.equal(parameter.data, value + (-2 * 5e-4) * z)
            assert not torch.equal(parameter.data, value)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_update_decays_weights_but_not_biases_and_layer_norms(self, dtype: torch.dtype) -> None:
        named = _named(dtype)
        before, noise = _values(named), _noise_by_hand(named, 7)
        official.update_(named, 7, 3.0, 0.5, 0.1)
        decayed = {"embed.weight", "layers.0.mlp.weight", "norm.weight"}
        for value, z, (name, parameter) in zip(before, noise, named, strict=True):
            direction = 3.0 * z + 0.1 * value if name in decayed else 3.0 * z
            assert torch.equal(parameter.data, value - 0.5 * direction), name

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("model.layers.0.mlp.up_proj.weight", True),
            ("model.norm.weight", True),
            ("model.layers.0.input_layernorm.weight", False),
            ("encoder.layer_norm.weight", False),
            ("h.0.attn.bias", False),
        ],
    )
    def test_names_that_decay(self, name: str, expected: bool) -> None:
        assert official.is_decayed(name) is expected

    def test_decay_terms_at_zero_change_no_value(self) -> None:
        with_terms, without_terms = _named(), _named()
        official.update_(with_terms, 7, 3.0, 0.5, decay_terms=True)
        official.update_(without_terms, 7, 3.0, 0.5, decay_terms=False)
        for (_, first), (_, second) in zip(with_terms, without_terms, strict=True):
            assert torch.equal(first, second)

    def test_decay_without_its_terms_is_refused(self) -> None:
        named = _named()
        before = _values(named)
        with pytest.raises(ValueError, match=r"weight_decay 0 without decay terms, got 0\.1"):
            official.update_(named, 7, 3.0, 0.5, 0.1, decay_terms=False)
        assert all(torch.equal(value, p.data) for value, (_, p) in zip(before, named, strict=True))

    def test_local_step_and_rebuild_are_the_papers_formulas(self) -> None:
        """In fp64: there and back again, w - lr g z a step, w0 - lr sum_k g_k z_k for the pool."""
        named = _named(torch.float64)
        before = _values(named)
        for scaling_factor in (1, -2, 1):
            official.perturb_(named, 11, scaling_factor, 1e-3)
        for value, (_, parameter) in zip(before, named, strict=True):
            torch.testing.assert_close(parameter.data, value, rtol=0, atol=1e-15)

        pool = {11: 2.0, 12: 0.0, 13: -3.0}
        expected = _values(named)
        for seed, grad in pool.items():
            for value, z in zip(expected, _noise_by_hand(named, seed), strict=True):
                value.sub_(0.25 * grad * z)
        official.rebuild_(named, pool, 0.25)
        for value, (_, parameter) in zip(expected, named, strict=True):
            torch.testing.assert_close(parameter.data, value, rtol=0, atol=1e-14)

    def test_a_seed_without_gradient_is_not_visited(self) -> None:
        named = _named()
        storages = [parameter.data_ptr() for _, parameter in named]
        official.rebuild_(named, {11: 0.0}, 0.25)
        assert [parameter.data_ptr() for _, parameter in named] == storages


class TestBaselines:
    def test_axpy_is_the_step_written_by_hand(self) -> None:
        named = _named()
        before, noise = _values(named), _noise_by_hand(named, 7)
        torch_ways.axpy_([parameter for _, parameter in named], 7, 0.5)
        for value, z, (_, parameter) in zip(before, noise, named, strict=True):
            torch.testing.assert_close(parameter.data, value + 0.5 * z)

    def test_rademacher_axpy_moves_every_weight_by_the_coefficient(self) -> None:
        parameter = torch.nn.Parameter(torch.zeros(4096))
        torch_ways.rademacher_axpy_([parameter], 7, 0.5)
        assert set(parameter.tolist()) == {0.5, -0.5}
        assert abs(parameter.sum().item()) < 0.5 * 4 * 4096**0.5

    def test_noise_alone_changes_nothing_but_draws_what_the_others_draw(self) -> None:
        named = _named()
        before = _values(named)
        torch_ways.noise([parameter for _, parameter in named], 7)
        state = torch.get_rng_state()
        assert all(torch.equal(value, p.data) for value, (_, p) in zip(before, named, strict=True))
        torch_ways.axpy_([parameter for _, parameter in named], 7, 0.5)
        assert torch.equal(torch.get_rng_state(), state)


class TestWeights:
    def test_smollm2_has_its_parameters(self) -> None:
        shapes = weights.smollm2_shapes()
        assert weights.num_parameters("smollm2") == 134_515_008
        assert len({name for name, _ in shapes}) == len(shapes) == 1 + 30 * 9 + 1

    @pytest.mark.model
    def test_smollm2_is_the_model(self) -> None:
        from fedkseed.data.models import load_smollm2

        model, _ = load_smollm2()
        found = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        assert weights.smollm2_shapes() == found

    def test_reset_restores_values_and_storage(self) -> None:
        made = weights.make_weights("tiny", torch.bfloat16)
        before, storages = _values(made.named), [p.data_ptr() for p in made.parameters]
        official.perturb_(made.named, 7, 1, 0.5)
        torch_ways.axpy_(made.parameters, 8, 0.5)
        made.reset_()
        assert all(torch.equal(value, p.data) for value, p in zip(before, made.parameters, strict=True))
        assert [p.data_ptr() for p in made.parameters] == storages


class _FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def spend(self, seconds: float, log: list[str], name: str) -> Callable[[int], None]:
        def run(index: int) -> None:
            self.now += seconds
            log.append(f"{name}{index}")

        return run


class TestMeasure:
    def test_contestants_take_turns_and_are_reset_outside_the_time(self) -> None:
        clock, log = _FakeClock(), list[str]()
        reset = clock.spend(100.0, log, "reset")
        contestants = [
            measure.Contestant(name, "torch", clock.spend(cost, log, name), num_samples)
            for name, cost, num_samples in (("a", 1.0, 4), ("b", 2.0, 4), ("c", 8.0, 1))
        ]
        samples = measure.interleave(contestants, lambda: reset(0), clock.read)
        assert samples == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [8.0]}
        turns = [entry for entry in log if not entry.startswith("reset")]
        assert turns == ["a0", "b0", "b1", "a1", "a2", "b2", "c0", "b3", "a3"]
        assert log[::2] == ["reset0"] * 9

    @pytest.mark.parametrize(("num_samples", "num_rounds"), [(1, 8), (3, 8), (8, 8), (2, 2), (1, 1), (3, 9)])
    def test_samples_lie_evenly_in_the_rounds(self, num_samples: int, num_rounds: int) -> None:
        due = [r for r in range(num_rounds) if measure.is_due(num_samples, num_rounds, r)]
        assert len(due) == num_samples
        assert max(due) - min(due) + num_rounds / num_samples >= num_rounds - 1

    def test_a_wrong_answer_gives_no_timing(self) -> None:
        def fail() -> None:
            raise AssertionError("wrong bits")

        ran: list[int] = []
        contestant = measure.Contestant("a", "ours", ran.append, 1)
        with pytest.raises(AssertionError, match="wrong bits"):
            measure.interleave([replace(contestant, check_before=fail)], lambda: None)
        assert ran == []
        with pytest.raises(AssertionError, match="wrong bits"):
            measure.interleave([replace(contestant, check_after=fail)], lambda: None)
        assert ran == [0]

    def test_equal_names_are_refused(self) -> None:
        contestant = measure.Contestant("a", "ours", lambda _: None, 1)
        with pytest.raises(ValueError, match="unique names"):
            measure.interleave([contestant, contestant], lambda: None)

    def test_spread(self) -> None:
        assert measure.spread([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
        assert measure.spread([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}


class TestSettings:
    @pytest.mark.parametrize(
        "changes", [{"model": "gpt"}, {"dtype": "int8"}, {"num_threads": 0}, {"rebuild_seeds": (16, 0)}]
    )
    def test_bad_values_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="expected"):
            settings.Settings(**changes)

    def test_from_the_command_line(self) -> None:
        made = settings.make_settings(quick=False, dtype="fp32", num_threads=3, seeds="4,64")
        assert (made.rebuild_seeds, made.rademacher_seeds, made.num_threads) == ((4, 64), 64, 3)
        assert settings.make_settings(quick=True, dtype="bf16", num_threads=2, seeds="") == settings.QUICK

    def test_long_rebuilds_are_timed_once(self) -> None:
        assert [settings.num_own_samples(k, 9) for k in (1, 16, 256, 4096)] == [9, 9, 3, 1]


class TestAnswers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", ["gaussian", "rademacher"])
    def test_right_bits_pass_and_one_flipped_bit_does_not(self, dtype: torch.dtype, family: str) -> None:
        made = weights.make_weights("tiny", dtype)
        terms = answers.Terms(made, [3, 5], [0.25, -0.5], family)
        for variant in answers.own_variants():
            made.reset_()
            with torch.no_grad():
                terms.check_slices(variant)
                terms.apply_(variant)
            terms.check_weights(variant)
            place = answers.slices(made)[-1]
            raw = (
                made.parameters[place.index]
                .data.view(-1)
                .view(torch.int32 if dtype == torch.float32 else torch.int16)
            )
            raw[place.stop - 1] ^= 1
            with pytest.raises(AssertionError, match="expected the reference's bits"):
                terms.check_weights(variant)

    def test_a_kernel_that_ignores_a_term_is_caught_before_timing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = weights.make_weights("tiny", torch.float32)
        terms = answers.Terms(made, [3, 5], [0.25, -0.5])
        whole = fedkseed_kernels.seed_axpy_

        def without_last_term(tensors: Any, seeds: Any, coeffs: Any, **options: Any) -> None:
            whole(tensors, seeds[:-1], coeffs[:-1], **options)

        monkeypatch.setattr(fedkseed_kernels, "seed_axpy_", without_last_term)
        with torch.no_grad(), pytest.raises(AssertionError, match="expected the reference's bits"):
            terms.check_slices(answers.own_variants()[0])

    def test_variants_can_be_forced(self) -> None:
        for variant in answers.own_variants():
            with answers.forced(variant):
                selected = dispatch.select("cpu")
            assert variant in (selected.name, selected.isa)


class TestCases:
    def test_contestants_do_the_cases_operation(self) -> None:
        """With fp64 weights, the official and the simplest passes arrive at the same point."""
        made = weights.make_weights("tiny", torch.float64)
        buffers = cases.CopyBuffers(16)
        for case in cases.cases(settings.QUICK):
            everyone = cases.contestants(case, made, buffers, settings.QUICK)
            assert [c.name for c in everyone] == case.contestant_names()
            by_seed = [c for c in everyone if c.kind in ("official", "torch", "noise")]
            assert {c.repeats for c in by_seed} == {case.num_seeds if case.operation == "rebuild" else 1}
            moved = {}
            for contestant in by_seed:
                made.reset_()
                contestant.run(1)
                moved[contestant.name] = torch.cat(
                    [(p.data - w).reshape(-1) for p, w in zip(made.parameters, made.pristine, strict=True)]
                )
            if case.family == "gaussian":
                reached = moved[cases.RANDN_LIKE]
                assert reached.abs().max() > 0
                torch.testing.assert_close(moved[cases.AS_WRITTEN], reached, rtol=0, atol=1e-15)
                if cases.WITHOUT_DECAY in moved:
                    torch.testing.assert_close(moved[cases.WITHOUT_DECAY], reached, rtol=0, atol=1e-15)
            assert moved[cases.NOISE_ALONE].abs().max() == 0

    def test_copy_counts_bytes_read_and_written(self) -> None:
        buffers = cases.CopyBuffers(1024)
        buffers.copy_()
        assert torch.equal(buffers.source, buffers.target)
        assert buffers.num_bytes_moved == 2048


def _raw_row(case: str, contestant: str, kind: str, samples: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "case": case,
        "title": f"Title of {case}",
        "operation": "rebuild" if case.startswith("rebuild") else "perturb",
        "family": "gaussian",
        "num_seeds": 1,
        "contestant": contestant,
        "kind": kind,
        "isa": "avx2" if kind == "ours" else "",
        "answer_checked": kind == "ours",
        "samples": samples,
        "repeats": 1,
        "num_normals": 8_000_000_000,
        "num_bytes": 4_000_000_000,
        **changes,
    }


def _document() -> results.Document:
    """Ours: 2 s for a perturbation, 16 s for K = 10; official: 40 s, and 64 s a seed; copy: 4 GB/s."""
    rebuild = {"num_seeds": 10, "num_normals": 80_000_000_000}
    raw = [
        _raw_row("perturb", "ours (avx2)", "ours", [1.0, 2.0, 3.0]),
        _raw_row("perturb", cases.AS_WRITTEN, "official", [40.0]),
        _raw_row("perturb", cases.NOISE_ALONE, "noise", [10.0]),
        _raw_row("perturb", cases.COPY, "copy", [1.0], num_normals=0),
        _raw_row("rebuild-10", "ours (avx2)", "ours", [16.0], **rebuild),
        _raw_row("rebuild-10", cases.AS_WRITTEN, "official", [60.0, 64.0, 68.0], repeats=10, **rebuild),
        _raw_row("rebuild-10", cases.COPY, "copy", [1.0], num_normals=0),
    ]
    environment = {
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "0123456789ab",
        "cpu": "Some CPU (R) 123",
        "cpu_flags": ["avx2"],
        "num_cpus": 2,
        "load_average": 0.1,
        "load_average_after": 1.2,
        "system": "Linux 6",
        "machine": "x86_64",
        "python": "3.11",
        "torch": "2.13",
        "numpy": "2",
        "fedkseed_kernels": "0.1",
        "contract_version": 1,
    }
    memory = {"operation": "perturb", "num_elements": 5, "num_seeds": 1, "dtype": "bf16"}
    return {
        "schema": results.SCHEMA_VERSION,
        "command": "python -m benchmarks.kernels",
        "environment": environment,
        "settings": {"model": "tiny", "dtype": "bf16", "num_threads": 2},
        "num_parameters": 5,
        "rows": [results.finish_row(row) for row in raw],
        "memory": [{**memory, "tensor_bytes": 10, "growth_bytes": 4096}],
    }


class TestResults:
    def test_figures_of_a_row(self) -> None:
        row = results.finish_row(_raw_row("rebuild", "x", "official", [2.0, 4.0], repeats=10))
        assert row["extrapolated"] is True
        assert row["seconds"]["median"] == pytest.approx(30.0)
        assert row["gb_per_s"] == pytest.approx(4 / 30)
        assert row["g_normals_per_s"] == pytest.approx(8 / 30)

    def test_a_document_is_written_whole_and_read_back(self, tmp_path: Path) -> None:
        document = _document()
        path = results.write(document, tmp_path / "new")
        assert path.name == "kernels-some-cpu-r-123-avx2-2t-tiny-bf16.json"
        assert results.read(path) == document
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda d: d.pop("environment"), "expected the field environment"),
            (lambda d: d.update(schema=0), "expected schema"),
            (lambda d: d["environment"].pop("commit"), "the environment: expected the field commit"),
            (lambda d: d["rows"].clear(), "at least one row"),
            (lambda d: d["rows"][0].pop("seconds"), "row perturb, ours .avx2.: expected the field seconds"),
            (lambda d: d["rows"][0].update(num_seeds="1"), "expected num_seeds to be"),
            (lambda d: d["rows"][0].update(samples=[0.0]), "expected positive samples"),
            (
                lambda d: d["memory"][0].pop("growth_bytes"),
                "memory of perturb: expected the field growth_bytes",
            ),
        ],
    )
    def test_a_spoilt_document_is_refused(
        self, tmp_path: Path, spoil: Callable[[results.Document], object], message: str
    ) -> None:
        document = copy.deepcopy(_document())
        spoil(document)
        with pytest.raises(results.ResultError, match=message):
            results.write(document, tmp_path)
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "spoilt.json").write_text(json.dumps(document))
        with pytest.raises(results.ResultError, match=message):
            report.write(tmp_path / "spoilt.json")

    def test_a_file_that_is_not_json_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "cut.json").write_text('{"schema": ')
        with pytest.raises(results.ResultError, match=r"expected JSON in cut\.json"):
            results.read(tmp_path / "cut.json")


class TestReport:
    def test_ratios_times_and_labels(self) -> None:
        text = report.build(_document())
        assert "| Title of perturb | avx2 | **20x** |" in text, "40 s against a median of 2 s"
        assert "| Title of rebuild-10 | avx2 | **40x** |" in text, "10 seeds of 64 s against 16 s"
        assert f"| {cases.AS_WRITTEN} (extrapolated) | **40x** | 640 [616, 664] | 3 of one seed |" in text
        assert "| 2 [1.4, 2.6] | 3 | 2 | 50.0% | 4 |" in text, "2 GB/s beside a copy of 4 GB/s, 4 G normals/s"
        for fact in (
            "Some CPU (R) 123",
            "0123456789ab",
            "2026-01-01",
            "`python -m benchmarks.kernels`",
            "4,096",
        ):
            assert fact in text

    @pytest.mark.parametrize(
        ("before", "after", "busy"), [(0.3, 2.2, False), (0.7, 2.2, True), (0.3, 2.7, True)]
    )
    def test_a_busy_machine_is_pointed_out(self, before: float, after: float, busy: bool) -> None:
        document = _document()
        document["environment"].update(load_average=before, load_average_after=after)
        assert ("not to be relied on" in report.build(document)) is busy

    def test_what_bounds_a_row(self) -> None:
        rows = _document()["rows"]
        ours, as_written, _, _, longest, *_ = rows
        assert report.bound(longest, rows) == "arithmetic: this row defines the loop's rate"
        assert report.bound(ours, rows) == "arithmetic (memory 50%, arithmetic 80% of the time)"
        assert report.bound({**ours, "num_bytes": 7_000_000_000}, rows).startswith("memory (memory 88%")
        slow = {**ours, "seconds": {"median": 20.0}, "g_normals_per_s": 0.4}
        assert report.bound(slow, rows) == "neither alone (memory 5%, arithmetic 8% of the time)"
        assert report.bound(as_written, rows) == "25% is drawing noise, the rest temporaries"


@pytest.mark.slow
def test_everything_runs_on_tiny_shapes(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="the suite needs pytest-benchmark (the bench extra)")
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernels",
        "--quick",
        "--dtype",
        "fp32",
        "--output",
        str(tmp_path),
    ]
    # pytest-benchmark times nothing where it finds itself in a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("kernels-*-tiny-fp32.json")
    document = results.read(path)
    assert document["settings"]["dtype"] == "fp32"
    planned = [(case.id, name) for case in cases.cases(settings.QUICK) for name in case.contestant_names()]
    assert [(row["case"], row["contestant"]) for row in document["rows"]] == planned
    assert all(row["answer_checked"] for row in document["rows"] if row["kind"] == "ours")
    assert [row["extrapolated"] for row in document["rows"] if row["contestant"] == cases.AS_WRITTEN] == [
        case.operation == "rebuild" for case in cases.cases(settings.QUICK)
    ]
    text = path.with_suffix(".md").read_text()
    assert text == report.build(document)
    assert str(ROOT) not in path.read_text()


@pytest.mark.parametrize("sampling", ["uniform", "pro"])
def test_the_merge_benchmark_measures_right_answers(sampling: Sampling) -> None:
    merge.check_answer(sampling)
    row = merge.measure(20, sampling)
    assert (row["bytes_down"], row["bytes_up"]) == (16_916, 860)
    assert row["merges_per_second"] == 20 / row["merge_seconds"]["median"]
    # What a merge may hold for 20 replies: its schedules, K sums, one pass of scalars.
    assert 20 * 2 * 200 < row["merge_peak_bytes"] < 20_000_000
