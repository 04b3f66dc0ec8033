"""Finished runs beside each other: one row a variant, with mean and spread over its seeds, ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import fedkseed_kernels
from fedkseed.documents import DocumentError, read_json, shown
from fedkseed.scenarios.experiments.entries import ComparisonError
from fedkseed.scenarios.experiments.finished_runs import (
    CURVES,
    MAJORITY,
    SHIFTED,
    ZERO_SHOT,
    Bounds,
    FinishedRun,
)
from fedkseed.scenarios.experiments.gathering import gather

FORMAT = 1
#: Bytes of a result file: some hundred variants of some hundred rounds.
_MAX_BYTES = 8 << 20
#: Settings that say where a run ran, or are what the mean is over: runs that differ in them are one variant.
_APART = ("seed", "num_threads", "workers", "worker_timeout", "device", "trust_remote_code")
#: Settings that say what is measured, on which rows: unlike ones cannot stand in one table.
_MEASURED_BY = (
    "round_rows",
    "round_unseen",
    "final_rows",
    "generate_rows",
    "held_out_mean",
    "answer_tokens",
    "max_length",
    "truncate",
)
#: Settings that change what an untuned model answers.
_ASKED_BY = ("model", "template", "template_file", "words", "classify", "dtype", "autocast")
#: Digits that a result file keeps.
_DIGITS = 7

Document = dict[str, Any]
Group = list[FinishedRun]


def compare(paths: Sequence[Path], by: str = "") -> Document:
    """The runs at these places beside each other.

    Args:
        paths: folders of runs or of sweeps.
        by: name of the variant that all others are set against; empty: none.

    Returns:
        What a result file holds; `comparison_table` and `comparison_picture` show it.

    Raises:
        ComparisonError: runs that are not finished, damaged, or unlike each other; no such variant.
    """
    return document_of(gather(paths).runs, by)


def document_of(runs: Sequence[FinishedRun], by: str = "") -> Document:
    """The document of runs that have been read.

    Args:
        runs: at least one.
        by: as `compare`.

    Raises:
        ComparisonError: as `compare`.
    """
    _check_alike(runs)
    groups = _grouped(runs)
    _check_seeds(groups)
    differing = _differing([group[0] for group in groups.values()])
    first = runs[0]
    document = {
        "format": FORMAT,
        "environment": {
            "date": datetime.now(UTC).date().isoformat(),
            "fedkseed_kernels": fedkseed_kernels.__version__,
            "processors": sorted({run.machine["processor"] for run in runs}),
        },
        "kind": first.kind,
        "data": {
            "name": first.data,
            "rows": {str(seed): rows for seed, rows in sorted({run.seed: run.rows for run in runs}.items())},
        },
        "num_rows": dict(first.num_rows),
        "conventions": sorted({run.convention for run in runs} - {""}),
        "model": {name: first.machine[name] for name in ("num_parameters", "weight_bytes")},
        "settings": {
            name: value
            for name, value in first.settings.items()
            if name not in (*_APART, *differing) and value != ""
        },
        "untuned": _untuned(groups),
        "variants": [_variant(name, group, differing) for name, group in groups.items()],
    }
    if by:
        document["by"] = by
        document["differences"] = _differences(groups, by)
    return document


def read_document(path: Path) -> Document:
    """The content of a result file; what stands in it is for its reader to check.

    Raises:
        ComparisonError: it cannot be read, or is none.
    """
    try:
        found = read_json(path, max_bytes=_MAX_BYTES)
    except (OSError, DocumentError) as error:
        raise ComparisonError(f"expected a result of `fedkseed compare --json` in {path}: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ComparisonError(
            f"expected a result of `fedkseed compare --json`, format {FORMAT}, in {path}, got {shown(found)}"
        )
    return found


def _check_alike(runs: Sequence[FinishedRun]) -> None:
    """Raises unless all runs are scored alike on the same rows; of each seed, if seeds divide the data."""
    first = runs[0]
    by_seed = {first.seed: first}
    for run in runs[1:]:
        if run.kind != first.kind:
            raise _unlike("rows of one kind", (first, first.kind), (run, run.kind))
        if run.data != first.data:
            raise _unlike("runs over one data set", (first, first.data), (run, run.data))
        for name in _MEASURED_BY:
            ours, theirs = first.settings.get(name), run.settings.get(name)
            if ours != theirs:
                raise _unlike(f"runs with one {name}", (first, ours), (run, theirs))
        same = by_seed.setdefault(run.seed, run)
        if run.rows != same.rows:
            raise _unlike(
                f"the same rows of {first.data} in runs from seed {run.seed}",
                (same, f"rows {same.rows[:12]}..."),
                (run, f"rows {run.rows[:12]}..."),
            )


def _unlike(expected: str, *found: tuple[FinishedRun, Any]) -> ComparisonError:
    got = " and ".join(f"{shown(value)} in {run.folder}" for run, value in found)
    return ComparisonError(f"expected {expected}, got {got}; compare each with runs of its own kind")


def _grouped(runs: Sequence[FinishedRun]) -> dict[str, Group]:
    """The runs of each variant by its name, by rising seed."""
    groups: dict[tuple[Any, ...], Group] = {}
    for run in runs:
        settings = sorted((name, repr(value)) for name, value in run.settings.items() if name not in _APART)
        key = (run.variant, run.machine["num_parameters"], run.machine["weight_bytes"], *settings)
        groups.setdefault(key, []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: run.seed)
        for one, next_one in pairwise(group):
            if one.seed == next_one.seed:
                raise ComparisonError(
                    "expected runs that differ in their seed or in another setting, got "
                    f"{one.folder} and {next_one.folder}, which differ in nothing; leave one out"
                )
    return dict(zip(_names([group[0] for group in groups.values()]), groups.values(), strict=True))


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """A name of each variant, no two alike: its folder's in a sweep, else its method's and what differs."""
    plain = [run.variant or _method(run) for run in runs]
    names: list[str] = []
    for run, name in zip(runs, plain, strict=True):
        alike = [other for other, its in zip(runs, plain, strict=True) if its == name]
        parts = [f"{key}={shown(run.settings.get(key))}" for key in _differing(alike)]
        full = ", ".join([name, *parts]) if len(alike) > 1 else name
        names.append(full if full not in names else f"{full} ({len(names) + 1})")
    return names


def _method(run: FinishedRun) -> str:
    method = str(run.settings.get("method", "fedkseed"))
    return "pro" if method == "fedkseed" and run.settings.get("sampling") == "pro" else method


def _differing(runs: Sequence[FinishedRun]) -> list[str]:
    """Settings in which the variants differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _APART)
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]


def _check_seeds(groups: Mapping[str, Group]) -> None:
    """Raises where each seed divides the data anew and two variants share no seed: no row is common."""
    runs = [run for group in groups.values() for run in group]
    if len({run.rows for run in runs}) == 1:
        return
    names = list(groups)
    seeds = [{run.seed for run in group} for group in groups.values()]
    for name, found in zip(names[1:], seeds[1:], strict=True):
        if not found & seeds[0]:
            raise ComparisonError(
                f"expected a seed that {names[0]} and {name} share, since each seed divides the data anew, "
                f"got {_listed(seeds[0])} and {_listed(found)}; run one of them with the other's seed"
            )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _variant(name: str, group: Group, differing: Sequence[str]) -> Document:
    first = group[0]
    scores = _spreads([run.scores for run in group])
    intervals = {
        score: [_rounded_bounds(run.intervals[score]) for run in group]
        for score in first.intervals
        if score in scores
    }
    return {
        "name": name,
        "title": first.title,
        "seeds": [run.seed for run in group],
        "rounds": len(first.curve),
        "settings": {key: first.settings.get(key) for key in differing},
        "scores": scores,
        "not_finite": _not_finite(group),
        "intervals": intervals,
        "costs": _spreads([run.costs for run in group]),
        "curve": _curve(group),
    }


def _not_finite(group: Group) -> dict[str, list[int]]:
    """The seeds whose tuned models have no finite value of a score that untuned ones have, by its name."""
    found: dict[str, list[int]] = {}
    for run in group:
        for name in run.untuned[ZERO_SHOT].values.keys() - run.scores.keys():
            found.setdefault(name, []).append(run.seed)
    return dict(sorted(found.items()))


def _untuned(groups: Mapping[str, Group]) -> list[Document]:
    """What needs no training, a row each: the untuned model by each way of asking it, majority answers."""
    asked: dict[tuple[str, ...], dict[int, FinishedRun]] = {}
    owners: dict[tuple[str, ...], str] = {}
    seeds: dict[int, FinishedRun] = {}
    for name, group in groups.items():
        for run in group:
            seeds.setdefault(run.seed, run)
            if run.curve:  # else it is itself the untuned model
                key = tuple(repr(run.settings.get(setting)) for setting in _ASKED_BY)
                owners.setdefault(key, name)
                asked.setdefault(key, {}).setdefault(run.seed, run)
    rows = []
    for kind in (ZERO_SHOT, SHIFTED):
        for key, runs in asked.items():
            name = kind if len(asked) == 1 else f"{kind}, as {owners[key]}"
            rows += _untuned_rows(name, kind, runs)
    return [*rows, *_untuned_rows(MAJORITY, MAJORITY, seeds)]


def _untuned_rows(name: str, kind: str, runs: Mapping[int, FinishedRun]) -> list[Document]:
    """The row of what needs no training, if these runs have it."""
    known = {seed: run.untuned[kind] for seed, run in sorted(runs.items()) if kind in run.untuned}
    if not known:
        return []
    scores = _spreads([found.values for found in known.values()])
    intervals = {
        score: [_rounded_bounds(found.intervals[score]) for found in known.values()]
        for score in scores
        if all(score in found.intervals for found in known.values())
    }
    return [{"name": name, "seeds": list(known), "scores": scores, "intervals": intervals}]


def _spreads(found: Sequence[Mapping[str, float]]) -> dict[str, Document]:
    """Mean, standard deviation (null of one run) and values of each name that all runs have."""
    names = [name for name in found[0] if all(name in values for values in found)] if found else []
    return {name: _spread([values[name] for values in found]) for name in names}


def _spread(values: Sequence[float]) -> Document:
    deviation = stdev(values) if len(values) > 1 else None
    return {
        "mean": _rounded(fmean(values)),
        "sd": None if deviation is None else _rounded(deviation),
        "values": [_rounded(value) for value in values],
    }


def _curve(group: Group) -> Document:
    """Mean and spread over seeds of each round; null in rounds that not every seed has scored."""
    points = list(zip(*(run.curve for run in group), strict=True))
    curve: Document = {"round": [number for number, _ in enumerate(points, 1)]}
    for axis in ("bytes", "forward_passes"):
        totals = [[point.get(axis) for point in same] for same in points]
        if all(total is not None for same in totals for total in same):
            curve[axis] = [_rounded(fmean(total for total in same if total is not None)) for same in totals]
    for name in CURVES:
        known = [[value for point in same if (value := point.get(name)) is not None] for same in points]
        whole = [_spread(values) if len(values) == len(group) else None for values in known]
        if any(whole):
            curve[name] = {
                part: [None if spread is None else spread[part] for spread in whole]
                for part in ("mean", "sd")
            }
    return curve


def _differences(groups: Mapping[str, Group], by: str) -> list[Document]:
    """Each other variant against one, seed by seed: scores less its scores, costs as a share of its costs."""
    if by not in groups:
        raise ComparisonError(f"expected --by one of {', '.join(groups)}, got {by!r}")
    base = {run.seed: run for run in groups[by]}
    rows = []
    for name, group in groups.items():
        pairs = [(run, base[run.seed]) for run in group if run.seed in base]
        if name == by or not pairs:
            continue
        less = [
            {score: run.scores[score] - other.scores[score] for score in run.scores if score in other.scores}
            for run, other in pairs
        ]
        shares = [
            {cost: run.costs[cost] / other.costs[cost] for cost in run.costs if other.costs.get(cost)}
            for run, other in pairs
        ]
        rows.append(
            {
                "name": name,
                "seeds": [run.seed for run, _ in pairs],
                "scores": _spreads(less),
                "costs": _spreads(shares),
            }
        )
    return rows


def _rounded_bounds(bounds: Bounds) -> list[float]:
    return [_rounded(value) for value in bounds]


def _rounded(value: float) -> float:
    """The value with so many digits as a result file keeps; counts whole."""
    return int(value) if float(value).is_integer() else float(f"{value:.{_DIGITS}g}")
