"""What one federated run on the instruction tasks is made of: fields with their help, from flags or TOML."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from fedkseed.data.prompts import PromptStyle
from fedkseed.federation.config import Sampling, Weighting
from fedkseed.model.identity import DTYPE_CODES
from fedkseed.simulation.simulation import SimulationConfig
from fedkseed.storage import STORAGE_MODES, storage_mode
from fedkseed_kernels import FAMILIES

DTYPES = {name: getattr(torch, name) for name in DTYPE_CODES if name != "mixed"}


class SettingsError(ValueError):
    """A setting that is unknown, of another type or out of range; names it."""


def _setting(default: Any, meaning: str, metavar: str | None = None, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": meaning, "metavar": metavar, "choices": tuple(choices)})


@dataclass(frozen=True)
class RunSettings:
    """A run of a federation whose clients hold one instruction task each.

    Every field is a flag (``num_seeds`` is --num-seeds) and a key of a TOML file.

    Raises:
        SettingsError: a field out of range.
    """

    rounds: int = _setting(8, "rounds to run", "N")
    clients_per_round: int = _setting(16, "clients that take part in a round, of 16", "N")
    local_steps: int = _setting(2, "steps of each client in a round", "N")
    batch_size: int = _setting(2, "rows of a step's batch", "N")
    lr: float = _setting(1e-4, "learning rate; the more clients share a round, the larger it may be", "LR")
    eps: float = _setting(1e-3, "scale of the perturbation", "EPS")
    num_seeds: int = _setting(256, "size K of the seed pool", "K")
    seed: int = _setting(0, "base seed of every random choice", "SEED")
    weighting: str = _setting("data_size", "weights of the clients", choices=get_args(Weighting))
    sampling: str = _setting(
        "uniform", "how seeds are drawn; pro: by significance (FedKSeed-Pro)", choices=get_args(Sampling)
    )
    family: str = _setting("gaussian", "noise; rademacher: signs, the cheaper to make", choices=FAMILIES)
    storage: str = _setting(
        "auto",
        "how a step visits both sides of the weights; auto: as suits their dtype and device",
        choices=tuple(STORAGE_MODES),
    )
    round_rows: int = _setting(1, "test rows of each task behind the held-out loss of a round", "N")
    final_rows: int = _setting(16, "test rows of each task behind the losses before and after, of 16", "N")
    generate_rows: int = _setting(
        2, "test rows of each client task that are answered for Rouge-L and exact match", "N"
    )
    rouge_every: int = _setting(0, "rounds between measurements of Rouge-L; 0: only before and after", "N")
    model: str = _setting("", "a save_pretrained folder or a hub id (SmolLM2-135M-Instruct)", "MODEL")
    prompt: str = _setting("plain", "prompt style", choices=get_args(PromptStyle))
    dtype: str = _setting("float32", "dtype of the weights", choices=tuple(DTYPES))
    workers: int = _setting(1, "processes that run clients side by side; 1: this process", "N")
    threads: int = _setting(0, "CPU threads of each worker; 0: torch's own number", "N")

    def __post_init__(self) -> None:
        for name in ("round_rows", "final_rows", "generate_rows", "workers"):
            self._at_least(name, 1)
        for name in ("rouge_every", "threads"):
            self._at_least(name, 0)
        try:
            self.simulation_config()
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from error

    def _at_least(self, name: str, low: int) -> None:
        if getattr(self, name) < low:
            raise SettingsError(f"expected {name} of at least {low}, got {getattr(self, name)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = DTYPES[self.dtype]
        return dtype

    def simulation_config(self) -> SimulationConfig:
        """The federation's part."""
        return SimulationConfig(
            num_rounds=self.rounds,
            clients_per_round=self.clients_per_round,
            num_local_steps=self.local_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            eps=self.eps,
            num_seeds=self.num_seeds,
            seed=self.seed,
            weighting=self.weighting,  # type: ignore[arg-type]
            sampling=self.sampling,  # type: ignore[arg-type]
            family=self.family,
            storage=storage_mode(self.storage),
            num_threads=self.threads or torch.get_num_threads(),
        )


#: What --quick changes: about a minute, all parts, too short to learn much.
QUICK: Mapping[str, Any] = {
    "rounds": 2,
    "clients_per_round": 2,
    "lr": 1e-5,
    "round_rows": 1,
    "final_rows": 1,
    "generate_rows": 1,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field, each with its default in the help; unset flags stay None."""
    for entry in dataclasses.fields(RunSettings):
        default = entry.default if entry.default != "" else None
        shown = f" ({default})" if default is not None else ""
        quick = f"; with --quick {QUICK[entry.name]}" if entry.name in QUICK else ""
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=type(entry.default),
            help=entry.metadata["help"] + (shown[:-1] + quick + ")" if quick else shown),
            metavar=entry.metadata["metavar"],
            choices=entry.metadata["choices"] or None,
        )


def make_settings(flags: Mapping[str, Any], *, quick: bool, toml: Path | None) -> RunSettings:
    """Flags over the file's keys over --quick over the defaults.

    Args:
        flags: by field; None where unset.
        quick: whether --quick was given.
        toml: a file of top-level keys, or None.

    Raises:
        SettingsError: an unknown key, a value of another type or out of range, or a file that is not TOML.
    """
    values: dict[str, Any] = dict(QUICK) if quick else {}
    if toml is not None:
        values.update(read_toml(toml))
    values.update({name: value for name, value in flags.items() if value is not None})
    return RunSettings(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, checked against the fields of `RunSettings`.

    Raises:
        SettingsError: as `make_settings`.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"expected a TOML file at {path}, got: {error}") from error
    known = {entry.name: entry for entry in dataclasses.fields(RunSettings)}
    if unknown := sorted(set(found) - set(known)):
        raise SettingsError(
            f"expected only known keys in {path}, got {', '.join(unknown)}; known are {', '.join(known)}"
        )
    return {name: _checked(path, known[name], value) for name, value in found.items()}


def _checked(path: Path, entry: dataclasses.Field[Any], value: Any) -> Any:
    wanted = type(entry.default)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise SettingsError(f"expected {entry.name} in {path} as {wanted.__name__}, got {value!r}")
    choices = entry.metadata["choices"]
    if choices and value not in choices:
        raise SettingsError(
            f"expected {entry.name} in {path} to be one of {', '.join(choices)}, got {value!r}"
        )
    return value
