"""What a user writes to embed a federation, and what an adapter is, stay as small as the pages say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support.embedding_pages import DOCS, files

ROOT = Path(__file__).parent.parent
ADAPTERS = ROOT / "python" / "fedkseed" / "adapters"
#: Most lines of the files of one program, those that its page shows and others, but for model and data.
LIMITS = {
    ("flower", "my_federation.py", "apps/flower-fedkseed/pyproject.toml"): 25,
    ("nvflare", "my_federation/job.py"): 20,
    ("embedding", "pipe_client.py", "pipe_server.py"): 15,
    ("embedding", "http_client.py", "http_server.py"): 30,
}
MODEL_AND_DATA = {("embedding", "my_task.py")}
FRAMEWORKS = {"flwr", "nvflare", "ray"}


def num_lines(page: str, *names: str) -> int:
    """Lines that are not blank."""
    shown = files(page)
    texts = [shown[name] if name in shown else (ROOT / name).read_text("utf-8") for name in names]
    return sum(bool(line.strip()) for text in texts for line in text.splitlines())


@pytest.mark.parametrize("program", LIMITS, ids="/".join)
def test_a_user_writes_few_lines(program: tuple[str, ...]) -> None:
    page, *names = program
    assert 1 <= num_lines(page, *names) <= LIMITS[program]


def test_every_file_of_these_pages_is_counted() -> None:
    counted = {(page, name) for page, *names in LIMITS for name in names} | MODEL_AND_DATA
    assert {(page, name) for page in {page for page, *_ in LIMITS} for name in files(page)} <= counted


def test_the_pages_state_the_limits() -> None:
    page = (DOCS / "embedding.md").read_text("utf-8")
    assert "\n## In 30 lines\n" in page
    assert "\n## Through pipes, in 15\n" in page


def test_an_adapter_is_at_most_150_lines() -> None:
    sizes = {path.name: len(path.read_text("utf-8").splitlines()) for path in ADAPTERS.rglob("*.py")}
    assert "nvflare.py" in sizes
    assert {name: size for name, size in sizes.items() if size > 150} == {}


def test_only_adapters_import_a_framework() -> None:
    found = set()
    for path in (ROOT / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] in FRAMEWORKS for name in names):
                found.add(path)
    assert found
    assert all(path.is_relative_to(ADAPTERS) for path in found)
