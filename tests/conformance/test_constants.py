"""Each constant of the contract stands on the page, in the headers and in the reference: always the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import fedkseed_kernels
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.contract import derived, reference, sums

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "noise-contract.md").read_text(encoding="utf-8")
INCLUDE = ROOT / "csrc" / "include"


def defines(header: str) -> dict[str, str]:
    """FK_ names and their values, of macros without arguments."""
    text = (INCLUDE / header).read_text(encoding="utf-8")
    return dict(re.findall(r"^#define FK_(\w+) +([^\s/]+)", text, re.MULTILINE))


def number(literal: str) -> float:
    """The value of a C literal: decimal or hexadecimal integer, or hexadecimal float."""
    if "p" in literal:
        return float.fromhex(literal.removesuffix("f"))
    return int(literal.rstrip("ul"), 0)


HEADER_CONSTANTS: dict[str, dict[str, float]] = {
    "normal.h": {
        "RADIUS_MASK": reference.RADIUS_WORD_MASK,
        "RADIUS_BASE": reference.RADIUS_BASE_PATTERN,
        "RADIUS_CENTRE": reference.RADIUS_BASE,
        "MANTISSA_MASK": reference.MANTISSA_MASK,
        "ONE_BITS": reference.ONE_PATTERN,
        "LOG_SLOPE": reference.EXPONENT_SCALE,
        "LOG_0": reference.EXPONENT_OFFSET,
        **{f"LOG_{5 - i}": c for i, c in enumerate(reference.LOG_COEFFICIENTS)},
        "RSQRT_MAGIC": reference.RSQRT_START_PATTERN,
        **{f"SQRT_{2 - i}": c for i, c in enumerate(reference.SQRT_COEFFICIENTS)},
        "ANGLE_SCALE": reference.ANGLE_SCALE,
        **{f"SIN_{2 - i}": c for i, c in enumerate(reference.SINE_COEFFICIENTS)},
        **{f"COS_{3 - i}": c for i, c in enumerate(reference.COSINE_COEFFICIENTS)},
        "SQRT2": reference.SQRT_TWO,
    },
    "philox4x32.h": {
        "PHILOX_ROUNDS": reference.PHILOX_NUM_ROUNDS,
        "PHILOX_M0": reference.PHILOX_MULTIPLIER_0,
        "PHILOX_M1": reference.PHILOX_MULTIPLIER_1,
        "PHILOX_W0": reference.PHILOX_KEY_STEP_0,
        "PHILOX_W1": reference.PHILOX_KEY_STEP_1,
        "TAG_GAUSSIAN": reference.TAG_GAUSSIAN,
        "TAG_RADEMACHER": reference.TAG_RADEMACHER,
        "TAG_ROUNDING": reference.TAG_ROUNDING,
        "TAG_DERIVED": reference.TAG_DERIVED,
        "GAUSSIAN_GROUP_SHIFT": reference.GAUSSIAN_GROUP_BITS,
        "RADEMACHER_GROUP_SHIFT": reference.RADEMACHER_GROUP_BITS,
        "ROUNDING_GROUP_SHIFT": reference.GAUSSIAN_GROUP_BITS,
    },
    "integer_sums.h": {
        "SUM_MAX_TERMS": sums.SUM_MAX_TERMS,
        "SUM_BITS": sums.SUM_BITS[False],
        "SUM_BITS64": sums.SUM_BITS[True],
        "SUM_SMALLEST": int(np.float32(sums.SUM_SMALLEST[False]).view(np.uint32)),
        "SUM_SMALLEST64": int(np.float64(sums.SUM_SMALLEST[True]).view(np.uint64)),
    },
}


@pytest.mark.parametrize("header", HEADER_CONSTANTS)
def test_header_and_reference_agree(header: str) -> None:
    found = {name: number(value) for name, value in defines(header).items()}
    assert found == {name: float(value) for name, value in HEADER_CONSTANTS[header].items()}


def section(title: str) -> str:
    """The text of the page's section whose heading holds title."""
    parts = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (found,) = [part for part in parts if title in part.partition("\n")[0]]
    return found


def code(title: str) -> str:
    """The indented blocks of a section, without what they say on the right."""
    lines = [line for line in section(title).splitlines() if line.startswith("    ")]
    return "\n".join(re.split(r" {3,}", line.strip())[0] for line in lines)


def test_page_and_reference_agree_on_the_gaussian_transform() -> None:
    in_order = [
        reference.RADIUS_WORD_MASK,
        reference.RADIUS_BASE_PATTERN,
        reference.RADIUS_BASE,
        reference.MANTISSA_MASK,
        reference.ONE_PATTERN,
        reference.EXPONENT_SCALE,
        reference.EXPONENT_OFFSET,
        *reference.LOG_COEFFICIENTS,
        reference.RSQRT_START_PATTERN,
        *reference.SQRT_COEFFICIENTS,
        reference.ANGLE_SCALE,
        *reference.SINE_COEFFICIENTS,
        *reference.COSINE_COEFFICIENTS,
        reference.SQRT_TWO,
    ]
    # A minus with a blank behind it subtracts; it is not the constant's sign.
    text = code("Gaussian noise")
    literals = re.findall(r"-?0x[0-9A-Fa-f]+(?:\.[0-9a-f]+)?(?:p[+-]\d+)?", text)
    found = [number(literal) for literal in literals]
    assert found == [float(constant) for constant in in_order]


def test_constants_of_the_transform_are_exact_in_fp32() -> None:
    for name, literal in defines("normal.h").items():
        if "p" in literal:
            assert float(np.float32(number(literal))) == number(literal), name


def test_page_and_reference_agree_on_philox() -> None:
    found = [int(literal, 16) for literal in re.findall(r"0x[0-9A-F]{8}", code("Philox4x32-10"))]
    assert found == [
        reference.PHILOX_MULTIPLIER_0,
        reference.PHILOX_MULTIPLIER_1,
        reference.PHILOX_KEY_STEP_0,
        reference.PHILOX_KEY_STEP_1,
    ]
    assert reference.PHILOX_NUM_ROUNDS == 10
    assert "Ten rounds" in section("Philox4x32-10")


def test_page_and_reference_agree_on_tags() -> None:
    row = r"^\| (\d) \| (\w+)[^|]*\|(?: element >> (\d))? \|$"
    rows = re.findall(row, section("Keys, counters, tags"), re.MULTILINE)
    found = {word: (int(tag), int(shift) if shift else None) for tag, word, shift in rows}
    assert found == {
        "Gaussian": (reference.TAG_GAUSSIAN, reference.GAUSSIAN_GROUP_BITS),
        "Rademacher": (reference.TAG_RADEMACHER, reference.RADEMACHER_GROUP_BITS),
        "stochastic": (reference.TAG_ROUNDING, reference.GAUSSIAN_GROUP_BITS),
        "derived": (reference.TAG_DERIVED, None),
    }


def test_page_and_reference_agree_on_integer_sums() -> None:
    text = section("The primitive").partition("### 6.3")[2].partition("### 6.4")[0]
    limits = re.search(r"K at most 2\^(\d+).*?>= 2\^(-\d+) \(fp64 tensors: 2\^(-\d+)\)", text, re.DOTALL)
    assert limits is not None
    assert [2.0 ** int(exponent) for exponent in limits.groups()] == [
        sums.SUM_MAX_TERMS,
        sums.SUM_SMALLEST[False],
        sums.SUM_SMALLEST[True],
    ]
    bits = re.search(r"s   = (\d+) - L - e +fp64 tensors: (\d+) - L - e", text)
    assert bits is not None
    assert [int(number) for number in bits.groups()] == [sums.SUM_BITS[False], sums.SUM_BITS[True]]


def test_page_and_module_agree_on_purposes() -> None:
    rows = re.findall(r"^\| (\d) \| (\w+ \w+)", section("Derived values"), re.MULTILINE)
    assert {meaning: int(purpose) for purpose, meaning in rows} == {
        "candidate seeds": derived.PURPOSE_CANDIDATE_SEEDS,
        "schedule draws": derived.PURPOSE_SCHEDULE,
        "client sampling": derived.PURPOSE_CLIENT_SAMPLING,
        "rounding seeds": derived.PURPOSE_ROUNDING_SEEDS,
    }


def test_one_contract_version() -> None:
    version = int(defines("fedkseed.h")["CONTRACT_VERSION"])
    assert f"# The noise contract, version {version}\n" in PAGE
    assert version == reference.CONTRACT_VERSION == fedkseed_kernels.CONTRACT_VERSION


def test_philox_known_answers_of_the_page() -> None:
    words = r"((?:[0-9a-f]{8} ?)+)"
    rows = re.findall(rf"^\| {words} \| {words} \| {words} \|$", PAGE, re.MULTILINE)
    assert len(rows) == 3
    for row in rows:
        counter, key, expected = (golden.words_from_hex(cell) for cell in row)
        np.testing.assert_array_equal(reference.philox4x32_10(counter, key), expected)
