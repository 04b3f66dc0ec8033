"""A server's evaluation of its open round's model: who is asked, which answers count, their means."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from support.messages import make_replies, make_reply, make_server

from fedkseed import (
    Broadcast,
    EvaluationReply,
    EvaluationRound,
    EvaluationSummary,
    MessageError,
    ProtocolError,
    Server,
    TooFewRepliesError,
)
from fedkseed.federation.messages import broadcast_digest

LARGEST = float(np.finfo(np.float64).max)


def answer(opened: EvaluationRound, client: int, scores: Mapping[str, float], **changes: Any) -> bytes:
    """A good answer of a client that is asked, or one with other fields; 1 + client examples."""
    fields: dict[str, Any] = {"round": opened.number, "client": client, "num_examples": 1 + client}
    if "digest" not in changes:
        fields["digest"] = broadcast_digest(opened.messages[client])
    return EvaluationReply(**{**fields, **changes}, scores=scores).to_bytes()


def everything_of(server: Server) -> tuple[Any, ...]:
    opened = server.open()
    return server.round, dict(opened.messages), opened.replied, server.coefficients.tobytes()


def test_messages_carry_the_open_round_s_model_and_no_schedule() -> None:
    server = make_server()
    for number in range(2):
        asked = server.open_evaluation()
        assert (asked.number, asked.clients) == (number, tuple(range(7)))
        for client, message in asked.messages.items():
            found = Broadcast.from_bytes(message)
            assert (found.kind, found.round, found.client) == ("evaluate", number, client)
            assert found.run_id == server.config.run_id
            assert found.coefficients.tobytes() == server.wire_coefficients.tobytes()
        assert asked.num_bytes_down == sum(map(len, asked.messages.values()))
        server.merge(make_replies(server))


def test_who_is_asked_is_drawn_as_a_round_s_clients_are() -> None:
    server = make_server()
    assert server.open_evaluation(num_clients=3).clients == server.clients
    few = server.open_evaluation([6, 1, 4, 1], 2).clients
    assert len(few) == 2
    assert set(few) < {1, 4, 6}
    assert make_server().open_evaluation({4, 6, 1}, 2).clients == few
    assert server.open_evaluation([5, 2], 4).clients == (2, 5)
    for wrong in ([], [7], [0.5]):
        with pytest.raises(ProtocolError, match="available clients out of 0 .. 6"):
            server.open_evaluation(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_clients"):
        server.open_evaluation(num_clients=0)


def test_means_are_weighted_by_examples_whatever_the_order_of_arrival() -> None:
    found = set()
    scores = [{"loss": 0.1, "accuracy": 1.0}, {"loss": 0.7}, {"loss": -2.5, "accuracy": 0.0}]
    for order in permutations(range(3)):
        asked = make_server().open_evaluation(range(3))
        for client in order:
            asked.add(client, answer(asked, client, scores[client]))
        found.add(repr(asked.close()))
        summary = asked.close()
    assert len(found) == 1
    assert summary.num_examples == 6
    assert summary.scores == {
        "accuracy": 0.25,  # of the clients that have it
        "loss": pytest.approx((0.1 + 2 * 0.7 - 3 * 2.5) / 6, rel=1e-15),
    }
    assert summary.by_client == dict(enumerate(scores))
    assert summary.metrics() == {
        **{"round": 0.0, "num_clients": 3.0, "num_replied": 3.0, "num_examples": 6.0, "num_capped": 0.0},
        **summary.scores,
    }


def liars_summary(caplog: pytest.LogCaptureFixture, **changes: Any) -> EvaluationSummary:
    """Four honest clients of 10 examples with a loss of 1, and one that states 2^32 - 1 and a loss of 9."""
    asked = make_server(**changes).open_evaluation(range(5))
    for client in range(4):
        asked.add(client, answer(asked, client, {"loss": 1.0}, num_examples=10))
    liar = {"loss": 9.0, "only mine": 2.0}
    asked.add(4, answer(asked, 4, liar, num_examples=2**32 - 1))
    caplog.clear()
    return asked.close()


def test_one_that_states_any_number_of_examples_weighs_no_more_than_the_cap(
    caplog: pytest.LogCaptureFixture,
) -> None:
    free = liars_summary(caplog)
    assert free.scores["loss"] == pytest.approx(9.0)
    assert free.capped == ()
    assert (
        "evaluation of round 0: client 4 weighs 1.000 (by its number of examples), more than" in caplog.text
    )
    bound = liars_summary(caplog, share_cap=1.5)
    assert bound.scores == {"loss": pytest.approx(1 + 8 * 1.5 / 5), "only mine": 2.0}
    assert bound.weights == pytest.approx({0: 0.175, 1: 0.175, 2: 0.175, 3: 0.175, 4: 0.3})
    assert (bound.capped, bound.metrics()["num_capped"]) == ((4,), 1.0)
    assert bound.num_examples == 40 + 2**32 - 1
    assert "evaluation of round 0: cut the weights of clients 4 to 1.5 / 5" in caplog.text


def test_a_cap_that_cuts_nothing_changes_no_bit_of_a_mean() -> None:
    found = []
    for cap in (0.0, 2.0):
        asked = make_server(share_cap=cap).open_evaluation(range(4))
        for client in range(4):
            asked.add(client, answer(asked, client, {"loss": 0.1 * client}, num_examples=7 + client))
        found.append(asked.close())
    assert found[0] == found[1]
    assert found[0].capped == ()


def test_a_mean_stays_within_the_scores() -> None:
    """Sums of floats overflow in the first case, and miss what all clients say in the second."""
    sizes = [7, 9, 9, 1, 2, 9]
    for score in (LARGEST, 0.1, -LARGEST, 5e-324):
        asked = make_server().open_evaluation(range(6))
        for client, size in enumerate(sizes):
            asked.add(client, answer(asked, client, {"score": score}, num_examples=size))
        assert asked.close().scores["score"] == score


def test_an_answer_counts_once_and_a_bad_one_is_typed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    server = make_server()
    asked = server.open_evaluation(range(3))
    good = answer(asked, 1, {"loss": 0.5})
    trained = make_reply(server, server.clients[0])
    other_run = make_server(run_id=b"some earlier run").open_evaluation(range(3))
    for given in (good, bytearray(good), memoryview(good)):
        asked.add(1, given)
    before = asked.close()
    for client, reply, error, text in (
        (1, answer(asked, 1, {"loss": 0.25}), ProtocolError, "one reply of client 1, got two that differ"),
        (0, good, ProtocolError, "answer to another message"),
        (0, answer(asked, 0, {}, round=1), ProtocolError, "answer to another message"),
        (0, answer(other_run, 0, {}), ProtocolError, "answer to another message"),
        (0, trained, MessageError, "client 0: expected an? answer to an evaluation"),
        (0, good[:-1], MessageError, "client 0: "),
        (0, None, MessageError, "got NoneType"),
        (3, good, ProtocolError, "one of the 3 clients"),
        (1.0, good, ProtocolError, "one of the 3 clients"),
    ):
        caplog.clear()
        with pytest.raises(error, match=text):
            asked.add(client, reply)  # type: ignore[arg-type]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "round 0: a reply was refused: " in caplog.text
        assert (asked.close(), asked.missing) == (before, (0, 2))


def test_too_few_answers_are_an_error_and_more_may_come() -> None:
    asked = make_server().open_evaluation([2, 5])
    with pytest.raises(TooFewRepliesError, match="answers to the evaluation of round 0, got 0 of 2; missing"):
        asked.close()
    nobody = asked.close(min_replies=0)
    assert (nobody.replied, nobody.missing, nobody.num_examples, nobody.scores) == ((), (2, 5), 0, {})
    asked.add(5, answer(asked, 5, {}))  # a client whose scores were all NaN
    assert (asked.close().replied, asked.close().scores, asked.close().num_examples) == ((5,), {}, 6)
    with pytest.raises(
        TooFewRepliesError, match="at least 3 answers to the evaluation .* no more were asked"
    ):
        asked.close(min_replies=3)
    asked.add(2, answer(asked, 2, {"loss": 1.0}))
    assert asked.close(min_replies=2).missing == ()


def test_an_evaluation_changes_nothing_of_the_server_and_outlives_its_round() -> None:
    server, alone = make_server(), make_server()
    opened = server.open()
    opened.add(*make_replies(server)[0])
    before = everything_of(server)
    asked = server.open_evaluation()
    asked.add(0, answer(asked, 0, {"loss": 1.0}))
    asked.close()
    assert everything_of(server) == before
    messages = dict(asked.messages)
    opened.add_all(make_replies(server))
    opened.close()
    alone.merge(make_replies(alone))
    assert server.coefficients.tobytes() == alone.coefficients.tobytes()
    asked.add(1, answer(asked, 1, {"loss": 3.0}))  # late, and still of the model that it was sent
    assert dict(asked.messages) == messages
    assert asked.close().scores == {"loss": (1.0 + 2 * 3.0) / 3}
    later = server.open_evaluation()
    with pytest.raises(ProtocolError, match="answer to another message"):
        later.add(1, answer(asked, 1, {"loss": 3.0}))
