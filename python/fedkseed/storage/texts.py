"""Storage modes as states and run folders hold them: their repr, read back without evaluating it."""

from __future__ import annotations

import ast
from typing import Any

import torch

from fedkseed.storage.inplace import Inplace
from fedkseed.storage.interface import StorageOptions
from fedkseed.storage.streamed import Streamed

_KINDS = {"Inplace": Inplace, "Streamed": Streamed}
#: More than any mode takes, and less than the parser could come to harm with.
_MAX_LENGTH = 300


def mode_of_text(text: object) -> StorageOptions:
    """The mode whose repr this is; fields that it does not name have their defaults.

    Raises:
        ValueError: not the repr of a mode.
    """
    try:
        if not isinstance(text, str) or len(text) > _MAX_LENGTH:
            raise ValueError(f"got {type(text).__name__}")
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not a call with fields by name")
        fields = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
        if len(fields) < len(call.keywords):
            raise ValueError("a field twice")
        mode: StorageOptions = _KINDS[call.func.id](**fields)
        return mode
    except (ValueError, TypeError, SyntaxError, KeyError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"expected the text of a storage mode, {' or '.join(_KINDS)} with its fields, got {text!r:.100}"
        ) from error


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if ast.unparse(node) == str(torch.float32):
        return torch.float32
    raise ValueError(ast.unparse(node))
