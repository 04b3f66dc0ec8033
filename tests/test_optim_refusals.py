"""What cannot be tuned is refused by its name in the model, in every storage mode, and nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.two_devices import two_devices
from support.untunable import REFUSED, Wrapper, accepted, base, with_weight
from torch import Tensor, distributed, nn

import fedkseed_kernels
from fedkseed import (
    ZOSGD,
    FedKSeedSGD,
    Inplace,
    Ledger,
    SeedPool,
    Streamed,
    WorkingCopy,
)
from fedkseed.model import named_errors
from fedkseed_kernels import dispatch

MODES = {
    "inplace": Inplace(),
    "chained": Inplace(chained=True),
    "streamed": Streamed(),
    "paired": Streamed(paired=True),
}
POOL = SeedPool(3, 8)
COEFFICIENTS = np.full(8, 1e-3)
#: Cases that no hash can be made of.
WITHOUT_BYTES = (
    "meta",
    "offloaded",
    "freed",
    "lazy",
    "fake",
    "sharded",
    "wrapper",
    "subclass",
    "coo",
    "csr",
    "mkldnn",
    "frozen, wrapped",
)


def content(tensor: Tensor) -> Any:
    """The bytes of an ordinary tensor, else what tells that it was not written to."""
    if torch.nn.parameter.is_lazy(tensor):
        return None
    is_ordinary = type(tensor.data) is torch.Tensor and tensor.layout is torch.strided
    if not is_ordinary or tensor.is_meta or tensor.untyped_storage().nbytes() == 0:
        return tensor._version
    plain = tensor.detach().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).tolist()


def snapshot(model: nn.Module) -> list[Any]:
    """Parameters, buffers and hooks of a model."""
    tensors = [(name, id(p), p.requires_grad, content(p)) for name, p in model.named_parameters()]
    buffers = [(name, id(b), content(b)) for name, b in model.named_buffers()]
    hooks = [
        (name, attribute, len(value))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute.endswith("_hooks") and value is not None
    ]
    return [tensors, buffers, hooks, [vars(module).get("forward") for module in model.modules()]]


@contextmanager
def refused(
    model: nn.Module, error: type[Exception], message: str, names: Sequence[str] = ()
) -> Iterator[None]:
    """An error in these words, in none of the kernels', that leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        yield
    said = str(caught.value)
    assert [name for name in names if name not in said] == []
    assert not re.search(r"tensors\[|out\[|prepare|one call", said)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert snapshot(model) == before


pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.few(54)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_is_named(case: str, mode: str) -> None:
    found = REFUSED[case]
    model = found.make()
    with refused(model, found.error, found.message, found.names):
        ZOSGD(model, 0.1, storage=MODES[mode])


@pytest.mark.parametrize("case", REFUSED)
def test_the_model_names_it_in_whatever_order_it_is_given(case: str) -> None:
    found = REFUSED[case]
    model = found.make()
    tuned = [p for p in model.parameters() if p.requires_grad]
    for params in (tuned[::-1], [{"params": tuned[2:], "lr": 0.2}, {"params": tuned[:2]}]):
        with refused(model, found.error, found.message, found.names):
            ZOSGD(params, 0.1, model=model)


@pytest.mark.parametrize("case", REFUSED)
def test_a_working_copy_names_it_too(case: str) -> None:
    found = REFUSED[case]
    model = found.make()
    with refused(model, found.error, found.message, found.names):
        WorkingCopy(model)


@pytest.mark.parametrize("case", REFUSED)
def test_a_ledger_names_it_too(case: str) -> None:
    found = REFUSED[case]
    model = found.make()
    if case in WITHOUT_BYTES:
        with refused(model, ValueError, r"expected (whole|dense|parameters).* got \d\.\w+ "):
            Ledger.of(model, POOL, COEFFICIENTS)
        return
    ledger = Ledger.of(model, POOL, COEFFICIENTS)
    if case == "lazy buffers":  # no part of a ledger
        ledger.apply_(model)
        return
    with refused(model, found.error, ".", found.names):
        ledger.apply_(model)


def test_tensors_without_a_model_have_their_names_or_places() -> None:
    weight = torch.zeros(3, 3)
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    expanded = torch.zeros(1).expand(4)
    for params, name in (
        ([frozen, weight, expanded], "tensor 2"),
        ([("scale", weight), ("shift", expanded)], "shift"),
        ([{"params": [weight]}, {"params": [frozen, expanded], "lr": 1.0}], "tensor 2"),
    ):
        with pytest.raises(ValueError, match=f"got {name} with elements that share memory"):
            ZOSGD(params, 0.1)
    with pytest.raises(ValueError, match="but tensor 0 and tensor 2 share memory"):
        ZOSGD([weight, frozen, weight[0]], 0.1)
    with pytest.raises(TypeError, match="got tensor 1 of torch.int64; leave it out"):
        ZOSGD([weight, torch.zeros(3, dtype=torch.int64)], 0.1)
    computed = nn.Parameter(torch.ones(3)) * 2
    with pytest.raises(ValueError, match="got tensor 0, which autograd has computed from others; give those"):
        ZOSGD([computed], 0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", accepted())
def test_what_only_looks_alike_is_tuned(case: str, mode: str) -> None:
    model = accepted()[case]()
    ZOSGD(model, 0.1, storage=MODES[mode])
    WorkingCopy(model)


def scripted() -> nn.Module:
    return torch.jit.script(base())  # type: ignore[no-any-return, no-untyped-call]


def traced() -> nn.Module:
    return torch.jit.trace(base(), torch.ones(2, 4))  # type: ignore[no-any-return, no-untyped-call]


def scripted_inside() -> nn.Module:
    model = base()
    model[2] = torch.jit.script(model[2])  # type: ignore[no-untyped-call]
    return model


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [scripted, traced, scripted_inside])
def test_torchscript_is_tuned_in_place_or_refused_in_words(make: Callable[[], nn.Module], mode: str) -> None:
    model, plain = make(), base()
    with torch.no_grad():
        for theirs, ours in zip(model.parameters(), plain.parameters(), strict=True):
            theirs.copy_(ours)
    inputs = torch.linspace(-1, 1, 8).view(2, 4)
    if mode == "inplace":
        twins = [ZOSGD(one, 0.1, 1e-2, seed=4) for one in (model, plain)]
        for _ in range(3):
            for one, optimizer in zip((model, plain), twins, strict=True):
                optimizer.step(lambda one=one: one(inputs).square().mean())  # type: ignore[misc]
        assert twins[0].projected_grads == pytest.approx(twins[1].projected_grads, rel=1e-3)
        return
    place = r"2 \(Rec" if make is scripted_inside else r"the model itself \((Rec|TopLevel)"
    advice = "give (the optimizer )?the model that was scripted or traced, or (take|use storage=)"
    with refused(model, TypeError, rf"got {place}.*TorchScript.*{advice}"):
        ZOSGD(model, 0.1, storage=MODES[mode])


@pytest.mark.parametrize("mode", ["streamed", "paired"])
def test_weights_that_count_no_writes_are_not_streamed(mode: str) -> None:
    with torch.inference_mode():
        model = base()
    with refused(model, TypeError, "got 0.weight made within torch.inference_mode"):
        ZOSGD(model, 0.1, storage=MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_a_device_without_a_backend_is_refused_at_construction(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "TABLE", {"cuda": dispatch.TABLE["cuda"]})
    model = base()
    with refused(model, RuntimeError, "expected 0.weight on one of cuda, got cpu; move the model there"):
        ZOSGD(model, 0.1, storage=MODES[mode])


@pytest.mark.parametrize("mode", ["inplace", "streamed"])
def test_names_are_right_on_several_devices(mode: str) -> None:
    with two_devices() as devices:
        model = with_weight(torch.ones(8).as_strided((4, 4), (1, 1)))
        devices.place(*model[2].parameters(), *model[3].parameters())
        with refused(model, ValueError, "got 2.weight with elements that share memory"):
            ZOSGD(model, 0.1, storage=MODES[mode])
        model = base()
        devices.place(*model[2].parameters(), *model[3].parameters())
        optimizer = ZOSGD(model, 0.1, storage=MODES[mode])
        model[3].weight.data = model[3].weight.data.t()
        with refused(model, RuntimeError, r"expected 3.weight where and what it was, but its .* changed"):
            optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_another_view_of_the_same_memory(mode: str) -> None:
    model = base()
    optimizer = ZOSGD(model, 0.1, storage=MODES[mode])
    model[2].weight.data = model[2].weight.data.t()
    with refused(model, RuntimeError, "expected 2.weight where and what it was, but its strides changed"):
        optimizer.step(lambda: model(torch.ones(6, 4)).square().mean(1)[:2].unbind()[0])


@pytest.mark.parametrize("mode", ["inplace", "chained"])
def test_a_closure_that_makes_restoring_impossible_is_told_so_by_name(mode: str) -> None:
    model = base()
    optimizer = ZOSGD(model, 0.1, storage=MODES[mode])

    def closure() -> float:
        model[2].weight.data = torch.ones(4, 1).expand(4, 4)
        return 0.0

    with pytest.raises(ValueError, match="got 2.weight with elements that share memory"):
        optimizer.step(closure)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_is_shared_later_is_refused_at_every_step(mode: str) -> None:
    model = base()
    model[0].requires_grad_(False)
    optimizer = ZOSGD(model, 0.1, storage=MODES[mode])
    model[2].weight.data = model[0].weight.data
    for _ in range(2):
        with refused(model, ValueError, "share memory", ("2.weight", "0.weight (not tuned)")):
            optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_a_closure_switches_on(mode: str) -> None:
    model = base()
    optimizer = ZOSGD(model, 0.1, storage=MODES[mode])

    def closure() -> Any:
        torch.set_grad_enabled(True)
        inputs = torch.ones(6, 4)
        losses = model(inputs).square().mean(1)
        return (losses[:3].mean(), losses[3:].mean()) if mode == "paired" else losses.mean()

    with (
        pytest.warns(UserWarning, match="a loss with requires_grad"),
        pytest.raises(RuntimeError, match=r"got 0.weight that requires grad; .* in the closure\?"),
    ):
        optimizer.step(closure)
    assert torch.is_grad_enabled()


def test_a_working_copy_whose_model_was_changed() -> None:
    """Loading would go to parameters that the model no longer has, or to another dtype."""
    for change, error, message in (
        (
            lambda model: model.load_state_dict(dict(base().state_dict()), assign=True),
            RuntimeError,
            "0.weight",
        ),
        (lambda model: setattr(model, "2", nn.Linear(4, 4)), RuntimeError, "2.weight"),
        (
            lambda model: model.to(torch.bfloat16),
            TypeError,
            "0.weight in torch.float32 like w0's, got torch.bf",
        ),
    ):
        model = base()
        working = WorkingCopy(model)
        change(model)
        advice = ".* make a new WorkingCopy" if error is RuntimeError else ""
        with refused(model, error, message + advice):
            working.load(POOL, COEFFICIENTS)


def test_w0_apart_from_the_weights() -> None:
    model = base()
    weights = [p.data for p in model.parameters()]
    with refused(model, ValueError, r"but (\d.\w+) and w0's \1 share memory; give w0"):
        WorkingCopy(model, w0=weights)
    own = [weight.clone() for weight in weights]
    with refused(model, ValueError, r"but round_model's (\d.\w+) and w0's \1 share memory"):
        WorkingCopy(model, w0=own, round_model=own)
    with refused(
        model, ValueError, r"6 tensors, 1 others, 2.weight torch.float32 of shape \(2, 4\) on cpu for"
    ):
        WorkingCopy(model, w0=[*own[:2], own[2][:2], *own[3:]])


class Linear4bit(nn.Module):
    """A layer of 4 bits by the name that bitsandbytes gives it."""

    def __init__(self, adapter: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(4))
        if adapter:
            self.lora = nn.Parameter(torch.zeros(4, 2))


class QuantLinear(nn.Module):
    """A layer packed into integers, by the names of GPTQ."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(4))


def quantised(kind: str) -> nn.Module:
    norm, embedding = nn.LayerNorm(4), nn.Embedding(5, 4)
    if kind == "dynamic":
        model = nn.Sequential(embedding, norm, nn.Linear(4, 4), nn.Linear(4, 2))
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})  # type: ignore[no-any-return]
    layers = {
        "bitsandbytes": Linear4bit,
        "adapter inside": lambda: Linear4bit(adapter=True),
        "GPTQ": QuantLinear,
        "wrapped": lambda: frozen_linear(Wrapper(torch.eye(4))),
        "float8": lambda: frozen_linear(torch.eye(4).to(torch.float8_e4m3fn)),
    }
    return nn.Sequential(embedding, norm, layers[kind](), layers[kind]())


def frozen_linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*deprecated")
@pytest.mark.parametrize(
    ("kind", "tuned"),
    [
        ("dynamic", "3 parameters with 28 elements"),
        ("bitsandbytes", "5 parameters with 36 elements"),
        ("GPTQ", "3 parameters with 28 elements"),
        ("wrapped", "3 parameters with 28 elements"),
        ("float8", "3 parameters with 28 elements"),
    ],
)
def test_a_quantised_model_without_adapters_is_warned_of_once(kind: str, tuned: str) -> None:
    model = quantised(kind)
    message = (
        rf"weights of 2 quantised layers cannot be tuned, the first 2 \(\w+\): only {tuned} are; .* adapters"
    )
    for make in (lambda: ZOSGD(model, 0.1), lambda: FedKSeedSGD(model, 0.1, 1e-3, POOL)):
        with pytest.warns(UserWarning, match=message) as caught:
            make()
        (one,) = [w for w in caught if "quantised" in str(w.message)]
        assert Path(one.filename) == Path(__file__)


@pytest.mark.filterwarnings("error:.*quantised")
def test_who_has_chosen_what_to_tune_is_not_warned() -> None:
    ZOSGD(base(), 0.1)
    ZOSGD(quantised("adapter inside"), 0.1)
    for kind in ("bitsandbytes", "GPTQ", "wrapped", "float8"):
        model = quantised(kind)
        ZOSGD([p for p in model[1].parameters()], 0.1, model=model)
        model[0].requires_grad_(False)
        ZOSGD(model, 0.1)
        ZOSGD(list(model[1].parameters()), 0.1)


def test_the_words_that_are_replaced_are_the_kernels() -> None:
    folder = Path(fedkseed_kernels.__file__).parent
    files = [
        folder / "prepared.py",
        folder / "dispatch.py",
        *(folder / "arguments").glob("*.py"),
        folder / "layout.py",
    ]
    source = re.sub(r'"\n\s+f?"', "", "".join(path.read_text() for path in files))
    assert [words for words in named_errors._WORDS if words not in source] == []
