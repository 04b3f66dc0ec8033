"""What a scenario's runs will take, told before any is begun: by shapes, counting and measured rates."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch

import fedkseed_kernels
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.models import is_local
from fedkseed.data.shapes import num_positions, shapes_of_config, weight_file_bytes
from fedkseed.federation.messages import broadcast_bytes, reply_bytes
from fedkseed.model.manifest import Manifest
from fedkseed.scenarios.autocast import Autocast, forward_passes
from fedkseed.scenarios.baselines import costs
from fedkseed.scenarios.baselines.lora import ADAPTER_DTYPE, num_adapter_weights
from fedkseed.scenarios.baselines.memory import plan_run
from fedkseed.scenarios.baselines.settings import FIRST_ORDER
from fedkseed.scenarios.built_in import instruction_tasks
from fedkseed.scenarios.experiments.scenario import Scenario
from fedkseed.scenarios.launch import with_data
from fedkseed.scenarios.model_source import ModelSource
from fedkseed.scenarios.run import make_bench
from fedkseed.scenarios.settings import RunSettings
from fedkseed.scenarios.wording import amount, counted, duration
from fedkseed.seeds import SeedPool
from fedkseed.simulation.devices import choose_device, device_name
from fedkseed.simulation.memory_plan import BatchShape, largest_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Characters that a token stands for where there is no tokenizer: usual for English text.
CHARACTERS_A_TOKEN = 4

#: How much slower than float32 the products of another dtype are where it is said.
_FAR_SLOWER = 2
#: Rows whose lengths stand for those of all.
_SAMPLE = 256
#: Seconds and sizes of a measurement: long enough to be steady, short beside reading the rows.
_SECONDS = 0.3
_WIDTHS = {"cpu": 1024, "cuda": 4096}
_WEIGHTS = {"cpu": 1 << 22, "cuda": 1 << 26}
_TERMS = 64


def describe(scenario: Scenario) -> Iterator[str]:
    """Lines about one run of each variant, with the scenario's first seed, and about all runs together.

    Raises:
        SettingsError, DataError, FetchError, ModelError, MissingExtraError: settings, rows or shapes cannot
            be had.
    """
    num_runs, num_seeds = counted(len(scenario.runs()), "run"), len(scenario.seeds)
    yield f"{scenario.title}: {num_runs}; nothing is run now; a block is one run, of seed {scenario.seeds[0]}"
    seconds, num_bytes = 0.0, 0
    for planned in scenario.limited(seeds=scenario.seeds[:1]).runs():
        settings, data = with_data(planned.values)
        yield ""
        yield f"{planned.variant} ({scenario.variants[planned.variant].title})"
        outlook = _Outlook.of(scenario, settings, data)
        yield from (f"  {line}" for line in outlook.lines())
        seconds += num_seeds * sum(outlook.seconds.values())
        num_bytes += num_seeds * outlook.num_bytes
    yield ""
    yield (
        f"In all, {num_runs} one after the other: about {duration(seconds)}; {num_bytes:,} bytes between "
        "server and clients"
    )


@dataclass(frozen=True)
class _Outlook:
    """One run as it is foreseen.

    Attributes:
        settings: of the run.
        data: its rows.
        model: on the meta device.
        tokenizer: of the model; None where there is its shape alone.
        train, evaluations: the largest batches.
        device: of the run.
    """

    settings: RunSettings
    data: FederatedData
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    train: Sequence[BatchShape]
    evaluations: Sequence[BatchShape]
    device: torch.device

    @classmethod
    def of(cls, scenario: Scenario, settings: RunSettings, data: FederatedData | None) -> _Outlook:
        """Reads shapes and lengths."""
        shape, device = scenario.shape, choose_device(settings.device)
        batch_size = settings.federation.batch_size
        if shape is not None and data is not None and settings.model and not is_local(settings.model):
            model = shapes_of_config(shape.architecture, shape.config, settings.torch_dtype)
            rows = [row for client in data.clients for row in client.train]
            train = [largest_batch(_estimated(rows, data, settings.max_length), batch_size)]
            return cls(settings, data, model, None, train, (), device)
        source = ModelSource.of(settings, data)
        model, tokenizer = source.load_shapes()
        train, evaluations = make_bench(settings, data, model, tokenizer).batch_shapes(batch_size)
        data = data or instruction_tasks(tokenizer, settings.choice)
        return cls(settings, data, model, tokenizer, train, evaluations, device)

    @property
    def num_rows(self) -> list[int]:
        """Training rows of each client."""
        return [len(client.train) for client in self.data.clients]

    def lines(self) -> Iterator[str]:
        """All that is foreseen."""
        yield from self._clients()
        down, up = self.bytes_of_client()
        is_of_files = down and self.settings.baseline.method != "fedkseed"
        apart = ", without the header of a file" if is_of_files else ""
        yield f"bytes of a client and round: {down:,} down and {up:,} up{apart}"
        by_shape = "" if self.tokenizer else ", by the scenario's [shape]"
        numel = Manifest.of(self.model).numel
        yield f"{numel:,} parameters in {self.settings.dtype}, {type(self.model).__name__}{by_shape}"
        yield from self._memory()
        yield from self._time()

    def _clients(self) -> Iterator[str]:
        data, rows = self.data, self.num_rows
        least, most = min(rows), max(rows)
        spread = f"{least:,} at least, {statistics.median(rows):,g} the median, {most:,} at most"
        yield (
            f"{counted(len(rows), 'client')}, {self.settings.federation.clients_per_round:,} a round; "
            f"training rows of a client: {f'{most:,} each' if least == most else spread}"
        )
        held_out, unseen = (
            sum(min(len(client.held_out), self.settings.final_rows) for client in part)
            for part in (data.clients, data.unseen)
        )
        yield f"scored rows: {held_out:,} of the clients, {unseen:,} of {len(data.unseen):,} unseen ones"

    def bytes_of_client(self) -> tuple[int, int]:
        """Bytes of a round to a client and from it: whole messages of FedKSeed, else the numbers alone."""
        config, baseline = self.settings.federation, self.settings.baseline
        if baseline.method == "fedkseed":
            return broadcast_bytes(config.num_seeds, config.num_local_steps), reply_bytes(
                config.num_local_steps
            )
        if baseline.method in ("first-order", "zeroth-order"):
            return 0, 0
        if baseline.method == "fedit":
            size = ADAPTER_DTYPE.itemsize * num_adapter_weights(self.model, baseline.lora_rank)
        else:
            size = sum(weight.numel() * weight.itemsize for weight in self.model.parameters())
        return size, size

    @property
    def num_bytes(self) -> int:
        """Bytes of all clients in all rounds."""
        config = self.settings.federation
        return sum(self.bytes_of_client()) * config.clients_per_round * config.num_rounds

    def _memory(self) -> Iterator[str]:
        settings = self.settings
        source = ModelSource.of(settings, self.data).name
        planned = plan_run(
            self.model,
            settings,
            device=self.device,
            train=self.train,
            evaluations=self.evaluations,
            file_bytes=weight_file_bytes(source) if is_local(source) else 0,
        )
        yield from planned.lines()

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """The parts of a run's time."""
        settings, rates = self.settings, self._rates(self.settings.torch_dtype)
        config, baseline = settings.federation, settings.baseline
        numel = Manifest.of(self.model).numel
        # Of a row's forward pass: a product and a sum for each weight and token.
        flops = 2 * numel * self.mean_tokens
        parts = {"local steps": self._num_passes() * config.batch_size * flops / rates.products}
        if baseline.method not in FIRST_ORDER:
            directions = 1 if baseline.method == "fedkseed" else baseline.directions
            draws = 3 * directions * costs.steps_left(settings, self.num_rows, 0)  # two sides, the update
            parts["noise of the steps"] = draws * numel / rates.perturbed
        if baseline.method == "fedkseed":
            parts["rebuilding"] = config.num_rounds * config.num_seeds * numel / rates.rebuilt
        parts["losses of scored rows"] = self._num_scored() * flops / rates.products
        return parts

    def _num_passes(self) -> int:
        config = self.settings.federation
        pool = SeedPool(config.seed, config.num_seeds)
        rounds = [
            {"clients": pool.sample_clients(number, len(self.num_rows), config.clients_per_round)}
            for number in range(config.num_rounds)
        ]
        return sum(costs.forward_passes(self.settings, self.num_rows, rounds))

    def _rates(self, dtype: torch.dtype) -> Rates:
        """What the device does with weights of a dtype."""
        config = self.settings.federation
        num_tokens = min(math.ceil(config.batch_size * self.mean_tokens), 4096)
        return measured_rates(dtype, self.settings.autocast, self.device, config.family, num_tokens)

    def _time(self) -> Iterator[str]:
        settings, parts = self.settings, self.seconds
        rates = self._rates(settings.torch_dtype)
        named = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        yield f"Time on {device_name(self.device)}: about {duration(sum(parts.values()))} ({named})"
        yield (
            f"  an estimate by arithmetic, answers left out: {self._num_passes():,} forward passes of "
            f"{settings.federation.batch_size} row(s) of {self.mean_tokens:,.0f} tokens; measured just now, "
            f"a second: {amount(rates.products / 1e9)} GFLOP of matrix products, "
            f"{amount(rates.perturbed / 1e9)} G weights perturbed, {amount(rates.rebuilt / 1e9)} G weights "
            "times seeds rebuilt"
        )
        if self.device.type == "cpu" and settings.torch_dtype != torch.float32:
            faster = self._rates(torch.float32).products / rates.products
            if faster > _FAR_SLOWER:
                yield (
                    f"  {settings.dtype} is slow on this processor: --set dtype=float32 has {amount(faster)} "
                    "times as many matrix products a second, and takes more memory"
                )
        if self.tokenizer is None:
            yield f"  tokens by {CHARACTERS_A_TOKEN} characters each: the tokenizer is not here"

    def _num_scored(self) -> int:
        """Rows whose loss is computed, in all rounds and before and after."""
        settings, data = self.settings, self.data

        def rows(clients: Sequence[ClientRows], most: int) -> int:
            return sum(min(len(client.held_out), most) for client in clients)

        # As the benches score: unseen rows in a round if it is asked, or if no other client has any.
        in_round = rows(data.clients, min(settings.round_rows, settings.final_rows))
        if settings.round_unseen or not in_round:
            in_round += rows(data.unseen, min(settings.round_rows, settings.final_rows))
        at_an_end = rows(data.clients, settings.final_rows) + rows(data.unseen, settings.final_rows)
        return -(-settings.federation.num_rounds // settings.eval_every) * in_round + 2 * at_an_end

    @functools.cached_property
    def mean_tokens(self) -> float:
        """Tokens of a training row, by some of them."""
        rows = [row for client in self.data.clients for row in client.train]
        some = rows[:: max(1, len(rows) // _SAMPLE)]
        positions = num_positions(self.model) or self.settings.max_length
        longest = min(self.settings.max_length, positions)
        if self.tokenizer is None:
            return statistics.fmean(length for length, _ in _estimated(some, self.data, longest))
        template, tokenizer = self.data.template, self.tokenizer
        texts = [template.prompt(tokenizer, row.fields) + row.response for row in some]
        return statistics.fmean(min(longest, len(tokenizer(text).input_ids)) for text in texts)


def _estimated(rows: Sequence[Row], data: FederatedData, max_length: int) -> list[tuple[int, int]]:
    """(tokens, those of the prompt) of each row, by its characters."""
    found = []
    for row in rows:
        prompt = math.ceil(len(data.template.prompt(None, row.fields)) / CHARACTERS_A_TOKEN)
        whole = prompt + math.ceil(len(row.response) / CHARACTERS_A_TOKEN) + 1
        found.append((min(whole, max_length), min(prompt, max_length - 1)))
    return found


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        products: floating-point operations of matrix products.
        perturbed: weights that get the noise of one seed.
        rebuilt: weights times seeds, of many seeds at once.
    """

    products: float
    perturbed: float
    rebuilt: float


@functools.lru_cache
def measured_rates(
    dtype: torch.dtype, autocast: Autocast, device: torch.device, family: str, num_tokens: int
) -> Rates:
    """What the device does now; takes about a second.

    Args:
        dtype: of the weights.
        autocast: of the forward passes.
        device: that is measured.
        family: of the noise.
        num_tokens: of a batch.
    """
    width = _WIDTHS[device.type]
    left = torch.ones(num_tokens, width, dtype=dtype, device=device)
    right = torch.ones(width, width, dtype=dtype, device=device)
    weights = torch.zeros(_WEIGHTS[device.type], dtype=dtype, device=device)
    seeds = list(range(_TERMS))
    coefficients = [1e-9] * _TERMS

    def perturb(number: int) -> None:
        fedkseed_kernels.seed_axpy_([weights], seeds[:number], coefficients[:number], family=family)

    with forward_passes(autocast, device):
        products = _per_second(lambda: left @ right, 2 * num_tokens * width**2, device)
    return Rates(
        products,
        _per_second(lambda: perturb(1), len(weights), device),
        _per_second(lambda: perturb(_TERMS), len(weights) * _TERMS, device),
    )


def _per_second(call: Callable[[], object], amount: int, device: torch.device) -> float:
    """How much of what a call does is done in a second."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    number, start = 0, perf_counter()
    while (elapsed := perf_counter() - start) < _SECONDS or not number:
        call()
        wait()
        number += 1
    return amount * number / elapsed
