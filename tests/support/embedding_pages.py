"""The files that a page shows: a line with a name in code marks and a colon, then a block."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
#: What stands for a page's file of model and data, so that it runs the federation of `embedding`.
TASK = "from support.embedding import CONFIG as config\nfrom support.embedding import make_task\n"


def files(page: str) -> dict[str, str]:
    """The texts of a page's files, by name."""
    text = (DOCS / f"{page}.md").read_text("utf-8")
    found = re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return dict(found)


def write(page: str, folder: Path, *, task: str) -> None:
    """Writes a page's files into a folder, and `TASK` as the one of that name."""
    for name, text in {**files(page), task: TASK}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
