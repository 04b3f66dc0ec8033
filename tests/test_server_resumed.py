"""A resumed server: its run id, clients that came later, bounds in the state."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
from support.federation import run
from support.messages import CONFIG, IDENTITY, POOL, make_replies, make_server
from test_server_state import HEADER, SAMPLINGS, resume, saved, sealed

from fedkseed import RECOMMENDED_BOUNDS, Bounds, Server, ServerConfig, StateError
from fedkseed.federation.state import ServerState, StateFolder
from fedkseed.simulation.run_folder import LEDGER, METRICS


def test_a_resumed_server_keeps_its_run_id_and_takes_new_clients(tmp_path: Path) -> None:
    config = ServerConfig(**CONFIG)
    with Server(IDENTITY, POOL, config) as server:
        server.merge(make_replies(server))
        server.save(tmp_path)
        run_id, answered = server.config.run_id, make_replies(server)
    with Server.resume(tmp_path, IDENTITY, POOL, config) as same:
        assert same.config.run_id == run_id
        same.merge(answered)  # replies to what was sent before the interruption
    with Server.resume(tmp_path, IDENTITY, POOL, replace(config, num_clients=40)) as grown:
        assert (grown.config.run_id, grown.round) == (run_id, 1)
        assert grown.open(range(7)).clients == server.clients
        seen: set[int] = set()
        for _ in range(20):
            seen.update(grown.open().clients)
            grown.merge(make_replies(grown))
        assert max(seen) >= 7
        grown.save(tmp_path)
    with pytest.raises(StateError, match="num_clients of at least 40, .*, got 7; clients may be added"):
        Server.resume(tmp_path, IDENTITY, POOL, config)


@pytest.mark.parametrize("changes", [{"median_clip": 5.0}, {"share_cap": 2.4, "pro_clip": 7.0}])
@SAMPLINGS
def test_bounds_stand_in_format_3_and_go_on_over_a_resume(
    tmp_path: Path, sampling: str, changes: dict[str, float]
) -> None:
    data = saved(tmp_path, sampling=sampling, **changes)
    assert struct.unpack_from("<H", data, 4) == (3,)
    stated = {**{"pro_clip": 1000.0, "pro_start": 0.0, "median_clip": 0.0, "share_cap": 0.0}, **changes}
    assert struct.unpack_from("<dddd", data, HEADER) == tuple(stated.values())
    straight = make_server(sampling=sampling, **changes)
    for _ in range(2):
        straight.merge(make_replies(straight))
    with resume(tmp_path, sampling=sampling, run_id=straight.config.run_id, **changes) as server:
        server.merge(make_replies(straight))
        straight.merge(make_replies(straight))
        assert server.coefficients.tobytes() == straight.coefficients.tobytes()
    for version in (1, 2):
        damaged = bytearray(data)
        damaged[4] = version
        with pytest.raises(StateError):
            ServerState.from_bytes(sealed(bytes(damaged)))
    # Bounds of 0, or Pro's numbers alone, are another format's.
    none = struct.pack("<dd", 0.0, 0.0)
    with pytest.raises(StateError, match="the numbers that format 3 is for"):
        ServerState.from_bytes(sealed(data[: HEADER + 16] + none + data[HEADER + 32 :]))


def test_a_run_that_was_saved_before_its_bounds_says_how_it_gets_them(tmp_path: Path) -> None:
    free = ServerConfig(**CONFIG)
    bound = free.with_bounds(RECOMMENDED_BOUNDS)
    with Server(IDENTITY, POOL, free) as server:
        server.save(tmp_path)
    words = (
        r"with median_clip 5.0 and share_cap 2.4, got one with 0.0 and 0.0; the run was saved without bounds"
        r": resume with both 0, then server.put_bounds\(...\) adds them"
    )
    with pytest.raises(StateError, match=words):
        Server.resume(tmp_path, IDENTITY, POOL, bound)
    with Server.resume(tmp_path, IDENTITY, POOL, free) as server:  # which is what the error advises
        server.put_bounds(RECOMMENDED_BOUNDS)
        server.merge(make_replies(server))
        server.save(tmp_path)
    words = r"share_cap 0.0, got one with 5.0 and 2.4; .* by with_bounds\(Bounds\(5.0, 2.4\)\)"
    with pytest.raises(StateError, match=words):
        Server.resume(tmp_path, IDENTITY, POOL, free)
    with Server.resume(tmp_path, IDENTITY, POOL, free.with_bounds(Bounds(5.0, 2.4))) as server:
        assert server.round == 1
    with pytest.raises(
        StateError, match="with lr 0.5 and median_clip 0.0 and .*; resume with the configuration"
    ):
        Server.resume(tmp_path, IDENTITY, POOL, replace(free, lr=0.5))


def test_a_simulation_with_bounds_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    bounds = {"median_clip": 1.2, "share_cap": 1.1}
    run(tmp_path / "free", 1, resume=False, num_rounds=4)
    run(tmp_path / "whole", 1, resume=False, num_rounds=4, **bounds)
    run(tmp_path / "halves", 1, resume=False, num_rounds=2, **bounds)
    run(tmp_path / "halves", 1, resume=True, num_rounds=4, **bounds)
    for name in (LEDGER, METRICS, StateFolder.FILE):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "halves" / name).read_bytes() == whole
        assert (tmp_path / "free" / name).read_bytes() != whole, "the bounds cut nothing"
    with pytest.raises(StateError, match="median_clip 0.0 and share_cap 0.0, got one with 1.2 and 1.1"):
        run(tmp_path / "halves", 1, resume=True, num_rounds=5)
