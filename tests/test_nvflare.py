"""`fedkseed.adapters.nvflare` over a stand-in of FLARE's Collab API, and in FLARE's simulator where it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import embedding
from support.embedding_pages import DOCS, write

from fedkseed import (
    RECOMMENDED_BOUNDS,
    Bounds,
    Broadcast,
    Client,
    Ledger,
    ModelIdentity,
    ProtocolError,
    Reply,
    RoundSummary,
    SeedPool,
    Server,
    StateError,
    TooFewRepliesError,
)
from fedkseed.adapters.nvflare import SiteError, client_side, server_side

pytestmark = pytest.mark.filterwarnings("ignore:the model is in train mode with dropout:UserWarning")

SECONDS = 300  # of what takes one minute on two busy cores: then something hangs


class CollabCallError(Exception):
    """FLARE's error of a call to a site that failed."""


class RunEndedError(Exception):
    """FLARE's error in a job that is being ended."""


class Site:
    """FLARE's proxy of a site: called with options, it gives what has the site's functions.

    Sites are threads here, and random numbers the process's: one after the other draws its own.
    """

    turn = threading.Lock()

    def __init__(self, name: str, answer: Callable[[bytes], Any]) -> None:
        self.name = name
        self.answer = answer
        self.arrive: Callable[[], Any] = lambda: None
        self.messages: list[bytes] = []
        self.timeouts: set[float] = set()

    def __call__(self, *, timeout: float) -> SimpleNamespace:
        self.timeouts.add(timeout)
        return SimpleNamespace(handle=self.handle)

    def handle(self, message: bytes) -> Any:
        self.messages.append(message)
        self.arrive()
        try:
            with self.turn:
                return self.answer(message)
        except SiteError as error:
            raise CollabCallError(f"call to {self.name}.handle failed: {error}") from error


@pytest.fixture
def flare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The facade `collab` of the stand-in, with one site for each client of `embedding`."""
    facade = SimpleNamespace(
        publish=lambda function: function,
        main=lambda function: function,
        workspace=SimpleNamespace(get_run_dir=lambda job: tmp_path / job),
        fl_ctx=SimpleNamespace(get_job_id=lambda: "job-1"),
    )
    (tmp_path / "job-1").mkdir()
    for name in ("nvflare", "nvflare.collab"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["nvflare.collab"]).update(collab=facade, CollabCallError=CollabCallError)
    facade.clients = [
        Site(f"site-{number + 1}", client_side(embedding.make_client))
        for number in range(len(embedding.SIZES))
    ]
    return facade


def run(**options: Any) -> Server:
    """The server after all rounds."""
    made = []

    def make_server() -> Server:
        made.append(embedding.make_server())
        return made[0]

    server_side(make_server, embedding.CONFIG.num_rounds, **{"timeout": 600, **options})()
    return made[0]


def test_the_ledger_is_that_of_the_plain_simulation(flare: SimpleNamespace, tmp_path: Path) -> None:
    run(ledger="model.ledger")
    assert (tmp_path / "job-1" / "model.ledger").read_bytes() == embedding.reference_ledger()


def test_an_absolute_path_of_the_ledger_is_taken_as_it_is(flare: SimpleNamespace, tmp_path: Path) -> None:
    run(ledger=tmp_path / "model.ledger")
    assert Ledger.load(tmp_path / "model.ledger").notes["num_rounds"] == "3"


def test_every_call_has_a_time_out_and_one_message_a_round(flare: SimpleNamespace) -> None:
    rounds: list[RoundSummary] = []
    run(timeout=17.5, on_round=lambda server, summary: rounds.append(summary))
    assert [summary.round for summary in rounds] == [0, 1, 2]
    for number, site in enumerate(flare.clients):
        assert len(site.messages) == sum(number in summary.clients for summary in rounds)
    assert set.union(*(site.timeouts for site in flare.clients)) == {17.5}


def test_no_message_holds_a_weight(flare: SimpleNamespace) -> None:
    """A message is as long as K and tau say and some hundred bytes, where the model has 67,587 weights."""
    config, answers = embedding.CONFIG, []
    for site in flare.clients:
        inner = site.answer
        site.answer = lambda message, inner=inner: answers.append(inner(message)) or answers[-1]
    run()
    down = {len(message) for site in flare.clients for message in site.messages}
    assert len(down) == 1
    assert max(down) < 4 * config.num_seeds + 2 * config.num_local_steps + 200
    assert max(map(len, answers)) < 4 * config.num_local_steps + 100


def test_messages_go_out_side_by_side(flare: SimpleNamespace) -> None:
    """Each site of a round answers when all three have their message."""
    barrier = threading.Barrier(embedding.CONFIG.clients_per_round, timeout=60)
    for site in flare.clients:
        site.arrive = barrier.wait
    assert run().ledger().to_bytes() == embedding.reference_ledger()


def fails(message: bytes) -> bytes:
    raise CollabCallError("call to site-3.handle failed: timed out\nafter 600 seconds")


@pytest.mark.parametrize("answer", [fails, lambda _: b"FKSR", lambda _: None, lambda message: message])
def test_a_site_that_fails_leaves_its_weight_to_the_others(
    answer: Callable[[bytes], Any], flare: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    flare.clients[2].answer = answer
    with caplog.at_level(logging.WARNING, "fedkseed"):
        assert run().ledger().to_bytes() == embedding.ledger_without(2)
    told = [record.getMessage() for record in caplog.records if "client 2" in record.getMessage()]
    assert told
    assert not any("\n" in line for line in told)


def test_a_reply_to_the_round_before_is_refused(flare: SimpleNamespace) -> None:
    inner, before = flare.clients[2].answer, list[bytes]()

    def late(message: bytes) -> bytes:
        before.append(inner(message))
        return before[max(0, len(before) - 2)]

    flare.clients[2].answer = late
    rounds: list[RoundSummary] = []
    run(on_round=lambda server, summary: rounds.append(summary))
    missing = [2 in summary.missing for summary in rounds if 2 in summary.clients]
    assert missing == [False, *[True] * (len(missing) - 1)]
    assert len(missing) > 1


def test_too_few_replies_end_the_job(flare: SimpleNamespace, tmp_path: Path) -> None:
    flare.clients[2].answer = fails
    with pytest.raises(TooFewRepliesError, match=r"expected at least 3 replies of round 0, got 2"):
        run(min_replies=3, ledger="model.ledger")
    assert not list((tmp_path / "job-1").iterdir())


def test_more_replies_than_a_round_invites_are_refused_before_a_message(flare: SimpleNamespace) -> None:
    with pytest.raises(
        ValueError, match=r"min_replies of at most 3, .*\(clients_per_round 3, 4 clients\), got 4"
    ):
        run(min_replies=4)
    del flare.clients[2:]
    with pytest.raises(ValueError, match=r"at most 2, .*\(clients_per_round 3, 2 clients\), got 3: no round"):
        run(min_replies=3)
    assert not any(site.messages for site in flare.clients)


def test_the_end_of_a_job_goes_through(flare: SimpleNamespace) -> None:
    """It is no failure of a site, and no round is merged after it."""

    def abort(message: bytes) -> bytes:
        raise RunEndedError

    flare.clients[2].answer = abort
    rounds: list[RoundSummary] = []
    with pytest.raises(RunEndedError):
        run(on_round=lambda server, summary: rounds.append(summary))
    assert all(2 not in summary.clients for summary in rounds)


def test_a_job_goes_on_where_another_ended(
    flare: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is ended in its second round; the next one resumes with the bounds that were put in."""
    reference, folder, inner = embedding.reference_ledger(), tmp_path / "state", flare.clients[3].answer
    config = dataclasses.replace(embedding.CONFIG, median_clip=0.0, share_cap=0.0)
    monkeypatch.setattr(embedding, "CONFIG", config)

    def abort(message: bytes) -> bytes:
        if Broadcast.peek(message).round == 1:
            raise RunEndedError
        reply: bytes = inner(message)
        return reply

    def resumed(bounds: Bounds = RECOMMENDED_BOUNDS) -> Server:
        identity, pool = ModelIdentity.of(embedding.make_model()), SeedPool(config.seed, config.num_seeds)
        return Server.resume(folder, identity, pool, config.server_config(4).with_bounds(bounds))

    flare.clients[3].answer = abort
    ended: list[Server] = []

    def save(server: Server, summary: RoundSummary) -> None:
        server.save(folder)
        ended.append(server)

    with pytest.raises(RunEndedError):
        run(on_round=save)
    ended[0].close()  # as the end of its process does
    flare.clients[3].answer = inner
    with pytest.raises(StateError, match="median_clip"):
        resumed(Bounds(0, 0))
    server_side(resumed, config.num_rounds, timeout=600, ledger="model.ledger", on_round=save)()
    ended[-1].close()
    assert [server.round for server in (ended[0], ended[-1])] == [1, 3]
    assert (tmp_path / "job-1" / "model.ledger").read_bytes() == reference


def test_bounds_are_put_in_where_the_config_has_none(
    flare: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = embedding.reference_ledger()
    off = dataclasses.replace(embedding.CONFIG, median_clip=0.0, share_cap=0.0)
    monkeypatch.setattr(embedding, "CONFIG", off)
    assert run().ledger().to_bytes() == reference
    assert run(bounds=Bounds(0, 0)).ledger().to_bytes() == embedding.simulated_ledger()
    monkeypatch.setattr(embedding, "CONFIG", dataclasses.replace(off, median_clip=3.0))
    config = run().config
    assert (config.median_clip, config.share_cap) == (3.0, RECOMMENDED_BOUNDS.share_cap)


def test_sites_evaluate_before_every_so_many_rounds(
    flare: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedkseed"):
        server = run(evaluate_every=2)
    assert server.ledger().to_bytes() == embedding.reference_ledger()
    told = [record.getMessage() for record in caplog.records if "held_out_loss" in record.getMessage()]
    assert len(told) == 2
    assert "'round': 0.0" in told[0]
    assert "'round': 2.0" in told[1]


def test_sites_of_other_names_are_numbered_by_their_places(flare: SimpleNamespace) -> None:
    names = ("north", "east", "south", "west")
    for site, name in zip(flare.clients, names, strict=True):
        site.name = name
    flare.clients.reverse()
    assert run(sites=names).ledger().to_bytes() == embedding.reference_ledger()
    with pytest.raises(ValueError, match=r"expected a site out of site-1, site-2, \.\.\., got 'west'"):
        run()
    with pytest.raises(ValueError, match=r"expected a site out of \('north',\), got 'west'"):
        run(sites=("north",))


def test_a_site_beyond_the_registered_clients_is_an_error(flare: SimpleNamespace) -> None:
    flare.clients.append(Site("site-5", fails))
    with pytest.raises(ProtocolError, match=r"expected available clients out of 0 \.\. 3, .* got 4"):
        run()


def test_of_an_error_at_a_site_only_the_type_leaves_it(
    flare: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    def make_client(number: int) -> Client[Any]:
        raise ValueError("a row of the site's data")

    with pytest.raises(SiteError) as caught:
        client_side(make_client)(embedding.make_server().broadcast(1))
    assert str(caught.value) == "ValueError"
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None, "FLARE sends a traceback, causes and all"
    assert "a row of the site's data" in caplog.text, "the site's own log has it"


def test_an_error_of_the_protocol_is_told_as_it_is(flare: SimpleNamespace) -> None:
    server = embedding.make_server()
    handle = client_side(embedding.make_client)
    handle(server.broadcast(1))
    with pytest.raises(SiteError, match=r"ProtocolError: expected a broadcast for client 1, got one for 2"):
        handle(server.broadcast(2))
    with pytest.raises(SiteError, match=r"MessageError: expected "):
        handle(b"FKSB")


def test_the_client_is_made_at_the_first_message_and_once(flare: SimpleNamespace) -> None:
    server = embedding.make_server()
    made: list[int] = []

    def make_client(number: int) -> Client[Any]:
        made.append(number)
        if len(made) == 1:
            raise OSError("a disk that is not there yet")
        return embedding.make_client(number)

    handle = client_side(make_client)
    with pytest.raises(SiteError, match="OSError"):
        handle(server.broadcast(1))
    assert handle(server.broadcast(1)) == handle(server.broadcast(1))
    assert made == [1, 1]


def test_functions_that_return_nothing_are_told_of_at_the_start(
    flare: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    handle = client_side(lambda number: None)
    with pytest.raises(SiteError, match="TypeError"):
        handle(embedding.make_server().broadcast(1))
    assert "expected make_client to return a client, got a NoneType; end it with return task" in caplog.text
    with pytest.raises(
        TypeError, match="expected what make_server returns as a Server, got a NoneType; end it"
    ):
        server_side(lambda: None, 3, timeout=1)()


def test_a_damaged_first_message_makes_no_client(flare: SimpleNamespace) -> None:
    message = embedding.make_server().broadcast(1)
    handle = client_side(embedding.make_client)
    place = len(message) - 4 - 2 * Broadcast.peek(message).num_steps - 4  # of the client's number
    with pytest.raises(SiteError, match="MessageError: expected a broadcast with checksum"):
        handle(message[:place] + bytes([2]) + message[place + 1 :])
    assert handle(message) == embedding.make_client(1).handle(message)


def require_flare() -> None:
    if importlib.util.find_spec("nvflare") is None:
        pytest.skip("needs NVIDIA FLARE: the extra nvflare")


@pytest.mark.slow
def test_a_call_and_its_result_as_flare_serialises_them() -> None:
    """The page's figures, at K = 4096 and 200 steps, within the 17,300 and 1,300 that they are to be."""
    require_flare()
    from nvflare.collab.runtime.defs import CallReplyKey, ObjectCallKey
    from nvflare.fuel.utils import fobs

    changes = {"num_seeds": 4096, "num_local_steps": 200}
    server = embedding.make_task().server(dataclasses.replace(embedding.CONFIG, **changes))
    call = {
        ObjectCallKey.CALLER: "server",
        ObjectCallKey.TARGET_NAME: "site-2",
        ObjectCallKey.METHOD_NAME: "handle",
        ObjectCallKey.ARGS: [],
        ObjectCallKey.KWARGS: {"message": server.broadcast(1)},
    }
    result = {CallReplyKey.RESULT: Reply(0, 1, 3, bytes(32), np.zeros(200, np.float32)).to_bytes()}
    sizes = [len(fobs.dumps(payload)) for payload in (call, result)]
    assert sizes[0] <= 17_300
    assert sizes[1] <= 1_300
    page = (DOCS / "nvflare.md").read_text("utf-8")
    assert all(f"{size:,}" in page for size in sizes)


@pytest.mark.slow
def test_the_job_of_the_page_in_the_simulator(tmp_path: Path) -> None:
    """FLARE's server, and a process for each of four sites, all ended by the end of the test."""
    require_flare()
    write("nvflare", tmp_path, task="my_federation/task.py")
    (tmp_path / "my_federation" / "__init__.py").touch()
    environment = {**embedding.environment(), "NVFLARE_SIMULATOR_WORKSPACE_ROOT": str(tmp_path / "flare")}
    with subprocess.Popen(
        [sys.executable, "-m", "my_federation.job"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, text
    folder = Path(text.splitlines()[-1])
    assert (folder / "server" / "simulate_job" / "model.ledger").read_bytes() == embedding.reference_ledger()
