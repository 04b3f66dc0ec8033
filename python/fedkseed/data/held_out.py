"""Rows and clients that nobody trains on: drawn so that no prompt stands on both sides."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from fedkseed.data.errors import DataError, choose_from
from fedkseed.data.partition import generator


@dataclass(frozen=True)
class HeldOutClients:
    """Which clients are held out whole.

    Attributes:
        field: rows with one of ``values`` in it are; a client for each value.
        values: of ``field``.
        fraction: of the clients that the partition makes; 0 with a field, or for none.
    """

    field: str = ""
    values: tuple[str, ...] = ()
    fraction: float = 0.0

    @classmethod
    def parse(cls, text: str) -> HeldOutClients:
        """FIELD=VALUE, FIELD=VALUE,VALUE, a fraction, or nothing.

        Raises:
            DataError: another form, or a fraction out of range.
        """
        if not text:
            return cls()
        field, equals, values = text.partition("=")
        if not equals:
            return cls(fraction=_fraction(text))
        # FIELD=A,FIELD=B says the same as FIELD=A,B.
        found = tuple(value.removeprefix(f"{field}=") for value in values.split(","))
        if not field or not all(found):
            raise DataError(f"expected held-out clients as FIELD=VALUE,... or a fraction, got {text[:80]!r}")
        return cls(field, tuple(dict.fromkeys(found)))

    def check(self, fields: Collection[str]) -> None:
        """Checks that the field is there.

        Raises:
            DataError: it is not; names the nearest one.
        """
        if self.field and self.field not in fields:
            raise DataError(choose_from("the held-out clients' field", self.field, fields))

    def by_value(self, values: Sequence[str]) -> dict[str, list[int]]:
        """Rows of each held-out value.

        Args:
            values: of the field, one a row.

        Raises:
            DataError: no row has one of them, or every row has.
        """
        found = {value: [row for row, own in enumerate(values) if own == value] for value in self.values}
        for value, rows in found.items():
            if not rows:
                raise DataError(choose_from(f"a held-out value of {self.field}", value, set(values)))
        if values and sum(map(len, found.values())) == len(values):
            raise DataError(f"expected rows to train on, got all of them held out by {self.field}")
        return found

    def drawn(self, names: Sequence[str], seed: int) -> list[str]:
        """The held-out ones among the clients that the partition has made, at least one.

        Raises:
            DataError: no client is left to train.
        """
        if not self.fraction:
            return []
        if len(names) < 2:
            raise DataError("expected at least two clients, of which one is held out, got one")
        number = min(max(1, round(self.fraction * len(names))), len(names) - 1)
        order = generator(seed, "held-out clients").permutation(len(names))
        return [names[index] for index in sorted(order[:number].tolist())]


def divide_rows(
    clients: Mapping[str, Sequence[int]], prompts: Sequence[Hashable], fraction: float, seed: int
) -> dict[str, tuple[list[int], list[int]]]:
    """Each client's training and held-out rows.

    Rows of one prompt stay on one side; a prompt that several clients have is trained on. A client holds out
    the share of its rows, at least one if it has two prompts, and trains on one at least.

    Args:
        clients: rows by name.
        prompts: of each row.
        fraction: of each client's rows to hold out, in [0, 1).
        seed: of the draws; each client has draws of its own.

    Raises:
        DataError: a fraction out of range.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"expected a held-out fraction in [0, 1), got {fraction}")
    owners: dict[Hashable, set[str]] = {}
    for name, rows in clients.items():
        for row in rows:
            owners.setdefault(prompts[row], set()).add(name)
    divided = {}
    for name, rows in clients.items():
        together: dict[Hashable, list[int]] = {}
        for row in rows:
            if len(owners[prompts[row]]) == 1:
                together.setdefault(prompts[row], []).append(row)
        own = list(together.values())
        wanted = max(1, round(fraction * len(rows))) if fraction else 0
        held_out: list[int] = []
        for index in generator(seed, "held-out rows", name).permutation(len(own)).tolist():
            if len(held_out) + len(own[index]) <= min(wanted, len(rows) - 1):
                held_out += own[index]
        if wanted and own and not held_out:
            fewest = min(own, key=len)  # each prompt stands more often than is wanted
            held_out = fewest if len(fewest) < len(rows) else []
        out = set(held_out)
        divided[name] = [row for row in rows if row not in out], sorted(held_out)
    return divided


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise DataError(
            f"expected held-out clients as FIELD=VALUE,... or a fraction in (0, 1), got {text[:80]!r}"
        )
    return fraction
