"""Arguments of the parts that are embedded, mistaken for one another: each error says what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.messages import CONFIG, IDENTITY, POOL, make_server
from support.small_client import make_broadcast, make_client, make_model
from test_task_client import make_config, make_task

from fedkseed import Bounds, EvaluationReply, Server, ServerConfig, Simulation, WorkingCopy

SERVER_CONFIG, RUN_CONFIG = ServerConfig(**CONFIG), make_config()


def saved(folder: Path) -> Path:
    with Server(IDENTITY, POOL, SERVER_CONFIG) as server:
        server.save(folder)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: Server(IDENTITY, POOL, RUN_CONFIG),
        lambda folder: Server.of(make_model(), POOL, RUN_CONFIG),
        lambda folder: Server.resume(saved(folder), IDENTITY, POOL, RUN_CONFIG),
    ],
    ids=["new", "of a model", "resumed"],
)
def test_a_server_given_a_simulation_s_config_says_how_to_make_its_own(
    tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    advice = (
        r"expected config as a ServerConfig, got a SimulationConfig; config\.server_config\(num_clients\)"
    )
    with pytest.raises(TypeError, match=advice):
        make(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_task().server(SERVER_CONFIG),
        lambda: make_task().client(0, None, SERVER_CONFIG),
        lambda: Simulation(make_task(), SERVER_CONFIG),
    ],
    ids=["server", "client", "simulation"],
)
def test_a_task_given_a_server_s_config_says_which_one_it_takes(make: Callable[[], Any]) -> None:
    advice = "expected config as a SimulationConfig, got a ServerConfig; one config is for clients and server"
    with pytest.raises(TypeError, match=advice):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Server(make_model(), POOL, SERVER_CONFIG),
            "ModelIdentity, got a Sequential; ModelIdentity.of",
        ),
        (lambda: Server(IDENTITY, 5, SERVER_CONFIG), "SeedPool, got a int; SeedPool"),
        (lambda: make_server().put_bounds((5.0, 2.4)), r"Bounds, got a tuple; Bounds\(median_clip"),
        (lambda: make_client(make_model()), r"WorkingCopy, got a Sequential; WorkingCopy\(model\)"),
        (
            lambda: make_client(WorkingCopy(make_model()), limits={"num_seeds": 9}),
            r"ClientLimits, got a dict; ClientLimits\(",
        ),
    ],
    ids=["identity", "pool", "bounds", "working copy", "limits"],
)
def test_what_stands_in_for_another_part_is_told_at_once(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()


def test_bounds_that_are_bounds_are_put_in() -> None:
    server = make_server()
    server.put_bounds(Bounds(5.0, 2.4))
    assert (server.config.median_clip, server.config.share_cap) == (5.0, 2.4)


@pytest.mark.parametrize("number", [4, 9, -1])
def test_a_client_that_the_task_has_not_is_told_the_range(number: int) -> None:
    for ask in (lambda: make_task().client(number, None, RUN_CONFIG), lambda: make_task().data_size(number)):
        with pytest.raises(IndexError, match=rf"expected a client out of 0 \.\. 3, .*, got {number}; add"):
            ask()


@pytest.mark.parametrize("number", ["1", 1.0, True, None])
def test_a_client_s_number_that_is_no_integer_is_told(number: Any) -> None:
    with pytest.raises(TypeError, match="expected the number of a client, got"):
        make_task().client(number, None, RUN_CONFIG)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "expected evaluate to return scores by name, got a NoneType; return a dict"),
        (0.5, "scores by name, got a float"),
        ({"loss": "0.5"}, "numbers by name, got a str as 'loss'; return a mean"),
        ({"losses": [0.5, 1.0]}, "numbers by name, got a list as 'losses'"),
        ({"losses": torch.ones(2)}, "numbers by name, got a Tensor as 'losses'"),
    ],
)
def test_an_evaluation_that_returns_no_scores_says_so_at_a_client_and_in_a_simulation(
    returned: Any, words: str
) -> None:
    task = replace(make_task(), evaluate=lambda *_: returned)
    client = make_client(WorkingCopy(make_model()), evaluate=task.evaluate)
    for ask in (
        lambda: client.evaluate(make_broadcast(schedule=np.zeros(0, np.uint16))),
        lambda: task.scores(0),
    ):
        with pytest.raises(TypeError, match=words):
            ask()


def test_scores_may_be_none_infinite_or_tensors_of_one_element() -> None:
    found = {"none": None, "infinite": float("inf"), "tensor": torch.tensor([0.5]), "count": 3}
    task = replace(make_task(), evaluate=lambda *_: found)
    assert task.scores(0) == {"none": None, "infinite": None, "tensor": 0.5, "count": 3.0}
    client = make_client(WorkingCopy(make_model()), evaluate=task.evaluate)
    answer = client.evaluate(make_broadcast(schedule=np.zeros(0, np.uint16)))
    assert EvaluationReply.from_bytes(answer).scores == {"tensor": 0.5, "count": 3.0}
