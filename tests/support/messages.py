"""Support for tests of the protocol: a server of a small federation, and replies to its broadcasts."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np

from fedkseed import Broadcast, ModelIdentity, Reply, SeedPool, Server, ServerConfig
from fedkseed.federation.messages import broadcast_digest
from fedkseed.federation.state import derived_run_id

IDENTITY = ModelIdentity(bytes(range(32)), bytes(range(32, 64)), "bfloat16")
CONFIG: dict[str, Any] = {
    "num_clients": 7,
    "clients_per_round": 3,
    "num_local_steps": 20,
    "lr": 0.3,
    "eps": 1e-3,
    "max_abs_g": 100.0,
}
POOL = SeedPool(5, 16)
#: Sizes of what stands before the coefficients of a broadcast and before the scalars of a reply.
BROADCAST_HEADER, REPLY_HEADER = 124, 56


def make_server(identity: ModelIdentity = IDENTITY, pool: SeedPool = POOL, **changes: Any) -> Server:
    """A server whose run id follows from its arguments, unless one is among them."""
    config = ServerConfig(**{**CONFIG, **changes})
    if "run_id" not in changes:
        config = replace(config, run_id=derived_run_id(identity, pool, config))
    return Server(identity, pool, config)


def make_broadcast(**changes: Any) -> Broadcast:
    fields: dict[str, Any] = {
        "round": 258,
        "client": 3,
        "run_id": b"sixteen bytes id",
        "identity": IDENTITY,
        "base_seed": 2**63 + 1,
        "lr": 0.1,
        "eps": 0.5,
        "max_abs_g": 8.0,
        "coefficients": np.array([1.5, -2.0], dtype=np.float32),
        "schedule": np.array([1, 0, 1], dtype=np.uint16),
    }
    return Broadcast(**{**fields, **changes})


def make_reply(server: Server, client: int, **changes: Any) -> bytes:
    """A good reply of an invited client, or one with other fields."""
    generator = np.random.default_rng([server.round, client])
    fields: dict[str, Any] = {
        "round": server.round,
        "client": client,
        "data_size": 10 + client,
        "scalars": generator.normal(size=server.config.num_local_steps).astype(np.float32),
    }
    if "digest" not in changes:
        fields["digest"] = broadcast_digest(server.broadcast(client))
    return Reply(**{**fields, **changes}).to_bytes()


def make_replies(server: Server) -> list[tuple[int, bytes]]:
    return [(client, make_reply(server, client)) for client in server.clients]


def sealed(message: bytes) -> bytes:
    """The message with its checksum made right."""
    return message[:-4] + struct.pack("<I", zlib.crc32(message[:-4]))


def patched(message: bytes, position: int, field: bytes) -> bytes:
    """The message with one field replaced, under a right checksum."""
    return sealed(message[:position] + field + message[position + len(field) :])
