"""The benchmark of whole steps: its contestants do a step, and none of the modes is left out."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import mmap
from typing import Any

import numpy as np
import pytest
import torch

import fedkseed_kernels
from benchmarks.baselines import mezo
from benchmarks.common import memory
from benchmarks.common.constants import LEARNING_RATE, ZO_EPS
from benchmarks.models import modes, workloads
from benchmarks.step import __main__ as step
from benchmarks.step import contestants as step_contestants
from benchmarks.step import memory as step_memory
from fedkseed import Inplace, Streamed

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _work(dtype: torch.dtype = torch.bfloat16) -> workloads.Workload:
    return workloads.load("random-tiny", dtype, num_rows=2, num_tokens=8)


def _values(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


class TestMezo:
    def test_a_step_is_the_papers(self) -> None:
        """In fp64: w - lr g z with z from one seeding of a generator, g from the losses on both sides."""
        torch.manual_seed(1)
        parameters = [
            torch.nn.Parameter(torch.randn(5, 3).double()),
            torch.nn.Parameter(torch.randn(4).double()),
        ]
        before = [parameter.detach().clone() for parameter in parameters]

        def loss(values: Any = parameters) -> torch.Tensor:
            return sum((value**3).sum() for value in values)

        generator = torch.Generator().manual_seed(9)
        noise = [torch.empty_like(value).normal_(generator=generator) for value in before]
        sides = [loss([w + sign * 1e-3 * z for w, z in zip(before, noise, strict=True)]) for sign in (1, -1)]
        g = mezo.step_(parameters, loss, 9, lr=0.01, eps=1e-3)
        assert g == pytest.approx(float(sides[0] - sides[1]) / 2e-3, rel=1e-9)
        for parameter, w, z in zip(parameters, before, noise, strict=True):
            torch.testing.assert_close(parameter.detach(), w - 0.01 * g * z, rtol=0, atol=1e-12)


class TestModes:
    @pytest.mark.parametrize("options", [Inplace, Streamed])
    def test_every_option_of_a_storage_mode_is_measured(self, options: type[Any]) -> None:
        taken = [found for found in (modes.ONE_SIDED | modes.PAIRED).values() if isinstance(found, options)]
        for field in dataclasses.fields(options):
            values = {getattr(found, field.name) for found in taken}
            assert len(values) > 1, f"{options.__name__}.{field.name} is never other than {values}"

    def test_names_are_of_modes_that_differ(self) -> None:
        for (one, left), (two, right) in itertools.combinations((modes.ONE_SIDED | modes.PAIRED).items(), 2):
            assert left != right, f"{one} is {two}"

    def test_modes_of_16_bit_weights_alone_are_left_out_for_fp32(self) -> None:
        assert "inplace, stochastic" in modes.modes(torch.float16)
        assert not {"inplace, stochastic", "streamed, fp32 forward"} & set(modes.modes(torch.float32))
        assert {"inplace", "inplace, chained", "streamed"} <= set(modes.modes(torch.float32))


class TestContestants:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("family", fedkseed_kernels.FAMILIES)
    def test_steps_move_the_weights_and_forward_passes_do_not(self, dtype: torch.dtype, family: str) -> None:
        for name in step_contestants.names(dtype, family):
            model = copy.deepcopy(_work(dtype).model)
            before = _values(model)
            take_step = step_contestants.open_step(name, model, _work(dtype).train, family)
            take_step()
            take_step()
            moved = any(not torch.equal(a, b) for a, b in zip(before, _values(model), strict=True))
            is_forward = name in step_contestants.baselines(dtype)
            # Two updates at lr 3e-7 may be too small for weights of 16 bits that are never perturbed.
            if is_forward or "streamed" not in name or dtype == torch.float32:
                assert moved != is_forward or name == step_contestants.FORWARDS_FP32, name

    def test_the_torch_steps_agree_with_ours_but_for_the_noise(self) -> None:
        """In fp32 all steps leave the weights within lr |g z| of where they were."""
        work = _work(torch.float32)
        for name in step_contestants.names(torch.float32, "gaussian"):
            model = copy.deepcopy(work.model)
            before = _values(model)
            step_contestants.open_step(name, model, work.train, "gaussian")()
            off = max(float((a - b).abs().max()) for a, b in zip(before, _values(model), strict=True))
            assert off < (ZO_EPS * 6 if "chained" in name else 1000 * LEARNING_RATE), name

    def test_an_unknown_one_is_refused(self) -> None:
        work = _work()
        with pytest.raises(ValueError, match="expected a contestant out of official step"):
            step_contestants.open_step("sideways", work.model, work.train, "gaussian")
        with pytest.raises(ValueError, match="expected contestants out of .*, got sideways"):
            step.measure(dataclasses.replace(step.QUICK, only=("sideways",)), 1)

    def test_forward_passes_that_a_step_is_compared_with(self) -> None:
        assert step_contestants.baseline_of("inplace", torch.bfloat16) == "two forwards"
        assert step_contestants.baseline_of("streamed, fp32 forward", torch.bfloat16) == "two forwards, fp32"
        assert step_contestants.baseline_of("streamed", torch.float32) == "two forwards"


class TestMeasure:
    def test_every_contestant_has_a_row(self) -> None:
        settings = dataclasses.replace(step.QUICK, measures_memory=False, batch_sizes=(1, 2), num_samples=1)
        document = step.measure(settings, 1)
        found = [(row["batch_size"], row["family"], row["contestant"]) for row in document["rows"]]
        assert found == [
            (size, family, name)
            for size in (1, 2)
            for family in fedkseed_kernels.FAMILIES
            for name in step_contestants.names(torch.bfloat16, family)
        ]
        lines = step.table(document).splitlines()
        assert len(lines) == 2 + len(found)
        assert lines[2].startswith("| 1 | gaussian | official step |")
        assert all(row["bytes_beyond_inference"] is None for row in document["rows"])

    def test_ratios_of_the_table(self) -> None:
        rows = [
            {
                "batch_size": 1,
                "family": family,
                "contestant": name,
                "baseline": "two forwards",
                "seconds": {"median": seconds, "p20": seconds, "p80": seconds},
                "bytes_beyond_inference": num_bytes,
            }
            for family, name, seconds, num_bytes in (
                ("gaussian", "official step", 9.0, 2_500_000),
                ("gaussian", "two forwards", 2.0, None),
                ("rademacher", "inplace", 3.0, 0),
                ("rademacher", "two forwards", 2.5, None),
            )
        ]
        lines = step.table({"rows": rows}).splitlines()
        assert lines[2] == "| 1 | gaussian | official step | 9 [9, 9] | 1.0x | 4.50x | 2.5 |"
        assert lines[4] == "| 1 | rademacher | inplace | 3 [3, 3] | 3.0x | 1.20x | 0.0 |"

    @pytest.mark.slow
    @pytest.mark.skipif(not memory.can_measure(), reason="needs Linux's /proc/self/clear_refs")
    def test_a_step_that_keeps_memory_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In this process, with a contestant that keeps 16 MB a step: the measurement finds them.

        They come from the system: the heap of a process that has run other tests may have as much to reuse.
        """
        kept: list[np.ndarray[Any, Any]] = []
        whole = step_contestants.open_step

        def keep_memory() -> None:
            pages = mmap.mmap(-1, 16_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            kept.append(np.frombuffer(pages, dtype=np.uint8))
            kept[-1].fill(1)

        def open_step(name: str, *rest: Any) -> step_contestants.Step:
            return keep_memory if name == "greedy" else whole(name, *rest)

        monkeypatch.setattr(step_contestants, "open_step", open_step)
        found = step_memory._growth(
            name="greedy",
            model="random-tiny",
            dtype="bf16",
            device="cpu",
            batch_size=1,
            num_tokens=8,
            family="gaussian",
        )
        assert found == pytest.approx(2 * 16_000_000, rel=0.1)

    @pytest.mark.slow
    @pytest.mark.skipif(not memory.can_measure(), reason="needs Linux's /proc/self/clear_refs")
    def test_memory_is_measured_in_a_process_of_its_own(self) -> None:
        options = {"model": "random-tiny", "dtype": "bf16", "device": "cpu", "batch_size": 1, "num_tokens": 8}
        found = step_memory.beyond_inference("inplace", **options, family="gaussian", num_threads=1)
        assert found is not None
        assert abs(found) < memory.LIMIT_BYTES
        with pytest.raises(RuntimeError, match="the memory of sideways to be measured"):
            step_memory.beyond_inference("sideways", **options, family="gaussian", num_threads=1)


def test_the_model_of_a_billion_parameters() -> None:
    with torch.device("meta"):
        model = workloads._random_llama("random-1b", torch.bfloat16, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_235_814_400
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_rows_are_the_same_each_time_and_unknown_models_are_refused() -> None:
    first, second = _work(), _work()
    assert torch.equal(first.train, second.train)
    assert all(torch.equal(a, b) for a, b in zip(_values(first.model), _values(second.model), strict=True))
    with pytest.raises(ValueError, match="expected a model out of smollm2"):
        workloads.load("gpt", torch.float32, num_rows=1, num_tokens=8)
