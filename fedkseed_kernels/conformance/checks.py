"""What `conformance` compares: each check runs one target over one part of the golden vectors.

A target is a backend, with an instruction set where it has several. The checks go through the public ops, and
the native library's test-only entries for raw words. Outputs are poisoned before each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedkseed_kernels as fk
from fedkseed_kernels import dispatch
from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.conformance import golden
from fedkseed_kernels.contract import derived, reference

_TORCH_DTYPE = {name: getattr(torch, name) for name in reference.DTYPES}
_INTEGER_DTYPE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_POISON_BYTE = 0xA5


class Target(NamedTuple):
    """A backend and, for `native`, one of its instruction sets."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}/{self.isa}" if self.isa else self.backend

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Have the ops use this target within a block."""
        with ExitStack() as stack:
            stack.enter_context(dispatch.backend(self.backend))
            if self.isa:
                stack.enter_context(dispatch.cpu_isa(self.isa))
            yield


class Comparison(NamedTuple):
    """One result beside the golden one. dtype None: plain bits; else a NaN equals any NaN."""

    label: str
    got: NDArray[Any]
    expected: NDArray[Any]
    dtype: str | None = None

    def first_difference(self) -> str | None:
        """Where the two differ first, None if nowhere."""
        if self.got.shape != self.expected.shape:
            return f"{self.label}: shape {self.got.shape}, expected {self.expected.shape}"
        got, expected = (np.ascontiguousarray(x).reshape(-1) for x in (self.got, self.expected))
        if self.dtype is None:
            same = got.view(f"u{got.itemsize}") == expected.view(f"u{expected.itemsize}")
        else:
            same = golden.same_value(got, expected, self.dtype)
        if same.all():
            return None
        first = int(np.argmin(same))
        at = f"value {first} of {same.size}"
        bits = f"got {golden.to_hex(got[first])}, expected {golden.to_hex(expected[first])}"
        return f"{self.label}: {at}: {bits} ({int((~same).sum())} differ)"


Check = Callable[[Target, dict[str, Any]], Iterator[Comparison]]


def tensor_of(stored: NDArray[Any], dtype: str, memory: str = "contiguous") -> Tensor:
    """A tensor of these stored values, copied bit by bit, that lies in memory as a layout case says."""
    bits = torch.from_numpy(np.array(stored).view(f"i{stored.itemsize}"))
    if memory == "transposed" and bits.dim() > 1:
        bits = bits.transpose(0, -1).contiguous().transpose(0, -1)
    elif memory == "every other" and bits.dim() > 0:
        wide = _poisoned_bits((*bits.shape[:-1], 2 * bits.shape[-1]), stored.itemsize)
        wide[..., ::2] = bits
        bits = wide[..., ::2]
    return bits.view(_TORCH_DTYPE[dtype])


def stored_of(tensor: Tensor) -> NDArray[Any]:
    """The stored values of a tensor: uint16 patterns for bf16 and fp16."""
    bits = tensor.contiguous().view(_INTEGER_DTYPE[tensor.element_size()]).numpy()
    return bits.view({2: np.uint16, 4: np.float32, 8: np.float64}[tensor.element_size()])


def _poisoned_bits(shape: tuple[int, ...], itemsize: int) -> Tensor:
    poison = int.from_bytes(bytes([_POISON_BYTE] * itemsize), "little", signed=True)
    return torch.full(shape, poison, dtype=_INTEGER_DTYPE[itemsize])


def poisoned(shape: tuple[int, ...], dtype: str, memory: str = "contiguous") -> Tensor:
    """A tensor to write results into, full of a pattern that no result has."""
    itemsize = _TORCH_DTYPE[dtype].itemsize
    return tensor_of(_poisoned_bits(shape, itemsize).numpy().view(f"u{itemsize}"), dtype, memory)


def philox(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """Section 2."""
    counters, keys, expected = (
        np.array([golden.words_from_hex(case[name]) for case in vectors["philox"]])
        for name in ("counter", "key", "words")
    )
    if target.isa is not None:
        got = native_cpu.philox_words(counters, keys, target.isa)
    elif target.backend == "triton":
        from fedkseed_kernels.backends.triton import test_entries

        tensors = (torch.from_numpy(array.view(np.int32)) for array in (counters, keys))
        got = test_entries.philox_words(*tensors).numpy().view(np.uint32)
    else:
        got = reference.philox4x32_10(counters, keys)
    yield Comparison("philox", got, expected)


def normals(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """Section 4 for chosen words, and its digests of ranges of words."""
    words = golden.words_from_hex(vectors["normals"]["words"])
    expected = np.stack(
        [golden.stored_from_hex(vectors["normals"][name], "float32") for name in ("even", "odd")], axis=-1
    )
    if target.isa is not None:
        got = native_cpu.normal_from_words(words, target.isa)
    elif target.backend == "triton":
        from fedkseed_kernels.backends.triton.test_entries import normal_from_words

        got = normal_from_words(torch.from_numpy(words.view(np.int32))).numpy()
    else:
        got = np.stack(reference.normals_from_words(words), axis=-1)
    yield Comparison("chosen words", got, expected)
    for case in vectors["digests"]:
        first, count = case["first"], case["count"]
        if target.isa is not None:
            digest = native_cpu.normal_digest(first, count, target.isa)
        elif target.backend == "triton":
            from fedkseed_kernels.backends.triton.test_entries import normal_digest

            digest = normal_digest(first, count, "cpu")
        else:
            digest = reference.normal_digest(first, count)
        label = f"digest of {count} words from {first} on"
        expected_digest = golden.words64_from_hex(case["digest"])
        yield Comparison(label, np.array([digest], dtype=np.uint64), expected_digest)


def noise(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """Sections 3 to 5 through `normal`."""
    for case in vectors["noise"]:
        dtype = case["dtype"]
        expected = golden.stored_from_hex(case["z"], dtype)
        with target.forced():
            z = fk.normal(
                (expected.size,),
                case["seed"],
                stream=case["stream"],
                offset=case["first_element"],
                dtype=_TORCH_DTYPE[dtype],
                family=case["family"],
            )
        label = "{family} seed {seed} stream {stream} from {first_element} on, {dtype}".format(**case)
        yield Comparison(label, stored_of(z), expected)


def _options(case: dict[str, Any]) -> dict[str, Any]:
    placing: dict[str, Any] = {"streams": [case["stream"]]}
    if case.get("view") is not None:
        placing["views"] = [tuple(map(tuple, case["view"]))]
    else:
        placing["offsets"] = [case.get("first_element", case.get("offset"))]
    return placing | {key: case[key] for key in ("alpha", "family", "rounding", "rounding_seed")}


def _calls(
    target: Target, vectors: dict[str, Any], case: dict[str, Any], weights: NDArray[Any], memory: str
) -> Iterator[Comparison]:
    """Every form of the primitive on one case."""
    dtype = case["dtype"]
    seeds = vectors["terms"][case["terms"]]["seeds"]
    coeffs = golden.coeffs_from_hex(vectors["terms"][case["terms"]]["coeffs"])
    options = _options(case)
    rows = None if case.get("rows") is None else torch.tensor(case["rows"], dtype=torch.int64)
    shape = weights.shape if rows is None else (rows.numel(), *weights.shape[1:])
    plus, minus = (golden.stored_from_hex(case[side], dtype).reshape(shape) for side in ("plus", "minus"))
    compared_as = None if case["unchanged"] else dtype
    label = "{family} {dtype} {rounding}, terms: {terms}, alpha {alpha}".format(**case)
    if "shape" in case:
        label += ", shape {shape}, view {view}, offset {offset}, rows {rows}, memory {memory}".format(**case)

    def compare(form: str, got: Tensor, expected: NDArray[Any]) -> Comparison:
        return Comparison(f"{form}, {label}", stored_of(got), expected, compared_as)

    with target.forced():
        if rows is None:
            for side, signed, expected in (("plus", coeffs, plus), ("minus", -coeffs, minus)):
                tensor = tensor_of(weights, dtype, memory)
                fk.seed_axpy_([tensor], seeds, signed.tolist(), **options)
                yield compare(f"in place {side}", tensor, expected)
        tensor = tensor_of(weights, dtype, memory)
        outs = [poisoned(shape, dtype, memory) for _ in range(3)]
        fk.seed_axpy([tensor], seeds, coeffs.tolist(), out=[outs[0]], rows=rows, **options)
        yield compare("out of place", outs[0], plus)
        fk.seed_axpy_pair(
            [tensor], seeds, coeffs.tolist(), out_plus=[outs[1]], out_minus=[outs[2]], rows=rows, **options
        )
        yield compare("pair, plus", outs[1], plus)
        yield compare("pair, minus", outs[2], minus)
        yield Comparison(f"input of {label}", stored_of(tensor), weights)


def primitive(target: Target, vectors: dict[str, Any], rounding: str) -> Iterator[Comparison]:
    """Sections 6 to 8: dtypes, terms, alpha, special weights."""
    for case in vectors["primitive"]:
        if case["rounding"] == rounding:
            weights = golden.stored_from_hex(vectors["weights"][case["dtype"]], case["dtype"])
            yield from _calls(target, vectors, case, weights, "contiguous")


def nearest(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """The primitive rounded to nearest."""
    return primitive(target, vectors, "nearest")


def stochastic(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """The primitive with stochastic rounding."""
    return primitive(target, vectors, "stochastic")


def layouts(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """Section 6.4: views, offsets, gathered rows, strides in memory."""
    for case in vectors["layouts"]:
        weights = golden.stored_from_hex(vectors["weights"][case["dtype"]], case["dtype"])
        yield from _calls(target, vectors, case, np.resize(weights[::-1], case["shape"]), case["memory"])


def compensated(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """Section 6.5: in place, out of place, both sides."""
    for case in vectors["compensated"]:
        dtype = case["dtype"]
        weights = golden.stored_from_hex(vectors["weights"][dtype], dtype)
        residuals, residuals_after = (
            golden.stored_from_hex(case[name], "bfloat16").view(np.int16)
            for name in ("residuals", "residuals_after")
        )
        terms = vectors["terms"][case["terms"]]
        seeds, coeffs = terms["seeds"], golden.coeffs_from_hex(terms["coeffs"]).tolist()
        options: dict[str, Any] = {
            "streams": [case["stream"]],
            "offsets": [case["first_element"]],
            "alpha": case["alpha"],
            "family": case["family"],
        }
        in_place, read = (tensor_of(weights, dtype) for _ in range(2))
        residuals_in_place, residuals_read = (torch.from_numpy(residuals.copy()) for _ in range(2))
        outs = [poisoned(weights.shape, dtype) for _ in range(3)]
        with target.forced():
            fk.seed_axpy_([in_place], seeds, coeffs, residuals=[residuals_in_place], **options)
            fk.seed_axpy([read], seeds, coeffs, out=[outs[0]], residuals=[residuals_read], **options)
            fk.seed_axpy_pair(
                [read],
                seeds,
                coeffs,
                out_plus=[outs[1]],
                out_minus=[outs[2]],
                residuals=[residuals_read],
                **options,
            )
        label = "{family} {dtype}, terms: {terms}, alpha {alpha}".format(**case)
        compared_as = None if case["unchanged"] else dtype
        after, plus, minus = (
            golden.stored_from_hex(case[name], dtype) for name in ("weights_after", "plus", "minus")
        )
        yield Comparison(f"weights in place, {label}", stored_of(in_place), after, compared_as)
        yield Comparison(f"residuals in place, {label}", residuals_in_place.numpy(), residuals_after)
        for form, out, expected in zip(
            ("out of place", "pair, plus", "pair, minus"), outs, (plus, plus, minus), strict=True
        ):
            yield Comparison(f"{form}, {label}", stored_of(out), expected, compared_as)
        yield Comparison(f"input of {label}", stored_of(read), weights)
        yield Comparison(f"residuals of the input of {label}", residuals_read.numpy(), residuals)


def wide(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """Section 6.1: fp32 outputs of 16-bit weights, with residuals and without."""
    for case in vectors["wide"]:
        dtype = case["dtype"]
        weights = golden.stored_from_hex(vectors["weights"][dtype], dtype)
        residuals = None
        if case["residuals"] is not None:
            residuals = torch.from_numpy(golden.stored_from_hex(case["residuals"], "bfloat16").view(np.int16))
        tensor = tensor_of(weights, dtype)
        outs = [poisoned(weights.shape, "float32") for _ in range(3)]
        seeds = vectors["terms"][case["terms"]]["seeds"]
        coeffs = golden.coeffs_from_hex(vectors["terms"][case["terms"]]["coeffs"]).tolist()
        options: dict[str, Any] = {
            "streams": [case["stream"]],
            "offsets": [case["first_element"]],
            "alpha": case["alpha"],
            "family": case["family"],
            "residuals": [residuals],
        }
        with target.forced():
            fk.seed_axpy([tensor], seeds, coeffs, out=[outs[0]], **options)
            fk.seed_axpy_pair([tensor], seeds, coeffs, out_plus=[outs[1]], out_minus=[outs[2]], **options)
        label = "{family} {dtype}, terms: {terms}, alpha {alpha}".format(**case)
        label += "" if residuals is None else ", compensated"
        plus, minus = (golden.stored_from_hex(case[side], "float32") for side in ("plus", "minus"))
        for form, out, expected in zip(
            ("out of place", "pair, plus", "pair, minus"), outs, (plus, plus, minus), strict=True
        ):
            yield Comparison(f"{form}, {label}", stored_of(out), expected, "float32")
        yield Comparison(f"input of {label}", stored_of(tensor), weights)


def derived_values(target: Target, vectors: dict[str, Any]) -> Iterator[Comparison]:
    """Section 9, which NumPy computes on every machine."""
    for case in vectors["derived"]:
        arguments = (case["base_seed"], case["purpose"], np.array(case["indices"], dtype=np.uint64))
        label = "base seed {base_seed} purpose {purpose}".format(**case)
        words = golden.words_from_hex(case["words"])
        yield Comparison(f"words, {label}", derived.words(*arguments).reshape(-1), words)
        yield Comparison(f"seeds, {label}", derived.seeds(*arguments), golden.words64_from_hex(case["seeds"]))
        uniforms = golden.stored_from_hex(case["uniforms"], "float64")
        yield Comparison(f"uniforms, {label}", derived.uniforms(*arguments), uniforms)
    for case in vectors["draws"]:
        probabilities, numbers = (golden.coeffs_from_hex(case[key]) for key in ("probabilities", "uniforms"))
        expected = np.array(case["indices"], dtype=np.int64)
        drawn = derived.draw(probabilities, numbers)
        yield Comparison(f"draws from {case['probabilities']}", drawn, expected)


CHECKS: dict[str, Check] = {
    "Philox words": philox,
    "Gaussian transform": normals,
    "noise": noise,
    "primitive, to nearest": nearest,
    "primitive, stochastic": stochastic,
    "primitive, views, rows, strides": layouts,
    "primitive, compensated": compensated,
    "primitive, fp32 outputs": wide,
}
