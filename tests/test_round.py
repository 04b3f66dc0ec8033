"""An open round as an object: messages out, replies in, whoever is missing, and its end."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from itertools import permutations

import numpy as np
import pytest
from support.messages import POOL, make_replies, make_reply, make_server, patched

from fedkseed import MessageError, ProtocolError, Server, TooFewRepliesError
from fedkseed_kernels import derived


def bytes_of(server: Server) -> tuple[int, tuple[int, ...], bytes]:
    return server.round, server.open().clients, server.coefficients.tobytes()


def test_a_round_is_its_messages_replies_and_end() -> None:
    server, straight = make_server(), make_server()
    for number in range(3):
        opened = server.open()
        assert opened is server.open()
        assert (opened.number, opened.clients) == (number, server.clients)
        assert list(opened.messages) == list(opened.clients)
        assert all(server.broadcast(client) == message for client, message in opened.messages.items())
        assert (opened.replied, opened.missing) == ((), opened.clients)
        for client, reply in make_replies(straight):
            opened.add(client, reply)
        assert (opened.replied, opened.missing) == (opened.clients, ())
        summary = opened.close()
        straight.merge(make_replies(straight))
        assert server.round == number + 1
        assert (summary.round, summary.replied, summary.missing) == (number, opened.clients, ())
    assert server.coefficients.tobytes() == straight.coefficients.tobytes()


def test_the_order_of_arrival_does_not_matter() -> None:
    found = set()
    for order in permutations(range(3)):
        server = make_server()
        replies = make_replies(server)
        for place in order:
            server.open().add(*replies[place])
        server.open().close()
        found.add(server.coefficients.tobytes())
    assert len(found) == 1


def test_the_same_bytes_again_count_once_and_others_are_refused() -> None:
    server, once = make_server(), make_server()
    replies = make_replies(server)
    opened = server.open()
    for client, reply in replies:
        opened.add(client, reply)
        opened.add(client, bytearray(reply))
        opened.add(client, memoryview(reply))
        with pytest.raises(ProtocolError, match=f"one reply of client {client}, got two that differ"):
            opened.add(client, make_reply(server, client, data_size=77))
    assert opened.replied == opened.clients
    opened.close()
    once.merge(replies)
    assert server.coefficients.tobytes() == once.coefficients.tobytes()


def test_a_bad_reply_is_typed_logged_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    server = make_server()
    opened = server.open()
    first, second, _ = opened.clients
    opened.add(first, make_reply(server, first))
    before = bytes_of(server)
    outsider = next(client for client in range(7) if client not in opened.clients)
    good = make_reply(server, second)
    for client, reply, error, text in (
        (second, good[:-1], MessageError, "expected a reply of 140 bytes"),
        (second, patched(good, 60, b"\0\0\xc0\x7f"), ProtocolError, "got nan at step 1"),
        (second, make_reply(server, second, round=1), ProtocolError, "a reply of"),
        (second, make_reply(server, second, digest=bytes(32)), ProtocolError, "answer to another"),
        (second, make_reply(server, first), ProtocolError, "a reply of"),
        (outsider, make_reply(server, outsider, digest=bytes(32)), ProtocolError, "one of the 3 clients"),
        (second, "text", MessageError, "as bytes, bytearray or memoryview, got str"),
        (second, None, MessageError, "got NoneType"),
    ):
        caplog.clear()
        with pytest.raises(error, match=text):
            opened.add(client, reply)  # type: ignore[arg-type]
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.WARNING
        assert "round 0: a reply was refused: " in caplog.text
        assert (bytes_of(server), opened.replied) == (before, (first,))
    opened.add(second, good)
    assert opened.missing == (opened.clients[2],)


def test_a_check_tells_what_it_refuses_too(caplog: pytest.LogCaptureFixture) -> None:
    server = make_server()
    good = make_reply(server, server.clients[0])
    server.check(server.clients[0], good)
    assert not caplog.records
    for call in (lambda: server.check(server.clients[0], good[:-1]), lambda: server.merge([(9, good)])):
        caplog.clear()
        with pytest.raises((MessageError, ProtocolError)):
            call()
        assert [record.message.split(": ")[:2] for record in caplog.records] == [
            ["round 0", "a reply was refused"]
        ]


def test_several_replies_are_added_all_or_none() -> None:
    server = make_server()
    opened = server.open()
    replies = make_replies(server)
    with pytest.raises(MessageError):
        opened.add_all([*replies[:2], (replies[2][0], b"short")])
    assert opened.replied == ()
    opened.add_all(replies)
    assert opened.missing == ()


def test_a_round_closes_with_as_many_replies_as_asked_for() -> None:
    server = make_server()
    opened = server.open()
    replies = make_replies(server)
    before = bytes_of(server)
    with pytest.raises(
        TooFewRepliesError, match="at least 1 replies of round 0, got 0 of 3; missing are clients"
    ):
        opened.close()
    opened.add(*replies[0])
    with pytest.raises(TooFewRepliesError, match="at least 3 replies of round 0, got 1"):
        opened.close(min_replies=3)
    assert bytes_of(server) == before
    with pytest.raises(TooFewRepliesError, match="at least 4 replies of round 0, got 1 of 3"):
        opened.close(min_replies=4)
    for wrong, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="min_replies"):
            opened.close(min_replies=wrong)  # type: ignore[arg-type]
    opened.add(*replies[2])
    summary = opened.close(min_replies=2)
    alone = make_server()
    alone.merge([replies[0], replies[2]])
    assert server.coefficients.tobytes() == alone.coefficients.tobytes()
    assert summary.missing == (replies[1][0],)
    assert sum(summary.weights.values()) == pytest.approx(1.0)


def test_a_round_without_replies_leaves_the_model_and_invites_others() -> None:
    server = make_server()
    summary = server.open().close(min_replies=0)
    assert (server.round, summary.replied, summary.num_skipped) == (1, (), 0)
    assert not server.coefficients.any()
    assert summary.metrics()["num_missing"] == 3
    assert "largest_weight" not in summary.metrics()


@pytest.mark.parametrize("nothing", [b"", bytearray(), memoryview(b"")])
def test_an_answer_without_a_byte_says_that_its_client_ended(nothing: bytes | bytearray | memoryview) -> None:
    server = make_server()
    client = server.clients[0]
    words = f"client {client}: expected an? .*, got 0: the client ended before it answered"
    for take in (
        server.open().add,
        server.check,
        server.open_evaluation().add,
        lambda client, reply: server.merge([(client, reply)]),
    ):
        with pytest.raises(MessageError, match=words):
            take(client, nothing)
    with pytest.raises(MessageError, match="got 1$"):
        server.check(client, b"1")


def test_fewer_clients_than_a_round_needs_are_too_few_replies() -> None:
    server = make_server()
    opened = server.open([4])
    opened.add_all(make_replies(server))
    with pytest.raises(
        TooFewRepliesError, match="got 1 of 1; no more were asked, .* or close with a smaller"
    ):
        opened.close(min_replies=2)
    assert server.round == 0
    assert opened.close().replied == (4,)


def test_a_round_that_is_over_takes_nothing() -> None:
    server = make_server()
    opened, replies = server.open(), make_replies(server)
    twin = opened.anew()
    twin.add_all(replies)
    opened.add_all(replies)
    opened.close()
    after = server.coefficients.tobytes()
    for call in (lambda: opened.add(*replies[0]), opened.close, twin.close):
        with pytest.raises(ProtocolError, match="round 0, which is over"):
            call()
    assert (server.round, server.coefficients.tobytes()) == (1, after)


def test_a_round_made_anew_is_over_with_the_round_that_it_is_of() -> None:
    server = make_server()
    replies = make_replies(server)
    late, trial = server.open().anew(), server.open().anew()
    for copy in (late, trial):
        copy.add_all(replies)
    trial.close()
    before = bytes_of(server)
    for copy in (late, trial):
        with pytest.raises(ProtocolError, match="round 0, which is over"):
            copy.close()
    assert bytes_of(server) == before


def test_clients_are_drawn_from_those_available() -> None:
    server = make_server()
    everyone = server.clients
    assert server.open(range(7)).clients == everyone
    few = server.open([5, 2, 2, 6, 0])
    assert len(few.clients) == 3
    assert set(few.clients) < {0, 2, 5, 6}
    assert make_server().open({0, 6, 5, 2}).clients == few.clients
    assert server.open() is few
    assert server.open([4]).clients == (4,)
    for wrong in ([], [7], [-1, 2], [1.0, 2], ["1", 2], [None]):
        with pytest.raises(ProtocolError, match="available clients out of 0 .. 6"):
            server.open(wrong)  # type: ignore[arg-type]
    assert server.clients == (4,)


@pytest.mark.parametrize("available", [range(7), [0, 2, 5, 6], {5, 3}, [6, 1, 4, 2, 0]])
def test_the_draw_is_that_of_the_page(available: Iterable[int]) -> None:
    server = make_server()
    for number in range(3):
        places = sorted(available)
        first = np.arange(min(3, len(places)), dtype=np.uint64)
        for i, u in enumerate(derived.uniforms(POOL.base_seed, 2, first + np.uint64(number << 40)).tolist()):
            other = i + math.floor(u * (len(places) - i))
            places[i], places[other] = places[other], places[i]
        assert server.open(available).clients == tuple(sorted(places[: len(first)]))
        server.skip_round()


def test_clients_are_plain_integers_however_they_are_named() -> None:
    server = make_server()
    opened = server.open(np.arange(3))
    for client in opened.clients:
        opened.add(np.int64(client), make_reply(server, client))  # type: ignore[arg-type]
    for stranger in (1.0, "1", [], None):
        with pytest.raises(ProtocolError, match="expected one of the 3 clients of round 0, got "):
            opened.add(stranger, b"")  # type: ignore[arg-type]
    summary = opened.close()
    assert json.loads(json.dumps(summary.replied)) == [0, 1, 2]
    assert {type(client) for client in (*summary.clients, *summary.replied, *summary.weights)} == {int}


def test_another_availability_begins_the_round_anew() -> None:
    server = make_server()
    first = server.open([0, 1, 2])
    first.add(0, make_reply(server, 0))
    second = server.open([0, 1, 3])
    assert second.replied == ()
    with pytest.raises(ProtocolError, match="which is over"):
        first.add(1, make_reply(server, 1))
    for client in second.clients:
        second.add(client, make_reply(server, client))
    assert second.close().replied == (0, 1, 3)
    assert server.clients == make_server_after(second.clients).clients


def make_server_after(clients: tuple[int, ...]) -> Server:
    """A server after one round of these clients."""
    server = make_server()
    opened = server.open(clients)
    opened.add_all(make_replies(server))
    opened.close()
    return server


def test_merge_counts_its_own_replies_alone() -> None:
    server = make_server()
    replies = make_replies(server)
    server.open().add(*replies[0])
    summary = server.merge(replies[1:])
    assert summary.replied == tuple(client for client, _ in replies[1:])


def test_a_summary_tells_bytes_and_skipped_steps() -> None:
    server = make_server()
    opened = server.open()
    for client in opened.clients:
        opened.add(client, make_reply(server, client))
    messages, replies = opened.messages, opened.replies
    summary = opened.close()
    assert summary.bytes_down == sum(map(len, messages.values()))
    assert summary.bytes_up == sum(map(len, replies.values()))
    metrics = summary.metrics()
    assert metrics["num_replied"] == 3
    assert metrics["largest_weight"] == max(summary.weights.values())
    assert all(isinstance(value, float) for value in metrics.values())


def test_a_ledger_holds_no_run_id_and_counts_rounds() -> None:
    one, other = make_server(run_id=b"one run's number"), make_server(run_id=b"and another run.")
    for server in (one, other):
        server.merge(make_replies(make_server(run_id=server.config.run_id)))
    assert one.broadcast(one.clients[0]) != other.broadcast(other.clients[0])
    ledger = one.ledger({"task": "tiny"})
    assert ledger.to_bytes() == other.ledger({"task": "tiny"}).to_bytes()
    assert dict(ledger.notes) == {"task": "tiny", "num_rounds": "1"}
    assert ledger.coefficients.tobytes() == one.wire_coefficients.tobytes()
