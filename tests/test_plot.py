"""`fedkseed plot`: a damaged file of metrics is one line, as on the way to a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_run_folder import BAD_ROWS, ROW

from fedkseed import cli
from fedkseed.cli.plot import read_metrics
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
