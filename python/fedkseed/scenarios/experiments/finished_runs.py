"""Finished runs as their folders keep them: scores, costs and curves, read within bounds and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from fedkseed.data.built_in_models import model_title
from fedkseed.documents import DocumentError, read_json, shown
from fedkseed.scenarios.experiments.entries import ComparisonError, Entry
from fedkseed.scenarios.report import resume_line
from fedkseed.scenarios.run import SUMMARY, read_summary
from fedkseed.scenarios.settings import OPTIONS
from fedkseed.simulation.round_log import check_timings, read_rounds
from fedkseed.simulation.run_folder import METRICS, SETTINGS, TIMINGS, RunFolderError

#: Bytes of the lines of all rounds: some ten thousand of them.
_MAX_LINES = 12 << 20
_MAX_SHOWN_DIGEST = 128

#: Estimate, low end and high end.
Bounds = tuple[float, float, float]

#: Scores of answers and losses, in the order of tables; a run has those of its kind of rows.
INSTRUCTION_SCORES = ("held_out_loss", "unseen_loss", "rouge_l", "paper_rouge", "exact_match")
#: What a round may have scored, drawn over rounds.
CURVES = (
    "train_loss",
    "held_out_loss",
    "unseen_loss",
    "accuracy",
    "rouge_l",
    "paper_rouge",
    "exact_match",
)
#: What needs no training: the model before any step, the same with the threshold between two labels where it
#: fits training rows best, and each client's most frequent answer.
ZERO_SHOT, SHIFTED, MAJORITY = "zero-shot", "shifted threshold", "majority answer"
PHASES = ("rebuild", "reset", "local", "evaluation")


class UnfinishedRunError(ComparisonError):
    """A run that was begun and has not come to its end.

    Attributes:
        goes_on: the command that goes on with it.
    """

    def __init__(self, message: str, goes_on: str) -> None:
        super().__init__(message)
        self.goes_on = goes_on


@dataclass(frozen=True)
class Scores:
    """Scores of a model, or of what stands for one.

    Attributes:
        values: by name; those that are finite.
        intervals: 95 % intervals of some of them: estimate, low end, high end.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Bounds] = field(default_factory=dict)

    def add(self, name: str, value: float | Bounds | None) -> None:
        """Takes a score, with its interval if it has one; None, which is not finite, is left out."""
        if isinstance(value, tuple):
            self.intervals[name], value = value, value[0]
        if value is not None:
            self.values[name] = value


@dataclass(frozen=True)
class FinishedRun:
    """What one run came to.

    Attributes:
        folder: of the run.
        variant: name of the sweep's variant; empty of a run by itself.
        title: of the variant; empty if it has none.
        settings: by name, files by their names alone.
        kind: of the rows, "instructions" or "classification".
        data: name of the data.
        rows: digest of its rows.
        machine: processor and numbers of the model, by name.
        num_rows: scored rows of each kind, where the summary tells them.
        convention: how forward passes are counted, in words; empty if they are not.
        scores: of the tuned model, by name; those that are finite.
        intervals: 95 % intervals of these scores, by name.
        untuned: what needs no training, by its name.
        costs: bytes, seconds, forward passes and memory, by name.
        curve: of each round, what came before it and it has cost, and its scores; None where there is none.
    """

    folder: Path
    variant: str
    title: str
    settings: Mapping[str, Any]
    kind: str
    data: str
    rows: str
    machine: Mapping[str, Any]
    num_rows: Mapping[str, int]
    convention: str
    scores: Mapping[str, float]
    intervals: Mapping[str, Bounds]
    untuned: Mapping[str, Scores]
    costs: Mapping[str, float]
    curve: tuple[Mapping[str, float | None], ...]

    @property
    def seed(self) -> int:
        """The base seed of the run."""
        seed: int = self.settings["seed"]
        return seed


def read_run(folder: Path, variant: str = "", title: str = "") -> FinishedRun:
    """One finished run.

    Args:
        folder: of the run.
        variant: its name in a sweep.
        title: of the variant.

    Raises:
        UnfinishedRunError: not finished; says how it goes on.
        ComparisonError: without what is compared, or damaged; says what to do.
    """
    try:
        planned = _object(read_json(folder / SETTINGS), folder / SETTINGS)
        if not (folder / SUMMARY).is_file():
            raise _unfinished(folder, variant, planned, "no summary")
        summary = Entry(read_summary(folder), folder / SUMMARY)
        metrics = list(read_rounds(folder / METRICS, max_bytes=_MAX_LINES)) if _has_rounds(folder) else []
        timings = _timings(folder, len(metrics))
    except (OSError, DocumentError, RunFolderError) as error:
        raise ComparisonError(f"expected the files of a finished run in {folder}, got: {error}") from error
    num_rounds = summary["settings"].count("num_rounds")
    if len(metrics) != num_rounds or planned.get("num_rounds") != num_rounds:
        of = f"{len(metrics)} rounds of {shown(planned.get('num_rounds'))}, a summary of {num_rounds}"
        raise _unfinished(folder, variant, planned, of)
    return _run(folder, variant, title, summary, metrics, timings)


def _has_rounds(folder: Path) -> bool:
    """Whether any round has been run: a run of none writes no lines."""
    return (folder / METRICS).exists()


def _timings(folder: Path, num_rounds: int) -> list[dict[str, Any]]:
    if not num_rounds:
        return []
    found = []
    for row in read_rounds(folder / TIMINGS, check_timings, num_rounds=num_rounds):
        missing = [name for name in PHASES if f"seconds_{name}" not in row]
        if missing:
            raise RunFolderError(f"{folder / TIMINGS} has no seconds_{missing[0]} of round {row['round']}")
        found.append(row)
    return found


def _unfinished(folder: Path, variant: str, planned: Mapping[str, Any], what: str) -> UnfinishedRunError:
    line = resume_line(folder, trust_remote_code=planned.get("trust_remote_code") is True, moved={})
    sweep = " (or the command that began the sweep)" if variant else ""
    return UnfinishedRunError(
        f"expected a finished run in {folder}, got one with {what}; this goes on with it: {line}{sweep}", line
    )


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DocumentError(f"{path} holds {shown(value)} in place of an object")
    return value


def _run(
    folder: Path,
    variant: str,
    title: str,
    summary: Entry,
    metrics: Sequence[Mapping[str, Any]],
    timings: Sequence[Mapping[str, Any]],
) -> FinishedRun:
    # A run from before a setting was there ran as its default says.
    defaults = {name: option.default for name, option in OPTIONS.items() if option.default is not MISSING}
    settings = {**defaults, **summary["settings"].items()}
    for name in ("seed", "final_rows", "generate_rows"):
        summary["settings"].count(name)
    for name in ("data", "model", "template_file"):
        settings[name] = _file_name(str(settings.get(name) or ""))
    settings["model"] = model_title(settings["model"])
    scores = summary["scores"]
    kind = "instructions" if "before" in scores else "classification"
    read = _instruction_scores if kind == "instructions" else _classification_scores
    tuned, untuned = read(scores)
    passes = None
    if "forward_passes" in summary:
        passes = summary["forward_passes"].numbers("rounds", len(metrics))
    return FinishedRun(
        folder=folder,
        variant=variant,
        title=title,
        settings=settings,
        kind=kind,
        data=summary["data"].text("name"),
        rows=summary["data"].text("rows")[:_MAX_SHOWN_DIGEST],
        machine={
            "processor": summary.text("processor"),
            "num_parameters": summary["model"].count("num_parameters"),
            "weight_bytes": summary["model"].count("weight_bytes"),
        },
        num_rows={
            part: scores[part]["all"].count("rows")
            for part in ("held_out", "unseen")
            if kind == "classification" and part in scores
        },
        convention="" if passes is None else summary["forward_passes"].text("convention"),
        scores=tuned.values,
        intervals=tuned.intervals,
        untuned=untuned,
        costs=_costs(summary, metrics, timings, passes),
        curve=_curve(metrics, passes),
    )


def _file_name(value: str) -> str:
    """What a setting names without the folder of this machine that it is in."""
    return Path(value).name if Path(value).is_absolute() else value


def _instruction_scores(scores: Entry) -> tuple[Scores, dict[str, Scores]]:
    def part(name: str) -> Scores:
        entry = scores[name]
        return Scores({score: entry.number(score) for score in INSTRUCTION_SCORES if score in entry})

    untuned = {ZERO_SHOT: part("before")}
    if "majority answer" in scores:
        untuned[MAJORITY] = part("majority answer")
    after = part("after")
    for name in ("held_out_difference", "unseen_difference"):
        if name in scores["after"]:
            after.add(name, _bounds(scores["after"], name))
    return after, untuned


def _classification_scores(scores: Entry) -> tuple[Scores, dict[str, Scores]]:
    parts = [part for part in ("held_out", "unseen") if part in scores]
    if not parts:
        raise scores.error("scores of held-out or of unseen rows")
    after, before, majority, shifted = Scores(), Scores(), Scores(), Scores()
    for part in parts:
        entry, rows = scores[part], scores[part]["all"]
        prefix = "" if part == "held_out" else "unseen_"
        pairs = {f"{part}_loss": entry.pair("loss")}
        if "auc" in entry:
            pairs[prefix + "auc"] = entry.pair("auc")
        for name, (then, now) in pairs.items():
            before.add(name, then)
            after.add(name, now)
        if "loss_difference" in entry:
            after.add(f"{part}_difference", _bounds(entry, "loss_difference"))
        before.add(prefix + "accuracy", _bounds(rows, "before"))
        after.add(prefix + "accuracy", _bounds(rows, "after"))
        after.add(prefix + "gain", _bounds(rows, "difference"))
        majority.add(prefix + "accuracy", rows.number("majority"))
        if "threshold" in entry:
            threshold = entry["threshold"]
            of_untuned, of_tuned = threshold.rows_of_numbers("accuracy", 2, 3)
            shifted.add(prefix + "accuracy", _three(of_untuned))
            after.add(prefix + "shifted_accuracy", _three(of_tuned))
            after.add(prefix + "gain_on_shifted", _bounds(threshold, "difference"))
    untuned = {ZERO_SHOT: before, MAJORITY: majority}
    return after, {**untuned, SHIFTED: shifted} if shifted.values else untuned


def _bounds(entry: Entry, name: str) -> Bounds:
    return _three(entry.numbers(name, 3))


def _three(numbers: Sequence[float]) -> Bounds:
    estimate, low, high = numbers
    return estimate, low, high


def _costs(
    summary: Entry,
    metrics: Sequence[Mapping[str, Any]],
    timings: Sequence[Mapping[str, Any]],
    passes: Sequence[float] | None,
) -> dict[str, float]:
    costs: dict[str, float] = {
        name: sum(row[name] for row in metrics) for name in ("bytes_down", "bytes_up", "num_skipped")
    }
    costs["num_failed"] = sum(len(row["failed"]) for row in metrics)
    if replies := sum(len(row["clients"]) for row in metrics):
        costs["bytes_per_client"] = (costs["bytes_down"] + costs["bytes_up"]) / replies
    if passes is not None:
        costs["forward_passes"] = sum(passes)
    costs["seconds_set_up"] = summary["seconds"].number("set_up")
    for phase in PHASES:
        costs[f"seconds_{phase}"] = sum(row[f"seconds_{phase}"] for row in timings)
    for place in ("process", "device"):
        if place in summary["peak_memory"]:
            costs[f"memory_{place}"] = summary["peak_memory"].count(place)
    return costs


def _curve(
    metrics: Sequence[Mapping[str, Any]], passes: Sequence[float] | None
) -> tuple[Mapping[str, float | None], ...]:
    points, num_bytes, num_passes = [], 0, 0.0
    for row in metrics:
        num_bytes += row["bytes_down"] + row["bytes_up"]
        found = {**row["evaluation"], "train_loss": row["train_loss"]}
        point = {"round": row["round"] + 1, "bytes": num_bytes, **{name: found.get(name) for name in CURVES}}
        if passes is not None:
            num_passes += passes[row["round"]]
            point["forward_passes"] = num_passes
        points.append(point)
    return tuple(points)
