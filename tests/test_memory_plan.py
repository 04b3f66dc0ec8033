"""The planned memory of a run, beside the tensors that stand; what is free, and what is refused."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.live_tensors import LiveTensors
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedkseed import (
    FedKSeedSGD,
    Inplace,
    SeedPool,
    Simulation,
    SimulationConfig,
    Streamed,
    Task,
    paired_losses,
)
from fedkseed.data.prompts import IGNORED, Batch, Encoded, collate
from fedkseed.data.scores import response_nll
from fedkseed.simulation import free_memory, memory_plan
from fedkseed.simulation.memory_plan import BatchShape, MemoryPlan, MemoryPlanError, largest_batch, plan
from fedkseed.storage import PAIRED_STORAGE_MODES, STORAGE_MODES, storage_mode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROWS, TOKENS, RESPONSE = 6, 64, 8
SHAPE = BatchShape(ROWS, TOKENS, logits=RESPONSE, scored=RESPONSE)


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 192}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).to(dtype).eval()


def gpt2(dtype: torch.dtype) -> Any:
    config = GPT2Config(vocab_size=400, n_embd=64, n_layer=3, n_head=4, n_positions=128)
    return GPT2LMHeadModel(config).to(dtype).eval()


def rows_of(count: int) -> list[Encoded]:
    tokens = torch.randint(3, 30, (count, TOKENS), generator=torch.Generator().manual_seed(4)).tolist()
    return [Encoded(tuple(row), TOKENS - RESPONSE) for row in tokens]


def parts_of(model: nn.Module, storage: Any, **options: Any) -> dict[str, int]:
    (place,) = plan(model, storage, device=CPU, **{"train": [SHAPE], **options}).places
    return dict(place.parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda dtype: llama(dtype, vocab_size=32),
        lambda dtype: llama(dtype, vocab_size=32, attn_implementation="eager"),
        gpt2,
    ],
    ids=["logits", "layers", "scores", "gelu"],
)
def test_a_batch_takes_what_is_planned_for_it(make: Any, dtype: torch.dtype) -> None:
    model, batch = make(dtype), collate(rows_of(ROWS), 0)
    shapes = {
        SHAPE: lambda: response_nll(model, batch),
        BatchShape(ROWS, TOKENS): lambda: model(**vars(batch), use_cache=False),
        BatchShape(ROWS, TOKENS, cached=TOKENS): lambda: model(**vars(batch)),
    }
    for shape, call in shapes.items():
        with torch.no_grad(), LiveTensors() as live:
            call()
        planned = parts_of(model, Inplace(), train=[shape])["the largest batch"]
        assert 0.95 < planned / live.peak < 1.3, shape


@pytest.mark.parametrize("name", [*STORAGE_MODES, *PAIRED_STORAGE_MODES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_and_residuals_are_those_that_the_mode_opens(name: str, dtype: torch.dtype) -> None:
    model, storage = llama(dtype), storage_mode(name)
    model.model.layers[0].requires_grad_(False)
    optimizer = FedKSeedSGD(model, lr=1e-3, eps=1e-3, seed_pool=SeedPool(1, 4), storage=storage, reduce=False)
    opened: Any = getattr(optimizer._storage, "_opened", optimizer._storage)
    scratch = residuals = 0
    if isinstance(optimizer.storage, Streamed):
        scratch = sum(one.num_bytes for both in opened._model._scratches.values() for one in both)
        residuals = sum(residual.nbytes for residual in opened._existing_residuals())
    parts = parts_of(model, storage)
    assert (parts["scratch of the storage mode"], parts["residuals"]) == (scratch, residuals)
    assert parts_of(copy.deepcopy(model).to("meta"), storage) == {**parts, "loading beyond that": 0}


@pytest.mark.parametrize("tied", [False, True])
def test_casts_that_autocast_keeps_are_planned(tied: bool) -> None:
    model, batch = llama(tie_word_embeddings=tied), collate([Encoded((5, 6, 7), 2)], 0)
    with torch.no_grad(), LiveTensors() as live, torch.autocast("cpu", torch.bfloat16):
        response_nll(model, batch)
    casts = parts_of(model, Inplace(), autocast=True)["weights in 16 bits (autocast)"]
    assert 0.9 < casts / live.peak <= 1
    both = parts_of(model, Inplace(), autocast=True, num_workers=2)["weights in 16 bits (autocast)"]
    assert both == 3 * casts


def one_loss(model: Any, batch: Batch) -> torch.Tensor:
    found: torch.Tensor = model(**vars(batch), use_cache=False).loss
    return found


def both_losses(model: Any, batch: Batch) -> torch.Tensor:
    return paired_losses(model, vars(batch))


@pytest.mark.parametrize("name", ["inplace", "streamed-fp32", "paired-fp32"])
def test_a_whole_simulation_takes_what_is_planned(name: str) -> None:
    model, storage = llama(torch.bfloat16), storage_mode(name)
    parts = parts_of(model, storage, train=[BatchShape(4, TOKENS)])
    planned = sum(parts.values()) - parts["weights"] - parts["beside tensors"]
    loss = both_losses if name.startswith("paired") else one_loss
    task = Task(model, [rows_of(8)], lambda rows: collate(rows, 0), loss)
    config = SimulationConfig(
        num_rounds=2,
        clients_per_round=1,
        num_local_steps=1,
        batch_size=4,
        lr=1e-4,
        eps=1e-2,
        num_seeds=8,
        storage=storage,
    )
    with LiveTensors() as live, Simulation(task, config) as simulation:
        list(simulation.rounds())
    assert 0.9 < planned / live.peak < 1.3


def test_weights_are_counted_once_for_each_copy() -> None:
    model = llama(tie_word_embeddings=True)
    model.model.norm.requires_grad_(False)
    every = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    tuned = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    parts = parts_of(model, Inplace())
    assert [parts[name] for name in ("weights", "w0", "the round's model")] == [every, tuned, tuned]
    parts = parts_of(model, Inplace(), num_workers=3)
    assert parts["working copies"] == 3 * every
    assert [parts[name] for name in ("weights", "w0", "the round's model")] == [every, tuned, tuned]


def test_each_gpu_and_the_processor_have_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9 + device.index, 2 * 10**9))
    model, shape = llama().to("meta"), [BatchShape(2, 16)]
    tuned = sum(parameter.nbytes for parameter in model.parameters())
    alone = plan(model, Inplace(), device=GPU, train=shape, file_bytes=tuned // 2)
    assert (alone.places[0].place, alone.places[0].free) == ("cuda:0", 10**9)
    assert alone.places[1].parts["loading beyond that"] >= tuned + tuned // 2
    two = plan(model, Inplace(), device=GPU, train=shape, num_workers=2)
    assert [place.place for place in two.places] == ["cuda:0", "cuda:1", "cpu"]
    first, second, host = (place.parts for place in two.places)
    assert (first["w0"], second["w0"], host["w0, shared"]) == (2 * tuned, tuned, tuned)
    assert first["the round's model"] == second["the round's model"] == tuned
    assert first["contexts"] == 2 * second["contexts"]
    assert len([line for line in two.lines() if line.startswith("Memory planned on ")]) == 3


def test_what_cannot_fit_is_refused_and_what_is_loaded_counts_as_taken() -> None:
    place = MemoryPlan("cuda:0", {"weights": 600, "w0": 600, "residuals": 0}, 700)
    assert place.lines() == ["Memory planned on cuda:0: 0 MB, 0 MB free", "  weights 0 MB, w0 0 MB"]
    with pytest.raises(
        MemoryPlanError, match=r"of free memory on cuda:0 for this run, got 0 MB; the largest"
    ):
        place.refuse()
    MemoryPlan("cuda:0", place.parts, 700, held=600).refuse()
    MemoryPlan("cuda:0", place.parts, None).refuse()
    with pytest.raises(MemoryPlanError):
        memory_plan.RunPlan([MemoryPlan("cpu", {}, 1), place]).refuse()


def test_the_largest_batch_of_some_rows() -> None:
    rows = [(20, 15), (30, 28), (12, 10), (9, 3)]
    assert largest_batch(rows, 2) == BatchShape(2, 30, logits=11, scored=6)
    assert largest_batch(rows, 8, cached=True) == BatchShape(4, 30, logits=15, scored=4, cached=30)
    drawn = [Encoded((1,) * length, prompt) for length, prompt in rows]
    for pair in itertools.combinations(drawn, 2):
        targets = collate(pair, 0).labels[:, 1:] != IGNORED
        assert int(targets.any(dim=0).sum()) <= 11
        assert int(targets.sum()) <= 2 * 6


def test_a_model_whose_config_names_no_sizes_says_so() -> None:
    found = plan(nn.Linear(4, 4), "auto", device=CPU, train=[BatchShape(2, 16)])
    assert found.lines()[-1] == "Not planned: the forward pass of Linear, whose config names no sizes"
    assert found.places[0].parts["the largest batch"] == 0


def test_free_memory_is_the_least_of_the_machine_s_and_its_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo, groups = tmp_path / "meminfo", tmp_path / "groups"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(free_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "tree")
    monkeypatch.setattr(free_memory, "_OWN_GROUPS", groups)
    assert free_memory.free_memory(CPU) == 5000 * 1024
    inner = tmp_path / "tree" / "a" / "b"
    inner.mkdir(parents=True)
    groups.write_text("0::/a/b\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("100\n")
    assert free_memory.free_memory(CPU) == 5000 * 1024
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("900\n")
    (inner.parent / "memory.stat").write_text("anon 7\ninactive_file 50\n")
    assert free_memory.free_memory(CPU) == 150
    groups.write_text("5:cpu:/\n4:memory:/elsewhere\n")
    older = tmp_path / "tree" / "memory"
    older.mkdir()
    (older / "memory.limit_in_bytes").write_text("2000\n")
    (older / "memory.usage_in_bytes").write_text("1500\n")
    assert free_memory.free_memory(CPU) == 500
    meminfo.unlink()
    groups.unlink()
    assert free_memory.free_memory(CPU) is None
