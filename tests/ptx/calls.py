"""Calls of the package's functions on an emulated GPU and on the reference, compared bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol
from unittest import mock

import numpy as np
import torch

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.operands import DeviceTerms, Operands, TensorList, Terms
from fedkseed_kernels.self_test import gate
from ptx.kernel import Kernel
from ptx.memory import READ, WRITE, Memory
from ptx.parser import FaultError, UnknownPtxError
from ptx.world import Spec, Twins, World, layout_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
#: Coefficients on a device that are to be skipped; 1e300 is none for fp64.
SKIPPED = (np.nan, np.inf, -np.inf, 0.0, 1e300, np.nan)
#: What lies in device memory; the reference is given what is not to be skipped.
DEVICE = {
    "all": "terms",  # among others that are to be skipped, and are counted
    "alone": "only the terms",
    "seeds": "seeds",
    "coeffs": "all but the seeds",
    "skipped": "terms to be skipped",
    "half": "terms, of which the first half is to be skipped,",  # and is not counted
}
#: Which rows of a case are out of range, if its are to be.
BAD_ROWS = [1, 3, 4]


class Driver(Protocol):
    """What calls need of `CudaDriver` and `TritonDriver`: backends that run kernels in the emulator."""

    WRITES_FP32: bool
    memory: Memory
    launches: list[tuple[str, int, int]]
    num_instructions: int

    def unavailable(self, device: torch.device | None = None) -> str | None: ...

    def kernels(self) -> dict[str, Kernel]: ...

    def seed_axpy(self, operands: Operands, terms: Terms | DeviceTerms, isa: str = "auto") -> None: ...


@dataclass(frozen=True)
class Case:
    """One call. name: that of its specs."""

    name: str
    dtype: str
    family: str
    k: int
    specs: tuple[Spec, ...]
    form: str = "in place"  # or: out, pair, pair in place, noise
    rounding: str = "nearest"
    alpha: float = 1.0
    residuals: bool = False
    rows: tuple[int, ...] | None = None
    device: str = ""  # what of the terms lies in device memory: a key of DEVICE
    special: bool = True  # weights of SPECIAL among the others
    bad_rows: bool = False  # some rows are out of range, which only the kernels see: their results are NaN
    coeffs: str = "normal"  # or: cancel (pairs c, -c of one seed), tiny, smallest, zeros, dyadic

    def __str__(self) -> str:
        parts = [self.name, self.dtype, self.family, f"K = {self.k}", self.form, self.rounding]
        parts += [f"alpha {self.alpha}"] * (self.alpha != 1) + ["compensated"] * self.residuals
        parts += ["rows"] * (self.rows is not None) + ["rows out of range"] * self.bad_rows
        parts += [f"{DEVICE[self.device]} on the device"] if self.device else []
        parts += [self.coeffs] * (self.coeffs != "normal")
        return ", ".join(parts)


class Verdict(NamedTuple):
    """What a case came to: "equal", "differs", "fault" or "unknown"; in numbers and words."""

    word: str
    detail: str


def terms_of(case: Case, generator: np.random.Generator) -> tuple[list[int], list[float]]:
    """Seeds and coefficients."""
    seeds = [int(s) for s in generator.integers(-(1 << 63), (1 << 63) - 1, case.k)]
    coeffs = generator.standard_normal(case.k) * 10.0 ** generator.integers(-4, 1, case.k)
    if case.coeffs == "cancel":
        half = case.k // 2
        seeds[half : 2 * half] = seeds[:half]
        coeffs[half : 2 * half] = -coeffs[:half]
    elif case.coeffs == "tiny":
        coeffs = generator.standard_normal(case.k) * 1e-39
    elif case.coeffs == "smallest":  # products with most normals are zero
        smallest = np.nextafter(np.float64(0) if case.dtype == "fp64" else np.float32(0), 1)
        coeffs = np.where(generator.integers(0, 2, case.k) == 1, smallest, -smallest).astype(np.float64)
    elif case.coeffs == "zeros":
        coeffs[::2] = 0.0
    elif case.coeffs == "dyadic":  # exact sums: zeros occur
        coeffs = generator.integers(-2, 3, case.k) * 0.25
    return seeds, coeffs.tolist()


def on_device(terms: Terms, world: World, what: str, count: int, fp64: bool) -> DeviceTerms:
    """The terms as a key of DEVICE says; `count` of them with those that the case itself is to skip."""
    seeds, coeffs = terms.seeds.view(np.int64).tolist(), terms.coeffs.tolist()
    others = count - len(seeds)
    seeds, coeffs = [*range(others), *seeds], [*([float("nan"), 0.0] * others)[:others], *coeffs]
    if what == "all":
        seeds, coeffs = _among_others(seeds, coeffs, world.generator, fp64)
    made = DeviceTerms(
        terms.seeds, terms.coeffs, terms.alpha, terms.family, terms.rounding, terms.rounding_seed
    )
    if what != "coeffs":
        made.seeds = world.values(seeds, torch.int64)
    if what != "seeds":
        made.coeffs = world.values(coeffs, torch.float64)
    if what in ("all", "coeffs"):
        made.alpha = world.values([terms.alpha], torch.float64)
        signed = terms.rounding_seed - (1 << 64 if terms.rounding_seed >> 63 else 0)
        made.rounding_seed = world.values([signed], torch.int64)
    if what in ("all", "coeffs", "skipped"):
        with np.errstate(over="ignore"):
            num_counted = 5 + sum(not np.isfinite(c if fp64 else np.float32(c)) for c in coeffs)
        made.num_skipped = world.values([5], torch.int32, READ | WRITE)
        world.outputs.append(Twins(made.num_skipped, torch.tensor([num_counted], dtype=torch.int32)))
    return made


def _among_others(
    seeds: list[int], coeffs: list[float], generator: np.random.Generator, fp64: bool
) -> tuple[list[int], list[float]]:
    """Terms with others among them that are to be skipped, by each thread of a block if there are many."""
    bad = [c for c in SKIPPED if not (fp64 and np.isfinite(c) and c)] * max(1, len(seeds) // 12)
    pending = list(zip(seeds, coeffs, strict=True))
    mixed = []
    while pending or bad:
        if bad and (not pending or generator.random() < 0.3):
            mixed.append((int(generator.integers(1 << 62)), bad.pop()))
        else:
            mixed.append(pending.pop(0))
    return [seed for seed, _ in mixed], [coeff for _, coeff in mixed]


class _Call:
    """One case with its tensors."""

    def __init__(self, driver: Driver, case: Case):
        self.case, self._driver = case, driver
        generator = np.random.default_rng(list(map(ord, str(case))))
        self._dtype = DTYPES[case.dtype]
        elements = sum(64 + layout_of(spec, spec.shape)[1] for spec in case.specs)
        pages = elements * (4 * self._dtype.itemsize + 6) // 4096 + 1 + 8 * len(case.specs)
        self.world = World(generator, (1 << 20) + 4096 * pages)
        driver.memory = self.world.memory
        self._inputs: list[Twins] = []
        self._residuals: list[Twins] = []
        self.outs: list[Twins] = []
        self.minus: list[Twins] = []
        for spec in case.specs:
            self._make_tensors(spec)
        self._rows = None if case.rows is None else self.world.values(case.rows, torch.int64)
        self._seeds, self._coeffs = terms_of(case, generator)
        num_skipped = {"skipped": case.k, "half": case.k // 2}.get(case.device, 0)
        self._seeds, self._coeffs = self._seeds[num_skipped:], self._coeffs[num_skipped:]
        self._options: dict[str, Any] = {
            "alpha": case.alpha,
            "streams": [int(s) for s in generator.integers(0, 1 << 32, len(case.specs))],
            "offsets": [None if spec.view else spec.offset for spec in case.specs],
            "views": [spec.view for spec in case.specs],
            "family": case.family,
            "rounding": case.rounding,
        }
        if case.rounding == "stochastic":
            self._options["rounding_seed"] = int(generator.integers(1 << 62)) - (1 << 61)

    def _make_tensors(self, spec: Spec) -> None:
        case, world, dtype = self.case, self.world, self._dtype
        shape = spec.shape if case.rows is None else (len(case.rows), *spec.shape[1:])
        dense = replace(spec, layout="flat")
        if case.form != "noise":
            rights = READ | WRITE if case.form in ("in place", "pair in place") else READ
            fill = world.special_weights if case.special else world.weights
            self._inputs.append(world.tensor(spec, spec.shape, dtype, rights, fill))
        if case.residuals:
            rights = READ | WRITE if case.form == "in place" else READ
            aligned = replace(spec, skew=spec.skew if spec.skew % 8 else 0)
            self._residuals.append(world.tensor(aligned, spec.shape, torch.int16, rights, world.noise))
        if case.form in ("out", "pair", "noise"):
            out = spec if case.rows is None else dense
            self.outs.append(world.tensor(out, shape, dtype, WRITE, world.noise))
        if case.form.startswith("pair"):
            self.minus.append(world.tensor(dense, shape, dtype, WRITE, world.noise))

    def run(self, side: int) -> None:
        """Call the package's function on the tensors of one side of the twins."""
        case = self.case
        inputs, outs, minus = (
            [twins[side] for twins in all_of] for all_of in (self._inputs, self.outs, self.minus)
        )
        options = dict(self._options)
        if case.residuals:
            options["residuals"] = [twins[side] for twins in self._residuals]
        if case.form == "noise":
            seeds = np.array([self._seeds[0] % 2**64], np.uint64)
            one = Terms(seeds, np.array([1.0]), 1.0, case.family, "nearest", 0)
            no_views = [None] * len(outs)
            operands = Operands(
                None, TensorList(outs), None, None, options["streams"], options["offsets"], no_views
            )
            dispatch.execute(operands, one)
        elif case.form == "in place":
            fk.seed_axpy_(inputs, self._seeds, self._coeffs, **options)
        elif case.form == "out":
            fk.seed_axpy(inputs, self._seeds, self._coeffs, out=outs, rows=self._rows, **options)
        else:
            plus = inputs if case.form == "pair in place" else outs
            fk.seed_axpy_pair(
                inputs, self._seeds, self._coeffs, out_plus=plus, out_minus=minus, rows=self._rows, **options
            )

    # As a backend of tensors on the processor: the driver, given what only kernels see.

    SELF_TEST = None

    @property
    def WRITES_FP32(self) -> bool:  # noqa: N802
        return self._driver.WRITES_FP32

    def unavailable(self, device: torch.device | None = None) -> None:
        return None

    def seed_axpy(self, operands: Operands, terms: Terms | DeviceTerms) -> None:
        if self.case.device:
            assert isinstance(terms, Terms)
            terms = on_device(terms, self.world, self.case.device, self.case.k, self.case.dtype == "fp64")
        if self.case.bad_rows:
            assert operands.rows is not None
            operands.rows[BAD_ROWS] = torch.tensor([-1, self.case.specs[0].shape[0], 1 << 40])
        self.world.snapshot()
        self._driver.seed_axpy(operands, terms)


def run_case(driver: Driver, case: Case) -> Verdict:
    """Run a case on the driver and on the reference, and compare."""
    call = _Call(driver, case)
    with dispatch.backend("reference"):
        call.run(1)
    if case.bad_rows:
        for _, there in call.outs + call.minus:
            there[BAD_ROWS] = torch.nan
    try:
        with (
            mock.patch.dict(dispatch.TABLE["cpu"], native=call),
            mock.patch.object(dispatch, "_settled", set()),  # or the call's memory would be kept
            mock.patch.dict(gate.verdicts),
            dispatch.backend("native"),
        ):
            call.run(0)
    except FaultError as fault:
        return Verdict("fault", str(fault))
    except UnknownPtxError as unknown:
        return Verdict("unknown", str(unknown))
    found = call.world.differences()
    if found.num_wrong or found.num_stray:
        places = f"{found.num_wrong} of {found.num_elements} elements, {found.num_stray} stray bytes"
        return Verdict("differs", f"{places}; {found.example}")
    keeps_bytes = case.alpha == 1 and not case.bad_rows and (case.k == 0 or case.device == "skipped")
    if found.num_nan and keeps_bytes:
        return Verdict("differs", f"{found.num_nan} NaN of other bits where bytes are to stay")
    nans = f", {found.num_nan} NaN of other bits" if found.num_nan else ""
    return Verdict("equal", f"{found.num_elements} elements{nans}")
