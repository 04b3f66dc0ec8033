"""How instruction rows are cut, weighed and scored: the ways of the paper beside ours, each by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_samples import make_tokenizer
from support.tiny_language_model import make_model, make_task
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedkseed import Inplace, Simulation, SimulationConfig, Streamed, cli
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.prompts import encode_rows
from fedkseed.data.templates import Template
from fedkseed.scenarios import built_in, instructions
from fedkseed.scenarios.instructions import InstructionBench, Scoring
from fedkseed.scenarios.settings import RunSettings, SettingsError
from fedkseed.simulation.best_ledger import BEST
from fedkseed.simulation.run_folder import CLIENTS, METRICS

TEMPLATE = Template.custom("Say {text}:")


def row(text: str, response: str) -> Row:
    return Row({"text": text}, response)


CLIENTS_OF_TWO = (
    ClientRows("a", (row("x", "yes"), row("y", "no")), (row("z", "a long answer"), row("long " * 5, "no"))),
    ClientRows("b", (row("v", "yes"),), (row("w", "yes"), row("u", "n"))),
)
UNSEEN = (ClientRows("c", (), (row("t", "maybe"),)),)


def make_bench(
    clients: Sequence[ClientRows] = CLIENTS_OF_TWO,
    unseen: Sequence[ClientRows] = UNSEEN,
    max_length: int = 100,
    scoring: dict[str, Any] | None = None,
    **options: Any,
) -> InstructionBench:
    data = FederatedData("instructions", tuple(clients), tuple(unseen), TEMPLATE)
    model, tokenizer = make_model(torch.float32), make_tokenizer()
    chosen = Scoring(**{"round_rows": 1, "final_rows": 9, **(scoring or {})})
    return InstructionBench(model, tokenizer, data, chosen, max_length, **options)


# Cutting


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as those of Llama: characters, of which the first of a text gets a space before it."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(10, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("make", [make_tokenizer, piece_tokenizer])
def test_cut_at_the_end_rows_are_those_of_the_authors_code(make: Any) -> None:
    """Twenty rows in five lengths, beside `_tokenize_fn` and `preprocess` of the authors' llm_dataset."""
    tokenizer = make()
    rows = [row("word " * (number % 7), "answer." * (number % 5)) for number in range(20)]
    seen = set()
    for max_length in (4, 12, 20, 40, 200):
        expected = []
        for each in rows:
            source = f"Say {each.fields['text']}:"
            ids = tokenizer(source + each.response + tokenizer.eos_token).input_ids[:max_length]
            labels = list(ids)
            source_length = len(tokenizer(source).input_ids[:max_length])
            labels[:source_length] = [-100] * source_length
            expected.append((ids, labels))
        encoded, cuts = encode_rows(tokenizer, rows, TEMPLATE, max_length, "end")
        assert [
            (list(one.input_ids), [-100] * one.num_prompt + list(one.input_ids[one.num_prompt :]))
            for one in encoded
        ] == expected
        emptied = sum(all(label == -100 for label in labels) for _, labels in expected)
        assert (cuts.dropped, cuts.emptied) == (0, emptied)
        whole, _ = encode_rows(tokenizer, rows, TEMPLATE, 10_000, "end")
        assert cuts.shortened == sum(len(one.input_ids) > max_length for one in whole)
        seen.add((cuts.shortened, cuts.emptied))
    assert (20, 20) in seen
    assert (0, 0) in seen
    assert any(0 < emptied < shortened < 20 for shortened, emptied in seen)


def test_a_row_whose_response_is_gone_is_no_loss_and_no_score() -> None:
    gone, whole = row("a text that is far too long", "yes"), row("x", "yes")
    client = ClientRows("a", (gone, whole), (gone, whole))
    bench = make_bench([client], [], max_length=12, truncate="end", data_size="tokens")
    assert bench.notes == [
        "2 rows longer than 12 tokens lost what stands at their end",
        "2 of them lost their whole response: no loss, and no step, comes of them alone",
    ]
    task = bench.task()
    first, second = task.datasets[0]
    assert (first.num_response, second.num_response) == (0, 4)
    assert task.data_sizes == [4]
    assert math.isnan(bench.train_loss(bench.model, task.collate([first])))
    alone = bench.train_loss(bench.model, task.collate([second]))
    assert bench.train_loss(bench.model, task.collate([first, second])) == pytest.approx(alone, rel=1e-6)
    silent = ClientRows("b", (whole,), (gone,) * 9)
    for means in ("tokens", "rows"):
        scored = make_bench([client, silent], [], max_length=12, truncate="end", scoring={"mean": means})
        assert scored.scores()["held_out_loss"] == pytest.approx(alone, rel=1e-6)
    with pytest.raises(ValueError, match="client a that fit into 12 tokens, got none whose response does"):
        make_bench([ClientRows("a", (gone,), (whole,))], [], max_length=12, truncate="end")


@pytest.mark.parametrize("storage", [Inplace(), Streamed(paired=True)])
def test_a_step_on_such_rows_alone_is_skipped(storage: Any) -> None:
    gone, whole = row("a text that is far too long", "yes"), row("x", "yes")
    client = ClientRows("a", (gone, whole), (whole,))
    is_paired = isinstance(storage, Streamed)
    bench = make_bench([client], [], max_length=12, truncate="end", is_paired=is_paired)
    config = SimulationConfig(
        clients_per_round=1, num_local_steps=4, lr=1e-3, eps=1e-3, num_rounds=1, batch_size=1, storage=storage
    )
    with Simulation(bench.task(), config) as simulation:
        (result,) = simulation.rounds()
    assert result.failed == ()
    assert result.num_skipped == 2
    assert result.train_loss is not None
    assert math.isfinite(result.train_loss)


# Losses


def row_losses(bench: InstructionBench) -> list[tuple[float, int]]:
    """(sum of the response's losses, its tokens) of each held-out row by itself, in float64."""
    found = []
    for client in CLIENTS_OF_TWO:
        for each in client.held_out:
            (one,), _ = encode_rows(make_tokenizer(), [each], TEMPLATE, 100)
            logits = bench.model.double()(torch.tensor([one.input_ids])).logits[0].log_softmax(-1)
            start = one.num_prompt
            picked = [-logits[at - 1, one.input_ids[at]].item() for at in range(start, len(one.input_ids))]
            found.append((sum(picked), len(picked)))
    bench.model.float()
    return found


def test_a_held_out_loss_is_the_mean_over_tokens_or_over_rows() -> None:
    by_token, by_row = make_bench(), make_bench(scoring={"mean": "rows"})
    losses = row_losses(by_token)
    over_tokens = sum(total for total, _ in losses) / sum(number for _, number in losses)
    over_rows = sum(total / number for total, number in losses) / len(losses)
    assert abs(over_tokens - over_rows) > 1e-3, "else nothing tells them apart"
    assert by_token.scores()["held_out_loss"] == pytest.approx(over_tokens, rel=1e-5)
    scores = by_row.scores()
    assert scores["held_out_loss"] == pytest.approx(over_rows, rel=1e-5)
    assert sorted(scores["held_out"]) == pytest.approx(sorted(total / n for total, n in losses), rel=1e-5)
    # Of a round: the first row of each client.
    first = [losses[0], losses[2]]
    assert by_row.round_scores(0) == {
        "held_out_loss": pytest.approx(sum(total / number for total, number in first) / 2, rel=1e-5)
    }


def test_rows_whose_loss_is_no_number_are_left_out_of_a_mean_over_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = make_bench(scoring={"mean": "rows"})
    monkeypatch.setattr(instructions, "response_row_losses", lambda *_, **__: [1.0, math.nan, 4.0])
    assert bench.scores()["held_out_loss"] == 2.5
    monkeypatch.setattr(instructions, "response_row_losses", lambda *_, **__: [math.nan])
    assert math.isnan(bench.scores()["held_out_loss"])


def test_with_losses_by_row_their_paired_difference_is_told() -> None:
    bench = make_bench(scoring={"mean": "rows"})
    before = bench.scores()
    with torch.no_grad():
        bench.model.lm_head.weight.mul_(1.5)
    after = bench.scores()
    summary = bench.summary(before, after)
    assert summary["before"].keys() == {"held_out_loss", "unseen_loss"}
    estimate, low, high = summary["after"]["held_out_difference"]
    assert estimate == pytest.approx(after["held_out_loss"] - before["held_out_loss"], rel=1e-9)
    assert low < estimate < high
    assert "unseen_difference" not in summary["after"], "one row has no interval"
    json.dumps(summary)
    assert f"held-out loss after less before, 95 %: {estimate:+.3f} [" in bench.table(before, after)


def test_a_client_weighs_by_its_response_tokens_or_by_its_rows() -> None:
    by_tokens, by_rows = make_bench().task(), make_bench(data_size="rows").task()
    assert [by_tokens.data_size(client) for client in (0, 1)] == [len("yes") + len("no") + 2, len("yes") + 1]
    assert [by_rows.data_size(client) for client in (0, 1)] == [2, 1]


def test_rounds_score_unseen_clients_where_that_is_asked_for_or_no_other_has_rows() -> None:
    whole = make_bench(scoring={"final_rows": 9}).scores()
    assert make_bench().round_scores(0).keys() == {"held_out_loss"}
    scores = make_bench(scoring={"round_unseen": True}).round_scores(0)
    assert scores.keys() == {"held_out_loss", "unseen_loss"}
    assert scores["unseen_loss"] == whole["unseen_loss"]
    trained = [ClientRows(client.name, client.train, ()) for client in CLIENTS_OF_TWO]
    bench = make_bench(trained, scoring={"round_unseen": True, "generate_rows": 1, "answer_tokens": 2})
    assert bench.round_scores(0) == {"held_out_loss": whole["unseen_loss"]}
    before = bench.scores()
    assert before["held_out_loss"] is None
    assert before["rouge_l"] is not None
    summary = bench.summary(before, before)
    # "yes", the most frequent answer of all training rows, is not "maybe".
    assert summary["majority answer"]["rouge_l"] == 0.0
    assert "answers to 1 of each unseen client" in bench.table(before, before)


# Answers


def test_answers_have_as_many_tokens_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(model: Any, tokenizer: Any, prompts: Sequence[Any], **options: Any) -> list[str]:
        asked.append(options["max_new_tokens"])
        assert options["strip"] is False, "the paper's scores count white space behind a full stop"
        return ["yes\n"] * len(prompts)

    monkeypatch.setattr(instructions, "generate_greedy", generate)
    for tokens in (0, 128, 3):
        bench = make_bench(scoring={"generate_rows": 2, "answer_tokens": tokens})
        scores = bench.scores()
        assert scores["exact_match"] == scores["rouge_l"] == 0.25
        longest = bench.batch_shapes(1)[1][-1]
        assert longest.cached - longest.tokens == (tokens or 128)
    assert asked == [2 * (len("a long answer") + 1), 128, 3]


def test_the_paper_s_rouge_is_a_column_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["a long, long answer", "No", "yes", "."] * 2)
    monkeypatch.setattr(
        instructions, "generate_greedy", lambda *arguments, **_: [next(answers) for _ in arguments[2]]
    )
    bench = make_bench(scoring={"generate_rows": 2, "paper_rouge": True})
    scores = bench.scores()
    # Three distinct words of four, "long," another one; case counts; a full stop alone raises.
    assert scores["paper_rouge"] == pytest.approx((2 * 3 / 7 + 0 + 1 + 0) / 4, abs=1e-6)
    assert scores["rouge_l"] == pytest.approx((2 * 3 / 7 + 1 + 1 + 0) / 4)
    summary = bench.summary(scores, scores)
    assert summary["majority answer"]["paper_rouge"] == pytest.approx(0.25, abs=1e-6)
    head, columns = bench.table(scores, scores).splitlines()[:2]
    assert "paper Rouge-L" in columns
    assert "Rouge-L and exact match" in head
    assert "paper_rouge" not in make_bench(scoring={"generate_rows": 1}).scores()


# A run


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model(torch.float32).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    tasks = [make_task(name) for name in ("red", "blue", "green")], [make_task("grey")]
    monkeypatch.setattr(built_in, "load_instruction_tasks", lambda tokenizer: tasks)
    return tmp_path / "base"


SMALL = {"num_local_steps": 1, "clients_per_round": 2, "num_seeds": 16, "num_threads": 1, "generate_rows": 1}


def simulate(
    base: Path, out: Path, num_rounds: int, status: int = 0, **settings: Any
) -> list[dict[str, Any]]:
    flags = {**SMALL, "num_rounds": num_rounds, "model": base, "out": out, **settings}
    words = [
        [f"--{name.replace('_', '-')}"] + ([str(v)] if v is not True else []) for name, v in flags.items()
    ]
    assert cli.main(["simulate", *(word for pair in words for word in pair)]) == status
    return [json.loads(line) for line in (out / METRICS).read_text("utf-8").splitlines()]


def test_a_run_is_scored_as_often_and_as_its_settings_say(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    plain = simulate(base, tmp_path / "plain", 6)
    paper = {
        "truncate": "end",
        "data_size": "rows",
        "eval_every": 2,
        "rouge_every": 4,
        "round_unseen": True,
        "held_out_mean": "rows",
        "answer_tokens": 3,
        "paper_rouge": True,
        "sampling": "pro",
        "pro_clip": 0.5,
        "pro_start": 0.25,
        "max_loss_gap": 2.0,
    }
    out = tmp_path / "paper"
    rows = simulate(base, out, 6, **paper)
    losses, answers = {"held_out_loss", "unseen_loss"}, {"rouge_l", "exact_match", "paper_rouge"}
    assert [row["evaluation"].keys() for row in rows] == [
        set(),
        losses,
        set(),
        losses | answers,
        set(),
        losses,
    ]
    assert [row["evaluation"].keys() for row in plain] == [{"held_out_loss"}] * 6
    last = simulate(base, tmp_path / "last", 3, eval_every=2)
    assert [list(row["evaluation"]) for row in last] == [[], ["held_out_loss"], ["held_out_loss"]]
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert {name: summary["settings"][name] for name in paper} == paper
    assert summary["best_round"] in (1, 3, 5)
    assert (out / BEST).exists()
    assert (out / "plot.png").exists()
    kept = json.loads((out / CLIENTS).read_text("utf-8"))
    assert (kept["max_loss_gap"], kept["task"]["data_size"]) == (2.0, "rows")
    # The same run, killed in its fourth round.
    walk, steps = InstructionBench.train_loss, iter(range(100))

    def interrupted(self: InstructionBench, *arguments: Any) -> float:
        if next(steps) == 3 * 4 + 3:  # both sides of two clients' steps
            raise KeyboardInterrupt
        return walk(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(InstructionBench, "train_loss", interrupted)
        assert len(simulate(base, tmp_path / "parts", 6, 130, **paper)) == 3
    assert cli.main(["simulate", "--resume", str(tmp_path / "parts")]) == 0
    for name in (METRICS, "server.state", BEST):
        assert (tmp_path / "parts" / name).read_bytes() == (out / name).read_bytes(), name
    torch.set_num_threads(threads)


def test_answers_that_no_scored_round_would_have_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"rouge_every as a multiple of eval_every \(2\), got 3"):
        RunSettings.of({"eval_every": 2, "rouge_every": 3}, num_clients=16)
    assert RunSettings.of({"eval_every": 2, "rouge_every": 0}, num_clients=16).eval_every == 2
