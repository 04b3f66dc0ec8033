"""`fedkseed compare`: its numbers, its tables and its picture, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_folders import INSTRUCTIONS, classification, write_run
from test_own_runs import SHORT, write_dolly, write_model, write_sentences

from fedkseed import cli
from fedkseed.documents import MAX_JSON_BYTES
from fedkseed.scenarios.experiments.comparison import compare, read_document
from fedkseed.scenarios.experiments.comparison_picture import figure_of
from fedkseed.scenarios.experiments.comparison_table import bytes_text, rendered
from fedkseed.scenarios.experiments.entries import ComparisonError
from fedkseed.scenarios.experiments.runner import is_finished


def scored(loss: float, rouge: float = 0.25) -> dict[str, Any]:
    return {**INSTRUCTIONS, "after": {**INSTRUCTIONS["after"], "held_out_loss": loss, "rouge_l": rouge}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two variants of two seeds each."""
    out = tmp_path / "sweep"
    for seed, loss in ((1, 2.0), (2, 3.0)):
        write_run(out / "ours" / f"seed-{seed}", seed=seed, scores=scored(loss), losses=(3.0, loss))
        write_run(
            out / "all-weights" / f"seed-{seed}",
            seed=seed,
            scores=scored(loss - 0.5),
            losses=(2.75, None),
            bytes_down=1_000_000,
            method="fedavg",
        )
    return out


def test_the_table_of_a_sweep(sweep: Path) -> None:
    assert rendered(compare([sweep], by="all-weights")) == (
        """\
Scores on held-out rows after the last round
                 seeds  held-out loss  Rouge-L  exact match
---------------  -----  -------------  -------  -----------
zero-shot            2          3.500    0.125        0.000
majority answer      2              -    0.500        0.250
all-weights          2  2.000 ± 0.707    0.250        0.000
ours                 2  2.500 ± 0.707    0.250        0.000
Data: rows.jsonl, rows 000000000000. Scored: up to 8 held-out rows of each client, answers to 2 of each.
Losses in nats a response token.
Mean ± standard deviation over seeds; without ± where all seeds agree in these digits.

Costs: passes and messages
             rounds  forward passes  bytes down  bytes up  a client, a round
-----------  ------  --------------  ----------  --------  -----------------
all-weights       2              16     2.00 MB     800 B             500 kB
ours              2              16     1.20 kB     800 B              500 B
Means over seeds. Bytes of all messages of a run, and both ways of one client in one round.
Counted forward passes of a batch: two a direction.

Costs: seconds and memory
             rounds  set-up s  local steps s  rebuild s  reset s  evaluation s  peak memory
-----------  ------  --------  -------------  ---------  -------  ------------  -----------
all-weights       2      1.50           20.0       1.00     0.50          4.00       123 MB
ours              2      1.50           20.0       1.00     0.50          4.00       123 MB
Wall-clock time, added up over clients, on a processor, 1 threads; memory is that of the process.

Scores less those of all-weights
      seeds  held-out loss  Rouge-L  exact match
----  -----  -------------  -------  -----------
ours      2         +0.500   +0.000       +0.000
Differences of runs from the same seed.

Costs as a share of those of all-weights
      bytes down  bytes up  a client, a round  forward passes  local steps s  peak memory
----  ----------  --------  -----------------  --------------  -------------  -----------
ours      0.06 %     100 %              0.1 %           100 %          100 %        100 %"""
    )


def test_the_same_as_markdown(sweep: Path) -> None:
    lines = rendered(compare([sweep]), "markdown").splitlines()
    assert lines[:4] == [
        "**Scores on held-out rows after the last round**",
        "",
        "|  | seeds | held-out loss | Rouge-L | exact match |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    assert "| ours | 2 | 2.500 ± 0.707 | 0.250 | 0.000 |" in lines


def test_accuracies_have_intervals_over_rows_of_each_seed(tmp_path: Path) -> None:
    for seed, gain in ((1, 0.25), (2, 0.125)):
        write_run(tmp_path / str(seed), seed=seed, scores=classification(0.5, gain, "held_out", "unseen"))
    text = rendered(compare([tmp_path / "1", tmp_path / "2"]))
    held_out, held_out_intervals, unseen, unseen_intervals, *_ = text.split("\n\n")
    told = "8 held-out rows of each client, 100 of the clients that train and 100 of unseen ones."
    assert told in " ".join(text.split())
    for part in (held_out, unseen):
        cells = [re.split(r"  +", line) for line in part.splitlines()]
        assert ["fedkseed", "2", "0.500", "0.688 ± 0.088", "+0.188 ± 0.088", "0.750"] in cells
        assert ["majority answer", "2", "-", "0.625", "-", "-"] in cells
        assert ["zero-shot", "2", "0.750", "0.500", "-", "0.500"] in cells
    for part in (held_out_intervals, unseen_intervals):
        cells = [re.split(r"  +", line) for line in part.splitlines()]
        assert cells[1] == ["", "seed", "accuracy [low, high]", "gain [low, high]"]
        assert ["zero-shot", "2", "0.500 [0.400, 0.600]", "-"] in cells
        assert ["fedkseed", "1", "0.750 [0.650, 0.850]", "+0.250 [+0.188, +0.312]"] in cells
        assert ["fedkseed", "2", "0.625 [0.525, 0.725]", "+0.125 [+0.062, +0.188]"] in cells
    assert len(re.findall("In brackets: ", text)) == 1


def test_losses_have_paired_differences_where_a_run_has_them(tmp_path: Path) -> None:
    for seed, low in ((1, -1.5), (2, -1.25)):
        after = {**INSTRUCTIONS["after"], "held_out_difference": [-1.0, low, -0.5 * seed]}
        write_run(tmp_path / str(seed), seed=seed, scores={**INSTRUCTIONS, "after": after})
    text = rendered(compare([tmp_path / "1", tmp_path / "2"]))
    assert re.search("fedkseed +2 +2.500 +-1.000 +0.250", text)
    for seed, interval in ((1, "[-1.500, -0.500]"), (2, "[-1.250, -1.000]")):
        assert re.search(rf"fedkseed +{seed} +-1.000 {re.escape(interval)}", text)
    assert "Less untuned: the mean difference" in text
    part = {**classification(0.5, 0.25)["held_out"], "loss_difference": [-0.25, -0.5, 0.0]}
    write_run(tmp_path / "labels", seed=1, scores={"held_out": part})
    text = rendered(compare([tmp_path / "labels"]))
    assert re.search(r"fedkseed +1 +0.500 +-0.250 ", text)
    assert re.search(r"fedkseed +1 +-0.250 \[-0.500, \+0.000\] ", text)


def test_a_shifted_threshold_has_a_row_untuned_and_columns_beside_the_tuned(tmp_path: Path) -> None:
    threshold = {
        "value": [0.5, 0.25],
        "rows": 40,
        "accuracy": [[0.625, 0.5, 0.75], [0.875, 0.8, 0.9]],
        "difference": [0.125, 0.0625, 0.1875],
    }
    part = {**classification(0.5, 0.25)["held_out"], "threshold": threshold}
    write_run(tmp_path / "a" / "seed-1", seed=1, scores={"held_out": part})
    write_run(tmp_path / "b" / "seed-1", seed=1, scores=classification(0.5, 0.25), template="chat")
    table, levels, paired, *_ = rendered(compare([tmp_path])).split("\n\n")
    cells = [re.split(r"  +", line) for line in table.splitlines()]
    assert ["shifted threshold, as a", "1", "-", "0.625", "-", "-", "-", "-"] in cells
    assert ["a", "1", "0.500", "0.750", "+0.250", "0.875", "+0.125", "0.750"] in cells
    assert not any(row[0] == "shifted threshold, as b" for row in cells)
    # All of it is too wide for one table.
    assert re.search(r"as a +1 +0.625 \[0.500, 0.750\] +-\n", levels)
    assert re.search(r"\na +1 +0.750 \[0.650, 0.850\] +0.875 \[0.800, 0.900\]\n", levels)
    assert re.search(r"\na +1 +\+0.250 \[\+0.188, \+0.312\] +\+0.125 \[\+0.062, \+0.188\]\n", paired)


def test_no_table_of_all_scores_and_costs_is_wider_than_a_terminal(tmp_path: Path) -> None:
    threshold = {"accuracy": [[0.625, 0.5, 0.75], [0.875, 0.8, 0.9]], "difference": [0.125, 0.0625, 0.1875]}
    for seed, gain in ((1, 0.25), (2, 0.125)):
        scores = classification(0.5, gain, "held_out", "unseen")
        for part in scores.values():
            part |= {"threshold": threshold, "loss_difference": [-0.25, -0.5, 0.0]}
        write_run(tmp_path / "directions-4" / f"seed-{seed}", seed=seed, scores=scores)
    for place in (tmp_path, tmp_path / "directions-4" / "seed-1"):
        lines = rendered(compare([place])).splitlines()
        assert max(map(len, lines)) <= 110
        assert len({line for line in lines if line.startswith("In brackets: ")}) == 1


def test_a_small_share_is_one_part_of_many(tmp_path: Path) -> None:
    for name, num_bytes in (("a", 1), ("b", 1_380_400), ("c", 3000)):
        write_run(tmp_path / name / "seed-1", seed=1, bytes_down=num_bytes, lr=float(num_bytes))
    cells = [re.split(r"  +", line)[:2] for line in rendered(compare([tmp_path], by="b")).splitlines()]
    assert ["a", "1 / 1,380,000"] in cells
    assert ["c", "0.217 %"] in cells


@pytest.mark.parametrize("kind", ["instructions", "classification"])
def test_a_score_that_is_not_finite_is_told_and_not_averaged(tmp_path: Path, kind: str) -> None:
    for seed in (1, 2):
        scores = copy.deepcopy(INSTRUCTIONS if kind == "instructions" else classification(0.5, 0.25))
        if seed == 2 and kind == "instructions":
            scores["after"]["held_out_loss"] = None
        elif seed == 2:
            scores["held_out"]["loss"][1] = None
        write_run(tmp_path / "one" / f"seed-{seed}", seed=seed, scores=scores)
    document = compare([tmp_path])
    assert document["variants"][0]["not_finite"] == {"held_out_loss": [2]}
    assert "held_out_loss" not in document["variants"][0]["scores"]
    assert "Not finite: held-out loss of one, seed 2." in rendered(document)


def test_curves_are_means_over_seeds_and_name_rounds_without_scores(sweep: Path) -> None:
    ours, theirs = (entry["curve"] for entry in reversed(compare([sweep])["variants"]))
    assert ours["round"] == [1, 2]
    assert ours["bytes"] == [1000, 2000]
    assert ours["forward_passes"] == [8, 16]
    assert ours["held_out_loss"] == {"mean": [3, 2.5], "sd": [0, 0.7071068]}
    assert theirs["held_out_loss"] == {"mean": [2.75, None], "sd": [0, None]}
    assert theirs["train_loss"]["mean"] == [4, 3]


def test_a_run_by_itself_is_called_by_its_method_and_what_differs(tmp_path: Path) -> None:
    for number, settings in enumerate(({}, {"lr": 1e-4}, {"sampling": "pro"}, {"method": "fedavg"})):
        write_run(tmp_path / str(number), seed=1, **settings)  # type: ignore[arg-type]
    found = compare([tmp_path / str(number) for number in range(4)])["variants"]
    assert [entry["name"] for entry in found] == [
        "fedkseed, lr=0.001",
        "fedkseed, lr=0.0001",
        "pro",
        "fedavg",
    ]
    assert found[1]["settings"] == {"lr": 1e-4, "sampling": "uniform", "method": "fedkseed"}
    assert all(entry["scores"]["held_out_loss"]["sd"] is None for entry in found)


def test_a_run_from_before_a_setting_was_there_ran_with_its_default(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed-1", seed=1)
    write_run(tmp_path / "a" / "seed-2", seed=2, round_unseen=False, lora_rank=8)
    write_run(tmp_path / "b" / "seed-1", seed=1, lora_rank=4, template="{text}\nIt was")
    found = compare([tmp_path])["variants"]
    assert [(entry["name"], entry["seeds"]) for entry in found] == [("a", [1, 2]), ("b", [1])]
    assert found[1]["settings"] == {"template": "{text}\nIt was", "lora_rank": 4}
    alone = [write_run(tmp_path / name, seed=1, template=f"{{text}}\n{name}") for name in "cd"]
    names = [entry["name"] for entry in compare(alone)["variants"]]
    assert names == [rf"fedkseed, template={{text}}\n{name}" for name in "cd"], "on one line"


def test_each_template_has_a_row_of_its_own_untuned(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed-1", seed=1)
    write_run(tmp_path / "b" / "seed-1", seed=1, template="chat")
    write_run(tmp_path / "untuned" / "seed-1", seed=1, template="plain", losses=())
    document = compare([tmp_path])
    assert [entry["name"] for entry in document["untuned"]] == [
        "zero-shot, as a",
        "zero-shot, as b",
        "majority answer",
    ]
    assert [entry["rounds"] for entry in document["variants"]] == [2, 2, 0]


def test_a_sweep_has_the_order_and_the_titles_of_its_scenario(sweep: Path) -> None:
    (sweep / "scenario.toml").write_text('[variants.ours]\ntitle = "Ours"\n[variants.all-weights]\n')
    found = compare([sweep])["variants"]
    assert [(entry["name"], entry["title"]) for entry in found] == [("ours", "Ours"), ("all-weights", "")]
    (sweep / "scenario.toml").write_text("variants = 3")
    with pytest.raises(ComparisonError, match="variants.NAME"):
        compare([sweep])


def test_the_result_file_names_no_folder(sweep: Path, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    assert cli.main(["compare", str(sweep), "--json", str(target)]) == 0
    text = target.read_text()
    assert "/somewhere" not in text
    assert str(tmp_path) not in text
    document = read_document(target)
    assert document == compare([sweep])
    assert document["data"] == {"name": "rows.jsonl", "rows": {"1": "0" * 64, "2": "0" * 64}}
    for broken in (text[: len(text) // 2], "[]", '{"format": 99}'):
        target.write_text(broken)
        with pytest.raises(ComparisonError, match="compare --json"):
            read_document(target)


def test_the_picture_has_scores_over_rounds_passes_and_bytes(sweep: Path, tmp_path: Path) -> None:
    figure = figure_of(compare([sweep]))
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "round",
        "forward passes of local steps",
        "bytes exchanged so far",
    ]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[2].get_lines()}
    assert lines == {"ours": [[1000, 3], [2000, 2.5]], "all-weights": [[1_000_400, 2.75]]}
    for target in (tmp_path / "plot.png", tmp_path / "plot"):  # a PNG there, whatever it is called
        assert cli.main(["compare", str(sweep), "--plot", str(target)]) == 0
        assert target.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "run", seed=1, losses=())
    with pytest.raises(ComparisonError, match="nothing to draw"):
        figure_of(compare([tmp_path / "run"]))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"scores": classification(0.5, 0.25)}, "rows of one kind"),
        ({}, {"data": "/somewhere/others.jsonl"}, "one data set, got rows.jsonl in .* and others.jsonl in"),
        ({}, {"rows": "f" * 64, "lr": 1.0}, "same rows of rows.jsonl in runs from seed 1"),
        ({}, {"generate_rows": 3}, "one generate_rows, got 2 in .* and 3 in"),
        ({}, {}, "differ in nothing"),
        ({}, {"rows": "f" * 64, "lr": 1.0, "seed": 2}, "a seed that .*share"),
    ],
)
def test_runs_that_are_unlike_are_refused(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    folders = [
        write_run(tmp_path / name, **{"seed": 1, **how}) for name, how in (("a", first), ("b", second))
    ]
    with pytest.raises(ComparisonError, match=said) as raised:
        compare(folders)
    if "share" not in said:
        assert all(str(folder) in str(raised.value) for folder in folders)


def test_each_seed_may_divide_the_data_anew(tmp_path: Path) -> None:
    for variant, seed in itertools.product(("a", "b"), (1, 2)):
        write_run(tmp_path / variant / f"seed-{seed}", seed=seed, rows=str(seed) * 64, lr=len(variant))
    text = rendered(compare([tmp_path]))
    assert "each seed divides and holds out anew (rows of seed 1: 111111111111, 2:" in text


@pytest.mark.parametrize("how", ["no summary", "no last round", "more rounds"])
def test_a_run_that_is_not_finished_says_how_it_goes_on(tmp_path: Path, how: str) -> None:
    run = write_run(tmp_path / "run", seed=1)
    if how == "no summary":
        (run / "summary.json").unlink()
    elif how == "no last round":
        (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    else:
        settings = json.loads((run / "settings.json").read_text())
        (run / "settings.json").write_text(json.dumps({**settings, "num_rounds": 9}))
    with pytest.raises(ComparisonError, match=rf"finished run in .*simulate --resume {re.escape(str(run))}"):
        compare([run])


def test_a_place_without_a_run_or_variant_is_named(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([str(tmp_path / "gone")], [str(sweep), "--by", "nobody"]):
        assert cli.main(["compare", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fedkseed compare: expected ")
        assert said.count("\n") == 1


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*way, key))


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    changed = copy.deepcopy(value)
    inner = changed
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = new
    return changed


def test_a_summary_of_thousands_of_clients_is_read(tmp_path: Path) -> None:
    scores = classification(0.5, 0.25)
    part = scores["held_out"]
    part["clients"] = {f"client {number}": part["all"] for number in range(4000)}
    run = write_run(tmp_path / "run", seed=1, scores=scores)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary, indent=2))
    assert (run / "summary.json").stat().st_size > MAX_JSON_BYTES
    assert is_finished(run)
    assert compare([run])["variants"][0]["seeds"] == [1]


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["instructions", "classification"])
def test_a_damaged_summary_is_refused_in_words_or_compared(tmp_path: Path, kind: str) -> None:
    scores = INSTRUCTIONS if kind == "instructions" else classification(0.5, 0.25)
    if kind == "classification":
        rows = [[0.5, 0.25, 0.75]] * 2
        scores["held_out"]["threshold"] = {"accuracy": rows, "difference": [0.5, 0.25, 0.75]}
    run = write_run(tmp_path / "run", seed=1, scores=scores)
    summary = json.loads((run / "summary.json").read_text())
    refused = []
    for way in places(summary):
        for new in (None, [], {}, "text", -1, True, [1, 2, 3]):
            (run / "summary.json").write_text(json.dumps(replaced(summary, way, new)))
            try:
                rendered(compare([run]))
            except ComparisonError as error:
                refused.append(str(error))
    assert len(refused) > 200
    assert not any("\n" in message for message in refused)
    for name in ("summary.json", "metrics.jsonl", "timings.jsonl", "settings.json"):
        kept = (run / name).read_bytes()
        for text in (b"", b"{", b"[]", b"\xff", b'{"round": 0}\n', b"[" * 100):
            (run / name).write_bytes(text)
            with pytest.raises(ComparisonError):
                compare([run])
        (run / name).write_bytes(kept)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["instructions", "classification"])
def test_real_runs_are_compared(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    if kind == "instructions":
        write_dolly()
        own = ["--data", "dolly.jsonl", "--generate-rows", "1"]
    else:
        write_sentences()
        own = ["--data", "sentences.csv", "--label", "mood", "--words", "good= great,bad= terrible"]
    threads = torch.get_num_threads()
    try:
        for variant, flags in (("uniform", []), ("pro", ["--sampling", "pro"])):
            out = f"sweep/{variant}/seed-7"
            line = ["simulate", "--model", "my-model", *own, *SHORT, "--seed", "7", "--out", out, *flags]
            assert cli.main(line) == 0
    finally:
        torch.set_num_threads(threads)
    capsys.readouterr()
    assert cli.main(["compare", "sweep", "--json", "result.json"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0] for line in printed.splitlines() if line}
    assert {"zero-shot", "majority", "uniform", "pro"} <= rows
    document = read_document(Path("result.json"))
    assert document["kind"] == kind
    for entry in document["variants"]:
        summary = json.loads(Path(f"sweep/{entry['name']}/seed-7/summary.json").read_text())
        assert entry["costs"]["bytes_up"]["mean"] == summary["bytes"]["up"]
        scores = summary["scores"]
        loss = scores["after"]["held_out_loss"] if kind == "instructions" else scores["held_out"]["loss"][1]
        assert entry["scores"]["held_out_loss"]["mean"] == pytest.approx(loss, rel=1e-6)


def test_a_run_that_diverged_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), torch.float32)
    write_dolly()
    threads = torch.get_num_threads()
    try:
        line = ["simulate", "--model", "my-model", "--data", "dolly.jsonl", "--out", "run", *SHORT]
        assert cli.main([*line, "--method", "fedavg", "--lr", "1e30"]) == 0
    finally:
        torch.set_num_threads(threads)
    capsys.readouterr()
    assert cli.main(["compare", "run"]) == 0
    assert "Not finite: held-out loss of fedavg, seed " in capsys.readouterr().out


def test_bytes_are_written_with_three_digits() -> None:
    assert [bytes_text(value) for value in (0, 999, 17_988, 999_600, 1.076e9)] == [
        "0 B",
        "999 B",
        "18.0 kB",
        "1.00 MB",
        "1.08 GB",
    ]
