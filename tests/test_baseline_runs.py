"""`fedkseed simulate --method` on tiny models: runs that go on, what they write and say, gradients."""

from __future__ import annotations

import csv
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.word_tokenizer import make_word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fedkseed import cli
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.templates import Template
from fedkseed.scenarios.autocast import forward_passes
from fedkseed.scenarios.baselines.lora import PROJECTIONS, add_adapters, num_adapter_weights
from fedkseed.scenarios.baselines.memory import plan_baseline
from fedkseed.scenarios.baselines.settings import BaselineSettings
from fedkseed.scenarios.baselines.tensor_files import write_tensors
from fedkseed.scenarios.bench import Bench
from fedkseed.scenarios.run import make_bench
from fedkseed.scenarios.settings import RunSettings
from fedkseed.simulation.run_folder import BASELINE, CLIENTS, LEDGER, METRICS

MOODS = {"good": " great", "bad": " terrible"}
SHORT = ["--num-rounds", "2", "--num-local-steps", "2", "--num-threads", "1", "--lr", "0.003"]
NUMBERS = {"data": "rows.csv", "num_rounds": 1, "num_local_steps": 1, "batch_size": 2, "lr": 0.1, "eps": 1e-3}
KEPT = (METRICS, BASELINE, CLIENTS)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def write_inputs(kind: str) -> list[str]:
    """A model and rows; the flags that name them."""
    make_model().save_pretrained("my-model")
    make_word_tokenizer(MOODS.values(), 160).save_pretrained("my-model")
    if kind == "instructions":
        rows = [
            {"instruction": f"What is {n}?", "input": "", "output": f"a number, {n % 7}"} for n in range(60)
        ]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["--model", "my-model", "--data", "rows.jsonl", "--partition", "iid:3"]
    with open("rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "mood"])
        for number in range(60):
            is_good = number % 2
            writer.writerow([f"Evening {number} was {('dull', 'fine')[is_good]}", ("bad", "good")[is_good]])
    words = ",".join(f"{label}={word}" for label, word in MOODS.items())
    own = ["--label", "mood", "--words", words, "--partition", "iid:3"]
    return ["--model", "my-model", "--data", "rows.csv", *own]


@pytest.mark.parametrize(
    ("method", "kind", "more"),
    [
        ("fedavg", "classification", []),
        ("fedit", "instructions", []),
        ("first-order", "instructions", ["--local-epochs", "1"]),
        pytest.param("fedit", "classification", [], marks=pytest.mark.slow),
        pytest.param("fedavg", "instructions", [], marks=pytest.mark.slow),
        pytest.param("first-order", "classification", [], marks=pytest.mark.slow),
        pytest.param(
            "fedzo",
            "classification",
            ["--directions", "2", "--storage", "paired"],
            marks=pytest.mark.slow,
        ),
        pytest.param("fedzo", "instructions", [], marks=pytest.mark.slow),
        pytest.param("zeroth-order", "instructions", ["--storage", "streamed"], marks=pytest.mark.slow),
        pytest.param("fedavg", "instructions", ["--autocast", "bfloat16"], marks=pytest.mark.slow),
    ],
)
def test_a_run_of_the_command(
    method: str, kind: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["simulate", "--method", method, *write_inputs(kind), *more, *SHORT]
    assert cli.main([*line, "--out", "whole"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert f"method {method}" in printed
    assert "Storage mode" in printed if "z" in method else "Optimizer: " in printed
    what = "adapters" if method == "fedit" else "weights"
    assert f"The tuned {what} by name are in {Path('whole', BASELINE).resolve()}" in printed
    summary = json.loads(Path("whole/summary.json").read_text())
    assert summary["settings"]["method"] == method
    model = make_model()
    size = sum(value.numel() for value in model.parameters())
    assert summary["model"] == {"num_parameters": size, "weight_bytes": 4 * size}
    passes = summary["forward_passes"]
    # Of 20 rows each client holds out 2: an epoch is two batches of 8 and one of 2.
    steps = 3 * (3 if "--local-epochs" in more else 2)
    of_a_step = {"fedzo": 4 if "--directions" in more else 2, "zeroth-order": 2}.get(method, 3)
    assert passes["rounds"] == [steps * of_a_step] * 2
    assert "backward pass as two" in passes["convention"]
    rows = [json.loads(text) for text in Path("whole", METRICS).read_text().splitlines()]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]
    assert summary["bytes"]["up"] == sum(row["bytes_up"] for row in rows)
    tuned = load_file(Path("whole", BASELINE))
    names = {name for name in tuned if not name.startswith("optimizer/")}
    if method == "fedit":
        assert len(names) == 2 * 2 * len(PROJECTIONS)
    else:
        assert names == {name for name, _ in model.named_parameters()}
    # Half of it, and the rest.
    assert cli.main([*line, "--out", "half", "--num-rounds", "1"]) == 0
    settings = json.loads(Path("half/settings.json").read_text())
    Path("half/settings.json").write_text(json.dumps({**settings, "num_rounds": 2}))
    assert cli.main(["simulate", "--resume", "half"]) == 0
    assert "Resuming" in capsys.readouterr().out
    for name in KEPT:
        assert Path("half", name).read_bytes() == Path("whole", name).read_bytes(), name
    assert not Path("half", LEDGER).exists()


def test_what_has_no_ledger_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["simulate", "--method", "first-order", *write_inputs("classification"), *SHORT, "--out", "run"]
    assert cli.main([*line, "--num-rounds", "0"]) == 0
    capsys.readouterr()
    assert cli.main(["ask", "run", "Evening"]) == 2
    assert "got none in run: a run of another method has none" in capsys.readouterr().err
    # What cannot be run is refused before a folder is made.
    assert cli.main([*line[:-1], "other", "--workers", "2"]) == 2
    assert "expected 1 worker with method first-order" in capsys.readouterr().err
    assert not Path("other").exists()


def make_bench_of(kind: str) -> Bench:
    rows = tuple(Row({"text": f"Evening {n} was fine"}, ("bad", "good")[n % 2]) for n in range(20))
    is_classification = kind == "classification"
    data = FederatedData(
        kind=kind,  # type: ignore[arg-type]
        clients=(ClientRows("a", rows[:16], rows[16:]),),
        unseen=(),
        template=Template.custom("Say how it was. {text}"),
        labels=("bad", "good") if is_classification else (),
        words=(" terrible", " great") if is_classification else (),
    )
    given = {
        "data": "rows.csv",
        "num_rounds": 1,
        "num_local_steps": 1,
        "batch_size": 9,
        "lr": 0.1,
        "eps": 1e-3,
    }
    settings = RunSettings.of(given, 1)
    return make_bench(settings, data, make_model(), make_word_tokenizer(MOODS.values(), 160))


@pytest.mark.parametrize("kind", ["classification", "instructions"])
def test_the_loss_for_gradients_is_that_of_a_run(kind: str) -> None:
    bench = make_bench_of(kind)
    task, model = bench.task(), bench.model
    batch = task.collate(task.datasets[0][:9])
    loss = bench.gradient_loss(model, batch)
    assert float(loss.detach()) == pytest.approx(float(task.loss(model, batch)), rel=1e-6)  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    found = [value.grad for value in model.parameters()]
    model.zero_grad()
    reference = _REFERENCES[kind](model, batch)
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    reference.backward()
    for gradient, value in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, value.grad, rtol=1e-3, atol=1e-6)


def _of_words(model: LlamaForCausalLM, batch: Any) -> torch.Tensor:
    """Cross-entropy among the two words at the last token of each prompt."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    tokenizer = make_word_tokenizer(MOODS.values(), 160)
    words = [tokenizer(word).input_ids[0] for word in (" terrible", " great")]
    rows = [logits[row, length - 1, words] for row, length in enumerate(batch.attention_mask.sum(1).tolist())]
    return torch.nn.functional.cross_entropy(torch.stack(rows), batch.labels)


def _of_transformers(model: LlamaForCausalLM, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    return loss


#: The losses written out, or the model's own.
_REFERENCES = {"classification": _of_words, "instructions": _of_transformers}


def test_dropout_is_drawn_for_each_row_of_a_batch() -> None:
    """A prefix that all rows begin with is not run once for all, as it may be where nothing is drawn."""
    bench = make_bench_of("instructions")
    task = bench.task()
    seen = []
    hook = bench.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.append(tuple(inputs[0].shape))
    )
    batch = task.collate(task.datasets[0][:9])
    bench.gradient_loss(bench.model, batch)
    hook.remove()
    assert seen == [tuple(batch.input_ids.shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_leave_a_language_model_as_it_is(dtype: torch.dtype) -> None:
    bench = make_bench_of("instructions")
    task = bench.task()
    batch = task.collate(task.datasets[0][:9])
    bench.model.to(dtype)
    before = bench.gradient_loss(bench.model, batch)
    adapters = add_adapters(bench.model, BaselineSettings(method="fedit"), 3)
    assert torch.equal(bench.gradient_loss(bench.model, batch), before)
    assert {value.dtype for value in adapters.parameters.values()} == {torch.float32}
    assert sum(value.numel() for value in adapters.parameters.values()) == num_adapter_weights(
        make_model(), 8
    )
    assert len(adapters.dropouts) == 2 * len(PROJECTIONS)
    with forward_passes("bfloat16", torch.device("cpu")):
        bench.gradient_loss(bench.model, batch).backward()  # type: ignore[no-untyped-call]
    for name, value in bench.model.named_parameters():
        assert (value.grad is not None) == ("lora_" in name), name


def test_planned_memory_is_that_of_what_is_tuned() -> None:
    model = make_model()
    weights = sum(value.numel() * 4 for value in model.parameters())
    adapters = 4 * num_adapter_weights(model, 8)
    wanted: dict[str, dict[str, Any]] = {
        "fedavg": {"gradients": weights, "the optimizer's state": 0},
        "first-order": {"gradients": weights, "the optimizer's state": 2 * weights},
        "fedit": {"adapters": adapters, "gradients": adapters, "the optimizer's state": 2 * adapters},
        "fedzo": {},
    }
    for method, parts in wanted.items():
        settings = RunSettings.of({**NUMBERS, "method": method}, 3)
        planned = plan_baseline(
            model, settings, device=torch.device("cpu"), train=[], evaluations=[], file_bytes=weights
        )
        (place,) = planned.places
        assert place.parts["weights"] >= weights
        assert {"w0", "the round's model"}.isdisjoint(place.parts)
        assert {name: place.parts[name] for name in parts} == parts
        told = " ".join(planned.notes)
        assert ("gradients" in place.parts) == ("backward pass" in told) == (method != "fedzo")
        assert ("on the disk" in told) == (method != "first-order")


def test_tensors_that_do_not_fit_on_the_disk_are_an_error_of_the_system(tmp_path: Path) -> None:
    """Which a sweep tells before it goes on; what the library of the format raises is none."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"expected to write .*tensors, got: .*too large"):
            write_tensors(tmp_path / "tensors", {"weight": torch.zeros(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
