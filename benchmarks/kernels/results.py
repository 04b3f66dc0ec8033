"""The result file: how it is made from pytest-benchmark's JSON, and what it must hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.measure import spread

SCHEMA_VERSION = 1

Document = dict[str, Any]

_DOCUMENT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "command": str,
    "environment": dict,
    "settings": dict,
    "num_parameters": int,
    "rows": list,
    "memory": list,
}
_ENVIRONMENT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "date": str,
    "commit": str,
    "cpu": str,
    "cpu_flags": list,
    "num_cpus": int,
    "load_average": float,
    "load_average_after": float,
    "system": str,
    "machine": str,
    "python": str,
    "torch": str,
    "numpy": str,
    "fedkseed_kernels": str,
    "contract_version": int,
}
_ROW_FIELDS: dict[str, type | tuple[type, ...]] = {
    "case": str,
    "title": str,
    "operation": str,
    "family": str,
    "num_seeds": int,
    "contestant": str,
    "kind": str,
    "isa": str,
    "answer_checked": bool,
    "samples": list,
    "repeats": int,
    "num_normals": int,
    "num_bytes": int,
    "extrapolated": bool,
    "seconds": dict,
    "gb_per_s": float,
    "g_normals_per_s": float,
}
_MEMORY_FIELDS: dict[str, type | tuple[type, ...]] = {
    "operation": str,
    "num_elements": int,
    "num_seeds": int,
    "dtype": str,
    "tensor_bytes": int,
    "growth_bytes": int,
}


class ResultError(ValueError):
    """A result file does not hold what it must."""


def finish_row(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its derived figures: seconds of the whole operation, GB/s and 10^9 normals/s at the median.

    A contestant with repeats > 1 was timed for 1/repeats of the operation: its seconds are extrapolated.
    """
    repeats = raw["repeats"]
    seconds = {name: value * repeats for name, value in spread(raw["samples"]).items()}
    return {
        **raw,
        "extrapolated": repeats > 1,
        "seconds": seconds,
        "gb_per_s": raw["num_bytes"] / seconds["median"] / 1e9,
        "g_normals_per_s": raw["num_normals"] / seconds["median"] / 1e9,
    }


def rows_of(pytest_benchmark_json: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows in the order in which the suite ran."""
    return [finish_row(entry["extra_info"]) for entry in pytest_benchmark_json["benchmarks"]]


def check(document: Mapping[str, Any]) -> None:
    """Raises ResultError when a field is missing or of another type, or a duration is not positive."""
    _check_fields("the document", document, _DOCUMENT_FIELDS)
    if document["schema"] != SCHEMA_VERSION:
        raise ResultError(
            f"expected schema {SCHEMA_VERSION}, got {document['schema']}; run the benchmarks again"
        )
    _check_fields("the environment", document["environment"], _ENVIRONMENT_FIELDS)
    if not document["rows"]:
        raise ResultError("expected at least one row, got none; run the benchmarks again")
    for row in document["rows"]:
        where = f"row {row.get('case')}, {row.get('contestant')}"
        _check_fields(where, row, _ROW_FIELDS)
        if not row["samples"] or min(row["samples"]) <= 0 or set(row["seconds"]) != {"median", "p20", "p80"}:
            raise ResultError(f"{where}: expected positive samples and their spread, got {row['samples']}")
    for entry in document["memory"]:
        _check_fields(f"memory of {entry.get('operation')}", entry, _MEMORY_FIELDS)


def _check_fields(where: str, got: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]]) -> None:
    for name, kind in fields.items():
        if name not in got:
            raise ResultError(
                f"{where}: expected the field {name}, got {sorted(got)}; run the benchmarks again"
            )
        if not isinstance(got[name], kind):
            raise ResultError(
                f"{where}: expected {name} to be {kind}, got {got[name]!r}; run the benchmarks again"
            )


def read(path: Path) -> Document:
    """A checked result file.

    Raises:
        ResultError: it is not JSON, or `check` refuses it.
    """
    try:
        document: Document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultError(f"expected JSON in {path.name}, got {error}; run the benchmarks again") from error
    check(document)
    return document


def write(document: Document, folder: Path) -> Path:
    """Writes the checked document, whole or not at all, in a file named by `file_stem`; returns its path."""
    check(document)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(document)}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(partial, path)
    return path


def file_stem(document: Document) -> str:
    """kernels-<cpu>-<best instruction set>-<threads>t-<model>-<dtype>"""
    settings, environment = document["settings"], document["environment"]
    parts = [environment["cpu"], best_isa(document["rows"]), f"{settings['num_threads']}t", settings["model"]]
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join([*parts, settings["dtype"]]).lower()).strip("-")
    return f"kernels-{slug}"


def best_isa(rows: Sequence[Mapping[str, Any]]) -> str:
    """The instruction set that our kernels chose by themselves: the first of ours in each case."""
    return next((str(row["isa"]) for row in rows if row["kind"] == "ours"), "none")
