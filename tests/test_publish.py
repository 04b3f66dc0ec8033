"""`fedkseed publish`: what the folder holds, that the model comes back from it, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from support.data_samples import save_model
from support.one_line import raised_line
from support.tiny_runs import dolly_rows, write_lines, write_llama

import fedkseed
from fedkseed import IdentityError, Ledger, LedgerError, ModelIdentity, SeedPool, cli
from fedkseed.data.asking import FILE as ASKING
from fedkseed.data.asking import AskingError
from fedkseed.data.built_in_models import BUILT_IN_MODELS, published_as
from fedkseed.data.models import ModelError, load_any_weights
from fedkseed.files import FolderNotEmptyError
from fedkseed.ledger import card
from fedkseed.ledger.card import CARD, card_text, check_card
from fedkseed.ledger.format import LedgerUnsignedError
from fedkseed.ledger.origin import FILE, Hashes, Origin, OriginError
from fedkseed.ledger.publish import license_of, write_published
from fedkseed.ledger.published import LEDGER, Published, PublishedError
from fedkseed.ledger.signature import make_key_pair
from fedkseed.scenarios.publishing import publish

Damage = Callable[[Path], object]


class Made(NamedTuple):
    """A run, its base, and what was published of it."""

    root: Path
    base: Path
    run: Path
    published: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run on a base and rows that are named by absolute paths."""
    root = tmp_path_factory.mktemp("maker")
    base, rows, run = root / "w0", root / "rows.jsonl", root / "run"
    write_llama(base, words=("number",))
    (base / CARD).write_text("---\nlicense: Apache-2.0\n---\n# A base\n")
    write_lines(rows, dolly_rows(48))
    flags = "--num-rounds 2 --num-local-steps 2 --num-seeds 64 --num-threads 1 --lr 1e-2 --device cpu"
    arguments = ["--model", str(base), "--data", str(rows), "--out", str(run), *flags.split()]
    assert cli.main(["simulate", *arguments]) == 0
    assert cli.main(["publish", str(run), str(root / "published")]) == 0
    return Made(root, base, run, root / "published")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.published, tmp_path / "copy"))


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def content(model: torch.nn.Module) -> str:
    return ModelIdentity.of(model).content.hex()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_model_of_the_folder_is_that_of_the_run(made: Made) -> None:
    assert names(made.published) == {CARD, FILE, LEDGER, ASKING}
    tuned = fedkseed.load(made.published, made.base)
    assert content(tuned) == summary(made.run)["content"]
    assert content(tuned) != content(load_any_weights(made.base))
    given = load_any_weights(made.base)
    assert fedkseed.load(made.published / LEDGER, given) is given
    assert content(given) == content(tuned)
    assert (made.published / LEDGER).read_bytes() == (made.run / LEDGER).read_bytes()


def test_the_folder_is_asked_as_the_run_is(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    outputs = []
    for arguments in ([made.run], [made.published, "--base", made.base]):
        command = ["ask", *map(str, arguments), "What is 5?", "--max-new-tokens", "4"]
        assert cli.main(command) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_apply_writes_the_model_of_the_folder(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["apply", str(made.published), "--base", str(made.base), "--out", str(tmp_path / "tuned")]
    assert cli.main(command) == 0
    assert summary(made.run)["content"] in capsys.readouterr().out
    assert (tmp_path / "tuned" / ASKING).read_bytes() == (made.run / ASKING).read_bytes()


def test_what_the_folder_says_is_what_the_run_was(made: Made) -> None:
    origin, run = Origin.read(made.published), summary(made.run)
    assert (origin.base, origin.source, origin.revision, origin.license) == (
        "w0",
        "folder",
        None,
        "apache-2.0",
    )
    assert (origin.data, origin.data_digest) == ("rows.jsonl", run["data"]["rows"])
    assert origin.facts["num_rounds"] == 2
    assert origin.facts["bytes_down"] == run["bytes"]["down"]
    assert origin.facts["bytes_up"] == run["bytes"]["up"]
    assert origin.facts["lr"] == run["settings"]["lr"]
    assert origin.facts["num_clients"] == 8
    assert origin.hashes is not None
    assert origin.hashes.base == content(load_any_weights(made.base))
    assert origin.hashes.tuned == run["content"]


def test_no_file_names_a_path_of_the_makers_machine(made: Made) -> None:
    for name in names(made.published):
        data = (made.published / name).read_bytes()
        assert str(made.root).encode() not in data, name
        assert made.root.parent.name.encode() not in data, name
        assert not re.search(rb"(?<![\w.:/])/(?:tmp|home|var|data)/", data), name


def test_the_card_is_read_by_the_hub_and_repeats_every_hash(made: Made) -> None:
    text = (made.published / CARD).read_text("utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "fedkseed"
    assert "base_model" not in front  # a folder of the maker's
    hashes = Origin.read(made.published).hashes
    assert hashes is not None
    for value in (hashes.base, hashes.tuned, *hashes.files.values(), Origin.read(made.published).sha256):
        assert text.count(value) == 1
    assert "`fedkseed.load`" in text


def test_the_front_matter_names_base_data_and_licence_as_the_hub_reads_them(made: Made) -> None:
    ledger = Ledger.load(made.run / LEDGER)
    hashes = Hashes("ab" * 32, "cd" * 32, {LEDGER: "ef" * 32})
    origin = Origin("owner/no", "hub", "v1", "mit", "hub:some/rows:en@v2", hashes=hashes)
    front = yaml.safe_load(card_text(origin, ledger).split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("owner/no", "finetune")
    assert front["datasets"] == ["some/rows"]
    for name in BUILT_IN_MODELS:
        text = card_text(Origin(name, "built-in", hashes=hashes), ledger)
        assert yaml.safe_load(text.split("---\n")[1])["base_model"] == published_as(name)[0]
        assert "| revision of the base | pinned by the package |" in text
    unknown = card_text(Origin("owner/name", hashes=hashes), ledger)
    assert "license" not in yaml.safe_load(unknown.split("---\n")[1])
    assert "licence of the base is not known" in unknown
    raised_line(OriginError, lambda: card_text(Origin("owner/name"), ledger))


def test_a_hostile_name_is_no_markup_and_no_row_of_the_card(made: Made) -> None:
    ledger = Ledger.load(made.run / LEDGER)
    hashes = Hashes("ab" * 32, "cd" * 32, {})
    evil = "a | b](x) <script> `" + "0" * 64 + "` |"
    origin = Origin("w0", "folder", data=evil, facts={"method": evil}, hashes=hashes)
    text = card_text(origin, ledger)
    assert "<script>" not in text.replace("\\<script", "")
    check_card(text, origin, "the card")
    assert len(card._ROW.findall(text)) == 3


def test_a_fact_says_what_it_is(made: Made) -> None:
    text = (made.published / CARD).read_text("utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    assert rows["rounds"] == "2"
    assert rows["bytes sent to clients, in all"] == f"{summary(made.run)['bytes']['down']:,}"
    assert rows["learning rate"] == "0.01"
    assert rows["versions"] == "ledger format 1, noise contract 1"
    assert rows["noise"].startswith("rademacher, K = 64 candidate seeds")


@pytest.mark.parametrize("name", [FILE, LEDGER, ASKING])
def test_any_byte_changed_in_a_file_is_refused(name: str, copy: Path, made: Made) -> None:
    path = copy / name
    whole = path.read_bytes()
    positions = {0, len(whole) - 1, *np.random.default_rng(1).choice(len(whole), 120).tolist()}
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        raised_line((LedgerError, AskingError), lambda: Published.read(copy))
    for other in (whole + b"\n", whole[:-1], b""):
        path.write_bytes(other)
        raised_line((LedgerError, AskingError), lambda: Published.read(copy))
    path.write_bytes(whole)
    assert content(fedkseed.load(copy, made.base)) == summary(made.run)["content"]


def test_any_digit_changed_in_a_hash_of_the_card_is_refused(copy: Path) -> None:
    path = copy / CARD
    text = path.read_text("utf-8")
    spans = [match.span(2) for match in card._ROW.finditer(text)]
    assert len(spans) == 5
    for start, end in spans:
        for position in range(start, end, 7):
            digit = "0" if text[position] != "0" else "1"
            path.write_text(text[:position] + digit + text[position + 1 :], "utf-8")
            raised_line(OriginError, lambda: Published.read(copy))
        row = text[text.rindex("\n", 0, start) + 1 : text.index("\n", end) + 1]
        for other in (text.replace(row, ""), text + row):
            path.write_text(other, "utf-8")
            raised_line(OriginError, lambda: Published.read(copy))
    path.write_text(text + "\nWords of its owner.\n", "utf-8")
    Published.read(copy)


def retuned(folder: Path, **changes: str) -> None:
    """Writes origin and card anew with other hashes, as a careless or a lying maker would."""
    origin = Origin.read(folder)
    assert origin.hashes is not None
    values = {"base": origin.hashes.base, "tuned": origin.hashes.tuned, **changes}
    files = {**origin.hashes.files}
    other = Origin(**{**origin.__dict__, "hashes": Hashes(files=files, **values)})
    other.write(folder)
    (folder / CARD).write_text(card_text(other, Ledger.load(folder / LEDGER)), "utf-8")


def test_a_card_of_another_tuned_model_is_refused_when_it_is_tuned(copy: Path, made: Made) -> None:
    retuned(copy, tuned="ab" * 32)
    text = raised_line(PublishedError, lambda: fedkseed.load(copy, made.base))
    assert "tuned model of content abababab" in text
    retuned(copy, base="ab" * 32)
    assert "base's content" in raised_line(PublishedError, lambda: fedkseed.load(copy, made.base))


def test_another_base_is_refused_with_what_the_card_names(
    copy: Path, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_any_weights(made.base)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    before = content(model)
    text = raised_line(IdentityError, lambda: fedkseed.load(copy, model))
    assert "names the base w0" in text
    assert content(model) == before
    model.save_pretrained(tmp_path / "other")
    shutil.copy(made.base / "tokenizer.json", tmp_path / "other")
    shutil.copy(made.base / "tokenizer_config.json", tmp_path / "other")
    capsys.readouterr()
    assert cli.main(["ask", str(copy), "x", "--base", str(tmp_path / "other")]) == 2
    assert "names the base w0" in capsys.readouterr().err


def test_a_base_that_was_a_folder_has_to_be_given(made: Made) -> None:
    text = raised_line(PublishedError, lambda: fedkseed.load(made.published))
    assert "folder called w0" in text
    text = raised_line(PublishedError, lambda: fedkseed.load(made.run / LEDGER))
    assert "base=" in text


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        *map(remove, (CARD, FILE, LEDGER, ASKING)),
        lambda folder: (folder / CARD).write_bytes(b"\xff" * 100),
        lambda folder: (folder / CARD).write_bytes(b"x" * (1 << 19)),
        lambda folder: (folder / FILE).write_text("[" * (1 << 17)),
        lambda folder: (
            (folder / "adapter").mkdir() or (folder / "adapter/adapter_config.json").write_text("{}")
        ),
        lambda folder: [remove(ASKING)(folder), (folder / ASKING).mkdir()],
        lambda folder: Origin("w0", "folder").write(folder),
    ],
)
def test_a_folder_that_is_not_whole_is_one_line(damage: Damage, copy: Path, made: Made) -> None:
    damage(copy)
    raised_line((LedgerError, AskingError), lambda: fedkseed.load(copy, made.base))


def test_a_folder_without_a_card_is_told_how_to_get_one(made: Made, tmp_path: Path) -> None:
    assert "fedkseed publish" in raised_line(PublishedError, lambda: fedkseed.load(made.run, made.base))
    assert "README.md" in raised_line(PublishedError, lambda: fedkseed.load(tmp_path, made.base))


def test_a_name_of_a_file_elsewhere_is_not_opened(copy: Path, tmp_path: Path) -> None:
    found = json.loads((copy / FILE).read_text())
    found["hashes"]["files"]["../outside"] = "ab" * 32
    origin = Origin.from_json(json.dumps(found))
    origin.write(copy)
    (copy / CARD).write_text(card_text(origin, Ledger.load(copy / LEDGER)))
    (tmp_path / "outside").write_text("x")
    text = raised_line(PublishedError, lambda: Published.read(copy))
    assert "no such file" in text


def test_a_signature_is_made_and_asked_for(made: Made, tmp_path: Path) -> None:
    make_key_pair(tmp_path / "private.pem", tmp_path / "public.pem")
    command = ["publish", str(made.run), str(tmp_path / "signed"), "--base", str(made.base)]
    assert cli.main([*command, "--key", str(tmp_path / "private.pem")]) == 0
    signed = fedkseed.load(tmp_path / "signed", made.base, public_key=tmp_path / "public.pem")
    assert content(signed) == summary(made.run)["content"]
    assert "is signed (Ed25519)" in (tmp_path / "signed" / CARD).read_text()
    with pytest.raises(LedgerUnsignedError):
        fedkseed.load(made.published, made.base, public_key=tmp_path / "public.pem")


def test_the_best_round_and_a_licence_of_its_own(made: Made, tmp_path: Path) -> None:
    written = publish(made.run, tmp_path / "best", best=True, license="mit")
    assert written.published.ledger == Ledger.load(made.run / "best.safetensors")
    assert written.published.origin.license == "mit"
    assert written.num_bytes == sum(path.stat().st_size for path in (tmp_path / "best").iterdir())
    assert written.num_bytes < 20_000


def test_a_trainers_folder_is_published_too(made: Made, tmp_path: Path) -> None:
    """A ledger and its origin are enough: no run, no template."""
    w0 = load_any_weights(made.base)
    ledger = Ledger.of(w0, SeedPool(1, 4), np.full(4, 1e-2))
    trained = tmp_path / "trained"
    trained.mkdir()
    ledger.save(trained / LEDGER)
    Origin.of(made.base, data="hub:owner/rows@v1", facts={"num_steps": 40}).write(trained)
    assert "--base" in raised_line(PublishedError, lambda: publish(trained, tmp_path / "out"))
    publish(trained, tmp_path / "out", base=made.base)
    assert names(tmp_path / "out") == {CARD, FILE, LEDGER}
    ledger.apply_(w0)
    assert content(fedkseed.load(tmp_path / "out", made.base)) == content(w0)
    again = publish(tmp_path / "out", tmp_path / "again", base=made.base)  # a published one is one, too
    assert again.published.origin == Origin.read(tmp_path / "out")
    assert "steps" in (tmp_path / "out" / CARD).read_text()


@pytest.mark.parametrize(
    ("break_run", "error"),
    [
        (lambda run: (run / LEDGER).unlink(), PublishedError),
        (lambda run: (run / "settings.json").unlink(), PublishedError),
        (lambda run: (run / "settings.json").write_text('{"model": 5}'), ValueError),
        (lambda run: (run / "settings.json").write_text("[]"), ValueError),
        (lambda run: (run / "settings.json").write_text('{"model": "/absent/w0"}'), ModelError),
        (lambda run: (run / "summary.json").write_text("[]"), ValueError),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), ValueError),
        (lambda run: (run / ASKING).write_text("{}"), AskingError),
        (lambda run: swap_content(run), PublishedError),
        (lambda run: Ledger.load(run / LEDGER).save(run / "x") or strip_notes(run), PublishedError),
    ],
)
def test_a_run_that_cannot_be_published_is_one_line_and_leaves_nothing(
    break_run: Damage, error: type[Exception], made: Made, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run", ignore=shutil.ignore_patterns("*.png")))
    break_run(run)
    raised_line(error, lambda: publish(run, tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def swap_content(run: Path) -> None:
    found = summary(run)
    found["content"] = "ab" * 32
    (run / "summary.json").write_text(json.dumps(found))


def strip_notes(run: Path) -> None:
    ledger = Ledger.load(run / LEDGER)
    Ledger(ledger.base_seed, ledger.coefficients, ledger.identity, family=ledger.family).save(run / LEDGER)


def test_publishing_onto_something_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("x")
    with pytest.raises(FolderNotEmptyError):
        publish(made.run, tmp_path / "out")
    with pytest.raises(PublishedError, match="--best"):
        publish(made.published, tmp_path / "other", best=True, base=made.base)
    with pytest.raises(PublishedError, match="nothing there"):
        publish(tmp_path / "absent", tmp_path / "other")


def test_an_interrupt_half_way_leaves_nothing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> str:
        assert any(tmp_path.glob(".out.*/origin.json"))
        raise KeyboardInterrupt

    monkeypatch.setattr("fedkseed.ledger.publish.card_text", stop)
    with pytest.raises(KeyboardInterrupt):
        publish(made.run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_published_without_a_summary(made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    (run / "summary.json").unlink()
    origin = publish(run, tmp_path / "out").published.origin
    assert origin.data_digest is None
    assert origin.hashes is not None
    assert origin.hashes.tuned == summary(made.run)["content"]


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: MIT\n---\n", "mit"),
        ('---\ntags:\n- x\nlicense: "llama3.1"\n---\ntext', "llama3.1"),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_of_a_base_is_the_one_that_its_card_names(
    text: str, license: str | None, tmp_path: Path
) -> None:
    (tmp_path / CARD).write_text(text)
    assert license_of(tmp_path, tmp_path) == license
    (tmp_path / CARD).write_bytes(b"\xff")
    assert license_of(tmp_path, tmp_path) is None
    assert license_of("minilm", tmp_path) == "apache-2.0"


def test_inspect_says_what_the_card_says(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["inspect", str(made.published)]) == 0
    output = capsys.readouterr().out
    for text in ("w0 (folder)", "apache-2.0", "rows.jsonl", "num_rounds 2", summary(made.run)["content"]):
        assert text in output


def test_a_tuned_parameter_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    save_model(tmp_path / "other")
    ledger = Ledger.load(made.run / LEDGER)
    text = raised_line(
        IdentityError,
        lambda: write_published(ledger, Origin("other", "folder"), tmp_path / "out", tmp_path / "other"),
    )
    assert "the base was loaded from" in text
    assert not (tmp_path / "out").exists()
