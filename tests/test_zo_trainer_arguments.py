"""What becomes of each training argument, and what the zeroth-order Trainer takes from the installed one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
from support.tiny_trainer import make_arguments, make_llama, make_trainer
from transformers import Trainer, TrainingArguments

from fedkseed import ZOSGD
from fedkseed.adapters.transformers import ZOTrainer, ZOTrainerMixin, saving, stepping, trainer
from fedkseed.adapters.transformers.arguments import IGNORED, REFUSED, SERVED, check_arguments, table
from fedkseed.adapters.transformers.saving import Saving
from fedkseed.adapters.transformers.stepping import Stepping

TABLE = table()
#: A value of each field that is not its default, as its user would give it or as the arguments keep it.
GIVEN: dict[str, Any] = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"offload": True},
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "ddp_bucket_cap_mb": 10,
    "ddp_find_unused_parameters": True,
    "ddp_static_graph": True,
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "enable_jit_checkpoint": True,
    "fp16": True,
    "fsdp": True,
    "fsdp_config": {"min_num_params": 100},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "liger_kernel_config": {"rope": True},
    "max_grad_norm": 0.5,
    "neftune_noise_alpha": 5.0,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "optim_target_modules": "all-linear",
    "parallelism_config": object(),
    "torch_empty_cache_steps": 4,
    "use_liger_kernel": True,
}
#: Attributes that the mixin sets.
PRIVATE_STATE = {"_settings", "_train_mode", "_walked", "_resumed_from"}
#: Of transformers, whose deprecated names TRL gives.
of_former_names = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fedkseed"]


def set_to(folder: Path, name: str) -> TrainingArguments:
    """Arguments with the field as given; set afterwards, for some ask for packages or devices when made."""
    arguments = make_arguments(folder)
    setattr(arguments, name, GIVEN[name])
    return arguments


def test_the_table_has_each_field_of_the_installed_release_once_and_none_that_is_gone() -> None:
    listed = [name for kind in (SERVED, IGNORED, REFUSED) for name in TABLE[kind]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(TABLE) == {SERVED, IGNORED, REFUSED, "unset", "former"}
    assert {*TABLE["unset"], *TABLE["former"], *TABLE["former"].values()} <= {
        *TABLE[IGNORED],
        *TABLE[REFUSED],
    }
    assert set(GIVEN) == {*TABLE[IGNORED], *TABLE[REFUSED]}


@pytest.mark.parametrize("name", TABLE[REFUSED])
def test_a_refused_field_is_an_error_that_names_it_before_the_trainer_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = set_to(tmp_path, name)
    monkeypatch.setattr(Trainer, "__init__", lambda *args, **kwargs: pytest.fail("the Trainer acts on it"))
    with pytest.raises(ValueError, match=rf"^expected no {name} in a zeroth-order Trainer, got ") as caught:
        ZOTrainer(make_llama(), arguments)
    assert str(caught.value).endswith(TABLE[REFUSED][name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TABLE[IGNORED])
def test_an_ignored_field_is_said_in_one_line(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedkseed")
    check_arguments(set_to(tmp_path, name), train_mode=False)
    assert lines_of(caplog) == [
        f"{name}={GIVEN[name]!r} has no effect in a zeroth-order Trainer: {TABLE[IGNORED][name]}"
    ]


def test_noise_of_train_mode_is_not_said_to_be_without_effect_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_arguments(set_to(tmp_path, "neftune_noise_alpha"), train_mode=True)
    assert lines_of(caplog) == []


@of_former_names
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_of_two_names_of_a_field_the_new_one_is_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, arguments={name: True, f"{name}_kwargs": {"use_reentrant": False}})
    said = [line.split("=")[0] for line in lines_of(caplog)]
    assert said == ["activation_checkpointing", "activation_checkpointing_kwargs"]


@of_former_names
@pytest.mark.parametrize("kind", ["TrainingArguments", "SFTConfig", "DPOConfig"])
def test_defaults_are_neither_refused_nor_said(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedkseed")
    if kind == "TrainingArguments":
        arguments: Any = TrainingArguments(str(tmp_path), use_cpu=True)
    else:
        trl = pytest.importorskip("trl", reason="needs the extra trl")
        arguments = getattr(trl, kind)(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    for train_mode in (False, True):
        check_arguments(arguments, train_mode)
    assert lines_of(caplog) == []


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 0.0), ("max_grad_norm", 0), ("fsdp", False)])
def test_what_switches_a_refused_field_off_is_taken(name: str, value: Any, tmp_path: Path) -> None:
    check_arguments(make_arguments(tmp_path, **{name: value}), train_mode=False)


def test_a_trainer_without_arguments_is_made_with_their_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ZOTrainer(make_llama()).args.max_grad_norm == 1.0


def test_arguments_are_found_wherever_a_trainer_takes_them(tmp_path: Path) -> None:
    class TakesAnotherModelFirst(ZOTrainerMixin, Trainer):  # type: ignore[misc]
        def __init__(self, model: Any, reference: Any, args: Any) -> None:
            super().__init__(model, reference, args)

    refused = set_to(tmp_path, "max_grad_norm")
    for given in ((make_llama(), make_llama(), refused), (make_llama(), None, refused)):
        with pytest.raises(ValueError, match="max_grad_norm"):
            TakesAnotherModelFirst(*given)
    with pytest.raises(ValueError, match="max_grad_norm"):
        ZOTrainer(make_llama(), args=refused)


def test_keywords_of_the_optimizer_have_its_defaults() -> None:
    own = inspect.signature(ZOTrainerMixin.__init__).parameters
    of_optimizer = inspect.signature(ZOSGD.__init__).parameters
    shared = [name for name in own if name in of_optimizer and name != "self"]
    assert shared == ["eps", "num_directions", "storage", "family", "max_abs_g", "max_loss_gap"]
    assert {name: own[name].default for name in shared} == {
        name: of_optimizer[name].default for name in shared
    }
    assert [own[name].default for name in ("seed_pool", "noise_seed", "train_mode")] == [None, None, False]


NOT_OVERRIDDEN = {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__qualname__"}


def own_names() -> set[str]:
    """What the mixin and its parts define."""
    return {name for part in (ZOTrainerMixin, Stepping, Saving) for name in vars(part)} - NOT_OVERRIDDEN


def test_what_is_overridden_is_public() -> None:
    overridden = {name for name in own_names() if hasattr(Trainer, name)}
    assert overridden == {"__init__", "create_optimizer", "training_step", "log", "train", "save_model"}
    assert not {name for name in vars(ZOTrainer) if hasattr(Trainer, name)} - NOT_OVERRIDDEN


def names_of_self() -> dict[str, set[str]]:
    """Attributes of ``self`` in the mixin's source: those that are read or called, and those that are set."""
    found: dict[str, set[str]] = {"read": set(), "set": set()}
    for module in (trainer, stepping, saving):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                found["set" if isinstance(node.ctx, ast.Store) else "read"].add(node.attr)
    return found


def test_names_that_it_reads_are_there_on_the_installed_trainer(tmp_path: Path) -> None:
    """Private ones among them: where one goes, this test says which."""
    names, own = names_of_self(), {*own_names(), *PRIVATE_STATE}
    read = (names["read"] | {"optimizer_cls_and_kwargs", "is_deepspeed_enabled", "is_fsdp_enabled"}) - own
    assert {"_prepare_inputs", "_load_from_checkpoint", "_train_batch_size", "is_in_train"} <= read
    plain = make_trainer(tmp_path, kind=Trainer)
    of_the_loop = {"current_gradient_accumulation_steps"}  # set there, at the first step
    assert [name for name in sorted(read - of_the_loop) if not hasattr(plain, name)] == []
    assert all(f"self.{name} = " in inspect.getsource(Trainer._run_epoch) for name in of_the_loop)


def test_private_names_of_its_own_are_none_of_the_trainers_beside_it(tmp_path: Path) -> None:
    assert names_of_self()["set"] - PRIVATE_STATE == {"optimizer"}
    own = {name for name in own_names() if name.startswith("_") and not name.startswith("__")}
    own |= {*PRIVATE_STATE, "zeroth_order"}
    assert {"_set_mode", "_loss"} <= own
    taken = {*dir(Trainer), *vars(make_trainer(tmp_path, kind=Trainer)), *assigned_in(Trainer)}
    assert own & taken == set()


@pytest.mark.parametrize("kind", ["SFTTrainer", "DPOTrainer", "RewardTrainer"])
def test_nor_of_trls(kind: str) -> None:
    trl = pytest.importorskip("trl", reason="needs the extra trl")
    beside = getattr(trl, kind)
    own = {name for name in own_names() if name.startswith("_") and not name.startswith("__")}
    assert (own | PRIVATE_STATE | {"zeroth_order"}) & {*dir(beside), *assigned_in(beside)} == set()


def assigned_in(kind: type[Any]) -> set[str]:
    """Attributes of ``self`` that the classes of a Trainer assign anywhere in their source."""
    modules = {inspect.getmodule(base) for base in kind.__mro__ if base is not object}
    return {
        node.attr
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))  # type: ignore[arg-type]
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
