"""The Python code of the pages of PAGES runs, block after block; the quickstart's settings file is one."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support import stand_ins
from support.ports import free_port

from fedkseed.scenarios.settings import values_of_file

DOCS = Path(__file__).parent.parent / "docs"
#: Pages whose Python blocks are one program, and how many they have.
PAGES = {"quickstart": 4, "optimizer": 8, "data": 1}
#: Pages with pieces of programs, or with programs that other tests run.
PIECES = ("ledger", "reproducibility", "embedding", "flower", "nvflare")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run(page: str) -> dict[str, Any]:
    """The names that a page's program leaves."""
    names: dict[str, Any] = {"__name__": page}
    for block in blocks(page, "python"):
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    return names


def test_every_page_with_code_is_named() -> None:
    counts = {path.stem: len(blocks(path.stem, "python")) for path in DOCS.glob("*.md")}
    assert {page: count for page, count in counts.items() if count and page not in PIECES} == PAGES


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = run("quickstart")["train_losses"]
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("error:.*:UserWarning:fedkseed")
def test_the_page_of_the_optimizers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed in a group of one, accelerate in one process; stand-ins for Lightning and peft."""
    monkeypatch.chdir(tmp_path)
    for name, module in stand_ins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    group = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for key, value in group.items():
        monkeypatch.setenv(key, str(value))
    names = run("optimizer")
    model, adapted, batches, loss_of = (names[name] for name in ("model", "adapted", "batches", "loss_of"))
    assert {name for name, weight in adapted.named_parameters() if weight.requires_grad} == {
        f"{layer}.lora_{part}.weight" for layer in (0, 2) for part in "AB"
    }
    assert adapted.get_parameter("0.lora_B.weight").any()
    assert len(names["trainer"].module.logged) == len(batches) // 4

    def mean_loss(tuned: Any) -> float:
        return sum(loss_of(tuned, batch).item() for batch in batches) / len(batches)

    assert mean_loss(model) < mean_loss(names["rebuilt"]) < mean_loss(names["w0"])
    assert mean_loss(adapted) < mean_loss(names["rebuilt"])  # the base that it began at


def test_the_settings_file_is_one(tmp_path: Path) -> None:
    (block,) = blocks("quickstart", "toml")
    (tmp_path / "run.toml").write_text(block)
    assert values_of_file(tmp_path / "run.toml")["sampling"] == "pro"
