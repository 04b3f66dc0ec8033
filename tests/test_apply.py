"""A ledger applied: w0 + sum_k c_k z_k to the last bit, on its own model only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from support.unchanged import Watch
from torch import Tensor, nn

import fedkseed
import fedkseed_kernels
from fedkseed import FedKSeedSGD, IdentityError, Ledger, LedgerError, ModelIdentity, SeedPool, WorkingCopy
from fedkseed.ledger.format import LedgerSignatureError, LedgerUnsignedError
from fedkseed.ledger.signature import make_key_pair
from fedkseed.model.identity import structure_hash
from fedkseed.model.manifest import Manifest
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.contract.reference import seed_axpy_array

#: Kept bits of the significand, and what a step of the last one is at least (subnormals are not met here).
SIGNIFICANT_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11, torch.float64: 53}


class Model(nn.Module):
    """A tied head, a frozen vector in the middle, odd sizes, a scalar, a parameter with other strides."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weights(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.temperature = nn.Parameter(weights())
        self.embed = nn.Embedding(11, 3, _weight=weights(11, 3))
        self.frozen = nn.ParameterList([nn.Parameter(weights(5), requires_grad=False)])
        self.mix = nn.Linear(3, 3, bias=False, dtype=dtype)
        self.mix.weight = nn.Parameter(weights(3, 3).t())
        self.head = nn.Linear(3, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight


def coefficients(num_seeds: int, *indices: int, scale: float = 0.01) -> np.ndarray:
    values = np.zeros(num_seeds, np.float32)
    values[list(indices)] = scale * np.random.default_rng(1).standard_normal(len(indices))
    return values


def make_ledger(model: nn.Module) -> Ledger:
    return Ledger.of(model, SeedPool(-5, 16), coefficients(16, 0, 3, 7, 15))


def rounded(x: Fraction, bits: int) -> Fraction:
    """The value to so many significant bits, to nearest even; Python's round() of a fraction is exact."""
    if x == 0:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    elif abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - bits + 1)
    return round(x / ulp) * ulp


@pytest.mark.parametrize("dtype", SIGNIFICANT_BITS, ids=str)
def test_against_exact_fractions(dtype: torch.dtype) -> None:
    """The contract's section 6.1 in rational arithmetic, given only z."""
    model, w0 = Model(dtype), Model(dtype)
    ledger = make_ledger(model)
    ledger.apply_(model)
    arithmetic = 53 if dtype == torch.float64 else 24
    assert [name for name, _ in fedkseed.manifest_parameters(model)] == [
        "temperature",
        "embed.weight",
        "frozen.0",
        "mix.weight",
    ]
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.frozen[0], w0.frozen[0])
    assert ledger.frozen == (2,)
    changed = 0
    for stream, name in ((0, "temperature"), (1, "embed.weight"), (3, "mix.weight")):
        before, after = w0.get_parameter(name).detach(), model.get_parameter(name).detach()
        noise = [
            fedkseed_kernels.normal(before.numel(), int(seed), stream=stream).tolist()
            for seed in ledger.seed_pool.seeds
        ]
        for element, (old, new) in enumerate(
            zip(before.reshape(-1).tolist(), after.reshape(-1).tolist(), strict=True)
        ):
            total = Fraction(0)
            for c, z in zip(ledger.coefficients.tolist(), noise, strict=True):
                total = rounded(total + Fraction(c) * Fraction(z[element]), arithmetic)
            expected = rounded(rounded(Fraction(old) + total, arithmetic), SIGNIFICANT_BITS[dtype])
            assert Fraction(new) == expected
            changed += old != new
    assert changed >= 30


@pytest.mark.parametrize("dtype", SIGNIFICANT_BITS, ids=str)
def test_a_rademacher_ledger(dtype: torch.dtype, tmp_path: Path) -> None:
    """Written, read and applied: the bits of the NumPy reference, others than a Gaussian ledger's."""
    model, w0 = Model(dtype), Model(dtype)
    gaussian = make_ledger(model)
    replace(gaussian, family="rademacher").save(tmp_path / "ledger")
    ledger = Ledger.load(tmp_path / "ledger")
    assert ledger.family == "rademacher"
    ledger.apply_(model)
    gaussian_model = Model(dtype)
    gaussian.apply_(gaussian_model)
    storage = {2: (torch.int16, np.uint16), 4: (torch.int32, np.float32), 8: (torch.int64, np.float64)}
    for stream, name in ((0, "temperature"), (1, "embed.weight"), (3, "mix.weight")):
        before, after, other = (
            m.get_parameter(name).detach().contiguous() for m in (w0, model, gaussian_model)
        )
        as_bits, stored_as = storage[before.element_size()]
        stored = before.view(as_bits).numpy().view(stored_as)
        expected = seed_axpy_array(
            stored,
            np.arange(stored.size).reshape(stored.shape),
            ledger.seed_pool.seeds.tolist(),
            ledger.coefficients,
            dtype=str(dtype).removeprefix("torch."),
            stream=stream,
            family="rademacher",
        )
        assert after.view(as_bits).numpy().tobytes() == expected.tobytes()
        assert name != "embed.weight" or not torch.equal(after, other)
    loaded = Model(dtype)
    fedkseed.load(tmp_path / "ledger", loaded)
    assert ModelIdentity.of(loaded, ledger.frozen) == ModelIdentity.of(model, ledger.frozen)


@contextmanager
def reference() -> Iterator[None]:
    with dispatch.backend("reference"):
        yield


def test_every_backend_gives_the_same_content() -> None:
    """K = 4096 with 8 coefficients that are not zero, as the slow backends can do it."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        w0 = nn.Sequential(nn.Embedding(97, 24), nn.Linear(24, 61), nn.LayerNorm(61)).to(dtype)
        ledger = Ledger.of(w0, SeedPool(8, 4096), coefficients(4096, 0, 5, 511, 512, 1000, 4000, 4094, 4095))
        contexts = {"automatic": nullcontext(), "reference": reference()}
        contexts |= {isa: dispatch.cpu_isa(isa) for isa in native_cpu.usable_isas()}
        for name, context in contexts.items():
            model = nn.Sequential(nn.Embedding(97, 24), nn.Linear(24, 61), nn.LayerNorm(61)).to(dtype)
            model.load_state_dict(w0.state_dict())
            with context:
                ledger.apply_(model)
            found[dtype, name] = ModelIdentity.of(model).content
        assert len({content for (kind, _), content in found.items() if kind == dtype}) == 1
        assert found[dtype, "automatic"] != ledger.identity.content
    assert len(set(found.values())) == 2
    assert len(found) >= 4


def test_flags_of_the_target_do_not_matter() -> None:
    """A model for inference, all of it frozen, or a fresh one, nothing of it frozen."""
    first, second = Model(torch.float32), Model(torch.float32)
    ledger = make_ledger(first)
    first.requires_grad_(False)
    second.requires_grad_(True)
    ledger.apply_(first)
    ledger.apply_(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert second.embed.weight.requires_grad
    assert second.embed.weight._version > 0


def test_wrapped_and_compiled() -> None:
    plain, wrapped = Model(torch.float32), Model(torch.float32)
    ledger = make_ledger(plain)
    ledger.apply_(plain)
    ledger.apply_(torch.compile(wrapped))
    assert torch.equal(plain.embed.weight, wrapped.embed.weight)


def test_nothing_but_zeros_and_nothing_to_tune() -> None:
    model = Model(torch.float32)
    zeros = Ledger.of(model, SeedPool(1, 4), np.array([0.0, -0.0, 0.0, 0.0]))
    before = ModelIdentity.of(model)
    zeros.apply_(model)
    assert ModelIdentity.of(model) == before
    model.requires_grad_(False)
    Ledger.of(model, SeedPool(1, 4), np.ones(4)).apply_(model)
    assert ModelIdentity.of(model) == replace(before, structure=ModelIdentity.of(model).structure)


@pytest.mark.parametrize(
    "difference", ["name", "shape", "untied", "dtype", "one bit", "applied", "negative zero"]
)
def test_another_model_is_refused_and_unchanged(difference: str) -> None:
    model = Model(torch.float32)
    with torch.no_grad():
        model.mix.weight[0, 0] = 0.0
    ledger = make_ledger(model)
    message = "expected weights of content"
    if difference == "name":
        model.tau = model.temperature
        del model.temperature
        message = "expected a model of structure"
    elif difference == "shape":
        model.temperature = nn.Parameter(model.temperature.detach().reshape(1))
        message = "expected a model of structure"
    elif difference == "untied":
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        message = "expected a model of structure"
    elif difference == "dtype":
        model.bfloat16()
        message = "expected weights in float32, got bfloat16; load the model in float32"
    elif difference == "one bit":
        model.frozen[0].data.view(torch.int32)[2] ^= 1
    elif difference == "negative zero":
        model.mix.weight.data[0, 0] = -0.0
    else:
        ledger.apply_(model)
    weights = [parameter.data for parameter in model.parameters()]
    with Watch(IdentityError, message, *weights):
        ledger.apply_(model)
    with Watch(IdentityError, message, *weights):
        fedkseed.load(ledger, model)


def test_models_that_cannot_take_a_ledger() -> None:
    model = Model(torch.float32)
    ledger = make_ledger(model)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        ledger.apply_(list(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected whole weights in memory"):
        ledger.apply_(Model(torch.float32).to("meta"))
    beyond = replace(ledger, frozen=(2, 4))
    assert structure_hash(Manifest.of(model), [True, True, False, True]) == beyond.identity.structure
    with Watch(IdentityError, "more than 4 parameters, got 4", *(p.data for p in model.parameters())):
        beyond.apply_(model)
    # Two parameters in the same memory that are not tied: the pass over them would depend on the order.
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    overlapping = make_ledger(model)
    with Watch(ValueError, "overlap|share", *(p.data for p in model.parameters())):
        overlapping.apply_(model)


def test_a_signature_that_is_asked_for(tmp_path: Path) -> None:
    public = make_key_pair(tmp_path / "private.pem", tmp_path / "public.pem")
    model = Model(torch.float32)
    ledger = make_ledger(model)
    weights = [parameter.data for parameter in model.parameters()]
    signed = ledger.sign(tmp_path / "private.pem")
    forged = replace(signed, coefficients=2 * signed.coefficients)
    for given, error in ((ledger, LedgerUnsignedError), (forged, LedgerSignatureError)):
        with Watch(error, "expected a ledger signed by", *weights):
            given.apply_(model, public_key=public)
        with Watch(error, "expected a ledger signed by", *weights):
            fedkseed.load(given, model, public_key=public)
    path = tmp_path / "ledger"
    signed.save(path)
    other = Model(torch.float32)
    assert fedkseed.load(path, other, public_key=tmp_path / "public.pem") is other
    signed.apply_(model, public_key=public)
    assert ModelIdentity.of(model) == ModelIdentity.of(other)


def test_coefficients_of_another_pool() -> None:
    with pytest.raises(LedgerError, match="expected 4 coefficients, got 5"):
        Ledger.of(Model(torch.float32), SeedPool(1, 4), np.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_server_holds_is_what_the_ledger_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, base = nn.Linear(7, 5).to(dtype), nn.Linear(7, 5).to(dtype)
    base.load_state_dict(model.state_dict())
    pool = SeedPool(4, 32)
    copy = WorkingCopy(model)
    sums = coefficients(32, *range(32)).astype(np.float64)
    ledger = Ledger.of(base, pool, sums)
    copy.load(pool, sums.astype(np.float32))
    ledger.apply_(base)
    assert ModelIdentity.of(base) == ModelIdentity.of(model)


def test_a_tuning_run_of_its_own() -> None:
    torch.manual_seed(0)
    inputs, model, base = torch.randn(16, 7, dtype=torch.float64), nn.Linear(7, 5).double(), nn.Linear(7, 5)
    base.double().load_state_dict(model.state_dict())
    pool = SeedPool(9, 64)
    optimizer = FedKSeedSGD(model, lr=1e-2, eps=1e-3, seed_pool=pool)
    first = optimizer.step(lambda: model(inputs).square().mean())
    for _ in range(100):
        last = optimizer.step(lambda: model(inputs).square().mean())
    assert last < 0.7 * first
    Ledger.of(base, pool, optimizer.coefficients).apply_(base)
    for tuned, walked in zip(base.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(tuned, walked, rtol=0, atol=1e-7)
