"""The self-test of the Triton kernels: every variant has a golden case, run before its first launch."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from importlib import util
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_triton import PACKAGE, damaged, interpreted

import fedkseed_kernels as fk
from fedkseed_kernels.backends import triton as triton_backend
from fedkseed_kernels.contract import reference
from fedkseed_kernels.self_test import gate
from fedkseed_kernels.self_test.arena import Arena

if util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from fedkseed_kernels.backends.triton import launch as launcher
from fedkseed_kernels.backends.triton import self_test
from fedkseed_kernels.backends.triton.launch import Launch, Variant

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)


def every_variant() -> Iterator[Variant]:
    """What launches of any call may be of."""
    for is_runs, family, dtype in product((False, True), reference.FAMILIES, DTYPES):
        yield Variant(
            is_runs, family, dtype, 1, has_input=False, pair=False, stochastic=False, residuals="none"
        )
        for num_by_value, pair, stochastic, residuals, has_rows, many_tiles in product(
            (0, 1, 2), (False, True), (False, True), ("none", "read", "split"), (False, True), (False, True)
        ):
            if (stochastic or residuals != "none") and dtype not in HALVES:
                continue
            if residuals == "split" and (pair or stochastic or has_rows):
                continue
            if (has_rows and not is_runs) or (many_tiles and (is_runs or not num_by_value)):
                continue
            yield Variant(
                is_runs,
                family,
                dtype,
                num_by_value,
                has_input=True,
                pair=pair,
                stochastic=stochastic,
                residuals=residuals,
                has_rows=has_rows,
                many_tiles=many_tiles,
            )


def test_every_variant_has_a_golden_case_of_its_own() -> None:
    variants = list(every_variant())
    assert len(set(variants)) == len(variants) > 400
    for variant in variants:
        calls, case = self_test.golden_cases(variant)
        for call in calls:
            arena = Arena(call, [case], "gpu", CPU)
            launches = launcher.ready_launches(arena.operands, arena.terms, variant.many_tiles)
            assert [launch.variant for launch in launches] == [variant]


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[Variant]:
    """The variants whose golden case is run from now on, in a process that has launched none."""
    found: list[Variant] = []
    monkeypatch.setattr(self_test, "_may_run", set())
    monkeypatch.setattr(gate, "_deferred", set())
    monkeypatch.setattr(triton_backend, "_failures", {})
    monkeypatch.setattr(self_test, "_identity", lambda launch, device: f"{launch.variant}")
    monkeypatch.setattr(self_test, "_test", lambda variant, device: found.append(variant))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv(gate.SELF_TEST_VARIABLE, raising=False)
    return found


FIRST, SECOND = (
    Variant(is_runs, "gaussian", torch.float32, 1, True, False, False, "none") for is_runs in (False, True)
)


def ensure(*variants: Variant) -> None:
    self_test.ensure([Launch(variant, 1, ()) for variant in variants], GPU)


def test_a_variant_is_tested_once_and_remembered(
    tested: list[Variant], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure(FIRST, SECOND)
    ensure(SECOND, FIRST)
    assert tested == [FIRST, SECOND]
    assert len(list((cache / "self-tests").iterdir())) == 2
    monkeypatch.setattr(self_test, "_may_run", set())  # another process
    ensure(FIRST)
    assert tested == [FIRST, SECOND]
    monkeypatch.setattr(self_test, "_may_run", set())
    monkeypatch.setattr(self_test, "_identity", lambda launch, device: "other machine code")
    ensure(FIRST)
    assert tested == [FIRST, SECOND, FIRST]


def test_a_variable_switches_it_off(tested: list[Variant], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gate.SELF_TEST_VARIABLE, "0")
    ensure(FIRST)
    assert tested == []


def test_it_waits_for_the_end_of_a_capture(
    tested: list[Variant], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        ensure(FIRST, SECOND)
        ensure(FIRST)
    assert tested == []
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (
            logging.WARNING,
            "the self-test of Triton's kernels on cuda:0 is deferred to the next call: "
            "a CUDA graph is being captured",
        )
    ]
    ensure(FIRST)
    assert tested == [FIRST]


def test_it_waits_where_memory_does_not_suffice(
    tested: list[Variant], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(variant: Variant, device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(self_test, "_test", out_of_memory)
        ensure(FIRST)
    assert "the device has no memory left for it" in caplog.text
    ensure(FIRST)
    assert tested == [FIRST]


def test_a_variant_that_fails_is_a_reason_against_triton_on_that_gpu(
    tested: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(variant: Variant, device: torch.device) -> None:
        raise self_test.SelfTestError(f"it fails its self-test on {device}: ...")

    class Outputs:
        tensors = (torch.empty(1, device="meta"),)

    class Call:
        device, outs = GPU, Outputs

    def seed_axpy(operands: Any, terms: Any, before: Any) -> None:
        before([Launch(FIRST, 1, ())], operands.device)
        raise AssertionError("launched")

    monkeypatch.setattr(self_test, "_test", fails)
    monkeypatch.setattr(launcher, "seed_axpy", seed_axpy)
    reason = "it fails its self-test on cuda:0: ..."
    with pytest.raises(RuntimeError, match=f"the Triton backend cannot be used: {reason}"):
        triton_backend.seed_axpy(Call, None)  # type: ignore[arg-type]
    assert triton_backend.unavailable(GPU) == reason
    assert fk.unavailable("triton", "cuda:0") == reason
    assert triton_backend.unavailable(torch.device("cuda:1")) != reason


# --- the comparison itself, in the interpreter

SHORT = [
    Variant(False, "gaussian", torch.float32, 1, True, False, False, "none"),
    Variant(True, "rademacher", torch.bfloat16, 2, True, True, True, "read", has_rows=True),
    Variant(True, "gaussian", torch.float16, 0, True, False, False, "split"),
    Variant(False, "gaussian", torch.float32, 1, True, True, False, "none"),
]


@pytest.mark.few(1)
@pytest.mark.parametrize("variant", SHORT, ids=["segments", "rows", "runs", "pair"])
def test_a_variant_that_computes_rightly_passes(variant: Variant) -> None:
    with interpreted():
        importlib.import_module(f"{PACKAGE}.self_test")._test(variant, CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "right", "wrong", "variant"),
    [
        (
            "noise.py",
            "TAG_ROUNDING = _constant(reference.TAG_ROUNDING)",
            "TAG_ROUNDING = _constant(reference.TAG_DERIVED)",
            1,
        ),
        ("compensated.py", "per_unit = (((2 * 127 + 25) << 23)", "per_unit = (((2 * 127 + 24) << 23)", 2),
        ("sums.py", "unequal, equal), signs, 31 - i)", "equal, unequal), signs, 31 - i)", 1),
        ("sums.py", "return negative_zeros(sums, ARITHMETIC) - sums", "return 0.0 - sums", 3),
    ],
)
def test_a_variant_that_does_not_fails(
    file: str, right: str, wrong: str, variant: int, tmp_path: Path
) -> None:
    with interpreted(damaged(tmp_path, file, right, wrong)):
        changed = importlib.import_module(f"{PACKAGE}.self_test")
        with pytest.raises(changed.SelfTestError, match="it fails its self-test on cpu: the case "):
            changed._test(SHORT[variant], CPU)
