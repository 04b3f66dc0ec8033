"""The writer of the files beside it: `python write.py FOLDER`, with the commit in README.md.

Nothing but the run of a language model depends on the machine: losses are given numbers, or sums and products
in a fixed order. So a later commit, given the same, has to write the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import fedkseed
import fedkseed_kernels
from fedkseed import (
    ZOSGD,
    Broadcast,
    FedKSeedSGD,
    Inplace,
    Ledger,
    ModelIdentity,
    Reply,
    SeedPool,
    Server,
    ServerConfig,
    Simulation,
    SimulationConfig,
    Streamed,
    Task,
)

FAMILIES = ("gaussian", "rademacher")
IDENTITY = ModelIdentity(bytes(range(32)), bytes(range(32, 64)), "bfloat16")
PRIVATE_KEY = bytes(range(7, 39))
POOL = SeedPool(2**64 - 3, 16)


# Ledgers and messages


def ledgers() -> dict[str, Ledger]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(PRIVATE_KEY)
    # Kept exactly: both zeros, a subnormal, the largest number.
    coefficients = np.array([0.5, -0.0, 0.0, 1e-45, -3.4028235e38, 0.1], dtype=np.float32)
    found = {}
    for family in FAMILIES:
        notes = {"num_rounds": "40", "creator": f"a {family} test"}
        ledger = Ledger(2**64 - 3, coefficients, IDENTITY, frozen=(0, 9, 10), notes=notes, family=family)
        found[f"{family}.safetensors"] = ledger
        found[f"{family}-signed.safetensors"] = ledger.sign(key)
    return found


def ledger_fields(ledger: Ledger) -> dict[str, Any]:
    signature = ledger.signature
    return {
        "base_seed": ledger.base_seed,
        "coefficients": ledger.coefficients.tobytes().hex(),
        "identity": identity_fields(ledger.identity),
        "frozen": list(ledger.frozen),
        "notes": dict(ledger.notes),
        "family": ledger.family,
        "contract_version": ledger.contract_version,
        "signature": None if signature is None else [signature.public_key.hex(), signature.value.hex()],
    }


def identity_fields(identity: ModelIdentity) -> list[str]:
    return [identity.structure.hex(), identity.content.hex(), identity.dtype]


def messages() -> dict[str, Broadcast | Reply]:
    found: dict[str, Broadcast | Reply] = {}
    for family in FAMILIES:
        found[f"{family}.broadcast"] = Broadcast(
            round=258,
            client=3,
            run_id=b"sixteen bytes id",
            identity=IDENTITY,
            base_seed=2**63 + 1,
            lr=0.1,
            eps=0.5,
            max_abs_g=8.0,
            coefficients=np.array([1.5, -2.0, 1e-45], dtype=np.float32),
            schedule=np.array([1, 0, 2, 1], dtype=np.uint16),
            family=family,
        )
        digest = hashlib.sha256(found[f"{family}.broadcast"].to_bytes()).digest()
        scalars = np.array([0.25, -8.0, 0.0, 1e-45], dtype=np.float32)
        found[f"{family}.reply"] = Reply(258, 3, 2**32 - 1, digest, scalars)
    return found


def message_fields(message: Broadcast | Reply) -> dict[str, Any]:
    return {entry.name: plain(getattr(message, entry.name)) for entry in dataclasses.fields(message)}


def plain(value: Any) -> Any:
    """A field as JSON holds it, with every bit."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, np.ndarray):
        return value.tobytes().hex()
    if isinstance(value, ModelIdentity):
        return identity_fields(value)
    return value.hex() if isinstance(value, float) else value


# Servers


SERVERS: dict[str, dict[str, Any]] = {
    "uniform-gaussian": {"sampling": "uniform", "family": "gaussian", "weighting": "equal"},
    "pro-rademacher": {"sampling": "pro", "family": "rademacher", "weighting": "data_size"},
}


def server_config(name: str) -> ServerConfig:
    return ServerConfig(
        num_clients=7,
        clients_per_round=3,
        num_local_steps=5,
        lr=0.3,
        eps=1e-3,
        max_abs_g=100.0,
        **SERVERS[name],
    )


def server_after_three_rounds(name: str) -> Server:
    """Merged twice, with a round without a reply between."""
    server = Server(IDENTITY, POOL, server_config(name))
    for number in range(3):
        if number == 1:
            server.skip_round()
            continue
        replies = []
        for client in server.clients:
            digest = hashlib.sha256(server.broadcast(client)).digest()
            scalars = (np.arange(5, dtype=np.float32) - client) / np.float32(3 + number)
            replies.append((client, Reply(number, client, 10 + client, digest, scalars).to_bytes()))
        server.merge(replies)
    return server


def server_fields(server: Server) -> dict[str, Any]:
    significance = server.significance
    return {
        "round": server.round,
        "clients": list(server.clients),
        "config": {name: plain(value) for name, value in dataclasses.asdict(server.config).items()},
        "coefficients": plain(server.coefficients),
        "sums": None if significance is None else plain(significance.sums),
        "counts": None if significance is None else plain(significance.counts),
        "broadcasts": {str(client): server.broadcast(client).hex() for client in server.clients},
    }


# A run of a federation


class Line(nn.Module):
    """Two weights and a bias in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.5, -0.25], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.125], dtype=torch.float64))


Row = tuple[float, float, float]


def line_loss(line: nn.Module, rows: Sequence[Row]) -> float:
    """The mean of the squared errors; one operation of fp64 after the other."""
    first, second = line.slope.tolist()
    (bias,) = line.bias.tolist()
    total = 0.0
    for x, y, wanted in rows:
        error = first * x + second * y + bias - wanted
        total += error * error
    return total / len(rows)


def line_task() -> Task[Row, Sequence[Row]]:
    datasets = [
        [(row / 8, (row - client) / 16, row / 4 + client / 32) for row in range(3 + client)]
        for client in range(5)
    ]
    rows = [row for rows in datasets for row in rows]
    return Task(
        Line(), datasets, list, line_loss, evaluate=lambda line, _: {"held_out_loss": line_loss(line, rows)}
    )


def run_line(folder: Path, num_rounds: int, *, resume: bool = False) -> None:
    config = SimulationConfig(
        num_rounds=num_rounds,
        clients_per_round=2,
        num_local_steps=4,
        batch_size=2,
        lr=0.02,
        eps=1e-3,
        num_seeds=32,
        seed=8,
        sampling="pro",
    )
    with Simulation(line_task(), config, folder=folder, resume=resume) as simulation:
        for _ in simulation.rounds():
            pass


# A run of `fedkseed simulate`

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
SIMULATE = {
    "rounds": 1,
    "clients-per-round": 2,
    "local-steps": 2,
    "num-seeds": 16,
    "threads": 1,
    "round-rows": 1,
    "final-rows": 1,
    "generate-rows": 1,
    "family": "rademacher",
    "sampling": "pro",
    "storage": "chained",
}


def write_language_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(10, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def simulate(*arguments: str) -> int:
    """The command line on tasks of a few words, in the working folder."""
    from fedkseed import cli
    from fedkseed.data import Example
    from fedkseed.data import Task as Instructions
    from fedkseed.scenarios import built_in

    def task(name: str) -> Instructions:
        rows = [Example(f"Say {name}.", f"case {i}", f"{name} {i % 2}") for i in range(6)]
        return Instructions(name, train=tuple(rows[:4]), validation=tuple(rows[4:5]), test=tuple(rows[5:]))

    tasks = [task(name) for name in ("red", "blue", "green")], [task("grey")]
    with mock.patch.object(built_in, "load_instruction_tasks", return_value=tasks):
        return cli.main(["simulate", *arguments])


# Optimizers

STORAGE: dict[str, Inplace | Streamed] = {
    "inplace": Inplace(),
    "chained": Inplace(chained=True),
    "inplace-stochastic": Inplace(rounding="stochastic"),
    "streamed-compensated": Streamed(compensated=True),
    "streamed-stochastic": Streamed(rounding="stochastic"),
}
STEPS_BEFORE, STEPS_AFTER = 4, 3


def make_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for weight in model.parameters():
        values = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape)
        weight.data = ((values * 0.37) % 2 - 1).to(torch.bfloat16)
    return model


def make_zosgd(model: nn.Sequential, storage: Inplace | Streamed) -> ZOSGD:
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.25},
        {"params": list(model[1].parameters()), "lr": 0.02},
    ]
    bounds = {"max_abs_g": 20.0, "max_loss_gap": 0.5}
    return ZOSGD(
        groups,
        0.05,
        1e-2,
        seed=2**64 - 1,
        num_directions=2,
        model=model,
        storage=storage,
        **bounds,
    )


def make_fedkseed(model: nn.Sequential, storage: Inplace | Streamed) -> FedKSeedSGD:
    return FedKSeedSGD(model, 0.05, 1e-2, POOL, max_abs_g=20.0, storage=storage, family="rademacher")


OPTIMIZERS: dict[str, Callable[[nn.Sequential, Inplace | Streamed], Any]] = {
    f"{name}-{mode}": (lambda model, storage=storage, make=make: make(model, storage))
    for name, make in (("zosgd", make_zosgd), ("fedkseed", make_fedkseed))
    for mode, storage in STORAGE.items()
}


def walk(model: nn.Sequential, optimizer: Any, first: int, num_steps: int) -> None:
    """Steps on losses that are given numbers: the same bits whatever computes a forward pass."""
    inputs = torch.ones(2, 3, dtype=torch.bfloat16)
    for step in range(first, first + num_steps):
        calls = 0

        def closure(step: int = step) -> float:
            nonlocal calls
            calls += 1
            model(inputs)
            return 1.0 + ((7 * step + 3 * calls) % 11 - 5) / 64

        optimizer.step(closure)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def optimizer_file(name: str) -> dict[str, Any]:
    """The state after some steps, the weights of that moment, and both after some more."""
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    walk(model, optimizer, 0, STEPS_BEFORE)
    content = {"state": optimizer.state_dict(), "weights": weights_of(model)}
    walk(model, optimizer, STEPS_BEFORE, STEPS_AFTER)
    return {**content, "later_state": optimizer.state_dict(), "later_weights": weights_of(model)}


# All of them


def golden_hashes(package: str) -> dict[str, str]:
    files = resources.files(package)
    return {
        name: hashlib.sha256(files.joinpath(name).read_bytes()).hexdigest()
        for name in ("vectors.json", "normal_digests.json")
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_all(folder: Path) -> None:
    for room in ("ledgers", "messages", "servers", "optimizers"):
        (folder / room).mkdir()
    fields: dict[str, Any] = {"ledgers": {}, "messages": {}, "servers": {}}
    for name, ledger in ledgers().items():
        ledger.save(folder / "ledgers" / name)
        fields["ledgers"][name] = ledger_fields(ledger)
    for name, message in messages().items():
        (folder / "messages" / name).write_bytes(message.to_bytes())
        fields["messages"][name] = message_fields(message)
    for name in SERVERS:
        with server_after_three_rounds(name) as server:
            (folder / "servers" / name).mkdir()
            server.save(folder / "servers" / name)
            fields["servers"][name] = server_fields(server)
    for name in OPTIMIZERS:
        torch.save(optimizer_file(name), folder / "optimizers" / f"{name}.pt")
    for num_rounds in (2, 4):
        run_line(folder / f"run-of-{num_rounds}-rounds", num_rounds)
    write_language_model(folder / "base")
    os.chdir(folder)
    flags = [text for name, value in SIMULATE.items() for text in (f"--{name}", str(value))]
    if simulate(*flags, "--model", "base", "--out", "simulate") != 0:
        sys.exit("expected fedkseed simulate to come to its end, got an error")
    write_json(folder / "fields.json", fields)
    write_json(folder / "golden.json", golden_hashes("fedkseed_kernels.golden"))
    names = {package.__name__: sorted(package.__all__) for package in (fedkseed, fedkseed_kernels)}
    write_json(folder / "names.json", names)
    for lock in folder.rglob(".lock"):
        lock.unlink()


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as made:
        write_all(Path(made).resolve())
        os.chdir(target)
        shutil.copytree(made, target, dirs_exist_ok=True)
