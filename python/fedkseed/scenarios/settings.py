"""All settings of one run, each declared once: from flags, a TOML file, a folder's settings.json, presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fedkseed.data.own import DataChoice
from fedkseed.documents import DocumentError, read_toml
from fedkseed.model.identity import DTYPE_CODES
from fedkseed.scenarios.autocast import Autocast, resolved_autocast
from fedkseed.scenarios.baselines.settings import FIRST_ORDER, LEARNING_RATES, BaselineSettings
from fedkseed.scenarios.options import Option, SettingsError, checked_values, options_of
from fedkseed.scenarios.presets import DEFAULT_DATA, completed, preset_of, quick_of
from fedkseed.simulation.config import SimulationConfig
from fedkseed.simulation.worker_pool import DEFAULT_TIMEOUT
from fedkseed.storage import PAIRED_STORAGE_MODES, STORAGE_MODES, storage_mode

__all__ = [
    "OLD_NAMES",
    "OPTIONS",
    "OPTION_GROUPS",
    "RunSettings",
    "SettingsError",
    "given_values",
    "values_of_file",
]

_DTYPES = {name: getattr(torch, name) for name in DTYPE_CODES if name != "mixed"}

#: Names of version 0.1, in files and flags -> the present ones.
OLD_NAMES: Mapping[str, str] = {
    "rounds": "num_rounds",
    "local_steps": "num_local_steps",
    "threads": "num_threads",
    "prompt": "template",
}


@dataclass(frozen=True)
class RunSettings:
    """A run of `fedkseed simulate`.

    Attributes:
        federation: the numbers of server, clients and simulation.
        choice: the data, and who holds which part.
        baseline: the method, and what methods beside FedKSeed are set by.
        model: a save_pretrained folder, a hub id, smollm2 (SmolLM2-135M-Instruct, the default) or minilm
            (all-MiniLM-L6-v2 with a head of two labels).
        dtype: of the weights.
        trust_remote_code: run the code that a model's folder or hub id brings along.
        max_length: tokens of a row, at most the model's positions.
        truncate: what a row of more tokens loses: prompt, the beginning of its prompt; end, what stands at
            its end, as in the authors' code.
        data_size: what a client's data size counts, its weight with --weighting data_size: tokens of its
            responses, or rows. Of a classification always rows.
        autocast: of the forward passes; auto: bfloat16 on a processor with AMX, else off.
        device: cpu, cuda, cuda:N, or auto: a GPU if there is one.
        workers: processes that run clients side by side, on GPUs one each; 1: this process.
        worker_timeout: seconds without a step after which a worker counts as hung; 0: never.
        round_rows: held-out rows of each client behind the scores of a round.
        final_rows: held-out rows of each client behind the scores before and after.
        threshold_rows: training rows of each client on which a threshold between two labels is fitted, to
            show what it alone gives; 0: none.
        generate_rows: held-out rows of each client that are answered for Rouge-L and exact match.
        rouge_every: rounds between measurements of Rouge-L, a multiple of eval_every; 0: only before and
            after.
        eval_every: rounds between scores of a round; the last one is scored, too.
        round_unseen: also score rows of unseen clients in a round of instructions, as many of each.
        held_out_mean: of held-out losses of instructions: over tokens of responses, or over rows of their own
            mean, as in the authors' code.
        answer_tokens: of an answer at most; 0: twice the longest of the rows that are asked, at most 128.
        paper_rouge: also score answers by the package rouge, as the paper does; needs the extra scenarios.

    Raises:
        SettingsError: a field out of range.
    """

    federation: SimulationConfig
    choice: DataChoice
    baseline: BaselineSettings = field(default_factory=BaselineSettings)
    model: str = field(default="", metadata={"metavar": "MODEL"})
    dtype: str = field(default="float32", metadata={"choices": tuple(_DTYPES)})
    trust_remote_code: bool = False
    max_length: int = 1024
    truncate: Literal["prompt", "end"] = "prompt"
    data_size: Literal["tokens", "rows"] = "tokens"
    autocast: Autocast = "auto"
    device: str = field(default="auto", metadata={"metavar": "DEVICE"})
    workers: int = 1
    worker_timeout: float = DEFAULT_TIMEOUT
    round_rows: int = 1
    final_rows: int = 16
    threshold_rows: int = 0
    generate_rows: int = 0
    rouge_every: int = 0
    eval_every: int = 1
    round_unseen: bool = False
    held_out_mean: Literal["tokens", "rows"] = "tokens"
    answer_tokens: int = 0
    paper_rouge: bool = False

    def __post_init__(self) -> None:
        for name in ("round_rows", "final_rows", "eval_every"):
            self._require(name, 1, 2**31)
        for name in ("rouge_every", "threshold_rows", "generate_rows", "answer_tokens"):
            self._require(name, 0, 2**31)
        self._require("workers", 1, 2**15)
        self._require("max_length", 2, 2**31)
        self._require("worker_timeout", 0, 1e9)
        if self.federation.sampling == "pro" and self.baseline.method != "fedkseed":
            raise SettingsError(
                f"expected sampling uniform with method {self.baseline.method}, got pro: seeds are drawn by "
                "significance with method fedkseed alone"
            )
        if self.rouge_every % self.eval_every:
            raise SettingsError(
                f"expected rouge_every as a multiple of eval_every ({self.eval_every}), got "
                f"{self.rouge_every}: other rounds are not scored"
            )
        method = self.baseline.method
        if self.workers > 1 and method != "fedkseed":
            raise SettingsError(
                f"expected 1 worker with method {method}, got {self.workers}: only fedkseed runs its clients "
                "in processes beside each other; leave --workers out"
            )
        if method in FIRST_ORDER and self.dtype == "float16":
            raise SettingsError(
                f"expected weights of float32 or bfloat16 with method {method}, got float16, in which "
                "gradients vanish; take --dtype bfloat16 or float32"
            )

    def _require(self, name: str, low: float, high: float) -> None:
        if not low <= getattr(self, name) <= high:
            raise SettingsError(f"expected {name} in [{low:g}, {high:g}], got {getattr(self, name)}")

    @classmethod
    def of(cls, values: Mapping[str, Any], num_clients: int) -> RunSettings:
        """The settings of these values, presets under them.

        Args:
            values: by name, of the options' types.
            num_clients: how many clients the data has: some settings follow from it if they are not given.

        Raises:
            SettingsError: a value out of range.
        """
        data = values.get("data", DEFAULT_DATA)
        preset = dict(preset_of(data))
        lr = LEARNING_RATES.get(values.get("method", "fedkseed"))
        if lr is not None:
            preset["lr"] = lr
        whole = completed({"data": data, **preset, **values}, num_clients)
        whole["num_threads"] = whole.get("num_threads") or torch.get_num_threads()
        whole["autocast"] = resolved_autocast(whole.get("autocast", "auto"), whole.get("device", "auto"))
        try:
            whole["storage"] = storage_mode(whole.get("storage", "auto"))
            federation = SimulationConfig(**_part(whole, SimulationConfig))
            federation.server_config(num_clients)
            return cls(
                federation=federation,
                choice=DataChoice(**_part(whole, DataChoice)),
                baseline=BaselineSettings(**_part(whole, BaselineSettings)),
                **_part(whole, cls),
            )
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from error

    def values(self) -> dict[str, Any]:
        """All of them by name, ready for JSON: what `of` takes."""
        parts = (self.federation, self.choice, self.baseline, self)
        whole = {
            entry.name: getattr(part, entry.name) for part in parts for entry in dataclasses.fields(part)
        }
        named = {repr(mode): name for name, mode in {**STORAGE_MODES, **PAIRED_STORAGE_MODES}.items()}
        whole["storage"] = named[repr(whole["storage"])]
        return {name: whole[name] for name in OPTIONS}

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = _DTYPES[self.dtype]
        return dtype


def _part(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    return {entry.name: values[entry.name] for entry in dataclasses.fields(cls) if entry.name in values}


#: The settings by what they are about, each with its options.
OPTION_GROUPS: Mapping[str, Mapping[str, Option]] = {
    "data": options_of((DataChoice,), old_names=OLD_NAMES),
    "model, machine and scores": options_of((RunSettings,), left_out=("federation", "choice", "baseline")),
    "federation": options_of((SimulationConfig,), old_names=OLD_NAMES),
    "method": options_of((BaselineSettings,)),
}
#: Every setting of a run by its name: flags and keys of files are made from these.
OPTIONS: Mapping[str, Option] = {
    name: option for group in OPTION_GROUPS.values() for name, option in group.items()
}


def given_values(flags: Mapping[str, Any], *, quick: bool, toml: Path | None) -> dict[str, Any]:
    """What was set: flags over the file's keys over --quick.

    Args:
        flags: by name; None where unset.
        quick: whether --quick was given.
        toml: a file of top-level keys, or None.

    Raises:
        SettingsError: an unknown key, a value of another type, or a file that is not TOML.
    """
    values = values_of_file(toml) if toml is not None else {}
    values.update({name: value for name, value in flags.items() if value is not None})
    return {**quick_of(values.get("data", DEFAULT_DATA)), **values} if quick else values


def values_of_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        SettingsError: as `given_values`.
    """
    try:
        found = read_toml(path)
    except (OSError, DocumentError) as error:
        raise SettingsError(f"expected a TOML file at {path}, got: {error}") from error
    return checked_values(found, OPTIONS, str(path))
