"""Files of 0.1 (`data/written_by_0_1/`) are read with every field, and written anew to the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.small_model import same_bytes

from fedkseed import ZOSGD, Broadcast, Ledger, LedgerError, ModelIdentity, Reply, Server, load
from fedkseed.federation.state import derived_run_id
from fedkseed.scenarios import autocast
from fedkseed.scenarios.settings import OLD_NAMES, OPTIONS, RunSettings, checked_values
from fedkseed.simulation.run_folder import CLIENTS, LEDGER, METRICS

FOLDER = Path(__file__).parent / "data" / "written_by_0_1"
FIELDS: dict[str, dict[str, Any]] = json.loads((FOLDER / "fields.json").read_text())
STATE = "server.state"


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("written_by_0_1", FOLDER / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write = _writer()


def test_all_files_are_here() -> None:
    for room in ("ledgers", "messages", "servers"):
        assert {path.name for path in (FOLDER / room).iterdir()} == set(FIELDS[room]), room
    assert {path.stem for path in (FOLDER / "optimizers").iterdir()} == set(write.OPTIMIZERS)


@pytest.mark.parametrize("name", FIELDS["ledgers"])
def test_ledgers(name: str, tmp_path: Path) -> None:
    path = FOLDER / "ledgers" / name
    ledger = Ledger.load(path)
    assert write.ledger_fields(ledger) == FIELDS["ledgers"][name]
    ledger.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == path.read_bytes()
    assert write.ledgers()[name].to_bytes() == path.read_bytes()
    if "signed" in name:
        key = bytes.fromhex(FIELDS["ledgers"][name]["signature"][0])
        assert Ledger.load(path, public_key=key) == ledger
        with pytest.raises(LedgerError, match="expected a ledger signed by"):
            Ledger.load(path, public_key=bytes(range(32)))


@pytest.mark.parametrize("name", FIELDS["messages"])
def test_messages(name: str) -> None:
    data = (FOLDER / "messages" / name).read_bytes()
    kind = Broadcast if name.endswith(".broadcast") else Reply
    message = kind.from_bytes(data)
    assert write.message_fields(message) == FIELDS["messages"][name]
    assert message.to_bytes() == data
    assert write.messages()[name].to_bytes() == data


@pytest.mark.parametrize("name", FIELDS["servers"])
def test_server_states(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums, who is invited, and the open round's messages; also of a server made anew."""
    saved = (FOLDER / "servers" / name / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(saved)
    with Server.resume(tmp_path, write.IDENTITY, write.POOL, write.server_config(name)) as server:
        fields = write.server_fields(server)
        since = {"pro_clip": 1000.0, "pro_start": 0.0, "median_clip": 0.0, "share_cap": 0.0}
        found = {setting: fields["config"].pop(setting) for setting in since}
        assert found == {setting: write.plain(value) for setting, value in since.items()}
        assert fields == FIELDS["servers"][name]
        (tmp_path / STATE).unlink()
        server.save(tmp_path)
    assert (tmp_path / STATE).read_bytes() == saved
    (tmp_path / "anew").mkdir()
    # Without a run id 0.1 took the one that derives from the configuration.
    config = write.server_config(name)
    derived = dataclasses.replace(config, run_id=derived_run_id(write.IDENTITY, write.POOL, config))
    monkeypatch.setattr(write, "server_config", lambda _: derived)
    with write.server_after_three_rounds(name) as server:
        server.save(tmp_path / "anew")
    assert (tmp_path / "anew" / STATE).read_bytes() == saved


def equal(left: Any, right: Any) -> bool:
    """Equality of states: bit for bit, and of the same types."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and same_bytes([left], [right])
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


@pytest.fixture
def _nothing_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight decay as 0.1 had it: what the rounding of alpha leaves out is lost."""

    def note(optimizer: ZOSGD, *arguments: Any) -> None:
        whole_note(optimizer, *arguments)
        optimizer._carried_decay = [0.0] * len(optimizer.param_groups)

    whole_note = ZOSGD._note
    monkeypatch.setattr(ZOSGD, "_note", note)


def state_of(optimizer: Any) -> dict[str, Any]:
    """The content of a state that 0.1 had too."""
    state: dict[str, Any] = optimizer.state_dict()
    assert set(state["fedkseed"].pop("carried_decay", [0.0])) == {0.0}
    return state


@pytest.mark.usefixtures("_nothing_carried")
@pytest.mark.parametrize("is_auto", [False, True])
@pytest.mark.parametrize("name", write.OPTIMIZERS)
def test_optimizer_states(name: str, is_auto: bool) -> None:
    """The state loads, is saved anew with the same content, and goes on to the bits that 0.1 came to.

    But for decay that alpha's rounding lost there, and that arrives since. An optimizer made with
    "auto" takes the state's storage mode.
    """
    content = torch.load(FOLDER / "optimizers" / f"{name}.pt", weights_only=True)
    model = write.make_model()
    make = write.make_zosgd if name.startswith("zosgd") else write.make_fedkseed
    optimizer = make(model, "auto") if is_auto else write.OPTIMIZERS[name](model)
    with torch.no_grad():
        for weight, saved in zip(model.parameters(), content["weights"], strict=True):
            weight.copy_(saved)
    optimizer.load_state_dict(content["state"])
    assert equal(state_of(optimizer), content["state"])
    write.walk(model, optimizer, write.STEPS_BEFORE, write.STEPS_AFTER)
    assert equal(state_of(optimizer), content["later_state"])
    assert same_bytes(write.weights_of(model), content["later_weights"])
    assert not same_bytes(content["weights"], content["later_weights"])
    anew = write.optimizer_file(name)
    for state in (anew["state"], anew["later_state"]):
        state["fedkseed"].pop("carried_decay", None)
    assert equal(anew, content)


def test_a_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """One that 0.1 stopped after two rounds, and one made anew, end as the one that 0.1 ran whole."""
    whole = FOLDER / "run-of-4-rounds"
    shutil.copytree(FOLDER / "run-of-2-rounds", tmp_path / "resumed")
    (tmp_path / "anew").mkdir()
    write.run_line(tmp_path / "resumed", 4, resume=True)
    write.run_line(tmp_path / "anew", 4)
    for folder in ("resumed", "anew"):
        for name in (STATE, LEDGER, METRICS, CLIENTS):
            assert (tmp_path / folder / name).read_bytes() == (whole / name).read_bytes(), (folder, name)
        lines = (tmp_path / folder / "timings.jsonl").read_text().splitlines()
        assert [json.loads(line).keys() for line in lines] == [
            json.loads(line).keys() for line in (whole / "timings.jsonl").read_text().splitlines()
        ]


def test_the_folder_of_simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed with no round left: the summary is written anew; what the rounds left stays as it was."""
    old = FOLDER / "simulate"
    for name in ("base", "simulate"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    given = json.loads((old / "settings.json").read_text())
    # Version 0.1 knew no autocast; "auto" would be another on some processors.
    kept = {"autocast": "off", **checked_values(given, OPTIONS, "settings.json")}
    settings = RunSettings.of(kept, num_clients=3).values()
    renamed = {OLD_NAMES.get(name, name): value for name, value in given.items()}
    assert {name: settings[name] for name in renamed} == {
        **renamed,
        "num_threads": given["threads"] or torch.get_num_threads(),
        "eps": settings["eps"],
    }
    assert settings["eps"] == pytest.approx(given["eps"])
    monkeypatch.chdir(tmp_path)
    assert write.simulate("--resume", "simulate") == 0
    for path in old.iterdir():
        if path.name not in ("summary.json", CLIENTS):  # what it trains on is noted when it is resumed
            assert (tmp_path / "simulate" / path.name).read_bytes() == path.read_bytes(), path.name
    summary, before = (
        json.loads((at / "simulate" / "summary.json").read_text()) for at in (tmp_path, FOLDER)
    )
    assert summary.keys() >= before.keys()
    assert summary["settings"] == settings
    for name in ("threads", "model", "bytes"):
        assert summary[name] == before[name], name
    assert {row: scores.keys() for row, scores in summary["scores"].items()} == {
        row: scores.keys() for row, scores in before["scores"].items()
    }
    assert summary["content"] == before["content"]
    model = load(old / LEDGER, FOLDER / "base")
    assert ModelIdentity.of(model).content.hex() == before["content"]


def test_a_folder_of_simulate_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two of four rounds of 0.1; to the bytes of a whole run of 0.1 where losses have its bits.

    Processors may part in any round; what was resumed and what was run anew are of the same one.
    """
    killed, whole = FOLDER / "simulate-killed", FOLDER / "simulate-whole"
    for name in ("resumed", "anew"):
        shutil.copytree(killed, tmp_path / name)
    shutil.copytree(FOLDER / "base", tmp_path / "base")
    for name in (STATE, LEDGER, METRICS, CLIENTS):
        (tmp_path / "anew" / name).unlink()
    (tmp_path / "anew" / "timings.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    for name in ("resumed", "anew"):
        assert write.simulate("--resume", name) == 0
    before = (killed / METRICS).read_bytes()
    assert (tmp_path / "resumed" / METRICS).read_bytes().startswith(before)
    assert Ledger.load(tmp_path / "resumed" / LEDGER).notes == {"num_rounds": "4"}
    anew = (tmp_path / "anew" / METRICS).read_bytes()
    rounds = [
        [json.loads(line) for line in metrics.splitlines()]
        for metrics in (anew, (whole / METRICS).read_bytes())
    ]
    for new, old in zip(*rounds, strict=True):
        for losses in ("train_loss", "evaluation"):
            assert new.pop(losses) == pytest.approx(old.pop(losses), rel=1e-6)
        assert new == old
    if anew.startswith(before):
        assert (tmp_path / "resumed" / METRICS).read_bytes() == anew
    if anew == (whole / METRICS).read_bytes():
        for path in whole.iterdir():
            assert (tmp_path / "resumed" / path.name).read_bytes() == path.read_bytes(), path.name


def test_golden_vectors_are_those_of_before() -> None:
    files = resources.files("fedkseed_kernels.conformance.golden")
    for name, wanted in json.loads((FOLDER / "golden.json").read_text()).items():
        assert hashlib.sha256(files.joinpath(name).read_bytes()).hexdigest() == wanted, name


@pytest.mark.parametrize("package", ["fedkseed", "fedkseed_kernels"])
def test_public_names_stay(package: str) -> None:
    before = json.loads((FOLDER / "names.json").read_text())[package]
    module = importlib.import_module(package)
    assert set(before) <= set(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name), name


def test_forward_passes_of_a_run_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a new run would have them in bfloat16."""
    for name in ("base", "simulate"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    monkeypatch.setattr(autocast, "has_amx", lambda: True)
    assert RunSettings.of({"device": "cpu"}, num_clients=16).autocast == "bfloat16"
    monkeypatch.chdir(tmp_path)
    assert write.simulate("--resume", "simulate", "--device", "cpu") == 0
    assert json.loads((tmp_path / "simulate" / "summary.json").read_text())["settings"]["autocast"] == "off"
