"""Partitions of rows among clients, and rows and clients that nobody trains on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkseed.data.errors import DataError
from fedkseed.data.held_out import HeldOutClients, divide_rows
from fedkseed.data.partition import MIN_DIRICHLET_ROWS, Partition

VALUES = [f"category {number * number % 7}" for number in range(400)]


def divided(text: str, seed: int = 0, values: list[str] | None = None) -> dict[str, list[int]]:
    values = VALUES if values is None else values
    parts = Partition.parse(text).divide(len(values), values, seed)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(values)))
    assert all(parts.values())
    return parts


def test_by_a_field_each_value_is_a_client() -> None:
    parts = divided("by:a:field")
    assert Partition.parse("by:a:field").field == "a:field"
    assert list(parts) == sorted(set(VALUES))
    assert all({VALUES[row] for row in rows} == {name} for name, rows in parts.items())
    assert list(divided("by:x", values=["b", "", "a"])) == ["(empty)", "a", "b"]


def test_iid_clients_have_equal_parts() -> None:
    parts = divided("iid:7")
    assert list(parts) == [f"client-{number}" for number in range(7)]
    assert Counter(map(len, parts.values())) == {57: 6, 58: 1}
    assert parts != divided("iid:7", seed=1)
    assert parts == divided("iid:7", values=VALUES[::-1])
    assert list(divided("iid:12"))[:2] == ["client-00", "client-01"]
    assert divided("iid:1") == {"client-0": list(range(400))}


def test_dirichlet_clients_are_unlike_but_none_is_small() -> None:
    even, uneven = divided("dirichlet:category:100:10"), divided("dirichlet:category:0.3:10")
    for parts in (even, uneven):
        assert min(map(len, parts.values())) >= MIN_DIRICHLET_ROWS
        assert max(map(len, parts.values())) < 400 * 0.5
    most = {
        kind: [
            Counter(VALUES[row] for row in rows).most_common(1)[0][1] / len(rows) for rows in parts.values()
        ]
        for kind, parts in (("even", even), ("uneven", uneven))
    }
    assert sum(most["even"]) / 10 < 0.4 < 0.55 < sum(most["uneven"]) / 10
    assert uneven != divided("dirichlet:category:0.3:10", seed=1)


def test_a_client_that_holds_its_part_gets_no_more_of_the_next_class() -> None:
    """One of two clients that got all of a class as large as half of the rows gets none of the others."""
    values = ["a"] * 100 + ["b"] * 50 + ["c"] * 50
    num_full = 0
    for seed in range(20):
        parts = divided("dirichlet:x:0.01:2", seed, values)
        full = [rows for rows in parts.values() if sum(row < 100 for row in rows) == 100]
        assert all(rows == list(range(100)) for rows in full)
        num_full += len(full)
    assert num_full > 10


def test_few_rows_ask_for_fewer_each() -> None:
    parts = divided("dirichlet:category:0.5:10", values=VALUES[:40])
    assert min(map(len, parts.values())) >= 2


def test_draws_that_never_suffice_end_with_an_error() -> None:
    with pytest.raises(
        DataError,
        match=r"at least 10 rows for each of 15 clients, got \d+ at best in 1,000 draws .*; raise ALPHA",
    ):
        divided("dirichlet:category:0.001:15", values=["a"] * 400)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a partition such as by:FIELD, iid:N or dirichlet:FIELD:ALPHA:N, got ''"),
        ("by:", "expected a partition such as"),
        ("iid", "expected a partition such as"),
        ("idd:3", "expected a partition such as"),
        ("dirichlet:0.5:3", "expected a partition such as"),
        ("dirichlet::0.5:3", "expected a partition such as"),
        ("iid:0", r"expected N of clients in \[1, 1,000,000\] in 'iid:0', got '0'"),
        ("iid:-1", "got '-1'"),
        ("iid:1.5", "got '1.5'"),
        ("iid:²", "got '²'"),
        ("iid:99999999", "got '99999999'"),
        ("dirichlet:a:0:3", r"expected ALPHA in \[0.001, 1e\+06\] in 'dirichlet:a:0:3', got '0'"),
        ("dirichlet:a:nan:3", "got 'nan'"),
        ("dirichlet:a:inf:3", "got 'inf'"),
        ("dirichlet:a:b:3", "got 'b'"),
    ],
)
def test_a_partition_of_no_form_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Partition.parse(text)


def test_what_a_partition_cannot_do_is_refused() -> None:
    with pytest.raises(DataError, match="as many clients as rows, got 5 clients for 4 rows; take fewer"):
        divided("iid:5", values=VALUES[:4])
    with pytest.raises(
        DataError, match="field out of category, text, got 'catgory'; the nearest is 'category'"
    ):
        Partition.parse("by:catgory").check_field(["text", "category"])


# Held out


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    clients=st.integers(1, 6),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 0.9]),
    seed=st.integers(0, 3),
)
def test_no_prompt_is_on_both_sides(prompts: list[int], clients: int, fraction: float, seed: int) -> None:
    parts = {f"c{number}": list(range(number, len(prompts), clients)) for number in range(clients)}
    parts = {name: rows for name, rows in parts.items() if rows}
    result = divide_rows(parts, prompts, fraction, seed)
    trained = {prompts[row] for rows, _ in result.values() for row in rows}
    held_out = {prompts[row] for _, rows in result.values() for row in rows}
    assert not trained & held_out
    for name, (rows, out) in result.items():
        assert rows
        assert sorted(rows + out) == sorted(parts[name])
        if not fraction:
            assert not out
    assert result == divide_rows(parts, prompts, fraction, seed)


def test_a_client_holds_out_its_share() -> None:
    parts = {"large": list(range(100)), "small": [100, 101], "one": [102]}
    result = divide_rows(parts, list(range(103)), 0.1, 0)
    assert [len(out) for _, out in result.values()] == [10, 1, 0]
    assert result != divide_rows(parts, list(range(103)), 0.1, 1)
    same = divide_rows({"x": [0, 1, 2, 3]}, ["a", "a", "b", "b"], 0.1, 0)
    assert sorted(same["x"]) in ([[0, 1], [2, 3]],)
    assert divide_rows({"x": [0, 1, 2]}, ["a"] * 3, 0.5, 0) == {"x": ([0, 1, 2], [])}


def test_a_clients_draw_does_not_depend_on_the_others() -> None:
    prompts = list(range(40))
    both = divide_rows({"a": list(range(20)), "b": list(range(20, 40))}, prompts, 0.3, 0)
    assert divide_rows({"b": list(range(20, 40))}, prompts, 0.3, 0)["b"] == both["b"]


def test_held_out_clients_by_value_and_by_fraction() -> None:
    chosen = HeldOutClients.parse("category=b,a")
    assert chosen == HeldOutClients("category", ("b", "a"))
    assert HeldOutClients.parse("category=b,category=a") == chosen
    assert chosen.by_value(["a", "b", "c", "a"]) == {"b": [1], "a": [0, 3]}
    assert chosen.drawn(["x", "y"], 0) == []
    names = [f"c{number}" for number in range(10)]
    drawn = HeldOutClients.parse("0.3").drawn(names, 0)
    assert len(drawn) == 3
    assert drawn == sorted(drawn)
    assert {tuple(HeldOutClients.parse("0.3").drawn(names, seed)) for seed in range(5)} != {tuple(drawn)}
    assert len(HeldOutClients.parse("0.99").drawn(names[:2], 0)) == 1
    assert HeldOutClients.parse("").drawn(names, 0) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", r"FIELD=VALUE,... or a fraction in \(0, 1\), got '1'"),
        ("0", "or a fraction"),
        ("nan", "or a fraction"),
        ("category", "or a fraction"),
        ("=a", "as FIELD=VALUE,... or a fraction, got '=a'"),
        ("category=", "as FIELD=VALUE,..."),
        ("category=a,", "as FIELD=VALUE,..."),
    ],
)
def test_held_out_clients_of_no_form_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        HeldOutClients.parse(text)


def test_what_cannot_be_held_out_is_refused() -> None:
    with pytest.raises(
        DataError, match="a held-out value of category out of a, b, got 'B'; the nearest is 'b'"
    ):
        HeldOutClients.parse("category=B").by_value(["a", "b"])
    with pytest.raises(DataError, match="expected rows to train on, got all of them held out by category"):
        HeldOutClients.parse("category=a,b").by_value(["a", "b"])
    with pytest.raises(DataError, match="at least two clients, of which one is held out, got one"):
        HeldOutClients.parse("0.5").drawn(["x"], 0)
    with pytest.raises(DataError, match=r"expected a held-out fraction in \[0, 1\), got 1"):
        divide_rows({"x": [0]}, [0], 1, 0)
    with pytest.raises(DataError, match="the held-out clients' field out of a, got 'b'"):
        HeldOutClients.parse("b=x").check(["a"])


def test_a_partition_does_not_depend_on_the_hash_seed() -> None:
    program = "from test_partition import some_division; print(some_division())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(some_division())


def some_division() -> dict[str, tuple[list[int], list[int]]]:
    parts = divided("dirichlet:category:0.3:10", seed=3)
    return divide_rows(parts, [*VALUES[:200], *range(200)], 0.2, 3)
