"""What bounds a pass on each chip, and the page of the committed result."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from benchmarks.machine_code import chips, sass
from benchmarks.machine_code.chips import CHIPS, Bound, Chip
from benchmarks.machine_code.page import in_words, page
from benchmarks.machine_code.rows import ARCHES
from benchmarks.machine_code.tools import ToolError

# A turn of the Gaussian loop over terms on sm_80 and sm_90, bf16, for each of its 32 normals.
K_LOOP = {
    name: n / 32
    for name, n in {
        "FFMA": 272,
        "FMUL": 128,
        "FADD": 32,
        "IMAD.WIDE.U32": 71,
        "LOP3.LUT": 110,
        "I2FP.F32.S32": 32,
        "SHF.R.U32.HI": 16,
        "LDS.128": 5,
        "BRA": 29,
    }.items()
}
BY_NAME = {chip.name: chip for chip in CHIPS}


def bound_of(chip: Chip, counts: dict[str, float], num_bytes: int | None = None) -> Bound:
    (bound,) = [b for b in chips.bounds(chips.work_of(counts), chip.arch, num_bytes) if b.chip == chip.name]
    return bound


def test_work_goes_to_the_pipe_that_runs_it() -> None:
    counts = {
        "IMAD.WIDE.U32": 2,
        "IMAD.MOV.U32": 1,
        "FFMA2": 1,
        "HADD2.F32": 1,
        "I2F": 1,
        "I2FP.F32.S32": 1,
        "BRA": 3,
    }
    assert chips.work_of(counts) == {
        "issue": 10,
        "wide": 2,
        "product": 1,
        "packed": 1,
        "half": 1,
        "conversion": 1,
        "alu": 1,
    }
    assert chips.work_of({"LDG.E.128": 1, "S2R": 1, "UIADD3": 1}) == {"issue": 3}
    with pytest.raises(ToolError, match="got FCHK; add it to _PIPES"):
        chips.work_of({"FCHK": 1})


def test_a100_is_bound_by_its_64_fp32_lanes_and_h200_by_issue() -> None:
    a100, h200 = (bound_of(BY_NAME[name], K_LOOP) for name in ("A100", "H200"))
    assert (a100.unit, a100.limit, a100.copy, a100.of_copy) == ("FMA pipe", "FMA pipe", None, None)
    # 432 fp32 operations and 71 wide products for 32 normals, at two or one slots a product.
    assert a100.ceiling == pytest.approx(108 * 1.41e9 * 64 * 32 / (432 + 2 * 71))
    assert a100.best_ceiling == pytest.approx(108 * 1.41e9 * 64 * 32 / (432 + 71))
    assert h200.unit == "issue"
    assert h200.ceiling == h200.best_ceiling == pytest.approx(132 * 1.98e9 * 128 * 32 / 695)


@pytest.mark.parametrize(
    ("counts", "unit", "clocks"),
    [
        ({"LOP3.LUT": 64, "BRA": 32}, "ALU", 1),
        ({"IMAD.WIDE.U32": 32, "BRA": 32}, "integer products", 1),
        ({"I2F": 16, "BRA": 32}, "conversions", 1),
        ({"DFMA": 64, "BRA": 32}, "FP64 pipe", 1),
        ({"FFMA2": 64, "BRA": 32}, "FMA pipe", 1),
        ({"HADD2.F32": 64, "FFMA": 60, "BRA": 4}, "issue", 1),
        ({"BRA": 128}, "issue", 1),
    ],
)
def test_the_busiest_unit_sets_the_ceiling(counts: dict[str, float], unit: str, clocks: float) -> None:
    bound = bound_of(BY_NAME["H100"], counts)
    assert (bound.unit, bound.ceiling) == (unit, pytest.approx(132 * 1.98e9 / clocks))


def test_fp16_has_a_pipe_of_its_own_on_a100_alone() -> None:
    counts = {"HADD2.F32": 48.0, "FFMA": 48.0}
    assert bound_of(BY_NAME["A100"], counts).ceiling == pytest.approx(108 * 1.41e9 / 0.75)
    assert bound_of(BY_NAME["B200"], counts).ceiling == pytest.approx(148 * 1.965e9 / 0.75)


def test_tensor_cores_reach_the_vendors_rate() -> None:
    """A product of 16 elements and 32 terms by 8 columns: 16 operations an element and term."""
    per_element = {"IMMA.16832.U8.S8": 1 / 16}
    for chip in CHIPS:
        bound = bound_of(chip, per_element)
        assert bound.unit == "tensor cores"
        assert bound.ceiling == pytest.approx(chip.int8_rate / 16)


def test_memory_bounds_a_pass_that_a_copy_is_slower_than() -> None:
    bound = bound_of(BY_NAME["H200"], {"BRA": 24.9}, 4)
    assert (bound.limit, bound.unit) == ("memory", "issue")
    assert bound.copy == pytest.approx(4.01e12 / 4)
    assert bound.of_copy == pytest.approx(bound.ceiling / bound.copy, abs=1e-3)
    assert in_words(asdict(bound)) == "1.00 memory (issue 1.34)"
    slow = bound_of(BY_NAME["H200"], {"BRA": 45.9}, 4)
    assert in_words(asdict(slow)) == "0.73 issue (73% of copy)"
    assert in_words(asdict(replace(slow, best_ceiling=0.8e12, of_copy=None))) == "0.73 to 0.80 issue"


def test_chips() -> None:
    assert {chip.arch for chip in CHIPS} == set(ARCHES)
    for chip in CHIPS:
        assert chip.copy < chip.bandwidth
        assert chip.source
        assert chip.copy_source
        # The vendors' fp32 rates: lanes, clock and multiprocessors belong together.
        tera = 2 * chip.fma_lanes * chip.num_sms * chip.clock / 1e12
        assert tera == pytest.approx({"A100": 19.5, "H100": 67, "H200": 67, "B200": 75}[chip.name], rel=0.01)


def test_the_committed_page_is_that_of_the_committed_result() -> None:
    content = json.loads(sass.RESULT.read_text())
    assert content["chips"] == [asdict(chip) for chip in CHIPS]
    assert sass.RESULT.with_suffix(".md").read_text() == page(content, sass.RESULT.name)


def test_the_committed_result_is_within_the_budget() -> None:
    content = json.loads(sass.RESULT.read_text())
    budget = json.loads(sass.BUDGET.read_text())
    assert {(row["arch"], row["kernel"]) for row in content["rows"]} == {
        (arch, kernel) for arch, kernels in budget.items() for kernel in kernels
    }
    for row in content["rows"]:
        for name, limit in budget[row["arch"]][row["kernel"]].items():
            assert row[name] <= limit, row["kernel"]
