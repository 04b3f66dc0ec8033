"""Rows of a user's data: JSON lines, CSV, Parquet, or a data set of the Hugging Face hub.

A file may be large; a line (a CSV record, a value of Parquet) is at most `MAX_ROW_BYTES` long and JSON is
nested at most as `fedkseed.documents` says. Only the fields that are asked for are kept.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from fedkseed._extras import require_extra
from fedkseed.data.errors import DataError
from fedkseed.documents import MAX_JSON_BYTES, DocumentError, json_lines

#: Bytes of one row, whatever the form of its file.
MAX_ROW_BYTES = MAX_JSON_BYTES
HUB = "hub:"
EXTRA = "data"
#: How the forms of a source are told to a user.
FORMS = (
    "*.jsonl, *.csv, *.parquet, a folder with tasks/ and splits/ (Natural Instructions) or "
    "hub:NAME[:CONFIG]@REVISION"
)

_BATCH = 256


@dataclass(frozen=True)
class Record:
    """One row as it stands in its source.

    Attributes:
        where: for messages, such as "line 7 of rows.jsonl".
        values: by field; anything that the source may hold.
    """

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set that can be read once or more.

    Attributes:
        name: for messages.
        fields: of its first row, or its columns.
        read: an iterator over all rows with the fields that it is given (a row may lack one).
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[Record]]

    def records(self, names: Sequence[str]) -> Iterator[Record]:
        """All rows in their order, with the fields ``names``.

        Raises:
            DataError: a row that cannot be read; says which.
        """
        with _typed(self.name):
            yield from self.read(names)


def open_source(text: str) -> Source:
    """The source that a user names by its form (`FORMS`; Natural Instructions have a module of their own).

    Raises:
        DataError: no such form or file, a file that is not what its name says, or one without rows.
        MissingExtraError: Parquet or the hub without the extra ``data``.
    """
    if text.startswith(HUB):
        return open_hub(*parse_hub(text))
    path = Path(text)
    openers = {".jsonl": _open_json_lines, ".csv": _open_csv, ".parquet": open_parquet}
    opener = openers.get(path.suffix.lower())
    if opener is None:
        raise DataError(f"expected data of a known form ({FORMS}), got {text[:200]!r}")
    if not os.path.isfile(text):  # unlike Path's method it never raises
        raise DataError(
            f"expected a file, got {text[:200]!r}, which is none; data names it"
            + ("" if path.is_absolute() else ", from the current folder")
        )
    with _typed(text):
        return opener(path)


def parse_hub(text: str) -> tuple[str, str | None, str]:
    """Name, configuration and revision of ``hub:NAME[:CONFIG]@REVISION``.

    Raises:
        DataError: another form; the revision must be named, or a run could not be repeated.
    """
    identity, _, revision = text.removeprefix(HUB).partition("@")
    name, colon, configuration = identity.partition(":")
    if not name or not revision or (colon and not configuration):
        raise DataError(
            f"expected hub:NAME[:CONFIG]@REVISION, got {text[:200]!r}; the revision (a commit of the data "
            "set, or a tag) makes the run repeatable"
        )
    return name, configuration or None, revision


def open_hub(name: str, configuration: str | None, revision: str | None) -> Source:
    """A data set of the hub, or a local folder of data files, through the package `datasets`.

    The package runs no code of a data set. Of several splits ``train`` is read, else the only one. Numbered
    classes are read by their names.

    Raises:
        DataError: it cannot be had, or has several splits and no ``train``.
        MissingExtraError: the extra ``data`` is not installed.
    """
    require_extra(EXTRA, "datasets", "pyarrow")
    import datasets

    try:
        loaded = datasets.load_dataset(name, configuration, revision=revision)
    except Exception as error:  # the package, its readers and its transport raise errors of many kinds
        raise DataError(
            f"expected the data set {name} at {revision}, got: {_reason(error)} ({type(error).__name__})"
        ) from error
    splits = list(loaded)
    split = "train" if "train" in splits else splits[0]
    if split != "train" and len(splits) > 1:
        raise DataError(f"expected a split train of {name}, got the splits {', '.join(sorted(splits))}")
    table = loaded[split]
    classes = {
        field: feature.names
        for field, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }

    def read(names: Sequence[str]) -> Iterator[Record]:
        chosen = [field for field in names if field in table.column_names]
        for record in _of_batches(table.select_columns(chosen).iter(_BATCH), name):
            values = {
                field: _class_name(value, classes[field]) if field in classes else value
                for field, value in record.values.items()
            }
            yield Record(record.where, values)

    return _with_rows(Source(f"{name} ({split})", tuple(table.column_names), read), len(table))


def _class_name(value: int | None, names: Sequence[str]) -> str | None:
    """The name of a numbered class; None if there is none (data sets write -1)."""
    return names[value] if value is not None and 0 <= value < len(names) else None


def _open_json_lines(path: Path) -> Source:
    def read(names: Sequence[str]) -> Iterator[Record]:
        for number, value in json_lines(path, max_line_bytes=MAX_ROW_BYTES):
            where = f"line {number} of {path}"
            if not isinstance(value, dict):
                raise DataError(f"expected one JSON object a line, got {str(value)[:80]!r} in {where}")
            yield Record(where, {name: value[name] for name in names if name in value})

    for number, value in json_lines(path, max_line_bytes=MAX_ROW_BYTES):
        if not isinstance(value, dict):
            raise DataError(
                f"expected one JSON object a line, got {str(value)[:80]!r} in line {number} of {path}"
            )
        return Source(str(path), tuple(value), read)
    raise _empty(path)


def _open_csv(path: Path) -> Source:
    def rows() -> Iterator[tuple[int, list[str]]]:
        with path.open("rb") as file:
            lines = _CsvLines(file, path)
            reader = csv.reader(lines, strict=True)
            while True:
                first = lines.number + 1
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    raise DataError(f"expected CSV in line {first} of {path}, got: {error}") from error
                if row is None:
                    return
                lines.begin_record()
                if row:
                    yield first, row

    def read(names: Sequence[str]) -> Iterator[Record]:
        for number, row in rows():
            if number == header_line:
                continue
            where = f"line {number} of {path}"
            if len(row) != len(header):
                raise DataError(
                    f"expected {len(header)} columns as in the header, got {len(row)} in {where}; a text "
                    "with a comma stands in double quotes"
                )
            values = dict(zip(header, row, strict=True))
            yield Record(where, {name: values[name] for name in names if name in values})

    header_line, header = next(rows(), (0, []))
    if not header_line:
        raise _empty(path)
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"expected different columns in the header of {path}, got {twice[:80]!r} twice")
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise DataError(f"expected columns with commas between them in {path}, got {header[0][:80]!r}")
    return Source(str(path), tuple(header), read)


class _CsvLines:
    """Decoded lines of a file, as many as a record of `MAX_ROW_BYTES` may have."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = self._offset = 0
        self.number = 0

    def begin_record(self) -> None:
        """What follows belongs to another record."""
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_ROW_BYTES + 1):
            self.number += 1
            self._size += len(line)
            if self._size > MAX_ROW_BYTES:
                raise DataError(
                    f"expected a record of at most {MAX_ROW_BYTES:,} bytes, got more, up to line "
                    f"{self.number} of {self._path}; a double quote may lack its other one"
                )
            try:
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"expected UTF-8 in line {self.number} of {self._path}, got other bytes at offset "
                    f"{self._offset + error.start}"
                ) from error
            self._offset += len(line)


def open_parquet(path: Path) -> Source:
    """A Parquet file.

    Raises:
        DataError: it is none, or has no rows.
        MissingExtraError: the extra ``data`` is not installed.
    """
    require_extra(EXTRA, "pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            fields, num_rows = tuple(file.schema_arrow.names), file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"expected Parquet in {path}, got: {_reason(error)}") from error

    def read(names: Sequence[str]) -> Iterator[Record]:
        chosen = [name for name in names if name in fields]
        try:
            with parquet.ParquetFile(path) as file:
                batches = file.iter_batches(_BATCH, columns=chosen)
                yield from _of_batches((batch.to_pydict() for batch in batches), str(path))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"expected Parquet in {path}, got: {_reason(error)}") from error

    return _with_rows(Source(str(path), fields, read), num_rows)


def _of_batches(batches: Iterable[Mapping[str, Sequence[Any]]], name: str) -> Iterator[Record]:
    numbers = count(1)
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            yield Record(f"row {next(numbers)} of {name}", dict(zip(batch, values, strict=True)))


def _with_rows(source: Source, num_rows: int) -> Source:
    if not num_rows:
        raise _empty(source.name)
    return source


def _empty(name: object) -> DataError:
    return DataError(f"expected at least one row in {name}, got none")


def _reason(error: Exception) -> str:
    """The first line of what a package says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextmanager
def _typed(name: str) -> Iterator[None]:
    """A context that makes `DataError` of what the readers raise."""
    try:
        yield
    except DocumentError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"expected a file that can be read, got {name}: {error}") from error
