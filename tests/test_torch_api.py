"""Every name that the packages take from torch stands in a list, and the installed torch has it.

The list is what a reader compares with the notes of other releases; a name outside it fails here first.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LISTED = (ROOT / "tests" / "support" / "torch_api.txt").read_text().split()


def chain(node: ast.AST) -> str | None:
    """ "torch.a.b" of nested attributes, None for what does not begin with a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := chain(node.value)) is not None:
        return f"{before}.{node.attr}"
    return None


def names_of(tree: ast.Module) -> set[str]:
    """Dotted names that begin with torch, and those imported from its modules."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            name = chain(node)
            if name is not None and name.startswith("torch."):
                found.add(name)
    return found


def has(name: str) -> bool:
    """Whether torch has it; what hangs on an operator of ours, or on a value, ends the search."""
    found: object = torch
    dotted = "torch"
    for part in name.split(".")[1:]:
        dotted += f".{part}"
        if dotted.startswith("torch.ops.fedkseed"):
            return True
        if not hasattr(found, part):
            try:
                importlib.import_module(dotted)
            except ImportError:
                return False
        found = getattr(found, part)
    return True


def test_the_list_is_what_is_used() -> None:
    files = [*(ROOT / "fedkseed_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
    used = set().union(*(names_of(ast.parse(path.read_text())) for path in files))
    assert sorted(used) == LISTED


@pytest.mark.parametrize("name", LISTED)
def test_the_installed_torch_has_it(name: str) -> None:
    assert has(name)


def test_a_name_that_torch_lacks_is_seen() -> None:
    assert not has("torch.library.no_such_function")
