"""`fedkseed simulate` killed at any instant goes on by the line that it printed; of two starts one wins."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

_SECONDS = 600


def chaos(*arguments: str) -> str:
    """What a process of its own prints, which forks: this one may have threads."""
    command = [sys.executable, "-m", "support.chaos", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_federation_whose_server_node_and_worker_are_killed_ends_with_the_ledger_of_none() -> None:
    said = chaos("--federation", "2")
    found = re.search(r"undisturbed one: .*num_between=(\d+), num_rounds=(\d+).*num_refused=(\d+)", said)
    assert found is not None, said
    num_between, num_rounds, num_refused = map(int, found.groups())
    assert num_between > 0
    assert num_rounds > 6
    assert num_refused > 0


def test_one_of_two_processes_takes_a_folder() -> None:
    assert "20 pairs took a folder: one winner each" in chaos("--folders", "20")


@pytest.mark.slow
def test_one_of_two_starts_wins_and_the_folder_is_its_alone() -> None:
    assert "starts 8 of 8" in chaos("--starts", "8")


@pytest.mark.slow
def test_killed_before_a_write_it_ends_in_the_same_bytes() -> None:
    found = re.search(r"killed before (\d+) writes", chaos("--every", "5"))
    assert found is not None
    assert int(found[1]) >= 10


@pytest.mark.slow
def test_killed_at_instants_from_the_first_to_the_last_second_it_ends_in_the_same_bytes() -> None:
    found = re.search(r"(\d) of 8 runs killed alive", chaos("--instants", "8"))
    assert found is not None
    assert int(found[1]) >= 4
