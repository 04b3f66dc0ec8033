"""The Python code of the pages of PAGES runs, block after block; the quickstart's settings file is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from peft import PeftModel
from support import data_samples
from support.ports import free_port

from fedkseed import ModelIdentity
from fedkseed.scenarios.settings import values_of_file

DOCS = Path(__file__).parent.parent / "docs"
#: Pages whose Python blocks are one program, and how many they have.
PAGES = {"quickstart": 4, "optimizer": 8, "data": 1, "publishing": 3, "transformers": 4}
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
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning", "ignore::FutureWarning:lightning")
def test_the_page_of_the_optimizers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed in a group of one, accelerate in one process."""
    monkeypatch.chdir(tmp_path)
    group = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for key, value in group.items():
        monkeypatch.setenv(key, str(value))
    names = run("optimizer")
    model, adapted, batches, loss_of = (names[name] for name in ("model", "adapted", "batches", "loss_of"))
    tuned = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    prefix = "base_model.model"
    assert tuned == {f"{prefix}.{layer}.lora_{part}.default.weight" for layer in (0, 2) for part in "AB"}
    assert adapted.get_parameter(f"{prefix}.0.lora_B.default.weight").any()
    assert names["trainer"].global_step == len(batches) // 4

    def mean_loss(tuned: Any) -> float:
        return sum(loss_of(tuned, batch).item() for batch in batches) / len(batches)

    assert mean_loss(model) < mean_loss(names["rebuilt"]) < mean_loss(names["w0"])
    assert mean_loss(adapted) < mean_loss(names["rebuilt"])  # the base that it began at


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # TRL's own
def test_the_page_of_trainers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model of the same architecture and a tokenizer of characters stand for the hub's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data_samples.save_model(tmp_path / "base")
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        load = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda _, load=load: load(tmp_path / "base"))
    load_tokenizer = transformers.AutoTokenizer.from_pretrained

    def with_padding(name: str) -> Any:
        tokenizer = load_tokenizer(name)
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", with_padding)
    names = run("transformers")
    assert (tmp_path / "run" / "checkpoint-8" / "optimizer.pt").is_file()
    walked, rebuilt = names["trainer"].model, names["rebuilt"]
    start = transformers.AutoModelForCausalLM.from_pretrained("")
    assert ModelIdentity.of(rebuilt).content != ModelIdentity.of(start).content
    for left, right in zip(walked.parameters(), rebuilt.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
    tuned = {name for name, weight in names["adapted"].named_parameters() if weight.requires_grad}
    assert tuned
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in tuned)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_page_of_publishing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is pushed: the hub's two calls are noted."""
    monkeypatch.chdir(tmp_path)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **call: calls.append(call))
    names = run("publishing")
    assert calls == [{"repo_id": "you/tuned", "folder_path": "published"}]
    assert isinstance(names["tuned"], PeftModel)
    assert not list(Path("published-lora").rglob("adapter_start*"))


def test_the_settings_file_is_one(tmp_path: Path) -> None:
    (block,) = blocks("quickstart", "toml")
    (tmp_path / "run.toml").write_text(block)
    assert values_of_file(tmp_path / "run.toml")["sampling"] == "pro"
