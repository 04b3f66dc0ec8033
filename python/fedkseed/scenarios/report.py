"""What a run prints: what it is made of, a row for each round, what it came to and how to go on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fedkseed_kernels
from fedkseed.data.built_in_models import model_title
from fedkseed.data.sources import HUB
from fedkseed.data.templates import CUSTOM, Template
from fedkseed.model.manifest import Manifest
from fedkseed.scenarios.autocast import has_amx
from fedkseed.scenarios.baselines.settings import FEDERATED, FIRST_ORDER
from fedkseed.scenarios.bench import Bench
from fedkseed.scenarios.settings import RunSettings
from fedkseed.scenarios.wording import counted
from fedkseed.simulation.run_folder import BASELINE, BEST, LEDGER, METRICS
from fedkseed.simulation.simulation import RoundResult
from fedkseed.storage import StorageOptions

_COLUMNS = (
    ("round", 5),
    ("train loss", 10),
    ("held-out loss", 13),
    ("bytes down", 10),
    ("bytes up", 8),
    ("rebuild s", 9),
    ("local steps s", 13),
    ("evaluation s", 12),
)

#: A folder's settings do not count for it: whoever goes on with a run, or asks its model, trusts anew.
_TRUST = " --trust-remote-code"


def model_name(settings: RunSettings) -> str:
    """What the model is called in texts."""
    return model_title(settings.model)


def data_name(settings: RunSettings) -> str:
    """What the data are called in texts and results."""
    return data_title(settings.choice.data)


def data_title(data: str) -> str:
    """What a source of data is called: a name, never a path of this machine."""
    return data if data.startswith(HUB) else Path(data).name


def command() -> str:
    """The command `fedkseed` of this environment, as a shell finds it."""
    return str(Path(sys.prefix) / "bin" / "fedkseed")


def resume_line(folder: Path, *, trust_remote_code: bool, moved: Mapping[str, str]) -> str:
    """The command line that goes on with a run.

    Args:
        folder: of the run.
        trust_remote_code: whether code of the model's own may run.
        moved: settings by name whose files lie elsewhere than when the run began.
    """
    flags = "".join(f" --{name.replace('_', '-')} {_quoted(value)}" for name, value in moved.items())
    return f"{command()} simulate --resume {_quoted(folder)}{flags}" + _TRUST * trust_remote_code


def start_text(settings: RunSettings, bench: Bench) -> str:
    """What the run is made of."""
    kernels, federation = fedkseed_kernels.info(), settings.federation
    epochs = settings.baseline.local_epochs
    steps = counted(epochs, "epoch") if epochs else counted(federation.num_local_steps, "step")
    forward = "" if settings.autocast == "off" else ", forward passes in bfloat16 by autocast"
    if forward and not has_amx():
        forward += " (this processor has no AMX: fp32 may be faster)"
    elif forward:
        forward += " (AMX)"
    lines = [
        f"{Manifest.of(bench.model).numel:,} parameters in {settings.dtype}{forward}; kernels: "
        f"{kernels['cpu_backend']} ({kernels['cpu_isa']}), {counted(settings.workers, 'worker')} of "
        f"{counted(torch.get_num_threads(), 'thread')}",
        f"{counted(federation.num_rounds, 'round')} of {federation.clients_per_round} out of "
        f"{counted(len(bench.names), 'client')}, {steps} each; batch {federation.batch_size}, "
        f"lr {federation.lr:g}{_noise(settings)}",
        f"Held-out loss of a round: on {counted(settings.round_rows, 'row')} of each client",
    ]
    return "\n".join([*lines, *bench.notes])


def _noise(settings: RunSettings) -> str:
    """What there is to say of the noise: of FedKSeed's pool, of a new seed each time, or nothing."""
    federation, method = settings.federation, settings.baseline.method
    if method in FIRST_ORDER:
        return f", base seed {federation.seed}; method {method}"
    noise = f", eps {federation.eps:g}, {federation.family} noise of"
    if method != "fedkseed":
        return (
            f"{noise} new seeds from base seed {federation.seed}, "
            f"{counted(settings.baseline.directions, 'direction')} a step; method {method}"
        )
    drawn = "uniformly" if federation.sampling == "uniform" else "by significance"
    return f"{noise} K = {federation.num_seeds} seeds from base seed {federation.seed}, drawn {drawn}"


def method_text(settings: RunSettings, storage: StorageOptions | None) -> str:
    """How a local step is made.

    Args:
        settings: of the run.
        storage: the storage mode that the clients have; None if they take gradients.
    """
    if storage is None:
        return f"Optimizer: {settings.baseline.first_order_optimizer}, by gradients"
    chosen = " (auto)" if settings.federation.storage == "auto" else ""
    return f"Storage mode{chosen}: {storage}"


def round_header() -> str:
    """The head of the table of rounds."""
    return "  ".join(name.rjust(width) for name, width in _COLUMNS)


def round_row(result: RoundResult) -> str:
    """One round as a row of that table."""
    cells = (
        str(result.round + 1),
        _loss(result.train_loss),
        _loss(result.evaluation.get("held_out_loss")),
        f"{result.bytes_down:,}",
        f"{result.bytes_up:,}",
        f"{result.seconds_rebuild + result.seconds_reset:.2f}",
        f"{result.seconds_local:.1f}",
        f"{result.seconds_evaluation:.1f}",
    )
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def end_text(
    folder: Path, base: str | Path, table: str, summary: Mapping[str, Any], template: Template
) -> str:
    """What the run came to, and the commands that rebuild and ask the model."""
    traffic, seconds, settings = summary["bytes"], summary["seconds"], summary["settings"]
    lines = [
        "",
        table,
        "",
        _traffic(settings["method"], traffic),
        f"{seconds['run']:.0f} s after {seconds['set_up']:.0f} s of set-up, on {summary['processor']}",
        "",
    ]
    if settings["method"] != "fedkseed":
        what = "adapters" if settings["method"] == "fedit" else "weights"
        state = folder / BASELINE
        return "\n".join(
            [
                *lines,
                f"The tuned {what} by name are in {state} ({state.stat().st_size:,} bytes; metrics beside it "
                f"in {METRICS}); there is no ledger of a run of {settings['method']}.",
            ]
        )
    ledger = folder / LEDGER
    trust = _TRUST * settings["trust_remote_code"]
    model = _quoted(folder / "model")
    lines += [
        f"The tuned model is {ledger} ({ledger.stat().st_size:,} bytes; metrics beside it in {METRICS}). "
        f"To rebuild it, content {summary['content'][:16]}..., and to ask it:",
        f"  {command()} apply {_quoted(ledger)} --base {_quoted(base)} --out {model}{trust}",
        f"  {command()} ask {model} TEXT{_fields(template)}{trust}",
    ]
    if summary["best_round"] is not None:
        lines.append(
            f"The lowest held-out loss was that of round {summary['best_round'] + 1}; its model is "
            f"{folder / BEST}"
        )
    return "\n".join(lines)


def _traffic(method: str, traffic: Mapping[str, int]) -> str:
    """What travelled, beside what the weights would have been where it was something else."""
    if method not in FEDERATED:
        return "No bytes travelled: this is no federation."
    text = f"Bytes in all: {traffic['down']:,} down and {traffic['up']:,} up."
    exchanged = traffic["down"] + traffic["up"]
    if method not in ("fedkseed", "fedit") or not exchanged:
        return text
    times = traffic["by_weights"] / exchanged
    return (
        f"{text} Sending the weights (FedAvg) would have cost {traffic['by_weights']:,}, "
        f"{times:,.{0 if times >= 10 else 1}f} times as much."
    )


def _fields(template: Template) -> str:
    """Flags of the fields that a question has beside its text."""
    if template.name != CUSTOM:
        return ""
    return "".join(f" --field {_quoted(name)}=TEXT" for name in template.placeholders()[:-1])


def processor_name() -> str:
    """The processor as the system calls it, with its number of threads here."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else 'an unnamed processor'}, {torch.get_num_threads()} threads"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))
