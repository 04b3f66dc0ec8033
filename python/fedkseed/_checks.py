"""Checks of arguments that several modules take; an error says the name, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from typing import TypeVar

import numpy as np

KindT = TypeVar("KindT")
_FP32 = np.finfo(np.float32)


def check_kind(name: str, value: object, kind: type[KindT], advice: str) -> KindT:
    """``value``, if it is of that class.

    Raises:
        TypeError: it is not; ends in the advice.
    """
    if not isinstance(value, kind):
        raise TypeError(f"expected {name} as a {kind.__name__}, got a {type(value).__name__}; {advice}")
    return value


def check_count(name: str, value: object, low: int, high: int) -> int:
    """``value`` as an int in [low, high].

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected an integer {name}, got {value!r}")
    if not low <= int(value) <= high:
        raise ValueError(f"expected {name} in [{low}, {high}], got {value}")
    return int(value)


def check_learning_rate(value: object) -> float:
    """A learning rate as a Python float: finite, at least 0.

    Raises:
        TypeError: not a real number.
        ValueError: negative, NaN or infinite.
    """
    return _finite_not_negative("lr", value)


def check_max_abs_g(value: object) -> float:
    """A bound of |g| rounded to fp32, once: the value that is used everywhere.

    Raises:
        TypeError: not a real number.
        ValueError: not a positive normal number of fp32.
    """
    return _positive_fp32("max_abs_g", value)


def check_eps(value: object) -> float:
    """eps rounded to fp32, once: the value that is used everywhere.

    Raises:
        TypeError: not a real number.
        ValueError: not a positive normal number of fp32.
    """
    return _positive_fp32("eps", value)


def check_weight_decay(value: object) -> float:
    """A weight decay as a Python float: finite, at least 0.

    Raises:
        TypeError: not a real number.
        ValueError: negative, NaN or infinite.
    """
    return _finite_not_negative("weight_decay", value)


def check_seed(value: object) -> int:
    """Any integer, taken mod 2^64.

    Raises:
        TypeError: not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected an integer seed, got {value!r}")
    return int(value) % 2**64


def check_bound(name: str, value: object) -> float:
    """A bound as a Python float: finite, above 0 and no subnormal number of fp32.

    Raises:
        TypeError: not a real number.
        ValueError: out of range.
    """
    bound = check_real(name, value)
    if not float(_FP32.tiny) <= bound < math.inf:
        raise ValueError(
            f"expected a finite {name} of at least {_FP32.tiny:.3g}, got {value}; None means no bound"
        )
    return bound


def check_real(name: str, value: object) -> float:
    """A real number as a Python float.

    Raises:
        TypeError: not one.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"expected a real number for {name}, got {value!r} ({type(value).__name__})"
            + ("; take its .item()" if hasattr(value, "item") else "")
        )
    return float(value)


def _finite_not_negative(name: str, value: object) -> float:
    number = check_real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"expected a finite {name} of at least 0, got {value}")
    return number


def _positive_fp32(name: str, value: object) -> float:
    number = check_real(name, value)
    if not float(_FP32.tiny) <= number <= float(_FP32.max):
        raise ValueError(f"expected {name} in [{_FP32.tiny:.3g}, {_FP32.max:.3g}], got {value}")
    return float(np.float32(number))
