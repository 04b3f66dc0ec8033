"""Writes the golden vectors from the reference: `python -m fedkseed_kernels.conformance.golden.generate`.

`--digests` also runs the transform of all 2^32 words through the native library's fastest instruction set
and writes normal_digests.json, which `conformance --exhaustive` compares every instruction set with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.contract import derived, reference
from fedkseed_kernels.contract.sums import kept_terms

DIGEST_BLOCK_WORDS = 1 << 24
NUM_DIGEST_BLOCKS = 2**32 // DIGEST_BLOCK_WORDS

# Random123's known answers (Salmon et al.), typed from the contract page, not computed.
PHILOX_KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)

# NaNs with a payload (quiet, signalling), infinities, zeros, subnormals, the smallest normal, the largest
# finite values, one.
SPECIAL_WEIGHTS = {
    "float32": "7fc12345 ffa00001 7f800000 ff800000 80000000 00000000 "
    "00000001 807fffff 00800000 7f7fffff ff7fffff 3f800000",
    "bfloat16": "7fc1 ffa1 7f80 ff80 8000 0000 0001 807f 0080 7f7f ff7f 3f80",
    "float16": "7e01 fd01 7c00 fc00 8000 0000 0001 83ff 0400 7bff fbff 3c00",
    "float64": "7ff8000000012345 fff4000000000001 7ff0000000000000 fff0000000000000 8000000000000000 "
    "0000000000000000 0000000000000001 800fffffffffffff 0010000000000000 7fefffffffffffff ffefffffffffffff "
    "3ff0000000000000",
}
NUM_ORDINARY_WEIGHTS = 14
NUM_SMALL_WEIGHTS = 6  # where fp16 is subnormal

FIRST_ELEMENTS = (0, 3, 2**31 - 17, 2**32 - 5, 2**35 - 9, 2**62 + 1)
STREAMS = (0, 1, 290, 2**32 - 1)
ALPHAS = (1.0, 1 - 2.0**-10, 0.9)


def _terms() -> dict[str, dict[str, list[Any]]]:
    random = np.random.default_rng(2)
    many = random.standard_normal(17) * 1e-3
    # Skipped in fp32, but 1e-60 is not in fp64; 1e-41 is a subnormal fp32.
    many[[2, 5, 9, 13]] = (0.0, -0.0, 1e-60, 1e-41)
    by_name: dict[str, tuple[list[int], list[float]]] = {
        "none": ([], []),
        "one": ([0], [1e-3]),
        "two": ([-1, 2**63], [-2.5e-3, 0.75]),
        "three, one skipped": ([7, 8, 9], [1.0, -0.0, -1 / 3]),
        "seventeen": ([int(s) for s in random.integers(-(2**63), 2**63, 17)], many.tolist()),
        "all skipped": ([1, 2], [0.0, -0.0]),
        "cancelling": ([5, 5], [0.5, -0.5]),
        "tiny": ([11, 12], [2e-8, 1e-40]),
        "past fp16": ([13], [4e4]),
        "past fp32": ([14], [3.2e38]),
        "past fp32 together": ([15, 16], [2.5e38, 2.5e38]),
        # Rademacher sums: what is skipped, and what rounds to small integers, ties among them.
        "far apart": (
            list(range(20, 28)),
            [2.0**-26 * 1.5, -(2.0**-28), 0.75, 2.0**-96, -(2.0**-97), 2.0**-26 * 2.5, 1e-41, 2.0**-29],
        ),
        "smallest that count": ([28, 29, 30], [2.0**-96, -(2.0**-95), 2.0**-960]),
    }
    return {
        name: {"seeds": seeds, "coeffs": [float(c).hex() for c in coeffs]}
        for name, (seeds, coeffs) in by_name.items()
    }


def _round(values: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    if dtype == "float64":
        return values
    single = values.astype(np.float32)
    return reference.round_to_nearest(single, dtype)


def _weights() -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(1)
    ordinary = np.concatenate(
        (
            random.standard_normal(NUM_ORDINARY_WEIGHTS) * 0.05,
            random.standard_normal(NUM_SMALL_WEIGHTS) * 2.0**-18,
        )
    )
    return {
        dtype: np.concatenate((golden.stored_from_hex(special, dtype), _round(ordinary, dtype)))
        for dtype, special in SPECIAL_WEIGHTS.items()
    }


def _philox() -> Iterator[dict[str, str]]:
    for counter, key, words in PHILOX_KNOWN_ANSWERS:
        yield {"counter": counter, "key": key, "words": words}
    random = np.random.default_rng(0)
    counters = random.integers(0, 2**32, (8, 4), dtype=np.uint32)
    keys = random.integers(0, 2**32, (8, 2), dtype=np.uint32)
    for arrays in zip(counters, keys, reference.philox4x32_10(counters, keys), strict=True):
        yield dict(zip(("counter", "key", "words"), map(golden.to_hex, arrays), strict=True))


def _normals() -> dict[str, str]:
    random = np.random.default_rng(3)
    chosen = [0, 2**32 - 1, 0x1FFFF, 0xFFFE0000, *(1 << bit for bit in range(32))]
    words = np.array([*chosen, *random.integers(0, 2**32, 28)], dtype=np.uint32)
    even, odd = reference.normals_from_words(words)
    return {"words": golden.to_hex(words), "even": golden.to_hex(even), "odd": golden.to_hex(odd)}


def _noise() -> Iterator[dict[str, Any]]:
    streams, dtypes = cycle(STREAMS), cycle(reference.DTYPES)
    for family, count in (("gaussian", 21), ("rademacher", 150)):
        for seed in (0, -1, 2**63, 0x0123456789ABCDEF):
            for first in FIRST_ELEMENTS:
                stream, dtype = next(streams), next(dtypes)
                elements = np.uint64(first) + np.arange(count, dtype=np.uint64)
                yield {
                    "family": family,
                    "seed": seed,
                    "stream": stream,
                    "first_element": first,
                    "dtype": dtype,
                    "z": golden.to_hex(reference.normal_array(seed, stream, elements, dtype, family)),
                }
        next(streams)  # so that a seed does not always meet the same streams and dtypes


def _pair(
    case: dict[str, Any], weights: NDArray[Any], elements: NDArray[np.uint64], terms: Any
) -> dict[str, str]:
    """Both sides of a case, NaN payloads taken off where they are not part of the contract."""
    sides = reference.seed_axpy_pair_array(
        weights,
        elements,
        terms["seeds"],
        golden.coeffs_from_hex(terms["coeffs"]),
        **{key: case[key] for key in ("dtype", "stream", "alpha", "family", "rounding", "rounding_seed")},
    )
    kept = sides if case["unchanged"] else [golden.without_payloads(side, case["dtype"]) for side in sides]
    return dict(zip(("plus", "minus"), map(golden.to_hex, kept), strict=True))


def _is_unchanged(terms: Any, alpha: float, dtype: str, family: str) -> bool:
    coeffs = golden.coeffs_from_hex(terms["coeffs"])
    return alpha == 1 and not kept_terms(terms["seeds"], coeffs, dtype == "float64", family)


def _primitive_choices() -> Iterator[tuple[str, str, str, float]]:
    """(family, dtype, terms, alpha) of every primitive case."""
    for dtype in reference.DTYPES:
        for terms in ("none", "one", "two", "three, one skipped", "seventeen"):
            for alpha in ALPHAS:
                yield "gaussian", dtype, terms, alpha
        for terms in ("all skipped", "cancelling", "tiny", "past fp16", "past fp32"):
            yield "gaussian", dtype, terms, 1.0
        for terms, alpha in (("one", 1.0), ("two", 0.9), ("cancelling", 1.0), ("seventeen", 1.0)):
            yield "rademacher", dtype, terms, alpha
    for dtype in reference.DTYPES:
        for terms in ("far apart", "smallest that count", "past fp32 together", "three, one skipped"):
            yield "rademacher", dtype, terms, 1.0
        yield "rademacher", dtype, "none", 0.9
        yield "rademacher", dtype, "all skipped", 1.0


def _primitive(all_terms: dict[str, Any], weights: dict[str, NDArray[Any]]) -> Iterator[dict[str, Any]]:
    streams, firsts = cycle(STREAMS), cycle(FIRST_ELEMENTS)
    for family, dtype, terms, alpha in _primitive_choices():
        for rounding in reference.ROUNDINGS:
            if rounding == "stochastic" and dtype in ("float32", "float64") and terms != "seventeen":
                continue  # such dtypes are rounded to nearest all the same: one set of terms shows it
            first = next(firsts)
            case = {
                "family": family,
                "dtype": dtype,
                "terms": terms,
                "alpha": alpha,
                "rounding": rounding,
                "rounding_seed": 2**64 - 3 if rounding == "stochastic" else None,
                "stream": next(streams),
                "first_element": first,
                "unchanged": _is_unchanged(all_terms[terms], alpha, dtype, family),
            }
            elements = np.uint64(first) + np.arange(weights[dtype].size, dtype=np.uint64)
            yield case | _pair(case, weights[dtype], elements, all_terms[terms])
        next(firsts)


# (shape, view as (full shape, start) or offset, rows, how the tensor lies in memory)
LAYOUTS: tuple[tuple[list[int], tuple[list[int], list[int]] | int, list[int] | None, str], ...] = (
    ([4, 6], ([1000, 777], [3, 5]), None, "contiguous"),
    ([4, 6], 0, None, "transposed"),
    ([5, 7], 2**35 - 11, None, "every other"),
    ([2, 3, 5], ([2**20, 2**12, 9], [2**19 + 1, 7, 2]), None, "transposed"),
    ([3, 17], ([3, 17], [0, 0]), None, "every other"),
    ([6, 5], 2**31 - 3, [5, 0, 0, 3], "contiguous"),
    ([6, 5], ([2**34, 23], [2**33 - 2, 11]), [1, 5, 1], "every other"),
    ([6, 5], 7, [], "transposed"),
    ([0, 3], 0, None, "contiguous"),
    ([], 2**40, None, "contiguous"),
)


COMPENSATED_CHOICES = (
    ("none", 0.9),
    ("all skipped", 1.0),
    ("one", 1.0),
    ("two", 1 - 2.0**-10),
    ("seventeen", 1.0),
    ("tiny", 1.0),
    ("past fp16", 1.0),
)

WIDE_CHOICES = (("none", 0.9), ("all skipped", 1.0), ("one", 1.0), ("seventeen", 1 - 2.0**-10))


def _layouts(all_terms: dict[str, Any], weights: dict[str, NDArray[Any]]) -> Iterator[dict[str, Any]]:
    streams, dtypes = cycle(STREAMS), cycle(reference.DTYPES)
    for shape, placing, rows, memory in LAYOUTS:
        for family in reference.FAMILIES:
            dtype = next(dtypes)
            case = {
                "shape": shape,
                "view": None if isinstance(placing, int) else placing,
                "offset": placing if isinstance(placing, int) else None,
                "rows": rows,
                "memory": memory,
                "family": family,
                "dtype": dtype,
                "terms": "two",
                "alpha": 1.0,
                "rounding": "stochastic",
                "rounding_seed": 99,
                "stream": next(streams),
                "unchanged": False,
            }
            w = np.resize(weights[dtype][::-1], shape)
            elements = case_elements(case)
            gather = slice(None) if rows is None else rows
            if shape:
                w, elements = w[gather], elements[gather]
            yield case | _pair(case, w, elements, all_terms["two"])
        next(dtypes)


def _compensated(all_terms: dict[str, Any], weights: dict[str, NDArray[Any]]) -> Iterator[dict[str, Any]]:
    streams, firsts, random = cycle(STREAMS), cycle(FIRST_ELEMENTS), np.random.default_rng(4)
    for dtype, family in product(reference.COMPENSATED_DTYPES, reference.FAMILIES):
        for terms, alpha in COMPENSATED_CHOICES:
            first, stream = next(firsts), next(streams)
            stored = weights[dtype]
            residuals = random.integers(-(2**15), 2**15, stored.size).astype(np.int16)
            residuals[::5] = 0
            case: dict[str, Any] = {
                "family": family,
                "dtype": dtype,
                "terms": terms,
                "alpha": alpha,
                "stream": stream,
                "first_element": first,
                "unchanged": _is_unchanged(all_terms[terms], alpha, dtype, family),
                "residuals": golden.to_hex(residuals),
            }
            options: dict[str, Any] = {key: case[key] for key in ("dtype", "stream", "alpha", "family")}
            seeds, coeffs = all_terms[terms]["seeds"], golden.coeffs_from_hex(all_terms[terms]["coeffs"])
            elements = np.uint64(first) + np.arange(stored.size, dtype=np.uint64)
            new, new_residuals = reference.seed_axpy_compensated_array(
                stored, residuals, elements, seeds, coeffs, **options
            )
            sides = reference.seed_axpy_pair_array(
                stored, elements, seeds, coeffs, residuals=residuals, **options
            )
            results = [new, *sides]
            if not case["unchanged"]:
                results = [golden.without_payloads(result, dtype) for result in results]
            names = ("weights_after", "plus", "minus")
            yield (
                case
                | dict(zip(names, map(golden.to_hex, results), strict=True))
                | {"residuals_after": golden.to_hex(new_residuals)}
            )
        next(firsts)


def _wide(all_terms: dict[str, Any], weights: dict[str, NDArray[Any]]) -> Iterator[dict[str, Any]]:
    """fp32 outputs of 16-bit weights, with residuals and without."""
    streams, firsts, random = cycle(STREAMS), cycle(FIRST_ELEMENTS), np.random.default_rng(5)
    for dtype, family in product(reference.COMPENSATED_DTYPES, reference.FAMILIES):
        for (terms, alpha), is_compensated in product(WIDE_CHOICES, (False, True)):
            first, stored = next(firsts), weights[dtype]
            residuals = random.integers(-(2**15), 2**15, stored.size).astype(np.int16)
            case: dict[str, Any] = {
                "family": family,
                "dtype": dtype,
                "terms": terms,
                "alpha": alpha,
                "stream": next(streams),
                "first_element": first,
                "residuals": golden.to_hex(residuals) if is_compensated else None,
            }
            sides = reference.seed_axpy_pair_array(
                stored,
                np.uint64(first) + np.arange(stored.size, dtype=np.uint64),
                all_terms[terms]["seeds"],
                golden.coeffs_from_hex(all_terms[terms]["coeffs"]),
                residuals=residuals if is_compensated else None,
                wide=True,
                **{key: case[key] for key in ("dtype", "stream", "alpha", "family")},
            )
            kept = [golden.to_hex(golden.without_payloads(side, "float32")) for side in sides]
            yield case | dict(zip(("plus", "minus"), kept, strict=True))
        next(firsts)


def case_elements(case: dict[str, Any]) -> NDArray[np.uint64]:
    """Element indices of a layout case, before rows are gathered."""
    if case["view"] is not None:
        return reference.view_elements(case["shape"], *case["view"])
    in_order = np.arange(math.prod(case["shape"]), dtype=np.uint64).reshape(case["shape"])
    elements: NDArray[np.uint64] = np.uint64(case["offset"]) + in_order
    return elements


def _derived() -> list[dict[str, Any]]:
    indices = np.array([0, 1, 2, 4095, 2**32 - 1, 2**32, 2**63, 2**64 - 1], dtype=np.uint64)
    return [
        {
            "base_seed": base_seed,
            "purpose": purpose,
            "indices": [int(index) for index in indices],
            "words": golden.to_hex(derived.words(base_seed, purpose, indices)),
            "seeds": golden.to_hex(derived.seeds(base_seed, purpose, indices)),
            "uniforms": golden.to_hex(derived.uniforms(base_seed, purpose, indices)),
        }
        for base_seed, purpose in ((0, 0), (-1, 1), (2**63, 2), (20240501, 3))
    ]


def _draws() -> list[dict[str, Any]]:
    uniforms = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9999, 1 - 2.0**-53]
    probabilities = ([1.0], [0.25, 0.0, 0.25, 0.5, 0.0], [0.1] * 10, [0.0, 0.3, 0.6999999, 0.0])
    return [
        {
            "probabilities": [p.hex() for p in chosen],
            "uniforms": [u.hex() for u in uniforms],
            "indices": derived.draw(chosen, uniforms).tolist(),
        }
        for chosen in probabilities
    ]


def _digest(first: int, count: int) -> dict[str, Any]:
    return {"first": first, "count": count, "digest": f"{reference.normal_digest(first, count):016x}"}


def build() -> dict[str, Any]:
    """The content of vectors.json."""
    terms, weights = _terms(), _weights()
    return {
        "contract_version": reference.CONTRACT_VERSION,
        "philox": list(_philox()),
        "normals": _normals(),
        "digests": [_digest(0, 1), _digest(2**31 - 999, 2222), _digest(2**32 - 1001, 1001)],
        "noise": list(_noise()),
        "terms": terms,
        "weights": {dtype: golden.to_hex(w) for dtype, w in weights.items()},
        "primitive": list(_primitive(terms, weights)),
        "layouts": list(_layouts(terms, weights)),
        "compensated": list(_compensated(terms, weights)),
        "wide": list(_wide(terms, weights)),
        "derived": _derived(),
        "draws": _draws(),
    }


def to_json(content: dict[str, Any]) -> str:
    """JSON with one case a line."""
    lines = []
    for name, value in content.items():
        if isinstance(value, (list, dict)):
            pairs = value.items() if isinstance(value, dict) else [(None, entry) for entry in value]
            entries = [(f"{json.dumps(k)}: " if k is not None else "") + json.dumps(v) for k, v in pairs]
            brackets = "{}" if isinstance(value, dict) else "[]"
            text = f"{brackets[0]}\n  " + ",\n  ".join(entries) + f"\n {brackets[1]}"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _digest_of_block(block: int) -> str:
    return f"{native_cpu.normal_digest(block * DIGEST_BLOCK_WORDS, DIGEST_BLOCK_WORDS, 'auto'):016x}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fedkseed_kernels.conformance.golden.generate", description=__doc__
    )
    parser.add_argument("--digests", action="store_true", help="also all 2^32 words: some minutes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="threads for --digests")
    arguments = parser.parse_args()
    folder = Path(__file__).parent
    (folder / golden.VECTORS_FILE).write_text(to_json(build()), encoding="ascii")
    if arguments.digests:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            digests = list(pool.map(_digest_of_block, range(NUM_DIGEST_BLOCKS)))
        content = {"block_words": DIGEST_BLOCK_WORDS, "digests": digests}
        (folder / golden.DIGESTS_FILE).write_text(to_json(content), encoding="ascii")


if __name__ == "__main__":
    main()
