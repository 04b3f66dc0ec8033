"""Warnings that point at the line of the user's own code."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_LIBRARIES = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (__file__, torch.__file__))


def warn_user(message: str) -> None:
    """A UserWarning at the innermost frame that is neither of this package nor of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
