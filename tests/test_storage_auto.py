"""storage="auto": which mode it is, what it says, its one fallback, and what states hold."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small_model import make_model, same_bytes, weights_of
from support.streamed_models import LanguageModel, build, loss_of, make_ids
from support.two_devices import two_devices
from support.unstreamable import ReadsOutside
from torch import nn

from fedkseed import ZOSGD, FedKSeedSGD, Inplace, NotStreamableError, SeedPool, Streamed
from fedkseed.storage import StorageChoice, StorageOptions, auto, mode_of_text

POOL = SeedPool(5, 16)
EPS = 1e-2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
IN_FP32 = Streamed(compute_dtype=torch.float32)
COMPENSATED = Streamed(compensated=True, compute_dtype=torch.float32)


def zosgd(params: Any, storage: StorageChoice = "auto", **options: Any) -> ZOSGD:
    return ZOSGD(params, 0.05, EPS, seed=3, storage=storage, **options)


def fedkseed(params: Any, storage: StorageChoice = "auto", **options: Any) -> FedKSeedSGD:
    return FedKSeedSGD(params, 0.05, EPS, POOL, storage=storage, **options)


Maker = Callable[..., Any]
BOTH = pytest.mark.parametrize("make", [zosgd, fedkseed])


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.fixture(autouse=True)
def _every_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedkseed")


@pytest.mark.parametrize(
    ("make", "dtype", "on_processor", "expected", "reason"),
    [
        (zosgd, FP32, True, Inplace(), "weights of float32"),
        (zosgd, FP64, True, Inplace(), "weights of float64"),
        (fedkseed, FP32, True, Inplace(), "weights of float32"),
        (fedkseed, FP64, False, Inplace(), "weights of float64"),
        (fedkseed, BF16, True, IN_FP32, "bfloat16 on a processor, where the ledger is"),
        (fedkseed, FP16, True, IN_FP32, "float16 on a processor, where the ledger is"),
        (fedkseed, BF16, False, Streamed(), "bfloat16 on an accelerator, where the ledger is"),
        (zosgd, BF16, True, COMPENSATED, "bfloat16 on a processor, where the walked weights are"),
        (zosgd, FP16, True, COMPENSATED, "float16 on a processor"),
        (zosgd, BF16, False, Streamed(compensated=True), "bfloat16 on an accelerator, where the walked"),
    ],
)
def test_the_table(
    make: Maker,
    dtype: torch.dtype,
    on_processor: bool,
    expected: StorageOptions,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not on_processor:
        monkeypatch.setattr(auto, "is_on_processor", lambda tensors: False)
    optimizer = make(build(LanguageModel, dtype))
    assert optimizer.storage == expected
    assert optimizer.storage_refusal is None
    (line,) = said(caplog, logging.INFO)
    assert line.startswith(f'storage="auto" is {expected!r}: ')
    assert reason in line
    assert optimizer.state_dict()["fedkseed"]["storage"] == repr(expected)


def test_it_is_the_default_and_an_explicit_mode_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    model = build(LanguageModel, BF16)
    assert ZOSGD(model, 0.1).storage == COMPENSATED
    assert FedKSeedSGD(model, 0.1, EPS, POOL).storage == IN_FP32
    caplog.clear()
    assert zosgd(model, Inplace()).storage == Inplace()
    assert zosgd(model, Streamed()).storage == Streamed()
    assert not caplog.records


def test_where_tensors_are_is_asked_of_those_of_16_bits() -> None:
    assert auto.is_on_processor([torch.zeros(1)])
    assert auto.is_on_processor([torch.zeros(1, device="meta"), torch.zeros(1)])
    assert not auto.is_on_processor([torch.zeros(1, device="meta")])


def test_one_tuned_weight_of_16_bits_counts_and_frozen_ones_do_not() -> None:
    model = build(LanguageModel, FP32)
    model.layers[1].to(BF16)
    assert zosgd(model).storage == COMPENSATED
    model.layers[1].requires_grad_(False)
    assert zosgd(model).storage == Inplace()


def with_lone_parameter() -> nn.Module:
    model = nn.ModuleList([nn.Linear(2, 2)]).to(BF16)
    model.register_parameter("alone", nn.Parameter(torch.zeros(2, dtype=BF16)))
    return model


def compiled_in_place() -> nn.Module:
    model = make_model(BF16)
    model[2].compile()
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "compiled": (lambda: torch.compile(make_model(BF16)), TypeError, "OptimizedModule"),
    "compiled in place": (compiled_in_place, TypeError, "compiled in place"),
    "renormalised": (
        lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 1)).to(BF16),
        ValueError,
        "max_norm",
    ),
    "read by no unit": (with_lone_parameter, ValueError, "alone in none"),
}


@BOTH
@pytest.mark.parametrize("name", REFUSED)
def test_what_streamed_refuses_at_construction(
    make: Maker, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build_model, kind, reason = REFUSED[name]
    with pytest.raises(NotStreamableError, match=reason) as caught:
        make(build_model(), Streamed())
    assert isinstance(caught.value, kind)
    optimizer = make(build_model())
    assert optimizer.storage == Inplace()
    assert reason in optimizer.storage_refusal
    (line,) = said(caplog, logging.INFO)
    assert line.startswith(f'storage="auto" is {Inplace()!r}: ')
    assert "cannot be streamed" in line
    assert reason in line


@BOTH
def test_tensors_alone(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    for params in (list(make_model(BF16).parameters()), make_model(BF16).named_parameters()):
        assert make(params).storage == Inplace()
    assert all("without the model" in line for line in said(caplog, logging.INFO))
    model = make_model(BF16)
    assert make(list(model.parameters()), model=model).storage != Inplace()


def test_a_unit_on_two_devices(caplog: pytest.LogCaptureFixture) -> None:
    with two_devices() as devices:
        model = build(LanguageModel, BF16)
        devices.place_module(model.layers[0].first)
        with pytest.raises(NotStreamableError, match="one device") as caught:
            zosgd(model, Streamed())
        assert isinstance(caught.value, ValueError)
        assert zosgd(model).storage == Inplace()
    assert "one device" in said(caplog, logging.INFO)[0]


def test_a_move_that_no_unit_survives_falls_before_the_first_measurement() -> None:
    with two_devices() as devices:
        model, ids = build(LanguageModel, BF16), make_ids()
        optimizer = zosgd(model)
        assert optimizer.storage == COMPENSATED
        devices.place_module(model.layers[0].first)
        optimizer.measure(lambda: float(loss_of(model, ids)))
        assert optimizer.storage == Inplace()
        assert "one device" in str(optimizer.storage_refusal)


@pytest.mark.parametrize("storage", ["streamed", "Auto", None, 3])
def test_what_is_no_storage_mode(storage: Any) -> None:
    with pytest.raises(TypeError, match="expected storage='auto', or a mode such as"):
        zosgd(make_model(), storage)


@pytest.mark.parametrize("storage", [Inplace, Streamed])
def test_a_class_is_no_storage_mode(storage: Any) -> None:
    with pytest.raises(TypeError, match=rf"got the class {storage.__name__}; call it: {storage.__name__}\("):
        zosgd(make_model(), storage)


@BOTH
@pytest.mark.parametrize("is_apart", [False, True])
def test_it_falls_in_the_first_evaluation_to_what_in_place_would_have_done(
    make: Maker, is_apart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    walks = []
    for storage in ("auto", Inplace()):
        model, ids, calls = build(ReadsOutside, BF16).train(), make_ids(), 0

        def closure(model: nn.Module = model, ids: Any = ids) -> Any:
            nonlocal calls
            calls += 1
            return loss_of(model, ids)

        optimizer = make(model, storage)
        assert (optimizer.storage == Inplace()) == (storage != "auto")
        torch.manual_seed(8)
        losses = []
        for _ in range(3):
            if is_apart:
                optimizer.measure(closure)
            losses.append(optimizer.step(None if is_apart else closure))
        assert optimizer.storage == Inplace()
        assert calls == 6 + (storage == "auto")
        own = optimizer.state_dict()["fedkseed"]
        assert own["storage"] == repr(Inplace())
        walks.append([losses, [*weights_of(model), *model.buffers(), torch.get_rng_state()], str(own)])
    assert walks[0][0] == walks[1][0]
    assert same_bytes(walks[0][1], walks[1][1])
    assert walks[0][2] == walks[1][2]
    (line,) = said(caplog, logging.WARNING)
    assert line.startswith(f'storage="auto" falls to {Inplace()!r}: expected head.weight to be read by')
    assert line.endswith("In place each pass rounds weights of 16 bits, and they drift (docs/numerics.md)")


def test_what_was_drawn_before_it_fell_is_no_other_draw() -> None:
    model, ids = build(ReadsOutside, BF16), make_ids()

    def loss() -> torch.Tensor:
        return torch.rand(()) + loss_of(model, ids) + torch.rand(())

    optimizer = zosgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(loss)
    assert optimizer.storage == Inplace()


def test_an_explicit_mode_never_falls_and_its_error_has_a_type() -> None:
    model, ids = build(ReadsOutside, BF16), make_ids()
    optimizer = zosgd(model, COMPENSATED)
    for _ in range(2):
        with pytest.raises(NotStreamableError, match=r"head\.weight") as caught:
            optimizer.step(lambda: loss_of(model, ids))
        assert isinstance(caught.value, RuntimeError)
    assert optimizer.storage == COMPENSATED


def test_other_errors_do_not_make_it_fall() -> None:
    model, ids = build(LanguageModel, BF16), make_ids()
    optimizer = zosgd(model)
    with pytest.raises(RuntimeError, match="no more data"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("no more data")))
    optimizer.step(lambda: loss_of(model, ids))
    assert optimizer.storage == COMPENSATED
    assert optimizer.storage_refusal is None


def test_after_the_first_measurement_the_mode_stays(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build(LanguageModel, BF16), make_ids()
    optimizer = zosgd(model)
    optimizer.step(lambda: loss_of(model, ids))
    closure = lambda: loss_of(model, ids) + model.layers[0].scale.sum()  # noqa: E731
    with pytest.raises(NotStreamableError, match=r"layers\.0\.scale"):
        optimizer.step(closure)
    assert optimizer.storage == COMPENSATED
    assert "falls" not in caplog.text


@pytest.mark.parametrize(
    ("make_layer", "shape"),
    [
        (lambda: nn.Linear(5, 2), (3, 5)),
        (lambda: nn.Conv1d(2, 3, 2), (3, 2, 5)),  # refused above the dispatcher
        (lambda: nn.MultiheadAttention(4, 2), (3, 1, 4)),
        (lambda: nn.GRU(4, 2), (3, 1, 4)),  # in Python
    ],
)
def test_inputs_of_16_bits_for_weights_in_fp32(
    make_layer: Callable[[], nn.Module], shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A model that is fed its own 16-bit dtype cannot be run in fp32; it is told so, and trained in place."""
    model, inputs = make_layer().to(BF16), torch.ones(shape, dtype=BF16)
    arguments = 3 if isinstance(model, nn.MultiheadAttention) else 1

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        found = model(*[inputs] * arguments)
        return (found[0] if isinstance(found, tuple) else found).float().sum()

    with pytest.raises(NotStreamableError, match="compute_dtype says, got one that mixes dtypes"):
        zosgd(model, IN_FP32).step(lambda: loss(inputs))
    optimizer = zosgd(model)
    optimizer.step(lambda: loss(inputs))
    assert optimizer.storage == Inplace()
    assert "give it inputs in fp32" in said(caplog, logging.WARNING)[0]
    # What fails without widened weights is the closure's own.
    with pytest.raises((RuntimeError, ValueError)) as caught:
        zosgd(model, Streamed()).step(lambda: loss(inputs.float()))
    assert not isinstance(caught.value, NotStreamableError)
    # So are other errors with them.
    with pytest.raises(ValueError, match="^no data of type float$"):
        zosgd(model, IN_FP32).step(lambda: (_ for _ in ()).throw(ValueError("no data of type float")))


@pytest.mark.parametrize(
    ("make", "first", "then", "mode"), [(fedkseed, BF16, FP32, IN_FP32), (zosgd, FP32, BF16, Inplace())]
)
def test_a_conversion_keeps_the_mode_and_is_said_once(
    make: Maker, first: torch.dtype, then: torch.dtype, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = build(LanguageModel, first), make_ids()
    optimizer = make(model)
    assert optimizer.storage == mode
    for dtype in (then, first, then):
        model.to(dtype)
        optimizer.step(lambda: loss_of(model, ids))
        assert optimizer.storage == mode
    (line,) = said(caplog, logging.WARNING)
    assert line.startswith(f'storage="auto" stays {mode!r}')
    assert "convert and move the model first" in line


def walk(optimizer: Any, model: nn.Module, num_steps: int) -> None:
    for step in range(num_steps):
        ids = make_ids(step)
        optimizer.step(lambda ids=ids: loss_of(model, ids))


@BOTH
@pytest.mark.parametrize("kind", [LanguageModel, ReadsOutside])
def test_a_resumed_run_goes_on_in_the_resolved_mode(
    make: Maker, kind: type[LanguageModel], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(4)
    model, other = build(kind, BF16), build(kind, BF16, seed=2)
    optimizer = make(model)
    walk(optimizer, model, 2)
    state, weights, rng = optimizer.state_dict(), model.state_dict(), torch.get_rng_state()
    other.load_state_dict(weights)
    resumed = make(other)
    caplog.clear()
    resumed.load_state_dict(state)
    assert resumed.storage == optimizer.storage
    goes_on = f'storage="auto" goes on in {Inplace()!r}, that of the state loaded'
    assert said(caplog, logging.INFO) == ([goes_on] if kind is ReadsOutside else [])
    walk(optimizer, model, 2)
    torch.set_rng_state(rng)
    walk(resumed, other, 2)
    assert same_bytes([*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()])
    assert str(resumed.state_dict()["fedkseed"]) == str(optimizer.state_dict()["fedkseed"])
    assert not said(caplog, logging.WARNING)


@pytest.mark.parametrize(
    "mode", [Inplace(), Inplace(chained=True), Streamed(rounding="stochastic"), COMPENSATED, IN_FP32]
)
def test_a_state_brings_its_mode_to_auto_and_to_nothing_else(mode: StorageOptions) -> None:
    model = build(LanguageModel, BF16)
    optimizer = zosgd(model, mode)
    walk(optimizer, model, 2)
    state, weights = optimizer.state_dict(), weights_of(model)
    walk(optimizer, model, 2)
    other = build(LanguageModel, BF16)
    with torch.no_grad():
        for weight, saved in zip(other.parameters(), weights, strict=True):
            weight.copy_(saved)
    resumed = zosgd(other)
    resumed.load_state_dict(state)
    assert resumed.storage == mode
    walk(resumed, other, 2)
    for walked in (optimizer, resumed):
        walked.flush()
    assert same_bytes(weights_of(model), weights_of(other))
    explicit = zosgd(build(LanguageModel, BF16), Streamed())
    with pytest.raises(ValueError, match=r"a state with storage Streamed\(paired=False"):
        explicit.load_state_dict(state)


def test_from_one_waiting_mode_to_another_the_weights_are_clean() -> None:
    model = build(LanguageModel, BF16)
    optimizer = zosgd(model)
    chained = zosgd(build(LanguageModel, BF16), Inplace(chained=True)).state_dict()
    plain = zosgd(build(LanguageModel, BF16), Inplace()).state_dict()
    before = weights_of(model)
    optimizer.load_state_dict(chained)
    walk(optimizer, model, 1)
    assert not same_bytes(before, weights_of(model))
    standing, kept = weights_of(model), optimizer._auto._opened  # kept alive: its end would flush, too
    optimizer.load_state_dict(plain)
    assert not same_bytes(standing, weights_of(model))  # the perturbation is taken back
    clean = weights_of(model)
    optimizer.flush()
    model(make_ids())
    del kept
    assert same_bytes(clean, weights_of(model))


def test_a_state_of_before_the_first_step_leaves_the_fallback_open() -> None:
    """Wrappers load an optimizer's own state into it, to move it, before anything has run."""
    model, ids = build(ReadsOutside, BF16), make_ids()
    optimizer = zosgd(model)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: loss_of(model, ids))
    assert optimizer.storage == Inplace()
    # One that has stepped in a streamed mode would lose its residuals.
    streamed = zosgd(build(LanguageModel, BF16), COMPENSATED)
    walk(streamed, build(LanguageModel, BF16), 1)
    resumed = zosgd(build(LanguageModel, BF16))
    resumed.load_state_dict(streamed.state_dict())
    with pytest.raises(NotStreamableError):
        resumed.step(lambda: loss_of(resumed._model, ids) + resumed._model.norm.weight.sum())


def test_a_state_whose_mode_cannot_serve_the_weights() -> None:
    state = zosgd(make_model(BF16), Streamed()).state_dict()
    optimizer = zosgd(list(make_model(BF16).parameters()))
    with pytest.raises(ValueError, match="a storage mode that can serve this model, got one of Streamed"):
        optimizer.load_state_dict(state)
    assert optimizer.storage == Inplace()


MODES: list[StorageOptions] = [
    Inplace(),
    Inplace(chained=True, rounding="stochastic"),
    Streamed(paired=True, compute_dtype=torch.float32, rounding="stochastic"),
    COMPENSATED,
]


@pytest.mark.parametrize("mode", MODES, ids=repr)
def test_a_mode_out_of_its_text(mode: StorageOptions) -> None:
    assert mode_of_text(repr(mode)) == mode


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"Inplace()",
        "",
        "Inplace",
        "auto",
        "Outside()",
        "Inplace(True)",
        "Inplace(chained=1)",
        "Inplace(chained=not False)",
        "Inplace(chained=True, chained=False)",
        "Inplace(**{'chained': True})",
        "Inplace(paired=True)",
        "Inplace(rounding='up')",
        "Inplace(rounding=print('called'))",
        "Streamed(compute_dtype=torch.float64)",
        "Streamed(compute_dtype='torch.float32')",
        "Streamed(compensated=True, rounding='stochastic')",
        "storage.Inplace()",
        "Inplace()()",
        "Inplace(); Inplace()",
        "Inplace(\0)",
        "(" * 250,
        "Inplace(" + " " * 300 + ")",
    ],
)
def test_a_text_that_is_no_mode(text: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected the text of a storage mode, Inplace or Streamed"):
        mode_of_text(text)
    optimizer = zosgd(make_model(BF16))
    state = optimizer.state_dict()
    state["fedkseed"]["storage"] = text
    with pytest.raises(ValueError, match="expected the text of a storage mode"):
        optimizer.load_state_dict(state)
    assert optimizer.storage == COMPENSATED
    assert not capsys.readouterr().out
