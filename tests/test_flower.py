"""The Flower adapter over a grid in this process, which serialises every message as Flower does."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra flower")

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from support import embedding
from support.embedding import CONFIG, SIZES
from support.flower_federation import make_client, make_server
from support.flower_grid import DirectGrid

from fedkseed import RECOMMENDED_BOUNDS, Bounds, Ledger, Server, TooFewRepliesError, WorkingCopy
from fedkseed.adapters.flower import FedKSeedStrategy, client_app, server_app

pytestmark = pytest.mark.filterwarnings("ignore:the model is in train mode with dropout:UserWarning")
CONTEXT = Context(11, 1, {}, RecordDict(), {})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkseed.adapters.flower.nodes.time.sleep", lambda seconds: None)


@pytest.fixture
def grid() -> DirectGrid:
    return DirectGrid(client_app(make_client, resident=False), len(SIZES))


def start(server: Server, grid: DirectGrid, num_rounds: int = CONFIG.num_rounds, **options: Any) -> Result:
    options = {"min_nodes": len(grid.numbers), "timeout": 1.0, **options}
    return FedKSeedStrategy(server, **options).start(grid, ArrayRecord(), num_rounds)


def ledger_of(server: Server, rounds: list[list[int]]) -> bytes:
    """What a loop in this process ends with where these clients were there, round by round."""
    for available in rounds:
        opened = server.open(available)
        for number, message in opened.messages.items():
            opened.add(number, embedding.make_client(number).handle(message))
        opened.close()
    return server.ledger().to_bytes()


def train(grid: DirectGrid) -> list[int | None]:
    """Who was asked to train, in order."""
    return [number for number, kind in grid.seen if kind == "train"]


class TestARun:
    def test_it_ends_with_the_ledger_of_the_plain_simulation(self, grid: DirectGrid) -> None:
        server = make_server(CONTEXT)
        result = start(server, grid)
        assert server.ledger().to_bytes() == embedding.reference_ledger()
        assert list(result.train_metrics_clientapp) == [1, 2, 3]
        assert result.train_metrics_clientapp[3]["num_replied"] == 3
        assert not result.evaluate_metrics_clientapp
        assert [number for number, kind in grid.seen if kind == "query"] == [3, 2, 1, 0]  # once each

    def test_its_app_saves_the_ledger(self, grid: DirectGrid, tmp_path: Any) -> None:
        config: dict[str, Any] = {"num-rounds": 3, "ledger": str(tmp_path / "ledger")}
        app = server_app(make_server, min_nodes=4)
        app(grid, Context(11, 1, {}, RecordDict(), config))
        assert (tmp_path / "ledger").read_bytes() == embedding.reference_ledger()

    def test_a_server_that_was_resumed_makes_the_rounds_that_are_left(
        self, grid: DirectGrid, tmp_path: Any
    ) -> None:
        with make_server(CONTEXT) as server:
            start(server, grid, 2, on_round=lambda server, summary: server.save(tmp_path / "state"))
            identity, pool = server.identity, server.pool
        found: list[int] = []

        def resumed(context: Context) -> Server:
            return Server.resume(tmp_path / "state", identity, pool, CONFIG.server_config(len(SIZES)))

        config: dict[str, Any] = {"num-rounds": 3, "ledger": str(tmp_path / "ledger")}
        app = server_app(resumed, min_nodes=4, on_round=lambda server, summary: found.append(summary.round))
        app(grid, Context(11, 1, {}, RecordDict(), config))
        assert found == [2]
        assert Ledger.load(tmp_path / "ledger").coefficients.any()
        assert (tmp_path / "ledger").read_bytes() == embedding.reference_ledger()

    def test_clients_evaluate_the_model_after_each_round(self, grid: DirectGrid) -> None:
        server = make_server(CONTEXT)
        result = start(server, grid, num_evaluators=2)
        assert server.ledger().to_bytes() == embedding.reference_ledger()
        assert list(result.evaluate_metrics_clientapp) == [1, 2, 3]
        last = result.evaluate_metrics_clientapp[3]
        assert isinstance(last, MetricRecord)
        assert last["num_replied"] == 2
        model = embedding.make_task().model
        server.ledger().apply_(model)
        assert last["held_out_loss"] == pytest.approx(embedding.evaluate(model, 3)["held_out_loss"], rel=1e-5)

    def test_functions_that_return_nothing_are_told_of(
        self, grid: DirectGrid, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(TypeError, match="what make_server returns as a Server, got a NoneType; end it"):
            server_app(lambda context: None)(grid, Context(11, 1, {}, RecordDict(), {"num-rounds": 1}))
        grid.app = client_app(lambda context: None, resident=False)
        with pytest.raises(TooFewRepliesError):
            start(make_server(CONTEXT), grid, max_lost=0)
        assert "expected make_client to return a client, got a NoneType; end it" in caplog.text


class TestNodes:
    def test_clients_are_drawn_by_their_numbers_whatever_their_nodes_are_called(
        self, grid: DirectGrid
    ) -> None:
        server = make_server(CONTEXT)
        start(server, grid)
        other = DirectGrid(grid.app, len(SIZES))
        other.numbers = {5 + number: (number + 2) % 4 for number in range(4)}
        again = make_server(CONTEXT)
        start(again, other)
        assert again.ledger().to_bytes() == server.ledger().to_bytes()
        assert train(other) == train(grid)

    def test_those_that_are_there_are_drawn(self, grid: DirectGrid) -> None:
        del grid.numbers[90 - 7 * 2]
        server = make_server(CONTEXT)
        start(server, grid)
        assert server.ledger().to_bytes() == ledger_of(make_server(CONTEXT), [[0, 1, 3]] * 3)

    def test_a_node_that_comes_later_is_asked_who_it_is(self, grid: DirectGrid) -> None:
        late = grid.numbers.pop(90)

        def arrives(server: Server, summary: object) -> None:
            grid.numbers[1234] = late

        server = make_server(CONTEXT)
        start(server, grid, on_round=arrives)
        assert server.ledger().to_bytes() == ledger_of(make_server(CONTEXT), [[1, 2, 3]] + [[0, 1, 2, 3]] * 2)
        assert [number for number, kind in grid.seen if kind == "query"] == [3, 2, 1, 0]

    def test_a_node_that_does_not_say_who_it_is_is_asked_again_in_the_next_round(
        self, grid: DirectGrid
    ) -> None:
        grid.mute = {0}
        server = make_server(CONTEXT)
        start(server, grid, min_nodes=3, on_round=lambda server, summary: grid.mute.clear())
        assert server.ledger().to_bytes() == ledger_of(make_server(CONTEXT), [[1, 2, 3]] + [[0, 1, 2, 3]] * 2)
        assert [number for number, kind in grid.seen if kind == "query"] == [3, 2, 1, 0, 0]

    def test_a_node_that_was_away_when_it_was_asked_is_asked_again(self, grid: DirectGrid) -> None:
        grid.away = {0}
        server = make_server(CONTEXT)
        start(server, grid, min_nodes=3, on_round=lambda server, summary: grid.away.clear())
        assert server.ledger().to_bytes() == ledger_of(make_server(CONTEXT), [[1, 2, 3]] + [[0, 1, 2, 3]] * 2)

    def test_nodes_without_a_number_or_with_a_strange_one_are_left_alone(
        self, grid: DirectGrid, caplog: pytest.LogCaptureFixture
    ) -> None:
        grid.numbers |= {7: None, 8: len(SIZES), 9: -1}
        server = make_server(CONTEXT)
        start(server, grid, min_nodes=4)
        assert server.ledger().to_bytes() == embedding.reference_ledger()
        assert "start flower-supernode with, for instance, --node-config 'partition-id=0'" in caplog.text
        assert "no answer of 7: 'ValueError'" in caplog.text
        assert len([kind for _, kind in grid.seen if kind == "query"]) == 7

    def test_two_nodes_that_state_one_number_at_once_are_left_alone_and_told_of(
        self, grid: DirectGrid, caplog: pytest.LogCaptureFixture
    ) -> None:
        grid.numbers[7] = 2
        server = make_server(CONTEXT)
        start(server, grid, min_nodes=3)
        assert server.ledger().to_bytes() == ledger_of(make_server(CONTEXT), [[0, 1, 3]] * 3)
        told = [record.message for record in caplog.records if "partition-id" in record.message]
        assert told == [
            "expected one node as client 2, got nodes 7, 76 with that partition-id; none of them takes part: "
            "give each a number of its own, or end all but one"
        ]

    def test_a_node_that_states_a_number_in_use_does_not_displace_who_has_it(
        self, grid: DirectGrid, caplog: pytest.LogCaptureFixture
    ) -> None:
        def arrives(server: Server, summary: object) -> None:
            if server.round == 1:
                grid.numbers[7] = 3
            else:
                grid.numbers.pop(69, None)  # and then the other one takes its place

        nodes: list[set[int]] = [set(), set(), set()]
        server = make_server(CONTEXT)
        answers = grid._answers

        def watched(message: Any) -> Any:
            if message.metadata.message_type == "train":
                nodes[server.round].add(message.metadata.dst_node_id)
            return answers(message)

        grid._answers = watched  # type: ignore[method-assign]
        start(server, grid, on_round=arrives)
        assert server.ledger().to_bytes() == embedding.reference_ledger()
        assert [69 in asked for asked in nodes] == [True, True, False]
        assert [7 in asked for asked in nodes] == [False, False, True]
        assert "got nodes 7, 69 with that partition-id; node 69 stays it" in caplog.text

    def test_too_few_nodes_in_time_end_the_run(self, grid: DirectGrid) -> None:
        grid.mute = {2}
        with pytest.raises(TooFewRepliesError, match=r"expected 4 clients to be there, got \[0, 1, 3\]"):
            start(make_server(CONTEXT), grid, min_nodes=4, timeout=0.1)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"min_replies": 4}, r"min_replies of at most 3, .* \(clients_per_round 3, 4 clients\), got 4"),
            ({"min_replies": -1}, r"min_replies in \[0, "),
            ({"min_nodes": 5}, r"min_nodes in \[0, 4\], got 5"),
        ],
    )
    def test_more_replies_or_nodes_than_there_can_be_are_refused_before_a_round(
        self, grid: DirectGrid, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            start(make_server(CONTEXT), grid, **options)
        assert not grid.seen


class TestFailures:
    def test_a_client_that_is_silent_or_lost_leaves_its_weight_to_the_others(
        self, grid: DirectGrid, caplog: pytest.LogCaptureFixture
    ) -> None:
        grid.silent, grid.broken = {2}, {3}
        server = make_server(CONTEXT)
        start(server, grid, 1)
        other = make_server(CONTEXT)
        opened = other.open()
        assert opened.clients == (1, 2, 3)
        opened.add(1, embedding.make_client(1).handle(opened.message(1)))
        opened.close()
        assert server.ledger().to_bytes() == other.ledger().to_bytes()
        assert "no answer of 3: 'Node Unavailable'" in caplog.text
        assert "a reply was refused" not in caplog.text, "there was none"

    def test_below_the_minimum_the_same_round_is_tried_again(self, grid: DirectGrid) -> None:
        grid.silent = {1, 2}
        server = make_server(CONTEXT)
        start(server, grid, 2, min_replies=2)
        assert server.round == 0
        grid.silent = set()
        start(server, grid, 3, min_replies=2)
        assert server.ledger().to_bytes() == embedding.reference_ledger()

    def test_the_run_ends_after_too_many_such_rounds(self, grid: DirectGrid) -> None:
        grid.silent = {0, 1, 2, 3}
        with pytest.raises(TooFewRepliesError, match="expected 2 replies, got fewer 3 times"):
            start(make_server(CONTEXT), grid, 9, min_replies=2, max_lost=2)
        assert len(train(grid)) == 9

    def test_an_error_crosses_without_its_text(
        self, grid: DirectGrid, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Failing:
            def handle(self, message: bytes) -> bytes:
                raise LookupError("row 'Dear Ms Example' of records.csv")

        def make(context: Context) -> Any:
            return Failing() if context.node_config["partition-id"] == 1 else make_client(context)

        grid.app = client_app(make, resident=False)
        start(make_server(CONTEXT), grid, 1)
        assert "Dear Ms Example" in caplog.text, "the client's own log has it"
        assert "no answer of 1: 'LookupError'" in caplog.text
        assert not any(b"Example" in raw or b"records" in raw for raw in grid.up)
        assert any(b"LookupError" in raw for raw in grid.up)

    @pytest.mark.parametrize("what", ["noise", "nothing", "another's", "another type", "no record", "before"])
    def test_a_bad_reply_counts_as_none(self, grid: DirectGrid, what: str) -> None:
        server = make_server(CONTEXT)
        start(server, grid, 1)
        expected, before = make_server(CONTEXT), dict(grid.replies)
        start(expected, DirectGrid(grid.app, len(SIZES)), 1)
        opened = expected.open()
        cheat = opened.clients[0]
        for number in opened.clients[1:]:
            opened.add(number, embedding.make_client(number).handle(opened.message(number)))
        opened.close()
        other = embedding.make_client(opened.clients[1])

        def falsified(record: RecordDict, number: int | None) -> RecordDict:
            if number != cheat:
                return record
            if what == "no record":
                return RecordDict()
            values: dict[str, Any] = {
                "noise": bytes(range(256)),
                "nothing": b"",
                "another's": other.handle(server.broadcast(opened.clients[1])),
                "another type": [1.5],
                "before": before[cheat],
            }
            return RecordDict({"fedkseed": ConfigRecord({"message": values[what]})})

        grid.falsified = falsified
        start(server, grid, 1)
        assert server.round == 2
        assert server.ledger().to_bytes() == expected.ledger().to_bytes()


class TestWhatTravels:
    def test_no_message_holds_a_weight_and_records_are_as_small_as_the_page_says(
        self, grid: DirectGrid
    ) -> None:
        """Records of 4,096 seeds and 200 steps, as Flower serialises them."""
        config = replace(CONFIG, num_seeds=4096, num_local_steps=200)
        task = embedding.make_task()
        working = WorkingCopy(task.model)
        grid.app = client_app(
            lambda context: task.client(int(context.node_config["partition-id"]), working, config),
            resident=False,
        )
        server = task.server(config)
        assert sum(parameter.nbytes for parameter in task.model.parameters()) > 2**18
        start(server, grid, 1, num_evaluators=4)
        for kind, most_down, most_up in (
            ("train", 17_300, 1_300),
            ("evaluate", 17_300, 1_300),
            ("query", 0, 100),
        ):
            down, up = zip(*grid.sizes[kind], strict=True)
            assert len(down) == {"train": 3, "evaluate": 4, "query": 4}[kind]
            assert (max(down) <= most_down, max(up) <= most_up) == (True, True), (kind, down, up)
        tuned = embedding.make_model()
        server.ledger().apply_(tuned)
        weights = [
            parameter.detach().numpy()
            for model in (tuned, embedding.make_model())
            for parameter in model.parameters()
        ]
        heads = [tensor.tobytes()[:64] for tensor in weights]
        for record in grid.records:
            assert not record.array_records
            assert [list(values) for values in record.config_records.values()] in ([], [["message"]])
            assert set(record) <= {"fedkseed"}
        assert not [raw for raw in (*grid.down, *grid.up) for head in heads if head in raw]

    def test_the_recommended_bounds_are_on_unless_others_are(self) -> None:
        without = replace(CONFIG, median_clip=0.0, share_cap=0.0)
        given = replace(CONFIG, median_clip=7.0, share_cap=0.0)
        for config, bounds, expected in (
            (without, RECOMMENDED_BOUNDS, tuple(RECOMMENDED_BOUNDS)),
            (given, RECOMMENDED_BOUNDS, (7.0, RECOMMENDED_BOUNDS.share_cap)),
            (without, Bounds(0, 0), (0.0, 0.0)),
        ):
            server = FedKSeedStrategy(embedding.make_task().server(config), bounds=bounds).server
            assert (server.config.median_clip, server.config.share_cap) == expected


class TestWhoHoldsTheClient:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
        """What workers that stay were asked for."""
        found: list[bytes] = []

        def connect(make: Any) -> Any:
            found.append(pickle.dumps(make))
            return make()

        monkeypatch.setattr("fedkseed.adapters.flower.client.connect", connect)
        return found

    def test_a_worker_of_the_node_that_is_found_again(self, grid: DirectGrid, asked: list[bytes]) -> None:
        grid.app = client_app(make_client)
        grid.run_config = {"a": 1, "b": 2}
        start(make_server(CONTEXT), grid, 2)
        grid.run_config = {"b": 2, "a": 1}
        start(make_server(CONTEXT), grid, 1)
        assert len(asked) == 9
        assert len(set(asked)) == len(set(train(grid)))

    def test_nobody_in_an_actor_of_ray_which_stays_itself(
        self, grid: DirectGrid, asked: list[bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
        grid.app = client_app(make_client)
        start(make_server(CONTEXT), grid, 1)
        assert not asked
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
        start(make_server(CONTEXT), grid, 1)
        assert len(asked) == 3
