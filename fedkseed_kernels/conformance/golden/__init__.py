"""Golden vectors of the noise contract, package data: vectors.json and normal_digests.json.

Both files are written from the NumPy reference by `python -m fedkseed_kernels.conformance.golden.generate`,
and read by `fedkseed_kernels.conformance`. An implementation in another language can read them as they are:

* Arrays are strings: the bit pattern of each value in hexadecimal, most significant digit first, values
  separated by blanks, in row-major order. Coefficients are C99 hexadecimal floats.
* A NaN in a result stands for any NaN, except where nothing is to change (`unchanged`: true): there the bytes
  count.
* `normals` and `digests` are section 4 of the contract, `noise` sections 4 and 5, `primitive` and `layouts`
  sections 6 to 8, `compensated` section 6.5 (residuals as 16-bit patterns; `plus` and `minus` are rounded to
  nearest, out of place), `derived` and `draws` section 9.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed_kernels.contract.reference import STORAGE

VECTORS_FILE = "vectors.json"
DIGESTS_FILE = "normal_digests.json"

_PATTERN = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16, "float64": np.uint64}
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float64": 0x7FF0000000000000}


def load(file: str = VECTORS_FILE) -> dict[str, Any]:
    """The content of one of the two files."""
    text = resources.files(__package__).joinpath(file).read_text(encoding="ascii")
    content: dict[str, Any] = json.loads(text)
    return content


def to_hex(values: NDArray[Any]) -> str:
    """Bit patterns of an array as the files hold them."""
    flat = np.ascontiguousarray(values).reshape(-1)
    digits = 2 * flat.itemsize
    return " ".join(f"{int(p):0{digits}x}" for p in flat.view(f"u{flat.itemsize}"))


def words_from_hex(text: str) -> NDArray[np.uint32]:
    """uint32 words of a string in the files."""
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


def words64_from_hex(text: str) -> NDArray[np.uint64]:
    """uint64 words of a string in the files."""
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint64)


def stored_from_hex(text: str, dtype: str) -> NDArray[Any]:
    """Stored values of a string in the files: float32, float64, or uint16 patterns for bf16 and fp16."""
    patterns = np.array([int(word, 16) for word in text.split()], dtype=_PATTERN[dtype])
    stored: NDArray[Any] = patterns.view(STORAGE[dtype])
    return stored


def coeffs_from_hex(texts: Iterable[str]) -> NDArray[np.float64]:
    """Coefficients, probabilities or uniform numbers of the files."""
    return np.array([float.fromhex(text) for text in texts], dtype=np.float64)


def is_nan(stored: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """Where stored values are NaN, read from their bits."""
    without_sign: NDArray[Any] = stored.view(_PATTERN[dtype]) << 1
    return np.asarray(without_sign > _PATTERN[dtype](2 * _INFINITY[dtype]))


def same_value(got: NDArray[Any], expected: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """Where two arrays of stored values have equal bits, or both hold a NaN."""
    equal = got.view(_PATTERN[dtype]) == expected.view(_PATTERN[dtype])
    return np.asarray(equal | (is_nan(got, dtype) & is_nan(expected, dtype)))


def without_payloads(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The same values with each NaN made the positive quiet one: payloads differ from machine to machine."""
    infinity = _INFINITY[dtype]
    patterns = stored.view(_PATTERN[dtype]).copy()
    lowest_exponent_bit = infinity & -infinity
    patterns[is_nan(stored, dtype)] = infinity | lowest_exponent_bit >> 1
    result: NDArray[Any] = patterns.view(STORAGE[dtype])
    return result
