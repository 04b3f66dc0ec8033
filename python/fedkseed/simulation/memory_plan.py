"""The memory of a run, planned by shapes before it starts: for each device, and for the processor's memory.

The sum of what stands at the same time, at the worst moment. What a forward pass takes is that of the usual
decoder (attention, a gated perceptron, logits) with the sizes of the model's ``config``. Shapes: B rows of a
batch, T tokens of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedkseed.model.placement import input_device
from fedkseed.simulation.devices import worker_devices
from fedkseed.simulation.free_memory import free_memory
from fedkseed.storage import StorageChoice
from fedkseed.storage.needs import Needs, needs

#: Bytes of a process beside tensors: tokenizer, rows, code that is loaded late, freed blocks that are kept.
_BESIDE = 48 << 20

#: Bytes of a worker process before it has a model that processes do not share: Python, torch, transformers.
_PROCESS = 330 << 20

#: Bytes that a process takes of a GPU before its first tensor: an allowance, of which no library tells.
_CONTEXT = 600 << 20

_HOST = torch.device("cpu")

_SCRATCH, _RESIDUALS, _BATCHES = "scratch of the storage mode", "residuals", "the largest batch"
_CASTS = "weights in 16 bits (autocast)"

#: What configs call the width of the perceptron.
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size")

#: What configs call the activation, and those that are written out in steps, each with its result in memory.
_ACTIVATION = ("hidden_act", "activation_function", "hidden_activation")
_WRITTEN_OUT = {"gelu_new", "gelu_fast", "gelu_accurate"}


class MemoryPlanError(ValueError):
    """A run that cannot fit into the memory that is free; says where, how much, and what takes less."""


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of one kind.

    Attributes:
        rows: B.
        tokens: T, padding included.
        logits: positions of each row whose logits are computed; all T if None.
        scored: those of them whose logits are gathered for the loss, as `fedkseed.data.scores` does; if None,
            the loss reads all of them where they are, as the models' own does.
        cached: tokens of each row whose keys and values are kept.
    """

    rows: int
    tokens: int
    logits: int | None = None
    scored: int | None = None
    cached: int = 0


def largest_batch(rows: Sequence[tuple[int, int]], batch_size: int, cached: bool = False) -> BatchShape:
    """The largest batch that may be drawn of some rows, for a loss on responses (`fedkseed.data.scores`).

    Args:
        rows: (tokens, those of them that are the prompt) of each, at least one.
        batch_size: rows of a batch; all where there are fewer.
        cached: whether keys and values are kept (``share_prefix``).
    """
    num_rows = min(batch_size, len(rows))
    tokens = max(length for length, _ in rows)
    responses = sorted((length - prompt for length, prompt in rows), reverse=True)[:num_rows]
    logits = min(tokens - min(prompt for _, prompt in rows), sum(responses))
    return BatchShape(num_rows, tokens, logits, -(-sum(responses) // num_rows), tokens if cached else 0)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one place at the worst moment.

    Attributes:
        place: a device, "cpu" for the processor's memory.
        parts: bytes of each part, by a name for people.
        free: bytes that are free there now; None if the system does not say.
        held: bytes of the parts that are taken already, and so are not among the free ones.
    """

    place: str
    parts: Mapping[str, int]
    free: int | None
    held: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """What is planned, to be printed."""
        free = "" if self.free is None else f", {_size(self.free)} free"
        loaded = f" ({_size(self.held)} loaded)" if self.held else ""
        named = ", ".join(f"{name} {_size(size)}" for name, size in self.parts.items() if size)
        return [f"Memory planned on {self.place}: {_size(self.total)}{loaded}{free}", f"  {named}"]

    def refuse(self) -> None:
        """Refuses what cannot fit.

        Raises:
            MemoryPlanError: less is free than would have to be taken.
        """
        wanted = self.total - self.held
        if self.free is None or wanted <= self.free:
            return
        name, size = max(self.parts.items(), key=lambda part: part[1])
        raise MemoryPlanError(
            f"expected {_size(wanted)} of free memory on {self.place} for this run, got {_size(self.free)}; "
            f"the largest part: {name}, {_size(size)}. A smaller batch, weights of 16 bits, fewer workers or "
            "a smaller model take less"
        )


@dataclass(frozen=True)
class RunPlan:
    """The plans of all places of a run.

    Attributes:
        places: one for each device, the processor's memory last.
        notes: what could not be planned.
    """

    places: Sequence[MemoryPlan]
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """What is planned, to be printed."""
        return [*(line for place in self.places for line in place.lines()), *self.notes]

    def refuse(self) -> None:
        """Refuses a run of which a place has too little memory.

        Raises:
            MemoryPlanError: as `MemoryPlan.refuse`.
        """
        for place in self.places:
            place.refuse()


def plan(
    model: nn.Module,
    storage: StorageChoice,
    *,
    device: torch.device,
    train: Sequence[BatchShape],
    evaluations: Sequence[BatchShape] = (),
    num_workers: int = 1,
    file_bytes: int = 0,
    devices: Sequence[torch.device] | None = None,
    autocast: bool = False,
) -> RunPlan:
    """What a simulation of a model takes, and what is free now.

    Args:
        model: its shapes and dtypes count; it may be on the meta device, not loaded yet. Where it is loaded
            its weights count as taken.
        storage: of the clients.
        device: where the model will be.
        train: the largest batches of clients, each once, though it be paired.
        evaluations: the largest batches of what is evaluated or generated.
        num_workers: processes that run clients.
        file_bytes: of the weights in their files, which are mapped into memory while they are loaded.
        devices: of the workers; those of `worker_devices` if None.
        autocast: whether forward passes are made under autocast to 16 bits, which keeps its casts of weights.

    Raises:
        DeviceError: more workers than GPUs.
    """
    devices = list(devices or worker_devices(device, num_workers))
    need, forward = needs(model, storage, device), _Forward.of(model)
    weights = _num_bytes([*model.parameters(), *model.buffers()])
    tuned = _num_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    step = scored = 0
    if forward is not None:
        step = max((forward.num_bytes(batch, need) for batch in train), default=0)
        scored = max((forward.num_bytes(batch) for batch in evaluations), default=0)
    parts: dict[torch.device, Counter[str]] = {place: Counter() for place in [device, *devices, _HOST]}
    own, host = parts[device], parts[_HOST]
    own.update({"weights": weights, "w0": tuned})
    if num_workers == 1:
        own.update({"the round's model": tuned, _SCRATCH: need.scratch, _RESIDUALS: need.residuals})
        own[_BATCHES] = step
    else:
        host["worker processes"] = num_workers * (_PROCESS + _BESIDE)
        host.update({"w0, shared": tuned} if device.type != "cpu" else {"the round's model": tuned})
        for place in devices:
            parts[place].update(
                {
                    "working copies": weights,
                    _SCRATCH: need.scratch,
                    _RESIDUALS: need.residuals,
                    _BATCHES: step,
                }
            )
            if place.type != "cpu":
                parts[place].update({"w0": tuned, "the round's model": tuned})
    own[_BATCHES] = max(own[_BATCHES], scored)
    if autocast:
        for place in {device, *devices}:
            processes = 1 if num_workers == 1 else devices.count(place) + (place == device)
            parts[place][_CASTS] = processes * _cast_bytes(model)
    for place in parts:
        if place.type != "cpu":
            parts[place]["contexts"] = _CONTEXT * (
                devices.count(place) + (num_workers > 1 and place == device)
            )
    is_loaded = not any(parameter.is_meta for parameter in model.parameters())
    host["beside tensors"] = _BESIDE
    if not (is_loaded and num_workers == 1):
        host["loading beyond that"] = _loading(host, weights, file_bytes, device, num_workers)
    held = {input_device(model): weights} if is_loaded else {}
    places = [
        MemoryPlan(str(place), dict(found), free_memory(place), held.get(place, 0))
        for place, found in parts.items()
    ]
    unknown = f"Not planned: the forward pass of {type(model).__name__}, whose config names no sizes"
    return RunPlan(places, () if forward is not None else (unknown,))


def _loading(
    host: Mapping[str, int], weights: int, file_bytes: int, device: torch.device, num_workers: int
) -> int:
    """How far the processor's memory, while weights are read, exceeds what stands there in the rounds."""
    # Of the weights' own dtype the mapped pages are the weights.
    mapped = file_bytes if abs(file_bytes - weights) > weights // 100 else 0
    standing = sum(host.values())
    if device.type != "cpu":
        return mapped + weights * num_workers
    later = sum(host.get(name, 0) for name in (_SCRATCH, _RESIDUALS, _BATCHES, _CASTS))
    before = weights + _BESIDE if num_workers == 1 else standing - later
    return max(0, before + mapped - standing)


@dataclass(frozen=True)
class _Forward:
    """Sizes of a decoder, by which its forward pass is planned.

    Attributes:
        hidden, inner, layers, heads: width of a token, of the perceptron, and numbers.
        keys: width of the keys of a token in a layer, and of its values.
        outputs: of the vocabulary, as the head has it; 0 for a model without.
        itemsize: bytes of an element of the weights.
        copies: of the perceptron's width that stand at once.
        keeps_scores: whether attention has its scores in memory ("eager").
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    keys: int
    outputs: int
    itemsize: int
    copies: int
    keeps_scores: bool

    @classmethod
    def of(cls, model: Any) -> _Forward | None:
        """The sizes that a model's config names; None without them."""
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        hidden, heads, layers = (
            getattr(config, name, None)
            for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        if not (hidden and heads and layers):
            return None
        inner = next(filter(None, (getattr(config, name, None) for name in _INNER)), 4 * hidden)
        width = getattr(config, "head_dim", None) or hidden // heads
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return cls(
            hidden=hidden,
            inner=inner,
            layers=layers,
            heads=heads,
            keys=width * (getattr(config, "num_key_value_heads", None) or heads),
            outputs=0 if head is None else len(head.weight),
            itemsize=max(parameter.itemsize for parameter in model.parameters()),
            copies=5 if _WRITTEN_OUT & {getattr(config, name, None) for name in _ACTIVATION} else 3,
            keeps_scores=getattr(config, "_attn_implementation", None) == "eager",
        )

    def num_bytes(self, batch: BatchShape, need: Needs | None = None) -> int:
        """The most that stands at once in a forward pass without gradients, and in its loss.

        Args:
            need: of the storage mode of a step; None for the stored weights as they are.
        """
        halves = 1 if need is None else need.num_halves
        widened = None if need is None else need.compute_dtype
        size = self.itemsize if widened is None else widened.itemsize
        tokens, rows = batch.rows * batch.tokens, batch.rows * halves
        stream = 2 * rows * batch.tokens * self.hidden * size
        cache = rows * batch.cached * self.layers * 2 * self.keys * size
        perceptron = (self.copies * self.inner + 2 * self.hidden) * size + 4 * self.hidden
        attention = (6 * self.hidden + 4 * self.keys) * size
        layer = tokens * max(perceptron, attention) + batch.rows * batch.tokens**2
        if self.keeps_scores:
            layer += batch.rows * self.heads * batch.tokens**2 * (8 if size == 2 else 2 * size)
        logits = batch.tokens if batch.logits is None else batch.logits
        scored = logits if batch.scored is None else batch.scored
        # The loss takes each half by itself: its logits in fp32, if they are not, and their log-softmax.
        is_copied = size == 2 or batch.scored is not None
        head = self.outputs * (rows * logits * size + batch.rows * scored * 4 * (1 + is_copied))
        return int(stream + cache + max(layer, head))


def _cast_bytes(model: Any) -> int:
    """The matrices of 32 bits in 16, but for those that rows are looked up in alone."""
    looked_up = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    apart = {id(part.weight) for part in (looked_up,) if part is not None}
    apart -= {id(part.weight) for part in (head,) if part is not None}
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.itemsize == 4 and id(p) not in apart]
    return sum(2 * int(matrix.numel()) for matrix in matrices)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _size(num_bytes: int) -> str:
    """For people: three digits in MB or GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
