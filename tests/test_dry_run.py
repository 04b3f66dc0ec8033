"""`fedkseed scenarios run --dry-run`: clients, bytes, memory and time, foreseen without a model or a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.messages import POOL, make_reply, make_server
from support.tiny_runs import dolly_rows, write_lines, write_llama

from fedkseed import cli
from fedkseed.data.federated import Row
from fedkseed.data.models import ModelError
from fedkseed.data.shapes import shapes_of_config
from fedkseed.federation.messages import broadcast_bytes, reply_bytes
from fedkseed.scenarios.experiments import dry_run
from fedkseed.scenarios.experiments.scenario import Scenario, library
from fedkseed.scenarios.launch import with_data

#: Rates with which times can be told by hand: a second for each giga of everything.
RATES = dry_run.Rates(products=1e9, perturbed=1e9, rebuilt=1e9)
#: Parameters of the two models of the paper, and numbers of their adapters of rank 8.
PARAMETERS = {"1.3b": 1_345_423_360, "3b": 3_426_473_600}
ADAPTERS = {"1.3b": 7_495_680, "3b": 12_712_960}


def dolly_clients(path: Path, name: str) -> list[tuple[Row, ...]]:
    """The training rows of each client."""
    data = with_data(Scenario.read(library()[name]).changed({"data": str(path)}).runs()[0].values)[1]
    assert data is not None
    return [client.train for client in data.clients]


@pytest.fixture
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "measured_rates", lambda *_: RATES)


@pytest.mark.usefixtures("fixed_rates")
@pytest.mark.parametrize("size", PARAMETERS)
def test_a_scenario_of_the_paper_is_foreseen_without_its_model(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "dolly.jsonl", dolly_rows(5000))
    arguments = ["scenarios", "run", f"paper-{size}-dolly-5.0", "--data", str(tmp_path / "dolly.jsonl")]
    assert cli.main([*arguments, "--dry-run", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert not (tmp_path / "out").exists()
    rows = sorted(map(len, dolly_clients(tmp_path / "dolly.jsonl", f"paper-{size}-dolly-5.0")))
    clients = (
        f"200 clients, 10 a round; training rows of a client: {rows[0]} at least, "
        f"{(rows[99] + rows[100]) / 2:g} the median, {rows[-1]} at most"
    )
    head, *blocks, total = capsys.readouterr().out.strip().split("\n\n")
    assert head.endswith("5 runs; nothing is run now; a block is one run, of seed 42")
    assert [block.split()[0] for block in blocks] == ["fedkseed", "pro", "fedavg", "fedit", "fedzo"]
    weights = {name: PARAMETERS[size] * size_of for name, size_of in (("fedavg", 4), ("fedzo", 2))}
    bytes_of = {"fedit": 4 * ADAPTERS[size], **weights}
    exchanged = 60 * 10 * (2 * (16_916 + 860) + 2 * sum(bytes_of.values()))
    assert total.startswith("In all, 5 runs one after the other: about ")
    assert total.endswith(f"; {exchanged:,} bytes between server and clients")
    in_all = sum(seconds(block, "about") for block in blocks)
    assert seconds(total, "about") == pytest.approx(in_all, rel=0.02)
    for block in blocks:
        name = block.split()[0]
        down, up = (16_916, 860) if name in ("fedkseed", "pro") else (bytes_of[name],) * 2
        assert f"bytes of a client and round: {down:,} down and {up:,} up" in block
        assert ("up, without the header of a file" in block) == (name in bytes_of)
        assert ("Files of a round on the disk: " in block) == (name in bytes_of)
        assert clients in block
        assert "scored rows: 0 of the clients, 625 of 1 unseen ones" in block
        assert f"{PARAMETERS[size]:,} parameters" in block
        assert "LlamaForCausalLM, by the scenario's [shape]" in block
        assert "Memory planned on cpu: " in block
        assert "an estimate by arithmetic" in block
        assert "tokens by 4 characters each" in block
        # As a run plans it: no w0 of methods that rebuild nothing, gradients of those that take them.
        assert (", w0 " in block) == (name in ("fedkseed", "pro"))
        assert ("Not planned: what a backward pass keeps" in block) == (name in ("fedavg", "fedit"))
        sizes = {"fedavg": f"{bytes_of['fedavg'] / 1e9:.2f} GB", "fedit": f"{bytes_of['fedit'] / 1e6:.0f} MB"}
        found = re.search(r"gradients ([\d.]+ [MG]B)", block)
        assert (found[1] if found else None) == sizes.get(name)
        assert ("rebuilding" in block) == (name in ("fedkseed", "pro"))
        tokens = float(re.search(r"row\(s\) of ([\d,]+) tokens", block)[1])  # type: ignore[index]
        # No client holds rows out: the unseen category is scored in each of 60 rounds, and twice more.
        scored = 62 * 625 * 2 * PARAMETERS[size] * tokens / RATES.products
        assert seconds(block, "losses of scored rows") == pytest.approx(scored, rel=0.02)
        # 60 rounds of 10 clients with 200 steps of two passes.
        assert ("240,000 forward passes of 1 row(s)" in block) == (name in ("fedkseed", "pro", "fedzo"))


def test_times_follow_from_counts_and_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the time by hand: 2 operations a weight and token, 3 draws a step, K a rebuild."""
    monkeypatch.setattr(dry_run, "measured_rates", lambda *_: dry_run.Rates(1e6, 1e3, 1e5))
    write_llama(tmp_path / "llama")
    write_lines(tmp_path / "rows.jsonl", dolly_rows(60))
    (tmp_path / "tiny.toml").write_text(
        f'title = "Tiny"\n[settings]\ndata = "{tmp_path}/rows.jsonl"\nmodel = "{tmp_path}/llama"\n'
        "num_rounds = 3\nclients_per_round = 2\nnum_local_steps = 5\nbatch_size = 4\nnum_seeds = 16\n"
        'partition = "iid:4"\nround_rows = 1\nfinal_rows = 1\nautocast = "off"\nnum_threads = 1\n'
        '[variants.fedkseed]\n[variants.central]\nmethod = "zeroth-order"\ndirections = 4\n'
        '[variants.adamw]\nmethod = "first-order"\n'
    )
    text = "\n".join(dry_run.describe(Scenario.read(tmp_path / "tiny.toml")))
    found = re.search(r"([\d,]+) parameters", text)
    tokens = re.search(r"row\(s\) of ([\d,]+) tokens", text)
    assert found
    assert tokens
    numel, tokens_of_row = int(found[1].replace(",", "")), int(tokens[1])
    times = [line for line in text.splitlines() if "Time on cpu" in line]
    assert len(times) == 3
    steps = 3 * 2 * 5
    for line, passes, draws, rebuilds in zip(
        times, (2 * steps, 8 * steps, 3 * steps), (3 * steps, 12 * steps, 0), (3 * 16, 0, 0), strict=True
    ):
        assert seconds(line, "local steps") == pytest.approx(
            passes * 4 * 2 * numel * tokens_of_row / 1e6, rel=0.02
        )
        assert seconds(line, "noise of the steps") == pytest.approx(draws * numel / 1e3, rel=0.01)
        assert seconds(line, "rebuilding") == pytest.approx(rebuilds * numel / 1e5, rel=0.01)
        # Four clients hold rows out: one each, in three rounds and twice on all.
        assert seconds(line, "losses of scored rows") == pytest.approx(
            (3 * 4 + 2 * 4) * 2 * numel * tokens_of_row / 1e6, rel=0.02
        )


def seconds(line: str, part: str) -> float:
    """A part of the time that a line tells; 0 if it tells of none."""
    found = re.search(rf"{part} ([\d.e+-]+) (s|min|h|day|year)", line)
    return (
        float(found[1]) * {"s": 1, "min": 60, "h": 3600, "day": 86400, "year": 365.25 * 86400}[found[2]]
        if found
        else 0.0
    )


def test_a_dtype_that_the_processor_is_slow_in_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama(tmp_path / "llama")
    write_lines(tmp_path / "rows.jsonl", dolly_rows(60))
    (tmp_path / "tiny.toml").write_text(
        f'title = "Tiny"\nseeds = [4, 5]\n[settings]\ndata = "{tmp_path}/rows.jsonl"\n'
        f'model = "{tmp_path}/llama"\npartition = "iid:4"\ndevice = "cpu"\ndtype = "float16"\n'
        "[variants.fedkseed]\n"
    )

    def told(slower: float) -> str:
        own = {torch.float16: 2e7 / slower, torch.float32: 2e7}
        monkeypatch.setattr(dry_run, "measured_rates", lambda dtype, *_: dry_run.Rates(own[dtype], 1e9, 1e9))
        return "\n".join(dry_run.describe(Scenario.read(tmp_path / "tiny.toml")))

    text = told(40)
    assert "float16 is slow on this processor: --set dtype=float32 has 40 times as many" in text
    assert "a second: 0.0005 GFLOP" in text
    assert "is slow" not in told(1.5)
    # Two seeds: all runs take twice as long as the one that is described.
    assert seconds(text, "In all, 2 runs one after the other: about") == pytest.approx(
        2 * seconds(text, "Time on cpu: about"), rel=0.02
    )


def test_bytes_are_those_of_messages() -> None:
    server = make_server()
    num_steps = server.config.num_local_steps
    assert len(server.broadcast(server.clients[0])) == broadcast_bytes(len(POOL.seeds), num_steps)
    assert len(make_reply(server, server.clients[0])) == reply_bytes(num_steps)


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_rates_are_measured(family: str) -> None:
    rates = dry_run.measured_rates(torch.float32, "off", torch.device("cpu"), family, 32)
    assert min(rates.products, rates.perturbed, rates.rebuilt) > 0


def test_a_shape_is_a_model_of_transformers() -> None:
    shape = Scenario.read(library()["paper-1.3b-ni"]).shape
    assert shape is not None
    model = shapes_of_config(shape.architecture, shape.config, torch.bfloat16)
    parameters = list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS["1.3b"]
    assert {(parameter.device.type, parameter.dtype) for parameter in parameters} == {
        ("meta", torch.bfloat16)
    }
    with pytest.raises(ModelError, match="expected a model class of transformers, got 'LamaForCausalLM'"):
        shapes_of_config("LamaForCausalLM", {}, torch.float32)
    with pytest.raises(ModelError, match="expected a config that LlamaForCausalLM takes"):
        shapes_of_config("LlamaForCausalLM", {"hidden_size": 8, "num_attention_heads": 0}, torch.float32)
