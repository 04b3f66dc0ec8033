"""Partitions: which client holds which rows, by a field, evenly, or unevenly by a field.

Every draw comes from NumPy's ``default_rng`` with the seed and the draw's purpose; nothing depends on the
hash seed of Python, or on the order of fields.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedkseed.data.errors import DataError, choose_from

#: How the forms of a partition are told to a user.
FORMS = "by:FIELD, iid:N or dirichlet:FIELD:ALPHA:N"
MAX_CLIENTS = 1_000_000

#: Rows that each client of a Dirichlet partition has at least, if there are enough.
MIN_DIRICHLET_ROWS = 10
MAX_REDRAWS = 1000
_ALPHAS = (1e-3, 1e6)

_UNNAMED = "(empty)"


def generator(seed: int, purpose: str, name: str = "") -> np.random.Generator:
    """The draws of one purpose, and of one name where each name has draws of its own."""
    return np.random.default_rng([seed % 2**64, zlib.crc32(purpose.encode()), zlib.crc32(name.encode())])


@dataclass(frozen=True)
class Partition:
    """How rows are divided among clients.

    Attributes:
        kind: "by" a field's values, "iid" in equal parts, "dirichlet" in shares drawn for each value.
        field: whose values count; empty with "iid".
        num_clients: 0 with "by".
        alpha: of "dirichlet": the smaller, the more unlike the clients.
    """

    kind: Literal["by", "iid", "dirichlet"]
    field: str = ""
    num_clients: int = 0
    alpha: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Partition:
        """The partition that a user names.

        Raises:
            DataError: none of `FORMS`, or a number out of range.
        """
        kind, _, rest = text.partition(":")
        if kind == "by" and rest:
            return cls("by", field=rest)
        if kind == "iid" and rest:
            return cls("iid", num_clients=_num_clients(rest, text))
        parts = rest.rsplit(":", 2)
        if kind == "dirichlet" and len(parts) == 3 and parts[0]:
            return cls("dirichlet", parts[0], _num_clients(parts[2], text), _alpha(parts[1], text))
        raise DataError(f"expected a partition such as {FORMS}, got {text[:80]!r}")

    def check_field(self, fields: Collection[str]) -> None:
        """Checks that the field is there.

        Raises:
            DataError: it is not; names the nearest one.
        """
        if self.field and self.field not in fields:
            raise DataError(choose_from("the partition's field", self.field, fields))

    def divide(self, num_rows: int, values: Sequence[str], seed: int) -> dict[str, list[int]]:
        """Each client's name and rows, at least one; every row has one client.

        Args:
            num_rows: how many there are.
            values: of the partition's field, one a row; not used by "iid".
            seed: of the draws.

        Raises:
            DataError: more clients than rows, or no draw gives each client enough.
        """
        if self.num_clients > num_rows:
            raise DataError(
                f"expected at most as many clients as rows, got {self.num_clients:,} clients for "
                f"{num_rows:,} rows; take fewer clients"
            )
        if self.kind == "by":
            rows_of = _by_value(values)
            unnamed = _UNNAMED
            while unnamed in rows_of:
                unnamed = f"({unnamed})"
            return {value or unnamed: rows for value, rows in rows_of.items()}
        drawn = generator(seed, self.kind)
        if self.kind == "iid":
            parts = [part.tolist() for part in np.array_split(drawn.permutation(num_rows), self.num_clients)]
        else:
            parts = _dirichlet(list(_by_value(values).values()), self.num_clients, self.alpha, drawn)
        width = len(str(self.num_clients - 1))
        return {f"client-{number:0{width}}": sorted(part) for number, part in enumerate(parts)}


def _dirichlet(
    classes: Sequence[Sequence[int]], num_clients: int, alpha: float, drawn: np.random.Generator
) -> list[list[int]]:
    """Rows of each client: of every class, shares drawn from a symmetric Dirichlet distribution.

    As in the paper's experiments (github.com/zhenqincn/FedKSeed at commit ebf8216,
    utils_data/partition_data): the share of a client that already holds rows / clients or more is set to
    0, the others are renormalised, and the whole is drawn anew until every client has enough rows. Here the
    redraws are bounded, and few rows ask for fewer than ten each.
    """
    num_rows = sum(map(len, classes))
    enough = max(1, min(MIN_DIRICHLET_ROWS, num_rows // (2 * num_clients)))
    best = 0
    for _ in range(MAX_REDRAWS):
        held: list[list[int]] = [[] for _ in range(num_clients)]
        for rows in classes:
            shares = drawn.dirichlet(np.full(num_clients, alpha))
            shares *= [len(own) < num_rows / num_clients for own in held]
            total = float(shares.sum())
            if not total > 0:
                break  # of tiny alphas: the whole class fell to clients that hold enough
            ends = (np.cumsum(shares / total) * len(rows)).astype(int)[:-1]
            for own, part in zip(held, np.split(drawn.permutation(rows), ends), strict=True):
                own += part.tolist()
        else:
            fewest = min(map(len, held))
            if fewest >= enough:
                return held
            best = max(best, fewest)
    raise DataError(
        f"expected at least {enough} rows for each of {num_clients:,} clients, got {best} at best in "
        f"{MAX_REDRAWS:,} draws of dirichlet shares; raise ALPHA or take fewer clients"
    )


def _by_value(values: Sequence[str]) -> dict[str, list[int]]:
    """Rows of each value, values sorted."""
    found: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        found.setdefault(value, []).append(row)
    return dict(sorted(found.items()))


def _num_clients(text: str, whole: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 7 and 1 <= int(text) <= MAX_CLIENTS):
        raise DataError(f"expected N of clients in [1, {MAX_CLIENTS:,}] in {whole[:80]!r}, got {text[:80]!r}")
    return int(text)


def _alpha(text: str, whole: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not _ALPHAS[0] <= alpha <= _ALPHAS[1]:
        raise DataError(
            f"expected ALPHA in [{_ALPHAS[0]:g}, {_ALPHAS[1]:g}] in {whole[:80]!r}, got {text[:80]!r}"
        )
    return alpha
