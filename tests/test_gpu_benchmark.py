"""benchmarks/gpu/ as far as it goes without a GPU: its plan, its command line, what each part measures."""

from __future__ import annotations

import importlib
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkseed_kernels
from benchmarks.baselines import torch_ways
from benchmarks.common import environment, pages
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases, passes, plan, smoke, steps, turns
from benchmarks.gpu import channel as gpu_channel
from benchmarks.gpu.channel import Channel, LineReader, PartEnded
from benchmarks.step import contestants as step_contestants
from benchmarks.step import memory as step_memory

ROOT = Path(__file__).resolve().parent.parent
DRY = plan.Settings(("bf16",), is_dry_run=True)


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    return Channel(tmp_path / "lines", 60.0)


def rows_of(channel: Channel) -> list[dict[str, Any]]:
    """The last row of each key, in order, and those without one."""
    found: dict[Any, dict[str, Any]] = {}
    for position, line in enumerate(LineReader(channel.path).new()):
        if "row" in line:
            found[line.get("key", position)] = line["row"]
    return list(found.values())


def fails_for_native(backend: str, _: str) -> None:
    if backend == "native":
        raise RuntimeError("CUDA error 999")


class TestPlan:
    def test_the_default_parts_are_expected_to_take_at_most_seven_minutes(self) -> None:
        assert plan.estimate(plan.DEFAULT) <= plan.SECONDS == 420

    def test_what_matters_most_comes_first(self) -> None:
        assert (
            *("smoke", "passes", "native-tests", "steps-1", "triton-tests", "memcheck", "ncu"),
            *("steps-8", "other-dtypes"),
        ) == plan.DEFAULT
        assert [part.name for part in plan.PARTS if not part.is_default] == ["steps-memory", "racecheck"]

    def test_every_part_has_a_function_and_time_to_spare(self) -> None:
        for part in plan.PARTS:
            module, _, function = part.run.partition(".")
            assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function))
            assert part.estimate < part.bound

    def test_the_files_are_few_and_their_names_plain(self) -> None:
        logs = {part.log for part in plan.PARTS}
        assert len(logs) <= 5
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", log) for log in logs)

    def test_the_page_has_the_plan_the_options_and_every_status(self) -> None:
        page = (ROOT / "docs" / "gpu.md").read_text()
        assert pages.with_part(page, "<!-- made by benchmarks.gpu.plan.table -->", plan.table()) == page
        for option in re.findall(r"^  (--[\w-]+)", gpu.make_parser().format_help(), re.M):
            assert f"`{option}" in page, option
        statuses = {value for name, value in vars(gpu_channel).items() if name.isupper()}
        assert {"passed", "over time", "not begun"} < statuses
        assert not [status for status in statuses if status not in page]
        assert environment.COMMIT_VARIABLE in page

    def test_the_kernels_are_those_of_the_sources(self) -> None:
        """Every __global__ function but those that tests alone launch."""
        launched = re.compile(r"__global__ void(?:\s+__launch_bounds__\([^{]*?\)+)?\s+(\w+)\(const \w+ ")
        found = set()
        for path in (ROOT / "csrc" / "cuda").glob("*.h"):
            text = path.read_text()
            names = launched.findall(text)
            assert len(names) == len(re.findall(r"__global__", re.sub(r"//.*", "", text))), path
            found |= set(names)
        assert sorted(found) == sorted(plan.KERNELS)


class TestCommandLine:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_without_a_gpu_it_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            gpu.main([])
        assert caught.value.code == 2
        assert "expected a GPU, got none" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--parts=smoke,speed", "expected parts out of smoke, passes, .*, got 'speed'"),
            ("--dtypes=bf16,fp8", "expected dtypes out of bf16, fp16, fp32, got 'fp8'"),
        ],
    )
    def test_an_unknown_name_is_refused(
        self, option: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            gpu.main(["--dry-run", option])
        assert re.search(message, capsys.readouterr().err)

    def test_the_help_names_parts_defaults_and_the_variable(self) -> None:
        text = re.sub(r"\s+", " ", gpu.make_parser().format_help())
        assert ", ".join(plan.BY_NAME) in text
        assert ",".join(plan.DEFAULT) in text.replace("- ", "-")
        assert "(default: 420)" in text
        assert environment.COMMIT_VARIABLE in text

    def test_the_file_has_the_name_of_the_gpu(self) -> None:
        found = gpu._default_path({"nvidia_smi": [{"name": "NVIDIA H200 (1/2)"}]}, False)
        assert found == ROOT / "benchmarks" / "results" / "gpu-nvidia-h200-1-2.json"
        assert gpu._default_path({"nvidia_smi": "could not start"}, False).name == "gpu-unknown.json"


class TestCommit:
    def test_the_variable_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEDKSEED_COMMIT", "0123abc")
        assert environment.commit() == "0123abc"

    @pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
    def test_a_tree_without_git_has_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Also where it lies inside another repository, whose commit says nothing."""
        monkeypatch.delenv("FEDKSEED_COMMIT", raising=False)
        other = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=other"]):
            subprocess.run([*other, *command], check=True)
        monkeypatch.setattr(environment, "REPOSITORY", tmp_path / "inside")
        (tmp_path / "inside").mkdir()
        assert environment.commit() == "unknown"

    def test_a_package_that_is_not_there_has_no_version(self) -> None:
        assert environment.version_of("no-such-package") is None


class TestPasses:
    def cases(self, dtype: torch.dtype) -> dict[str, cases.Case]:
        weights = cases.make_weights([(3,)], dtype, "cpu")
        return {
            case.name: case for case in cases.cases(weights, rebuild_seeds=(1, 64), num_official_seeds=16)
        }

    def test_the_weights_are_about_a_model_of_1_4_billion(self) -> None:
        shapes = cases.model_shapes()
        assert len(shapes) == 292
        assert sum(math.prod(shape) for shape in shapes) == 1_414_647_808

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_weights_and_residuals_are_of_random_bits_and_finite(self, dtype: torch.dtype) -> None:
        """Zeros would let a GPU clock higher; a NaN or an infinity could go another way."""
        (weight,) = cases.make_weights([(100, 100)], dtype, "cpu")
        assert weight.isfinite().all()
        assert weight.unique().numel() > 1000
        assert 0.4 < float((weight > 0).float().mean()) < 0.6
        (residual,) = cases.make_residuals([weight.data])
        assert residual.dtype == torch.int16
        assert residual.unique().numel() > 5000

    def test_copies_are_of_random_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        copied = []

        def clock(run: turns.Call) -> turns.Sample:
            copied.append(run())
            return turns.Sample(1.0, 1.0, True)

        assert passes.copy_seconds("cpu", 1 << 16, clock) == [1.0] * 20
        assert copied[0].unique().numel() == 256

    def test_every_case_names_its_contestants_once(self) -> None:
        found = self.cases(torch.float32)
        for case in found.values():
            names = [*(contestant.name for contestant in case.contestants), *case.refused]
            assert len(set(names)) == len(names)
            assert {"cuda", "triton"} <= set(names)
        rebuild = found["rebuild, K = 64, gaussian"]
        (official,) = [entry for entry in rebuild.contestants if entry.name == "official"]
        assert (rebuild.num_terms, official.repeats) == (64, 4)

    def test_bytes_that_cases_have_to_move(self) -> None:
        """In elements: w is read, one or two perturbed ones are written; residuals are read and written."""
        moved = {"perturb": 2, "restore and update": 2, "chained": 2, "perturb, rademacher": 2}
        moved |= {"perturbed copy": 2, "pair": 3}
        of_16_bits = {"perturb, stochastic": 2, "perturbed copy, compensated": 3, "update, compensated": 4}
        for dtype, expected in ((torch.float32, moved), (torch.bfloat16, moved | of_16_bits)):
            found = self.cases(dtype)
            assert {name: found[name].num_bytes / dtype.itemsize for name in expected} == expected
        assert self.cases(torch.float16)["perturbed copy in fp32"].num_bytes == 6
        assert not set(of_16_bits) & set(self.cases(torch.float32))

    def test_passes_are_on_prepared_handles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pair that is checked anew at each call takes the host longer than the GPU."""
        found = self.cases(torch.bfloat16)

        def forbidden(*_: Any, **__: Any) -> None:
            raise AssertionError("not on a prepared handle")

        for name in ("perturb_", "seed_axpy", "seed_axpy_", "seed_axpy_pair"):
            monkeypatch.setattr(fedkseed_kernels, name, forbidden)
        for case in found.values():
            for contestant in case.contestants:
                if contestant.kind == "ours":
                    contestant.run(0)

    def test_a_long_rebuild_is_warmed_up_on_its_own_handle_with_few_terms(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a handle does at its first call alone is no time of a rebuild."""
        weights = cases.make_weights([(3,), (40,)], torch.bfloat16, "cpu")
        case = cases._rebuild([weight.data for weight in weights], 256, "gaussian")
        seen: list[tuple[fedkseed_kernels.Prepared, int]] = []
        run = fedkseed_kernels.Prepared.seed_axpy_

        def noted(handle: fedkseed_kernels.Prepared, seeds: torch.Tensor, *rest: Any) -> Any:
            seen.append((handle, len(seeds)))
            return run(handle, seeds, *rest)

        monkeypatch.setattr(fedkseed_kernels.Prepared, "seed_axpy_", noted)
        for contestant in case.contestants:
            assert contestant.warm_up is not None
            contestant.warm_up()
            contestant.run(0)
            assert [count for _, count in seen] == [16, 256]
            assert seen[0][0] is seen[1][0]
            seen.clear()

    def test_a_dry_run_has_rows_by_both_clocks(self, channel: Channel) -> None:
        passes.first_dtype(DRY, channel)
        copy, *rows = rows_of(channel)
        assert copy["bytes_per_s"] > 0
        timed = [row for row in rows if "seconds" in row]
        assert {row["clock"] for row in timed} == {"device", "host"}
        official = [row for row in timed if row["contestant"] == "official"]
        assert [row["case"] for row in official[::2]] == [
            *("perturb", "restore and update"),
            *(f"rebuild, K = {k}, gaussian" for k in passes.TINY.rebuild_seeds),
        ]
        assert all(row["seconds"]["median"] > 0 for row in timed)
        assert {row["extrapolated"] for row in official if "K = 256" in row["case"]} == {True}

    def test_a_backend_that_cannot_serve_has_rows_that_say_so(
        self, channel: Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fedkseed_kernels, "unavailable", lambda *_: "it is not here")
        passes.first_dtype(DRY, channel)
        found = [row for row in rows_of(channel) if row.get("contestant") in ("cuda", "triton")]
        assert {row["refused"] for row in found} == {"it is not here"}

    def test_an_error_on_the_way_to_the_answer_costs_that_backend_alone(
        self, channel: Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fedkseed_kernels, "unavailable", fails_for_native)
        monkeypatch.setattr(cases, "BACKENDS", {"cuda": "native", "triton": "reference"})
        monkeypatch.setattr(cases, "triton_randn_add_", lambda *_: None)
        passes.first_dtype(DRY, channel)
        rows = rows_of(channel)
        refused = {(row["contestant"], row["refused"]) for row in rows if "refused" in row}
        assert refused == {("cuda", "RuntimeError: CUDA error 999")}
        assert {row["clock"] for row in rows if row.get("contestant") == "triton"} == {"device", "host"}

    def test_a_contestant_that_raises_fails_the_part_and_costs_its_own_row(
        self, channel: Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(torch_ways, "axpy_", fail)
        with pytest.raises(RuntimeError, match=r"got errors of randn_like \+ add_ \(perturb, bf16\)"):
            passes.first_dtype(DRY, channel)
        rows = rows_of(channel)
        assert {row["contestant"] for row in rows if "error" in row} == {"randn_like + add_"}
        assert all("seconds" in row for row in rows if row.get("contestant") == "official")

    def test_other_dtypes_are_skipped_where_none_is_named(self, channel: Channel) -> None:
        with pytest.raises(PartEnded, match="skipped: --dtypes names no other"):
            passes.other_dtypes(DRY, channel)


class TestSmoke:
    def test_every_kind_of_pass_is_compared(self, channel: Channel) -> None:
        smoke.run(DRY, channel)
        if fedkseed_kernels.unavailable("native", "cpu") is None:
            found = [row for row in rows_of(channel) if row.get("backend") == "cuda"]
            assert [row["case"] for row in found] == list(smoke.CASES)
            assert all(row["equal"] for row in found)
            proofs = [row for row in rows_of(channel) if row.get("case") == "self-test"]
            assert {(row["status"], row["device"]) for row in proofs if row["backend"] == "native"} == {
                ("pass", "cpu")
            }

    def test_a_self_test_that_fails_fails_the_part_after_the_cases(
        self, channel: Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes the library out of the process. What follows it on a GPU (Triton's) is not asked for."""
        found = ("native", "cuda:0", "auto", 3, 0.1, "a case differs")
        verdicts = iter([fedkseed_kernels.Verification("fail", *found)])
        monkeypatch.setattr(fedkseed_kernels, "verify", lambda: verdicts)
        with pytest.raises(PartEnded, match="self-test of native on cuda:0 .*: fail: a case differs"):
            smoke.run(DRY, channel)
        if fedkseed_kernels.unavailable("native", "cpu") is None:
            rows = rows_of(channel)[1:]
            assert [row.get("case") for row in rows[:-1]] == [*smoke.CASES, "self-test"]
            assert rows[-1]["backend"] == "triton"

    def test_a_wrong_bit_fails_the_part(self, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
        if fedkseed_kernels.unavailable("native", "cpu") is not None:
            pytest.skip("needs the native library")
        calls = []

        def call(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            calls.append(1)
            if len(calls) == 2:
                tensors[1].view(torch.int16)[4] += 1
            return tensors

        monkeypatch.setitem(smoke.CASES, "K = 2", (torch.bfloat16, call))
        with pytest.raises(PartEnded, match="failed: .* got cuda, K = 2: 1 of 9 differ, the first at 4"):
            smoke.run(DRY, channel)
        assert [row["case"] for row in rows_of(channel) if row.get("equal") is False] == ["K = 2"]

    def test_a_backend_that_is_missing_on_a_gpu_fails_the_part(
        self, channel: Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A library that was not carried along must not pass unseen."""
        monkeypatch.setattr(fedkseed_kernels, "unavailable", lambda *_: "not built")
        monkeypatch.setattr(plan.Settings, "device", "cpu")
        with pytest.raises(PartEnded, match="failed: .*cuda: refused: not built; triton: refused: not built"):
            smoke.run(plan.Settings(("bf16",)), channel)

    def test_an_error_on_the_way_to_the_answer_costs_that_backend_alone(
        self, channel: Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The library's kernels cannot be loaded just now: Triton's cases are compared all the same."""
        monkeypatch.setattr(fedkseed_kernels, "unavailable", fails_for_native)
        monkeypatch.setattr(fedkseed_kernels, "verify", lambda: iter(()))
        monkeypatch.setattr(smoke, "BACKENDS", {"cuda": "native", "triton": "reference"})
        monkeypatch.setattr(plan.Settings, "device", "cpu")
        with pytest.raises(PartEnded, match="got cuda: refused: RuntimeError: CUDA error 999$"):
            smoke.run(plan.Settings(("bf16",)), channel)
        assert [row["case"] for row in rows_of(channel) if row.get("equal")] == list(smoke.CASES)

    def test_nan_equals_nan_and_minus_zero_is_not_zero(self) -> None:
        nan = torch.tensor([0x7FC0, 0x0000], dtype=torch.int16).view(torch.bfloat16)
        other = torch.tensor([0x7FC1, -0x8000], dtype=torch.int16).view(torch.bfloat16)
        assert smoke._difference(nan, other) == "1 of 2 differ, the first at 1"
        assert smoke._difference(nan, nan) == ""


class TestSteps:
    def test_batches_and_contestants(self, channel: Channel) -> None:
        steps.batch_1(DRY, channel)
        found = [(row["batch_size"], row["family"], row["contestant"]) for row in rows_of(channel)]
        assert found == [
            (1, family, name)
            for family in fedkseed_kernels.FAMILIES
            for name in step_contestants.names(torch.bfloat16, family)
        ]

    @pytest.mark.slow
    def test_the_large_batch_leaves_forwards_in_fp32_out(self, channel: Channel) -> None:
        steps.batch_8(DRY, channel)
        names = {row["contestant"] for row in rows_of(channel)}
        assert {"two forwards", "streamed, paired", "official step"} <= names
        assert not [name for name in names if "fp32" in name]
        assert steps.FULL.large_batch == 8

    def test_memory_is_weighed(self, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(step_memory, "beyond_inference", lambda name, **_: len(name))
        steps.memory(DRY, channel)
        found = [(row["batch_size"], row["contestant"]) for row in rows_of(channel)]
        assert found == [(size, name) for size in (1, 3) for name in ("official step", "inplace")]
        assert rows_of(channel)[0]["bytes_beyond_inference"] == len("official step")

    def test_without_transformers_the_small_model_steps_and_the_part_says_so(
        self, channel: Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        monkeypatch.setattr(steps.importlib.util, "find_spec", lambda _: None)
        steps.batch_1(DRY, channel)
        assert {row["model"] for row in rows_of(channel)} == {"bare-tiny"}
        assert channel.noted("model").startswith("bare-tiny: transformers is not installed")

    def test_a_step_that_raises_fails_the_part_and_costs_its_own_row(
        self, channel: Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = step_contestants.open_step

        def fail(name: str, *arguments: Any) -> Callable[[], None]:
            if name == "streamed":
                raise torch.OutOfMemoryError("no room")
            return opened(name, *arguments)

        monkeypatch.setattr(step_contestants, "open_step", fail)
        with pytest.raises(RuntimeError, match=r"got errors of streamed \(batch 1, gaussian\), "):
            steps.batch_1(DRY, channel)
        errors = {row["contestant"]: row["error"] for row in rows_of(channel) if "error" in row}
        assert errors == {"streamed": "OutOfMemoryError: no room"}
