"""Methods beside FedKSeed on a federation that fits a line: what they compute, exchange and keep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import baseline_rounds, federation
from support.baseline_rounds import Projected, make_task, opened, run

from fedkseed import Server, ServerConfig
from fedkseed.data.architectures import ModelError
from fedkseed.model.identity import ModelIdentity
from fedkseed.scenarios.baselines import costs, kept, rounds, tensor_files
from fedkseed.scenarios.baselines.lora import PROJECTIONS, num_adapter_weights
from fedkseed.scenarios.baselines.settings import SEVERAL_DIRECTIONS, BaselineSettings
from fedkseed.scenarios.settings import RunSettings, SettingsError
from fedkseed.seeds import SeedPool
from fedkseed.simulation.run_folder import BASELINE, CLIENTS, METRICS, RunFolder
from fedkseed.simulation.simulation import RoundFailedError
from fedkseed.storage import Streamed

METHODS = ("fedavg", "fedit", "fedzo", "first-order", "zeroth-order")
KEPT = (METRICS, BASELINE, CLIENTS)


class StopError(Exception):
    """Cuts a run off."""


def stop_at(last_step: int) -> Callable[[], None]:
    """What raises in that step."""
    steps = iter(range(1, last_step))

    def step() -> None:
        if next(steps, None) is None:
            raise StopError

    return step


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.few(5)
@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_cut_off_in_mid_round_goes_on_to_the_same_bytes(
    method: str, epochs: int, tmp_path: Path
) -> None:
    directions = 2 if epochs and method in SEVERAL_DIRECTIONS else 1
    options = {"baseline": {"local_epochs": epochs, "directions": directions}}
    whole = run(tmp_path / "whole", method, **options)
    assert len(whole) == federation.CONFIG["num_rounds"]
    # In the first round, in the second, and in the second again.
    for last_step in (3, 11, 2):
        with pytest.raises(StopError):
            run(tmp_path / "cut", method, on_step=stop_at(last_step), **options)
    run(tmp_path / "cut", method, **options)
    for name in KEPT:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {*KEPT, "timings.jsonl", ".lock"}
    losses = [result.evaluation["held_out_loss"] for result in whole]
    assert losses[-1] < losses[0], losses


def test_a_process_that_is_killed_in_mid_round_leaves_nothing_behind(tmp_path: Path) -> None:
    run(tmp_path / "whole", "fedavg")
    command = [sys.executable, baseline_rounds.__file__, str(tmp_path / "cut"), "fedavg", "14"]
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    died = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, timeout=120)
    assert died.returncode == -signal.SIGKILL
    left = [path for path in (tmp_path / "cut").iterdir() if path.suffix == ".tmp"]
    assert [path.is_dir() and len(list(path.iterdir())) for path in left] == [2], "a broadcast and a reply"
    run(tmp_path / "cut", "fedavg")
    for name in KEPT:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "cut").glob(".*.tmp"))


def test_a_round_whose_state_could_not_be_written_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", "first-order")

    def full(*_: object) -> None:
        raise OSError("no space")

    with RunFolder.take(tmp_path / "cut") as folder, opened(folder, "first-order") as cut:
        steps = cut.rounds()
        next(steps)
        monkeypatch.setattr(kept, "put_in_place", full)
        with pytest.raises(OSError, match="no space"):
            next(steps)
        monkeypatch.undo()
    assert len((tmp_path / "cut" / METRICS).read_text().splitlines()) == 2, "a line more than counts"
    assert [result.round for result in run(tmp_path / "cut", "first-order")] == [1, 2]
    for name in KEPT:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_weights_of_16_bits_go_on_with_their_residuals(tmp_path: Path) -> None:
    """Centrally one optimizer goes on: what compensated weights carry is part of the state."""

    def task() -> Any:
        found = make_task("zeroth-order")
        found.model.bfloat16()
        return found

    def loss(model: torch.nn.Module, batch: federation.Batch) -> torch.Tensor:
        return federation.loss(model, (batch[0].to(next(model.parameters()).dtype), batch[1]))

    options = {"storage": Streamed(compensated=True), "lr": 1e-4}
    results = []
    for name, stops in (("whole", []), ("cut", [11])):
        for last_step in [*stops, None]:
            made = task()
            object.__setattr__(made, "loss", loss)
            object.__setattr__(made, "evaluate", None)
            on_step = None if last_step is None else stop_at(last_step)
            try:
                run(tmp_path / name, "zeroth-order", task=made, on_step=on_step, **options)
            except StopError:
                continue
        results.append((tmp_path / name / BASELINE).read_bytes())
    assert results[0] == results[1]
    with tensor_files.opened(tmp_path / "whole" / BASELINE) as file:
        residuals = [file.get_tensor(name) for name in file.keys() if name.startswith("optimizer")]  # noqa: SIM118
    assert any(bool(residual.any()) for residual in residuals)


@pytest.mark.parametrize("is_quick", [True, False])
def test_fedavg_of_one_client_and_one_step_is_plain_sgd(is_quick: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_local_steps": 1} if is_quick else {"baseline": {"local_epochs": 1}}
    task = make_task("fedavg")
    before = weights(task.model)
    (result,) = run(
        tmp_path / "run", "fedavg", task=task, clients_per_round=1, num_rounds=1, batch_size=99, **options
    )
    (client,) = result.clients
    model = federation.make_model()
    loss = federation.loss(model, federation.collate(federation.make_datasets()[client]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert result.train_loss == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = before[name] - baseline_rounds.LR["fedavg"] * parameter.grad
        torch.testing.assert_close(task.model.get_parameter(name).detach(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weighting", ["data_size", "equal"])
def test_the_servers_mean_is_that_of_fp64(
    weighting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 weights: one rounding, at the end."""
    replies: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
    write = tensor_files.write_tensors

    def recorded(path: Path, tensors: Mapping[str, torch.Tensor], said: Mapping[str, str]) -> int:
        if "client" in said:
            replies[int(said["client"])] = {
                name: value.detach().double().numpy().copy() for name, value in tensors.items()
            }
        return write(path, tensors, said)

    def loss(model: torch.nn.Module, batch: federation.Batch) -> torch.Tensor:
        return federation.loss(model, (batch[0].float(), batch[1].float()))

    monkeypatch.setattr(rounds, "write_tensors", recorded)
    task = make_task("fedavg")
    task.model.float()
    object.__setattr__(task, "evaluate", None)
    run(
        tmp_path / "run",
        "fedavg",
        task=task,
        gradient_loss=loss,
        clients_per_round=4,
        num_rounds=1,
        weighting=weighting,
    )
    assert len(replies) == 4
    sizes = {client: len(task.datasets[client]) if weighting == "data_size" else 1 for client in replies}
    for name, value in task.model.named_parameters():
        mean = sum(sizes[client] / sum(sizes.values()) * replies[client][name] for client in sorted(replies))
        np.testing.assert_array_equal(value.detach().numpy(), np.asarray(mean).astype(np.float32))


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_the_sizes_of_the_files_that_are_read(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[Path, int] = {}
    read: list[Path] = []
    write, into, average = (
        tensor_files.write_tensors,
        tensor_files.read_into,
        tensor_files.average_into,
    )

    def writes(path: Path, *rest: Any) -> int:
        size = write(path, *rest)
        written[path] = os.path.getsize(path)
        return size

    def reads(path: Path, *rest: Any) -> None:
        read.append(path)
        into(path, *rest)

    def averages(tensors: Any, paths: Sequence[Path], shares: Sequence[int]) -> None:
        read.extend(paths)
        average(tensors, paths, shares)

    for name, function in (("write_tensors", writes), ("read_into", reads), ("average_into", averages)):
        monkeypatch.setattr(rounds, name, function)
    task = make_task(method)
    (result,) = run(tmp_path / "run", method, task=task, num_rounds=1)
    is_federated = method.startswith("fed")
    down = [written[path] for path in read if path.name.startswith("broadcast")]
    up = [written[path] for path in read if path.name.startswith("reply")]
    assert (len(down), len(up)) == ((2, 2) if is_federated else (0, 0))
    assert (result.bytes_down, result.bytes_up) == (sum(down), sum(up))
    if is_federated:
        numbers = sum(value.numel() for value in task.model.parameters() if value.requires_grad)
        itemsize = 4 if method == "fedit" else 8
        assert 0 <= down[0] - itemsize * numbers < 2048, "the numbers, and a header"
    assert not any(path.exists() for path in written)


def test_fedit_changes_adapters_alone(tmp_path: Path) -> None:
    task = make_task("fedit")
    before, loss = weights(task.model), federation.evaluate(task.model, 0)["held_out_loss"]
    content = ModelIdentity.of(task.model).content
    with RunFolder.take(tmp_path / "run") as folder:
        fedit = opened(folder, "fedit", task=task)
        assert federation.evaluate(task.model, 0)["held_out_loss"] == loss, "they begin as nothing"
        with fedit:
            results = list(fedit.rounds())
    after = {name.replace(".base_layer", ""): value for name, value in weights(task.model).items()}
    added = {name: after.pop(name) for name in list(after) if ".lora_" in name}
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name].view(torch.int64), value.view(torch.int64)), name
    assert ModelIdentity.of(federation_of(before)).content == content
    assert sum(value.numel() for value in added.values()) == num_adapter_weights(Projected(), 8)
    assert all(bool(value.any()) for value in added.values()), "every one of them was tuned"
    assert results[-1].evaluation["held_out_loss"] < loss  # type: ignore[operator]
    assert not any(module.training for module in task.model.modules())


def federation_of(values: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    model = Projected().double()
    model.load_state_dict(dict(values))
    return model


def test_dropout_acts_in_local_steps_alone(tmp_path: Path) -> None:
    found = {}
    for rate in (0.0, 0.05, 0.9):
        results = run(tmp_path / str(rate), "fedit", baseline={"lora_dropout": rate})
        found[rate] = [(result.train_loss, result.evaluation["held_out_loss"]) for result in results]
    # The second matrix begins as zeros: the first step's loss is the same, the steps after it are not.
    assert len({tuple(rows) for rows in found.values()}) == 3
    again = run(tmp_path / "again", "fedit", baseline={"lora_dropout": 0.9})
    assert [(result.train_loss, result.evaluation["held_out_loss"]) for result in again] == found[0.9]


@pytest.mark.parametrize("method", METHODS)
def test_clients_are_those_of_a_server_and_batches_are_theirs(method: str, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    task = make_task(method)

    def loss(model: torch.nn.Module, batch: federation.Batch) -> torch.Tensor:
        seen.append(batch[1].detach().clone())
        return federation.loss(model, batch)

    object.__setattr__(task, "loss", loss)
    results = run(tmp_path / "run", method, task=task, gradient_loss=loss)
    numbers = {name: federation.CONFIG[name] for name in ("clients_per_round", "num_local_steps", "eps")}
    server = Server(
        ModelIdentity.of(federation.make_model()),
        SeedPool(federation.CONFIG["seed"], 7),
        ServerConfig(num_clients=5, lr=1e-3, **numbers),
    )
    # Each batch is seen on both sides where gradients are not taken.
    batches = iter(seen if method in ("fedavg", "fedit", "first-order") else seen[::2])
    for result in results:
        assert result.clients == server.clients
        server.skip_round()
        for client in result.clients:
            rows = np.array(task.datasets[client])
            size = min(federation.CONFIG["batch_size"], len(rows))
            generator = np.random.default_rng([federation.CONFIG["seed"], result.round, client])
            order: list[int] = []
            for _ in range(federation.CONFIG["num_local_steps"]):
                if len(order) < size:
                    order = generator.permutation(len(rows)).tolist()
                assert next(batches).flatten().tolist() == rows[order[:size], 2].tolist()
                order = order[size:]
    assert next(batches, None) is None


def run_settings(method: str, **values: Any) -> RunSettings:
    given = {**federation.CONFIG, "data": "rows.csv", "method": method, "num_threads": 1, **values}
    return RunSettings.of(given, 5)


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_steps_and_forward_passes_are_those_that_are_made(method: str, epochs: int, tmp_path: Path) -> None:
    made = {"steps": 0, "losses": 0}

    def loss(model: torch.nn.Module, batch: federation.Batch) -> torch.Tensor:
        made["losses"] += 1
        return federation.loss(model, batch)

    def count() -> None:
        made["steps"] += 1

    task = make_task(method)
    object.__setattr__(task, "loss", loss)
    directions = 3 if method in SEVERAL_DIRECTIONS else 1
    baseline = {"local_epochs": epochs, "directions": directions}
    results = run(tmp_path / "run", method, task=task, baseline=baseline, gradient_loss=loss, on_step=count)
    settings = run_settings(method, **baseline)
    num_rows = [len(rows) for rows in task.datasets]
    passes = costs.forward_passes(settings, num_rows, [result.metrics for result in results])
    assert costs.steps_left(settings, num_rows, 0) == made["steps"]
    of_a_step = 3 if method in ("fedavg", "fedit", "first-order") else 6
    assert sum(passes) == of_a_step * made["steps"]
    assert made["losses"] == (1 if of_a_step == 3 else 6) * made["steps"]
    last = results[-1].clients
    assert costs.steps_left(settings, num_rows, 2) == costs.local_steps(settings, num_rows, last)
    if epochs:
        assert passes[0] == of_a_step * sum(2 * -(-num_rows[client] // 3) for client in results[0].clients)


def test_fedkseed_counts_two_forward_passes_a_step() -> None:
    assert costs.forward_passes(run_settings("fedkseed"), [5] * 5, [{"clients": [0, 1]}]) == [2 * 2 * 4]


def test_an_epoch_takes_each_row_once(tmp_path: Path) -> None:
    seen: list[float] = []

    def loss(model: torch.nn.Module, batch: federation.Batch) -> torch.Tensor:
        seen.extend(batch[1].flatten().tolist())
        return federation.loss(model, batch)

    task = make_task("first-order")
    (result,) = run(
        tmp_path / "run",
        "first-order",
        task=task,
        gradient_loss=loss,
        baseline={"local_epochs": 1},
        num_rounds=1,
        clients_per_round=5,
    )
    assert sorted(seen) == sorted(row[2] for client in result.clients for row in task.datasets[client])


@pytest.mark.parametrize("method", ["fedavg", "first-order"])
def test_a_step_without_a_finite_loss_is_skipped(method: str, tmp_path: Path) -> None:
    calls = iter(range(100))

    def loss(model: torch.nn.Module, batch: federation.Batch) -> torch.Tensor:
        return federation.loss(model, batch) * (float("nan") if next(calls) % 3 == 1 else 1.0)

    results = run(tmp_path / "run", method, gradient_loss=loss)
    assert [result.num_skipped for result in results] == [3, 2, 3]
    assert all(result.train_loss is not None and result.failed == () for result in results)


def test_a_client_that_diverges_is_left_out_and_a_round_of_them_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = iter(range(100))

    def loss(model: torch.nn.Module, batch: federation.Batch) -> torch.Tensor:
        # The first client's first step; its gradient is infinite.
        return federation.loss(model, batch) + (1.0 if next(calls) else 1e200) * sum(
            (value.sum() - value.detach().sum()) * (0.0 if next(calls) > 1 else 1e200)
            for value in model.parameters()
        )

    (result,) = run(tmp_path / "run", "fedavg", gradient_loss=loss, num_rounds=1)
    assert result.failed == result.clients[:1]
    assert f"clients [{result.clients[0]}] are not finite" in caplog.text

    def endless(model: torch.nn.Module, batch: federation.Batch) -> torch.Tensor:
        return federation.loss(model, batch) + 1e300 * sum(
            (value.sum() - value.detach().sum()) * 1e300 for value in model.parameters()
        )

    for method in ("fedavg", "first-order"):
        with pytest.raises(RoundFailedError, match="expected finite weights after round 0.*learning rate"):
            run(tmp_path / method, method, gradient_loss=endless)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "fedavg", "workers": 2}, "expected 1 worker with method fedavg, got 2"),
        (
            {"method": "fedit", "dtype": "float16"},
            "expected weights of float32 or bfloat16 with",
        ),
    ],
)
def test_settings_that_a_method_cannot_serve(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        run_settings(**values)
    assert run_settings(**{**values, "method": "fedkseed"})


def test_fedit_wants_the_seven_projections(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        run(tmp_path / "run", "fedit", task=make_task("fedavg"))
    assert f"named {', '.join(PROJECTIONS)} for fedit, got none named {', '.join(PROJECTIONS)} in" in str(
        error.value
    )
    assert "in Sequential" in str(error.value)


def test_more_clients_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clients_per_round in \[1, 5\], got 6"):
        run(tmp_path / "run", "fedavg", clients_per_round=6)


def test_optimizers_by_their_names(tmp_path: Path) -> None:
    of_method = {
        m: BaselineSettings(method=m).first_order_optimizer for m in ("fedavg", "fedit", "first-order")
    }  # type: ignore[arg-type]
    assert of_method == {"fedavg": "sgd", "fedit": "adam", "first-order": "adamw"}
    contents = set()
    for name in ("sgd", "adam", "adamw", "auto"):
        task = make_task("first-order")
        run(tmp_path / name, "first-order", task=task, baseline={"optimizer": name})
        contents.add(ModelIdentity.of(task.model).content)
    assert len(contents) == 3


def test_metrics_of_a_resumed_run_are_all_there(tmp_path: Path) -> None:
    run(tmp_path / "run", "fedzo", num_rounds=1)
    with RunFolder.take(tmp_path / "run") as folder, opened(folder, "fedzo") as left:
        assert (left.num_complete, left.best_round) == (1, None)
        results = list(left.rounds())
        rows = left.past_metrics
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[1:] == [result.metrics for result in results]
    assert json.loads((tmp_path / "run" / CLIENTS).read_text())["method"] == "fedzo"
