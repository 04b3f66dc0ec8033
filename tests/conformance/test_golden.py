"""The committed golden files are what the reference says, and small."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest

from fedkseed_kernels.conformance import golden
from fedkseed_kernels.conformance.golden import generate
from fedkseed_kernels.contract import reference

FOLDER = resources.files(golden)


def test_vectors_are_unchanged() -> None:
    committed = FOLDER.joinpath(golden.VECTORS_FILE).read_text(encoding="ascii")
    assert committed == generate.to_json(generate.build())


@pytest.mark.slow
def test_a_block_of_the_digests_is_unchanged() -> None:
    content = golden.load(golden.DIGESTS_FILE)
    block, words = 171, content["block_words"]
    assert content["digests"][block] == f"{reference.normal_digest(block * words, words):016x}"


def test_digests_cover_all_words() -> None:
    content = golden.load(golden.DIGESTS_FILE)
    assert content["block_words"] * len(content["digests"]) == 2**32
    assert len(set(content["digests"])) == len(content["digests"])


def test_files_are_small() -> None:
    sizes = [len(FOLDER.joinpath(file).read_bytes()) for file in (golden.VECTORS_FILE, golden.DIGESTS_FILE)]
    assert sum(sizes) < 300_000


def test_vectors_hold_what_they_should() -> None:
    vectors = golden.load()
    keys = ("dtype", "rounding", "terms", "alpha")
    gaussian = {
        tuple(case[key] for key in keys) for case in vectors["primitive"] if case["family"] == "gaussian"
    }
    for terms in ("none", "one", "two", "three, one skipped", "seventeen"):
        for alpha in (1.0, 1 - 2**-10, 0.9):
            assert {
                ("bfloat16", "stochastic", terms, alpha),
                ("float64", "nearest", terms, alpha),
            } <= gaussian
    for dtype, text in vectors["weights"].items():
        assert golden.is_nan(golden.stored_from_hex(text, dtype), dtype).sum() == 2
    # Stochastic rounding meets fp16 subnormals and an overflow that rounding to nearest makes too.
    (tiny,) = [
        c
        for c in vectors["primitive"]
        if (c["dtype"], c["rounding"], c["terms"]) == ("float16", "stochastic", "tiny")
    ]
    magnitudes = golden.stored_from_hex(tiny["plus"], "float16") & 0x7FFF
    assert ((magnitudes > 0) & (magnitudes < 0x400)).sum() >= 5
    infinite = [c["plus"].split().count("7c00") for c in vectors["primitive"] if c["terms"] == "past fp16"]
    assert max(infinite) >= 3


def test_hex_round_trip() -> None:
    for dtype, storage in (("float32", np.uint32), ("bfloat16", np.uint16), ("float64", np.uint64)):
        patterns = np.array([0, 1, 0x7F80, 0xFFFF], dtype=storage)
        stored = golden.stored_from_hex(golden.to_hex(patterns), dtype)
        np.testing.assert_array_equal(stored.view(storage), patterns)


def test_nan_equals_any_nan() -> None:
    one = golden.stored_from_hex("7fc00000 7f800000 3f800000", "float32")
    other = golden.stored_from_hex("ffa00001 7fc00000 3f800001", "float32")
    assert golden.same_value(one, other, "float32").tolist() == [True, False, False]


def test_json_is_a_case_a_line() -> None:
    content = {"a": 1, "b": [{"c": [1, 2]}, {"c": []}], "d": {"e": "f"}}
    text = generate.to_json(content)
    assert json.loads(text) == content
    assert len(text.splitlines()) == 10
