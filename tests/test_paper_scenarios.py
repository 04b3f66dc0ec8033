"""The paper's six scenarios: their numbers, their clients and rows, their prompts, and a round of each.

A round is run with a random Llama of two layers and the word tokenizer of `support.word_tokenizer` in the
place of the real models and tokenizers, on rows in the schemas of Natural Instructions and Dolly-15K.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_runs import (
    dolly_rows,
    leave_out_pictures,
    write_lines,
    write_llama,
    write_natural_instructions,
)
from support.word_tokenizer import make_word_tokenizer

from fedkseed import cli
from fedkseed.data.federated import FederatedData, Row
from fedkseed.data.prompts import encode_rows
from fedkseed.data.templates import INPUT, INSTRUCTION
from fedkseed.scenarios.experiments.scenario import Scenario, library
from fedkseed.scenarios.launch import with_data

SIX = [f"paper-{size}-{data}" for size in ("1.3b", "3b") for data in ("ni", "dolly-0.5", "dolly-5.0")]
#: Rounds of the first tier: each data set, each size.
FAST = [(name, "fedkseed") for name in ("paper-1.3b-ni", "paper-1.3b-dolly-5.0", "paper-3b-dolly-0.5")]
MODELS = {"1.3b": "datajuicer/LLaMA-1B-dj-refine-150B", "3b": "openlm-research/open_llama_3b"}
#: A real cut of Natural Instructions that some machines have beside the checkout.
MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "natural-instructions-mini"
#: Rows of each Dirichlet client at least, clients, and the held-out category: github.com/zhenqincn/FedKSeed.
FEWEST, CLIENTS, HELD_OUT = 10, 200, "summarization"


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dolly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dolly") / "dolly.jsonl"
    write_lines(path, dolly_rows(9000))
    return path


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ni") / "natural-instructions-2.8"
    train = {f"task{number:03}_train": 20 + number for number in range(40)} | {"task999_small": 19}
    write_natural_instructions(folder, train, {"task500_test": 15, "task501_test": 60})
    return folder


def loaded(name: str, data: Path) -> FederatedData:
    """The clients of a scenario's first run."""
    run = Scenario.read(library()[name]).changed({"data": str(data), "clients_per_round": 1}).runs()[0]
    found = with_data(run.values)[1]
    assert found is not None
    return found


@pytest.mark.parametrize("name", SIX)
def test_the_numbers_are_those_of_the_authors(name: str) -> None:
    """Written out of their files and papers, apart from the scenarios' own."""
    _, size, data, *_ = name.split("-")
    scenario = Scenario.read(library()[name])
    settings, variants = scenario.settings, scenario.variants
    assert scenario.seeds == (42,)
    assert settings["model"] == MODELS[size]
    everywhere = {
        "dtype": "float16",
        "max_length": 1024,
        "truncate": "end",
        "num_local_steps": 200,
        "batch_size": 1,
        "lr": 3e-7,
        "eps": 5e-4,
        "num_seeds": 4096,
        "family": "gaussian",
        "weighting": "data_size",
        "data_size": "rows",
        "held_out": 0.0,
        "held_out_mean": "rows",
        "eval_every": 1,
        "answer_tokens": 128,
        "paper_rouge": True,
    }
    of_data: dict[str, Any]
    if data == "ni":
        of_data = {"num_rounds": 40, "clients_per_round": int(738 * 0.05), "template": "fedkseed-ni"}
    else:
        of_data = {
            "num_rounds": 60,
            "clients_per_round": int(200 * 0.05),
            "template": "fedkseed-dolly",
            "partition": f"dirichlet:category:{name[-3:]}:200",
            "held_out_clients": "category=summarization",
        }
    expected = {**everywhere, **of_data}
    assert {key: settings[key] for key in expected} == expected
    assert variants["fedkseed"].settings == {}
    assert variants["pro"].settings == {"sampling": "pro", "pro_clip": 1000.0, "pro_start": 0.0}
    fedit = {
        "method": "fedit",
        "optimizer": "adam",
        "local_epochs": 1,
        "lr": 3e-4 if data == "ni" else 3e-5,
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
    }
    assert {key: variants["fedit"].settings[key] for key in fedit} == fedit
    fedavg = {"method": "fedavg", "optimizer": "sgd", "local_epochs": 1}
    assert {key: variants["fedavg"].settings[key] for key in fedavg} == fedavg
    assert variants["fedzo"].settings == {"method": "fedzo", "directions": 1, "lr": 3e-7}


def dirichlet_clients(categories: Sequence[str], alpha: float, seed: int) -> list[list[int]]:
    """The authors' division, with the package's draws: rows of each client.

    A class after the other, by name: shares from a Dirichlet distribution, 0 for who holds N / 200 already,
    the rest normalised; all anew until each client has ten rows.
    """
    drawn = np.random.default_rng([seed, zlib.crc32(b"dirichlet"), zlib.crc32(b"")])
    while True:
        clients: list[list[int]] = [[] for _ in range(CLIENTS)]
        for category in sorted(set(categories)):
            rows = [row for row, own in enumerate(categories) if own == category]
            shares = drawn.dirichlet([alpha] * CLIENTS)
            shares = np.array(
                [
                    share if len(held) < len(categories) / CLIENTS else 0.0
                    for share, held in zip(shares, clients, strict=True)
                ]
            )
            shares /= shares.sum()
            order = drawn.permutation(rows)
            begin = 0
            for client, end in zip(clients, (np.cumsum(shares) * len(rows)).astype(int), strict=True):
                end = len(rows) if client is clients[-1] else end
                client += order[begin:end].tolist()
                begin = end
        if min(map(len, clients)) >= FEWEST:
            return clients


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_the_clients_of_dolly_follow_the_authors_rule(dolly: Path, alpha: float) -> None:
    data = loaded(f"paper-3b-dolly-{alpha}", dolly)
    rows = [json.loads(line) for line in dolly.read_text().splitlines()]
    assert sorted({row["category"] for row in rows}).index(HELD_OUT) == 7
    left = [row for row in rows if row["category"] != HELD_OUT]
    expected = dirichlet_clients([row["category"] for row in left], alpha, seed=42)
    assert len(data.clients) == CLIENTS
    for client, indices in zip(data.clients, expected, strict=True):
        assert client.held_out == ()
        own = [row.fields[INSTRUCTION] for row in client.train]
        assert sorted(own) == sorted(left[index]["instruction"] for index in indices)
    (unseen,) = data.unseen
    held_out = [row["instruction"] for row in rows if row["category"] == HELD_OUT]
    assert [row.fields[INSTRUCTION] for row in unseen.held_out] == held_out


def usable(folder: Path, name: str) -> list[dict[str, Any]]:
    """The instances of a task that the authors' filter leaves."""
    task = json.loads((folder / "tasks" / f"{name}.json").read_text())
    return [instance for instance in task["Instances"] if len(instance["input"]) < 1024]


def names_of(folder: Path, split: str) -> list[str]:
    return (folder / "splits" / "default" / f"{split}_tasks.txt").read_text().split()


def check_numbers(folder: Path, data: FederatedData) -> None:
    """Holds the numbers of rows of each task to the authors' rule."""
    trained = {name: len(usable(folder, name)) for name in names_of(folder, "train")}
    expected = {name: int(0.2 * number) for name, number in trained.items() if number >= 20}
    assert {client.name: len(client.train) for client in data.clients} == expected
    tested = {name: len(usable(folder, name)) for name in names_of(folder, "test")}
    expected = {
        name: max(20, int(0.02 * number)) if number > 20 else number for name, number in tested.items()
    }
    assert {client.name: len(client.held_out) for client in data.unseen} == expected


def test_natural_instructions_are_sampled_by_the_authors_rule(tmp_path: Path) -> None:
    numbers = {"at the bound": 20, "below": 19, "odd": 33, "many": 1234, "more": 2600}
    train, test = ({f"{name} {split}": n for name, n in numbers.items()} for split in ("train", "test"))
    train, test = ({name.replace(" ", "_"): n for name, n in part.items()} for part in (train, test))
    folder = tmp_path / "natural-instructions-2.8"
    write_natural_instructions(folder, train, test)
    for path in (folder / "tasks").iterdir():
        task = json.loads(path.read_text())
        # The filter counts characters: 1,023 of two bytes each are taken, 1,024 of one are not.
        task["Instances"][0]["input"] = f"{path.stem} ".ljust(1023, "ü")
        long = {"id": "long", "input": f"{path.stem} ".ljust(1024, "u"), "output": ["0"]}
        task["Instances"].append(long)
        path.write_text(json.dumps(task))
    data = loaded("paper-3b-ni", folder)
    assert [len(client.train) for client in data.clients] == [4, 6, 246, 520]
    assert [len(client.held_out) for client in data.unseen] == [20, 19, 20, 24, 52]
    check_numbers(folder, data)


@pytest.mark.skipif(not MINI.exists(), reason="needs natural-instructions-mini beside the checkout")
def test_a_real_cut_of_natural_instructions_is_sampled_by_the_authors_rule() -> None:
    data = loaded("paper-1.3b-ni", MINI)
    assert (len(data.clients), len(data.unseen)) == (72, 5)
    check_numbers(MINI, data)


def ni_prompt(row: Row) -> str:
    """The text of natural_instruction_loader.py, written out once more."""
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row.fields[INSTRUCTION]}\n\n### Input:\n{row.fields[INPUT]}\n\n### Response:"
    )


def dolly_prompt(row: Row) -> str:
    """The two texts of llm_dataset.py, written out once more."""
    if row.fields[INPUT]:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response for the task request.\n\n"
            f"### Instruction:\n{row.fields[INSTRUCTION]}\n\n### Input:\n{row.fields[INPUT]}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task. Write a response for the task request.\n\n"
        f"### Instruction:\n{row.fields[INSTRUCTION]}\n\n### Response:"
    )


@pytest.mark.parametrize("name", ["paper-1.3b-ni", "paper-3b-dolly-0.5"])
def test_prompts_and_cuts_are_those_of_the_authors(name: str, dolly: Path, instructions: Path) -> None:
    is_ni = name.endswith("ni")
    data = loaded(name, instructions if is_ni else dolly)
    rows = [row for client in data.clients for row in client.train][:20]
    assert len(rows) == 20
    assert is_ni or len({bool(row.fields[INPUT]) for row in rows}) == 2, "with and without a context"
    prompts = [(ni_prompt if is_ni else dolly_prompt)(row) for row in rows]
    assert [data.template.prompt(None, row.fields) for row in rows] == prompts
    tokenizer = make_word_tokenizer(prompts, 400)
    whole = [
        [*tokenizer(prompt).input_ids, *tokenizer(row.response).input_ids, tokenizer.eos_token_id]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    for length in (1024, len(whole[0]) - 1, len(tokenizer(prompts[0]).input_ids)):
        encoded, _ = encode_rows(tokenizer, rows, data.template, length, truncate="end")
        assert [list(row.input_ids) for row in encoded] == [ids[:length] for ids in whole]
        assert [row.num_prompt for row in encoded] == [
            min(length, len(tokenizer(prompt).input_ids)) for prompt in prompts
        ]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, marks=() if (name, variant) in FAST else pytest.mark.slow)
        for name in SIX
        for variant in ("fedkseed", "pro", "fedavg", "fedit", "fedzo")
    ],
)
def test_a_round_of_each_runs(
    name: str,
    variant: str,
    dolly: Path,
    instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leave_out_pictures(monkeypatch)
    write_llama(tmp_path / "llama", num_layers=2)
    is_ni = name.endswith("ni")
    data = instructions if is_ni else dolly
    few = {"num_rounds": 1, "num_local_steps": 1, "final_rows": 4, "generate_rows": 2, "answer_tokens": 4}
    arguments = ["scenarios", "run", name, "--model", str(tmp_path / "llama"), "--data", str(data)]
    arguments += ["--only", variant, "--device", "cpu", "--out", str(tmp_path / "out")]
    for key, value in {**few, "num_threads": 1}.items():
        arguments += ["--set", f"{key}={value}"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    folder = tmp_path / "out" / variant / "seed-42"
    (row,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert len(row["clients"]) == (36 if is_ni else 10)
    assert row["train_loss"] is not None
    assert row["evaluation"]["held_out_loss"] is not None, "the unseen rows are scored in rounds"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["scores"]["after"]["unseen_loss"] is not None
    assert summary["scores"]["after"]["paper_rouge"] is not None
