"""`fedkseed apply` in a process of its own, on each instruction set, against the server's own model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.data_samples import save_model
from support.messages import make_replies, make_server

from fedkseed import Ledger, ModelIdentity, SeedPool, WorkingCopy
from fedkseed.data import load_causal_lm_weights
from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.dispatch import BACKEND_VARIABLE, CPU_ISA_VARIABLE
from fedkseed_kernels.operands import ISA_CODES

NUM_SEEDS = 4096
# Draws enough that every seed is among them, 18 times on average.
FEDERATION = {"num_clients": 128, "clients_per_round": 128, "num_local_steps": 200, "lr": 0.01}
NUM_ROUNDS = 3
FAST_ISA = native_cpu.usable_isas()[-1] if native_cpu.unavailable() is None else "baseline"


class Tuned(NamedTuple):
    """What a server leaves behind, and the content of the model that it holds itself."""

    base: Path
    ledger: Path
    content: bytes


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("server")
    save_model(folder / "base")
    model = load_causal_lm_weights(folder / "base", torch.float32)
    copy = WorkingCopy(model)
    server = make_server(copy.identity, SeedPool(1, NUM_SEEDS), **FEDERATION)
    for _ in range(NUM_ROUNDS):
        server.merge(make_replies(server))
    coefficients = server.wire_coefficients
    assert np.count_nonzero(coefficients) == NUM_SEEDS
    Ledger(server.pool.base_seed, coefficients, copy.identity).save(folder / "ledger")
    copy.load(server.pool, coefficients)
    content = ModelIdentity.of(model).content
    assert content != copy.identity.content
    return Tuned(folder / "base", folder / "ledger", content)


@pytest.mark.skipif(native_cpu.unavailable() is not None, reason="tests/test_native.py says why")
@pytest.mark.parametrize(
    "isa",
    [
        pytest.param(name, marks=() if name == FAST_ISA else pytest.mark.slow)
        for name in ISA_CODES
        if name != "auto"
    ],
)
def test_a_full_ledger_gives_the_content_of_the_servers_own_model(
    isa: str, tuned: Tuned, tmp_path: Path
) -> None:
    if isa not in native_cpu.usable_isas():
        why = (
            "this processor lacks it"
            if isa in native_cpu.built_isas()
            else "the library was built without it"
        )
        pytest.skip(f"{isa}: {why}")
    out = tmp_path / "tuned"
    command = [
        sys.executable,
        "-m",
        "fedkseed.cli",
        "apply",
        tuned.ledger,
        "--base",
        tuned.base,
        "--out",
        out,
    ]
    environment = {**os.environ, CPU_ISA_VARIABLE: isa, BACKEND_VARIABLE: "native"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"Written: {out}, content {tuned.content.hex()}\n"
    assert ModelIdentity.of(load_causal_lm_weights(out, torch.float32)).content == tuned.content
