"""A table of many models of transformers, each with a few thousand random weights, inputs and a loss."""

from __future__ import annotations

from support.many_architectures.decoders import DECODERS, MIXTURES, RECURRENT
from support.many_architectures.encoders import ENCODERS, SEQUENCES
from support.many_architectures.media import SERIES, SEVERAL, SOUND, VISION
from support.many_architectures.rows import ModelRow

ROWS = (
    *DECODERS,
    *MIXTURES,
    *RECURRENT,
    *ENCODERS,
    *SEQUENCES,
    *VISION,
    *SOUND,
    *SERIES,
    *SEVERAL,
)

__all__ = ["ROWS", "ModelRow"]
