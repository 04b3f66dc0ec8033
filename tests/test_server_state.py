"""A server that is interrupted: its state on disk, its folder, and what cannot be resumed."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.killed_server import NUM_ROUNDS, play
from support.messages import CONFIG, IDENTITY, POOL, make_replies, make_server
from support.protocol_page import fields_of_the_page

from fedkseed import IdentityError, ModelIdentity, SeedPool, Server, ServerConfig, StateError
from fedkseed.federation.state import ServerState, StateFolder
from fedkseed.files import FolderInUseError, FolderLock, LockLostError

HEADER = 136
SAMPLINGS = pytest.mark.parametrize("sampling", ["uniform", "pro"])


def resume(folder: Path, identity: ModelIdentity = IDENTITY, pool: SeedPool = POOL, **changes: Any) -> Server:
    return Server.resume(folder, identity, pool, ServerConfig(**{**CONFIG, **changes}))


def saved(folder: Path, num_rounds: int = 2, **changes: Any) -> bytes:
    """The file of a server that merged some rounds, saved and ended."""
    with make_server(**changes) as server:
        for _ in range(num_rounds):
            server.merge(make_replies(server))
        server.save(folder)
    return (folder / StateFolder.FILE).read_bytes()


def sealed(data: bytes) -> bytes:
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


@SAMPLINGS
def test_a_resumed_server_goes_on_bit_for_bit(tmp_path: Path, sampling: str) -> None:
    straight = make_server(sampling=sampling)
    server = make_server(sampling=sampling)
    for round in range(6):
        replies = make_replies(straight)
        straight.merge(replies)
        # The replies answer the broadcasts of a server that was never interrupted.
        server.merge(replies)
        server.save(tmp_path)
        if round % 2:
            server.close()
            server = resume(tmp_path, sampling=sampling)
    assert server.round == 6
    assert server.clients == straight.clients
    assert server.coefficients.tobytes() == straight.coefficients.tobytes()
    for client in straight.clients:
        assert server.broadcast(client) == straight.broadcast(client)
    server.close()


@SAMPLINGS
def test_the_page_shows_every_byte_of_the_state(tmp_path: Path, sampling: str) -> None:
    data = saved(tmp_path, sampling=sampling)
    with resume(tmp_path, sampling=sampling) as server:
        pass
    fields = {}
    sizes = {"K": 16, "tau": 20}
    for name, code, offset in fields_of_the_page("Server state", sizes):
        if name == "checksum":
            offset = offset if sampling == "pro" else HEADER + 8 * 16
            assert offset + 32 == len(data)
        elif name in ("sums", "counts") and sampling == "uniform":
            continue
        fields[name] = struct.unpack_from("<" + code.replace("K ", "16"), data, offset)
    assert fields["magic"] == (b"FKSS",)
    assert fields["K"] == (16,)
    assert fields["round"] == (2,)
    assert (fields["clients"], fields["clients a round"], fields["tau"]) == ((7,), (3,), (20,))
    assert (fields["lr"], fields["bound of g"], fields["base seed"]) == ((0.3,), (100.0,), (5,))
    assert fields["run id"] == (server.config.run_id,)
    assert (fields["structure hash"], fields["content hash"]) == ((IDENTITY.structure,), (IDENTITY.content,))
    assert fields["sampling"] == (1 if sampling == "pro" else 0,)
    assert fields["coefficients"] == tuple(server.coefficients)
    if server.significance is not None:
        assert fields["sums"] == tuple(server.significance.sums)
        assert fields["counts"] == tuple(server.significance.counts)
    assert fields["checksum"] == (hashlib.sha256(data[:-32]).digest(),)


@SAMPLINGS
def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path: Path, sampling: str) -> None:
    data = saved(tmp_path, sampling=sampling)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        with pytest.raises(StateError):
            ServerState.from_bytes(bytes(changed))
        with pytest.raises(StateError):
            ServerState.from_bytes(data[:position])
    (tmp_path / StateFolder.FILE).write_bytes(data[:-1])
    with pytest.raises(StateError, match=r"server\.state: expected"):
        resume(tmp_path, sampling=sampling)
    # Refusing it gave the folder back and left the file alone.
    assert (tmp_path / StateFolder.FILE).read_bytes() == data[:-1]
    (tmp_path / StateFolder.FILE).write_bytes(data)
    resume(tmp_path, sampling=sampling).close()


@pytest.mark.parametrize(
    ("position", "field", "message"),
    [
        (4, struct.pack("<H", 4), "format version 1, 2, 3, got 4"),
        (4, struct.pack("<H", 3), "pro_clip"),
        (4, struct.pack("<H", 2), "pro_clip"),
        (6, struct.pack("<H", 2), "contract version 1, got 2"),
        (8, b"\2", "noise family below 2, got 2"),
        (9, b"\xff", "dtype code"),
        (10, b"\2", "weighting below 2"),
        (11, b"\2", "sampling below 2"),
        (12, struct.pack("<I", 0), r"number of seeds in \[1, 65536\], got 0"),
        (12, struct.pack("<I", 17), "3 arrays of 17 numbers"),
        (16, struct.pack("<I", 2**24), "round below"),
        (24, struct.pack("<I", 8), "clients_per_round"),
        (40, struct.pack("<d", np.nan), "lr"),
        (48, struct.pack("<f", 0.0), "eps"),
        (52, struct.pack("<f", np.inf), "max_abs_g"),
        (HEADER, struct.pack("<d", np.nan), "coefficients within fp32"),
        (HEADER, struct.pack("<d", 1e39), "coefficients within fp32"),
        (HEADER + 128, struct.pack("<d", -1.0), "sums and counts of at least 0"),
        (HEADER + 128, struct.pack("<d", np.inf), "sums and counts of at least 0"),
        (HEADER + 256, struct.pack("<q", -1), "sums and counts of at least 0"),
    ],
)
def test_a_field_out_of_range_under_a_right_checksum(
    tmp_path: Path, position: int, field: bytes, message: str
) -> None:
    data = saved(tmp_path, sampling="pro")
    assert ServerState.from_bytes(sealed(data)).to_bytes() == data
    with pytest.raises(StateError, match=message):
        ServerState.from_bytes(sealed(data[:position] + field + data[position + len(field) :]))


def test_a_file_of_any_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / StateFolder.FILE, "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(StateError, match="expected at most"):
        resume(tmp_path)


def test_another_model_or_configuration_is_named(tmp_path: Path) -> None:
    data = saved(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pool": SeedPool(6, 16)}, "base_seed 6, got one with 5"),
        ({"pool": SeedPool(5, 32)}, "num_seeds 32, got one with 16"),
        ({"num_clients": 6}, "num_clients of at least 7, .* got 6"),
        ({"median_clip": 5.0}, r"median_clip 5\.0, got one with 0\.0"),
        ({"share_cap": 2.0}, r"share_cap 2\.0, got one with 0\.0"),
        ({"clients_per_round": 2}, "clients_per_round 2, got one with 3"),
        ({"num_local_steps": 21}, "num_local_steps 21, got one with 20"),
        ({"lr": 0.2}, "lr 0.2, got one with 0.3"),
        ({"eps": 1e-2}, "eps 0.0099"),
        ({"max_abs_g": 99.0}, "max_abs_g 99.0, got one with 100.0"),
        ({"weighting": "equal"}, "weighting equal, got one with data_size"),
        ({"sampling": "pro"}, "sampling pro, got one with uniform"),
        ({"pro_clip": 5.0}, r"pro_clip 5\.0, got one with 1000\.0"),
        ({"pro_start": 0.25}, r"pro_start 0\.25, got one with 0\.0"),
        ({"run_id": b"another run here"}, "run_id b'another run here', got one with"),
    ]
    for changes, message in cases:
        with pytest.raises(StateError, match=message):
            resume(tmp_path, **changes)
    other = ModelIdentity(IDENTITY.structure, bytes(32), "bfloat16")
    with pytest.raises(IdentityError, match="the same shapes, other numbers"):
        resume(tmp_path, other)
    assert (tmp_path / StateFolder.FILE).read_bytes() == data


def test_a_folder_without_a_state_and_one_with_another_s(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="got none; start a new run there"):
        resume(tmp_path / "new")
    data = saved(tmp_path / "old")
    with make_server() as server, pytest.raises(StateError, match="resume that run, or choose another"):
        server.save(tmp_path / "old")
    assert (tmp_path / "old" / StateFolder.FILE).read_bytes() == data
    with make_server() as server:
        server.save(tmp_path / "first")
        server.save(tmp_path / "second")
        with make_server() as other, pytest.raises(StateError):
            other.save(tmp_path / "first")
        assert (tmp_path / "first" / StateFolder.FILE).read_bytes() == server._state(server.round).to_bytes()


def hold(folder: Path, ready: Any, done: Any) -> None:
    with make_server() as server:
        server.save(folder)
        ready.set()
        done.wait()


def test_two_servers_on_one_folder_fail_clearly(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(FolderInUseError, match="to itself"):
            resume(tmp_path)
        with make_server() as server, pytest.raises(FolderInUseError):
            server.save(tmp_path)
    finally:
        done.set()
        other.join(60)
    assert other.exitcode == 0
    with resume(tmp_path), pytest.raises(FolderInUseError):
        resume(tmp_path)
    resume(tmp_path).close()


@SAMPLINGS
def test_a_full_disk_leaves_the_old_state(
    tmp_path: Path, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, sampling=sampling)
    with resume(tmp_path, sampling=sampling) as server:
        before = (tmp_path / StateFolder.FILE).read_bytes()
        server.merge(make_replies(server))

        def no_space(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            with pytest.raises(OSError, match="No space left"):
                server.save(tmp_path)
        assert (tmp_path / StateFolder.FILE).read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", StateFolder.FILE]
        # The server itself lost nothing: with space it saves.
        server.save(tmp_path)
        assert ServerState.from_bytes((tmp_path / StateFolder.FILE).read_bytes()).round == 3


def test_a_real_limit_on_file_sizes_leaves_the_old_state(tmp_path: Path) -> None:
    saved(tmp_path)
    with resume(tmp_path) as server:
        before = (tmp_path / StateFolder.FILE).read_bytes()
        server.merge(make_replies(server))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(OSError, match="large"):
                server.save(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / StateFolder.FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", StateFolder.FILE]


@pytest.mark.slow
def test_killed_at_any_instant_it_ends_in_the_same_state(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    play(str(straight))
    script = Path(__file__).parent / "support" / "killed_server.py"
    command = [sys.executable, str(script), str(killed), "30"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    num_killed, num_states = map(int, done.stdout.split())
    assert num_killed >= 20
    assert num_states >= 10
    final = (killed / StateFolder.FILE).read_bytes()
    assert ServerState.from_bytes(final).round == NUM_ROUNDS
    assert final == (straight / StateFolder.FILE).read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == [".lock", StateFolder.FILE, StateFolder.OLDER]


@SAMPLINGS
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "zeroed", "huge", "gone"])
def test_a_damaged_state_is_replaced_by_the_one_before_it_and_said_aloud(
    tmp_path: Path, sampling: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = []
    with make_server(sampling=sampling) as server:
        for _ in range(3):
            server.merge(make_replies(server))
            server.save(tmp_path)
            server.save(tmp_path)  # the same state again takes no older one's place
            states.append((tmp_path / StateFolder.FILE).read_bytes())
    assert (tmp_path / StateFolder.OLDER).read_bytes() == states[1]
    damage_file(tmp_path / StateFolder.FILE, damage)
    with resume(tmp_path, sampling=sampling) as server:
        assert server.round == 2
        assert StateFolder.OLDER in server.notice
        assert "after 2 rounds" in server.notice
        assert server.notice in caplog.text
        server.save(tmp_path)
        assert (tmp_path / StateFolder.OLDER).read_bytes() == states[1], "not the damaged one"
        server.merge(make_replies(server))
        server.save(tmp_path)
    assert (tmp_path / StateFolder.FILE).read_bytes() == states[2]
    with resume(tmp_path, sampling=sampling) as server:
        assert server.notice == ""
    for name in (StateFolder.FILE, StateFolder.OLDER):
        damage_file(tmp_path / name, damage)
    with pytest.raises(StateError, match=r"got none" if damage == "gone" else r"server\.state: expected"):
        resume(tmp_path, sampling=sampling)


def damage_file(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "huge":
        os.truncate(path, 1 << 40)
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        path.write_bytes(
            {"cut": data[:-1], "flipped": bytes(flipped), "empty": b"", "zeroed": bytes(len(data))}[damage]
        )


def test_a_state_of_another_format_or_configuration_is_not_taken_for_damage(tmp_path: Path) -> None:
    with make_server() as server:
        for _ in range(2):
            server.merge(make_replies(server))
            server.save(tmp_path)
    data = bytearray((tmp_path / StateFolder.FILE).read_bytes())
    with pytest.raises(StateError, match="lr"):
        resume(tmp_path, lr=0.5)
    data[4] += 3
    (tmp_path / StateFolder.FILE).write_bytes(sealed(bytes(data)))
    with pytest.raises(StateError, match="format version"):
        resume(tmp_path)


def test_a_lock_file_that_is_gone_or_another_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    data = saved(tmp_path)
    with resume(tmp_path) as server:
        server.merge(make_replies(server))
        (tmp_path / ".lock").unlink()
        for _ in range(2):
            with pytest.raises(LockLostError, match="nothing more is written"):
                server.save(tmp_path)
            assert (tmp_path / StateFolder.FILE).read_bytes() == data
            (tmp_path / ".lock").touch()
        with resume(tmp_path) as other:
            other.save(tmp_path)


def test_a_state_folder_that_fails_gives_its_lock_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".x.1-1.tmp").touch()

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "unlink", fail)
        StateFolder(tmp_path)
    StateFolder(tmp_path).close()


def test_a_lock_may_be_the_caller_s(tmp_path: Path) -> None:
    saved(tmp_path)
    config = ServerConfig(**CONFIG)
    with FolderLock(tmp_path) as lock:
        for _ in range(2):
            with Server.resume(tmp_path, IDENTITY, POOL, config, lock=lock) as server:
                server.save(tmp_path, lock=lock)
            with pytest.raises(FolderInUseError):
                resume(tmp_path)
        (tmp_path / "other").mkdir()
    with pytest.raises(LockLostError):
        Server.resume(tmp_path, IDENTITY, POOL, config, lock=lock)
    resume(tmp_path).close()


def test_counts_that_the_next_rounds_would_wrap_are_refused(tmp_path: Path) -> None:
    data = saved(tmp_path, sampling="pro")
    for count, fits in ((2**53, True), (2**53 + 1, False), (2**63 - 1, False)):
        forged = sealed(data[:-40] + struct.pack("<q", count) + data[-32:])
        if fits:
            assert ServerState.from_bytes(forged).significance is not None
        else:
            with pytest.raises(StateError, match="counts"):
                ServerState.from_bytes(forged)


@SAMPLINGS
def test_another_clip_or_start_stands_in_format_2_and_the_defaults_in_format_1(
    tmp_path: Path, sampling: str
) -> None:
    plain = saved(tmp_path / "plain", sampling=sampling)
    stated = saved(tmp_path / "stated", sampling=sampling, pro_clip=1000, pro_start=0)
    assert plain == stated
    assert plain[4:6] == struct.pack("<H", 1)
    data = saved(tmp_path / "other", sampling=sampling, pro_clip=0.5, pro_start=0.25)
    assert data[4:6] == struct.pack("<H", 2)
    assert data[HEADER : HEADER + 16] == struct.pack("<dd", 0.5, 0.25)
    # What stands before and behind is that of format 1.
    assert data[6:56] == plain[6:56]
    arrays = slice(HEADER + 16, -32)
    with resume(tmp_path / "other", sampling=sampling, pro_clip=0.5, pro_start=0.25) as server:
        assert server.round == 2
        assert data[arrays][:128] == server.coefficients.tobytes()
        if server.significance is not None:
            kept = (server.significance.sums.tobytes(), server.significance.counts.tobytes())
            assert data[arrays][128:] == b"".join(kept)
            assert (server.significance.clip, server.significance.start) == (0.5, 0.25)
        assert server._state(server.round).to_bytes() == data
    with pytest.raises(StateError, match=r"pro_clip 0\.75, got one with 0\.5"):
        resume(tmp_path / "other", sampling=sampling, pro_clip=0.75, pro_start=0.25)
    with pytest.raises(StateError, match=r"pro_start 0\.0, got one with 0\.25"):
        resume(tmp_path / "other", sampling=sampling, pro_clip=0.5)
    pro = struct.Struct("<dd")
    for values, message in (
        ((1000.0, 0.0), "the numbers that format 2 is for"),
        ((0.0, 0.25), "expected pro_clip in"),
        ((np.inf, 0.25), "expected pro_clip in"),
        ((0.5, np.nan), "expected pro_start in"),
        ((0.5, -1.0), "expected pro_start in"),
    ):
        with pytest.raises(StateError, match=message):
            ServerState.from_bytes(sealed(data[:HEADER] + pro.pack(*values) + data[HEADER + 16 :]))
    for end in range(len(data) - 32):
        with pytest.raises(StateError):
            ServerState.from_bytes(sealed(data[:end] + bytes(32)))


def test_clip_and_start_go_on_over_a_resume_bit_for_bit(tmp_path: Path) -> None:
    changes = {"sampling": "pro", "pro_clip": 0.5, "pro_start": 0.25}
    straight, server = make_server(**changes), make_server(**changes)
    for _ in range(4):
        replies = make_replies(straight)
        straight.merge(replies)
        server.merge(replies)
        server.save(tmp_path)
        server.close()
        server = resume(tmp_path, **changes)
        assert server.probabilities().tobytes() == straight.probabilities().tobytes()
    server.close()
    assert not np.array_equal(server.probabilities(), make_server().probabilities())
