"""`fedkseed plot`: damaged metrics are one line, as on the way to a resume; what is drawn of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_run_folder import BAD_ROWS, ROW

from fedkseed import cli
from fedkseed.cli.plot import read_metrics
from fedkseed.scenarios.round_picture import figure_of
from fedkseed.simulation.run_folder import METRICS


@pytest.mark.parametrize("text", ["", *BAD_ROWS], ids=range(len(BAD_ROWS) + 1))
def test_metrics_that_no_run_wrote_are_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / METRICS).write_text(text)
    assert cli.main(["plot", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fedkseed plot: expected ")
    assert said.count("\n") == 1
    assert not (tmp_path / "plot.png").exists()


def test_what_is_drawn_of_a_round(tmp_path: Path) -> None:
    evaluation = {"held_out_loss": 2.5, "other": 0.5, "rouge_l": None}
    (tmp_path / METRICS).write_text(json.dumps({**ROW, "evaluation": evaluation}) + "\n")
    (row,) = read_metrics(tmp_path / METRICS)
    assert row["evaluation"] == {"held_out_loss": 2.5, "rouge_l": None}
    assert cli.main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plot", str(tmp_path), "--out", str(tmp_path / "plot.txt")]) == 0
    assert (tmp_path / "plot.txt").read_bytes().startswith(b"\x89PNG"), "whatever it is called"


def test_a_folder_that_is_missing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / METRICS).write_text(json.dumps(ROW) + "\n")
    assert cli.main(["plot", str(tmp_path), "--out", str(tmp_path / "gone" / "plot.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_panels_of_what_no_round_has_are_left_out() -> None:
    rows = [
        {
            "round": number,
            "train_loss": None,
            "evaluation": {"held_out_loss": 3.00001 + 1e-6 * number},
            "bytes_down": 0,
            "bytes_up": 0,
        }
        for number in range(3)
    ]
    figure = figure_of(rows)
    (losses,) = figure.axes
    assert losses.get_title() == "loss, nats"
    figure.canvas.draw()
    assert losses.yaxis.get_offset_text().get_text() == ""
    titles = [axes.get_title() for axes in figure_of([{**row, "bytes_down": 5} for row in rows]).axes]
    assert titles == ["loss, nats", "KiB exchanged so far"]
    rows[0]["evaluation"]["accuracy"] = 0.5
    assert [axes.get_title() for axes in figure_of(rows).axes] == ["loss, nats", "scores, mean over rows"]
