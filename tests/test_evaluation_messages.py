"""Messages to evaluate, the answers to them, and the client between the two."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from support.messages import make_broadcast, make_server, patched, sealed
from support.protocol_page import read_by_the_page
from support.small_client import COEFFICIENTS, loss, make_client, make_model, rebuilt, same_bytes, weights_of
from support.small_client import batches as make_batches
from support.small_client import make_broadcast as make_small_broadcast
from torch import nn

from fedkseed import (
    Broadcast,
    EvaluationReply,
    IdentityError,
    MessageError,
    ModelIdentity,
    ProtocolError,
    WorkingCopy,
)
from fedkseed.federation.evaluation_messages import MAX_EVALUATION_BYTES
from fedkseed.federation.messages import broadcast_digest
from fedkseed.seeds import MAX_CLIENTS
from fedkseed_kernels import CONTRACT_VERSION

NO_STEPS = np.zeros(0, np.uint16)
SCORES = {"accuracy": 0.75, "held_out_loss": -2.5}
REPLY = EvaluationReply(258, 3, 77, bytes(range(100, 132)), SCORES)
HEADER = 56


def question(**changes: Any) -> bytes:
    return make_small_broadcast(schedule=NO_STEPS, **changes)


def scores(model: nn.Module, round: int) -> Mapping[str, float]:
    return {"loss": loss(model, next(iter(make_batches(round, 1)))).item()}


# The bytes


def test_the_page_shows_every_byte_of_a_message_to_evaluate() -> None:
    message = make_broadcast(schedule=NO_STEPS).to_bytes()
    found = read_by_the_page("Broadcast", message, {"K": 2, "tau": 0})
    assert (found["magic"], found["tau"], found["K"], found["client"]) == (b"FKSE", 0, 2, 3)
    assert found["checksum"] == zlib.crc32(message[:-4])
    train = make_broadcast().to_bytes()
    same = set(range(len(train))) - {*range(4), 10, 11, *range(136, len(train))}
    assert all(message[place] == train[place] for place in same)


def test_the_page_shows_every_byte_of_an_answer() -> None:
    message = EvaluationReply(258, 3, 77, bytes(range(100, 132)), {"accuracy": 0.75}).to_bytes()
    assert read_by_the_page("Answer to an evaluation", message, {"length": 8}) == {
        "magic": b"FKSV",
        "format version": 2,
        "contract version": CONTRACT_VERSION,
        "number of scores": 1,
        "round": 258,
        "client": 3,
        "number of examples": 77,
        "digest": bytes(range(100, 132)),
        "length": 8,
        "name": b"accuracy",
        "value": 0.75,
        "checksum": zlib.crc32(message[:-4]),
    }


def test_what_is_read_is_what_was_written_in_any_order_of_scores() -> None:
    message = REPLY.to_bytes()
    assert EvaluationReply.from_bytes(bytearray(message)) == REPLY
    turned = EvaluationReply(258, 3, 77, REPLY.digest, dict(reversed(SCORES.items())))
    assert turned.to_bytes() == message
    none = EvaluationReply(0, 0, 1, bytes(32))
    assert EvaluationReply.from_bytes(none.to_bytes()) == none
    names = [f"{number:02}".ljust(64, "~") for number in range(32)]
    most = EvaluationReply(0, 0, 2**32 - 1, bytes(32), dict.fromkeys(names, 1e308))
    assert len(most.to_bytes()) == MAX_EVALUATION_BYTES
    assert EvaluationReply.from_bytes(most.to_bytes()) == most


def test_every_flipped_bit_and_every_truncation_is_noticed() -> None:
    message = REPLY.to_bytes()
    for position in range(len(message)):
        for bit in range(8):
            changed = bytearray(message)
            changed[position] ^= 1 << bit
            with pytest.raises(MessageError):
                EvaluationReply.from_bytes(changed)
    for length in range(len(message)):
        with pytest.raises(MessageError):
            EvaluationReply.from_bytes(message[:length])
    for more in (b"\0", bytes(MAX_EVALUATION_BYTES)):
        with pytest.raises(MessageError):
            EvaluationReply.from_bytes(message + more)


def test_random_bytes_under_a_right_checksum_are_refused_or_the_one_form() -> None:
    whole, generator, num_read = REPLY.to_bytes(), np.random.default_rng(4), 0
    for _ in range(4_000):
        message = bytearray(whole)
        for _ in range(generator.integers(1, 4)):
            start, size = int(generator.integers(8, len(whole) - 4)), int(generator.integers(1, 5))
            message[start : start + size] = generator.bytes(len(message[start : start + size]))
        try:
            found = EvaluationReply.from_bytes(sealed(bytes(message)))
        except MessageError:
            continue
        num_read += 1
        assert found.to_bytes() == sealed(bytes(message))
    assert 100 < num_read < 3_900


@pytest.mark.parametrize(
    ("position", "field", "message"),
    [
        (8, struct.pack("<I", 1), "expected 1 scores, got 2"),
        (8, struct.pack("<I", 2**32 - 1), "scores, got 2"),
        (12, struct.pack("<I", 2**24), "round below"),
        (16, struct.pack("<I", 2**24), "client below"),
        (20, struct.pack("<I", 0), r"examples in \[1, 2\^32\), got 0"),
        (HEADER, b"\0", "scores"),
        (HEADER, b"\xff", "cut off"),
        (HEADER + 1, b"\n", "printable ASCII"),
        (HEADER + 1, b"\xe4", "printable ASCII"),
        (HEADER + 1, b"z", "in the order of their names"),
        (HEADER + 9, struct.pack("<d", np.nan), "finite scores"),
        (HEADER + 9, struct.pack("<d", -np.inf), "finite scores"),
    ],
)
def test_a_field_out_of_range_under_a_right_checksum(position: int, field: bytes, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        EvaluationReply.from_bytes(patched(REPLY.to_bytes(), position, field))


def test_a_name_that_stands_twice_is_refused() -> None:
    entry = struct.pack("<B1sd", 1, b"a", 1.0)
    whole = REPLY.to_bytes()[:HEADER] + entry + entry + bytes(4)
    with pytest.raises(MessageError, match="expected 2 scores, got 1"):
        EvaluationReply.from_bytes(sealed(whole))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"": 1.0}, "printable ASCII characters, got ''"),
        ({"x" * 65: 1.0}, "1 to 64 printable"),
        ({"Umlaut \u00e4": 1.0}, "printable ASCII"),
        ({3: 1.0}, "printable ASCII characters, got 3"),
        ({f"score {number}": 1.0 for number in range(33)}, "at most 32 scores, got 33"),
    ],
)
def test_scores_that_no_message_can_carry_are_typed_errors(found: dict[Any, float], message: str) -> None:
    client = make_client(WorkingCopy(make_model()), evaluate=lambda model, round: found)
    with pytest.raises(MessageError, match=message):
        client.evaluate(question())


# The client


def test_a_client_scores_the_round_s_model() -> None:
    client = make_client(WorkingCopy(make_model()), evaluate=scores)
    found = EvaluationReply.from_bytes(client.evaluate(question()))
    assert found == EvaluationReply(2, 4, 9, sha256(question()).digest(), scores(rebuilt(), 2))
    assert client.handle(question()) == client.evaluate(question())
    assert client.last_run is None
    other = make_client(WorkingCopy(make_model()), evaluate=scores, num_examples=500)
    assert EvaluationReply.from_bytes(other.evaluate(question())).num_examples == 500


def test_an_evaluation_between_two_rounds_changes_no_byte_of_them() -> None:
    """It may leave the model in eval mode, move its buffers and draw random numbers."""

    def make() -> nn.Sequential:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double()

    def unruly(model: nn.Module, round: int) -> Mapping[str, float]:
        model(torch.randn(4, 3, dtype=torch.float64))  # moves the statistics
        assert not torch.is_grad_enabled()
        model.eval()
        return {"sum": float(sum(parameter.sum() for parameter in model.parameters()))}

    identity = ModelIdentity.of(make())
    client = make_client(WorkingCopy(make()), evaluate=unruly, seed=3)
    train, asking = make_small_broadcast(identity=identity), question(identity=identity)
    first = client.step(train)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    asked = client.evaluate(asking)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in client.working.model.modules())
    assert client.step(train) == first
    assert client.evaluate(asking) == asked


def test_scores_that_are_not_finite_are_left_out() -> None:
    found = {"good": 1.0, "nan": float("nan"), "huge": float("inf"), "none": None}
    client = make_client(WorkingCopy(make_model()), evaluate=lambda *_: found)
    assert EvaluationReply.from_bytes(client.evaluate(question())).scores == {"good": 1.0}


def test_an_evaluation_that_raises_leaves_the_modes_and_the_next_round() -> None:
    def failing(model: nn.Module, round: int) -> Mapping[str, float]:
        model.eval()
        raise ArithmeticError("of the user")

    client = make_client(WorkingCopy(make_model()), evaluate=failing)
    first = client.step(make_small_broadcast())
    with pytest.raises(ArithmeticError, match="of the user"):
        client.evaluate(question())
    assert all(module.training for module in client.working.model.modules())
    assert client.step(make_small_broadcast()) == first


def test_a_message_of_the_other_kind_or_for_others_changes_nothing() -> None:
    client = make_client(WorkingCopy(make_model()), evaluate=scores, run_id=b"one of many runs")
    before = weights_of(client.working.model)
    for call, error, message in [
        (lambda: client.step(question()), MessageError, "got an evaluation message; handle"),
        (lambda: client.evaluate(make_small_broadcast()), MessageError, "got a broadcast with local steps"),
        (lambda: client.evaluate(question(client=5)), ProtocolError, "for client 4, got one for 5"),
        (lambda: client.evaluate(question(run_id=bytes(16))), ProtocolError, "of run"),
        (lambda: client.evaluate(question(base_seed=1)), ProtocolError, "base seed"),
        (
            lambda: client.evaluate(question(identity=ModelIdentity(bytes(32), bytes(32), "float64"))),
            IdentityError,
            "structure",
        ),
        (
            lambda: make_client(client.working).evaluate(question()),
            ProtocolError,
            "client 4 to have an evaluation, got none",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert same_bytes(before, weights_of(client.working.model))


def test_a_message_to_evaluate_is_loaded_too() -> None:
    client = make_client(WorkingCopy(make_model()))
    for message in (question(), make_small_broadcast()):
        client.load(make_small_broadcast(coefficients=np.zeros_like(COEFFICIENTS)))
        assert same_bytes(weights_of(client.working.model), weights_of(make_model()))
        client.load(message)
        assert same_bytes(weights_of(client.working.model), weights_of(rebuilt()))
    assert Broadcast.from_bytes(question()).kind == "evaluate"


def test_a_mean_of_scores_lies_between_them_however_large() -> None:
    largest = float(np.finfo(np.float64).max)
    server = make_server(num_clients=49)
    asked = server.open_evaluation()
    for client, message in asked.messages.items():
        scores = {"same": 0.1, "most": largest, "least": -largest}
        answer = EvaluationReply(0, client, 1 + client % 7, broadcast_digest(message), scores)
        asked.add(client, answer.to_bytes())
    assert asked.close().scores == {"same": 0.1, "most": largest, "least": -largest}


def test_who_is_asked_is_drawn_without_a_list_of_all() -> None:
    server = make_server(num_clients=MAX_CLIENTS)
    tracemalloc.start()
    try:
        drawn = server.open_evaluation(num_clients=3).clients
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    small = make_server(num_clients=40)
    assert small.open_evaluation(num_clients=3).clients == small.open_evaluation(range(40), 3).clients
    assert len(drawn) == 3
