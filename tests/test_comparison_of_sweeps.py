"""`fedkseed compare` of sweeps on their way, of what is named twice, of places that cannot be written,
and what its picture says."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.run_folders import write_run

from fedkseed import cli
from fedkseed.scenarios.experiments.comparison import compare, read_document
from fedkseed.scenarios.experiments.comparison_picture import figure_of
from fedkseed.scenarios.experiments.entries import ComparisonError


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two variants of two seeds each, all finished."""
    out = tmp_path / "sweep"
    for name, lr in (("base", 0.5), ("fast", 1.0)):
        for seed in (0, 1):
            write_run(out / name / f"seed-{seed}", seed=seed, lr=lr)
    (out / "scenario.toml").write_text(
        'seeds = [0, 1]\n[variants.base]\ntitle = "K 1,024, uniform"\n[variants.fast]\ntitle = "fast"\n'
    )
    return out


def test_unfinished_runs_of_a_sweep_are_left_out_and_named(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "base" / "seed-1" / "summary.json").unlink()
    assert cli.main(["compare", str(sweep)]) == 0
    printed = capsys.readouterr()
    assert "\nfast " in printed.out
    goes_on = f"simulate --resume {sweep / 'base' / 'seed-1'}"
    assert "1 run is not finished and left out: base/seed-1; this goes on with it: " in printed.err
    assert goes_on in printed.err
    assert [entry["seeds"] for entry in compare([sweep])["variants"]] == [[0], [0, 1]]
    # Named itself, it is refused; and so is a result file of a part.
    assert cli.main(["compare", str(sweep), str(sweep / "base" / "seed-1")]) == 2
    assert "expected a finished run" in capsys.readouterr().err
    assert cli.main(["compare", str(sweep), "--json", str(tmp_path / "result.json")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "expected finished sweeps for a result file" in printed.err
    assert "base/seed-1" in printed.err
    assert not (tmp_path / "result.json").exists()


def test_runs_that_a_sweep_has_not_begun_are_counted(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = sweep / "scenario.toml"
    description.write_text(description.read_text().replace("[0, 1]", "[0, 1, 2, 3, 4]"))
    assert cli.main(["compare", str(sweep)]) == 0
    named = "base/seed-2, fast/seed-2, base/seed-3, fast/seed-3 and 2 more"
    assert f"6 runs of the sweep are not begun: {named}; " in capsys.readouterr().err
    assert cli.main(["compare", str(sweep), "--json", str(tmp_path / "result.json")]) == 2
    assert "6 runs of the sweep are not begun" in capsys.readouterr().err
    description.write_text("seeds = 3\n")
    with pytest.raises(ComparisonError, match="seeds as a list"):
        compare([sweep])


def test_a_sweep_of_which_nothing_is_finished_is_refused(sweep: Path) -> None:
    for summary in sweep.glob("*/*/summary.json"):
        summary.unlink()
    with pytest.raises(ComparisonError, match="at least one finished run, got none: 4 runs are not finished"):
        compare([sweep])


def test_titles_of_variants_are_told_wherever_their_runs_are_named(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "result.json"
    for places in ([sweep], [sweep / "base", sweep / "fast"], [*sweep.glob("*/seed-*")]):
        assert cli.main(["compare", *map(str, places), "--json", str(target)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "base: K 1,024, uniform" in lines
        assert "fast: fast" not in lines, "a title that says no more than the name"
        titles = {entry["name"]: entry["title"] for entry in read_document(target)["variants"]}
        assert titles == {"base": "K 1,024, uniform", "fast": ""}


def test_a_run_that_is_named_twice_is_counted_once(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sweep / "base" / "seed-0"
    assert cli.main(["compare", str(run), str(run)]) == 0
    assert capsys.readouterr().err.strip() == f"Named more than once and counted once: {run}."
    assert cli.main(["compare", str(sweep), str(run)]) == 0
    assert f"counted once: {run}." in capsys.readouterr().err
    assert cli.main(["compare", str(sweep)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", ["--json", "--plot"])
@pytest.mark.parametrize("target", ["gone/file", "folder", "/proc/file"])
def test_what_cannot_be_written_is_refused_before_the_table(
    sweep: Path, tmp_path: Path, flag: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    assert cli.main(["compare", str(sweep), flag, str(tmp_path / target)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"fedkseed compare: expected {flag} ")
    assert printed.err.count("\n") == 1
    assert ".tmp" not in printed.err


def test_a_picture_is_a_png_whatever_it_is_called(sweep: Path, tmp_path: Path) -> None:
    assert cli.main(["compare", str(sweep), "--plot", str(tmp_path / "x.txt")]) == 0
    assert (tmp_path / "x.txt").read_bytes().startswith(b"\x89PNG")
    same = str(tmp_path / "same")
    assert cli.main(["compare", str(sweep), "--json", same, "--plot", same]) == 2


def test_a_picture_has_a_title_integer_rounds_and_names_its_bands(sweep: Path) -> None:
    write_run(sweep / "base" / "seed-2", seed=2, lr=0.5, losses=(3.25, 2.0))
    figure = figure_of(compare([sweep]))
    assert figure.get_suptitle() == "rows.jsonl, tiny"
    assert figure_of(compare([sweep]), "Of mine").get_suptitle() == "Of mine"
    assert all(float(tick).is_integer() for axes in figure.axes[:2] for tick in axes.get_xticks())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "base",
        "fast",
        "band: ± 1 standard deviation over seeds",
    ]


def test_the_untuned_model_is_a_point_of_a_picture_only_where_its_rows_are_those_of_rounds(
    tmp_path: Path,
) -> None:
    for round_rows, expected in ((8, [[0, 3.5]]), (7, [])):
        run = write_run(tmp_path / str(round_rows), seed=1, round_rows=round_rows)
        figure = figure_of(compare([run]))
        for axes, points in zip(figure.axes, (expected, expected, []), strict=True):
            found = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_label() == "untuned"]
            assert [point for line in found for point in line] == points


def test_a_method_that_sends_nothing_is_named_above_the_bytes(sweep: Path) -> None:
    for metrics in sweep.glob("fast/*/metrics.jsonl"):
        text = metrics.read_text().replace('"bytes_up": 400', '"bytes_up": 0')
        metrics.write_text(text.replace('"bytes_down": 600', '"bytes_down": 0'))
    *_, traffic = figure_of(compare([sweep])).axes
    assert traffic.get_title(loc="left") == "no bytes are sent by fast"
