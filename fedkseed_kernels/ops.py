"""The op surface: schemas, implementations, fakes, and the public functions over them.

Supported dtypes, in any mixture within a list:

| dtype | arithmetic | rounding="nearest" | rounding="stochastic" |
|---|---|---|---|
| float32 | fp32 | stored as it is | no effect |
| bfloat16, float16 | fp32 | to nearest even | up or down by 16 random bits an element |
| float64 | fp64 | stored as it is | no effect |

Results of bfloat16 and float16 tensors can also be written to float32 outputs, as they are.

Every bit is fixed by docs/noise-contract.md; section numbers below are that page's. Seeds, coefficients,
alpha and the rounding seed are tensors in the schemas: as numbers they would make torch.compile recompile for
each value, could not exceed 2^63, and would be frozen into a captured graph.

Arguments of the public functions, where they have them:
    tensors: one tensor or a list or tuple, fp32, bf16, fp16 or fp64, on one device, of any shapes and any
        strides under which no two elements share memory (inputs that are only read may repeat them, as
        expand does). No two tensors may overlap.
    seeds: K integers, each taken mod 2^64, or an int64 tensor [K] of their bit patterns.
    coeffs: K finite numbers, or a floating-point tensor [K]. Rounded once to the arithmetic format.
    alpha: a number or a 0-d tensor, rounded to fp32. With alpha 1 and no coefficient but zeros no byte
    changes.
    streams: an integer in [0, 2^32) for each tensor; default: the position in the list.
    offsets: for each tensor None or the element index of its first element, in the tensor's row-major order;
    default 0.
    views: for each tensor None or (full_shape, start): it is the slice of a logical tensor of full_shape that
        begins at start, one number for each dimension. Not together with an offset.
    family: "gaussian" or "rademacher".
    rounding: "nearest" or "stochastic"; the latter needs rounding_seed, an integer taken mod 2^64 or an int64
    tensor.
    rows: int64 [num_rows]; gathers rows of dimension 0, repeats allowed, the same ones of every tensor. On a
        GPU the host does not synchronise for them: a row out of range is not read, its result is NaN.
    num_skipped: int32 tensor of one element on the tensors' device, or None; see below.
    residuals: None, or for each tensor None or an int16 tensor of its device, shape and strides that
        overlaps nothing; for bf16 and fp16 tensors only. Weight and residual together stand for an fp32
        number (contract section 6.5), so that updates below half a unit in the weight's last place are not
        lost; residuals start at 0. In place both are written, without stochastic rounding. The out-of-place
        forms read the residuals and round the results; out[i] may not be tensors[i] itself then.

For tensors on a GPU, seeds, coeffs, alpha and rounding_seed may be tensors of that GPU: the host does not
wait for their values, and a captured CUDA graph reads them anew at each replay. A NaN or infinite coefficient
there is skipped like a zero, and num_skipped is raised by the number of those; an alpha there is not checked.
They must not overlap the tensors that are written. Values from the host are frozen in a captured graph.

All checks are made before anything is written. Errors: ValueError for values, shapes, devices and overlaps;
TypeError for dtypes and Python types; IndexError for rows out of range; RuntimeError for tensors that require
grad while gradients are recorded (nothing here is differentiable: use torch.no_grad()) and for a backend that
cannot be had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkseed_kernels import dispatch
from fedkseed_kernels.arguments import tensors as tensor_checks
from fedkseed_kernels.arguments import terms as term_checks
from fedkseed_kernels.arguments.encoding import (
    Residuals,
    Tensors,
    encode_indices,
    encode_residuals,
    encode_views,
    tensor_list,
)
from fedkseed_kernels.arguments.terms import Coeffs, IntLike, Seeds, TermArguments
from fedkseed_kernels.operands import Operands, TensorList, View

# The schemas' form of `arguments.terms.TermArguments`; a test holds the two to each other.
_TERMS = (
    "Tensor seeds, Tensor coeffs, Tensor alpha, int[] streams, int[] offsets, int[] views, str family, "
    "str rounding, Tensor? rounding_seed, Tensor(c!)? num_skipped=None"
)
# streams, offsets and views are empty for their defaults; the form of views is that of
# `encoding.encode_views`; that of residuals is `encoding.encode_residuals`'s.
SCHEMAS = {
    "normal": "(SymInt[] shape, Tensor seed, int stream, int offset, ScalarType dtype, Device device, "
    "str family) -> Tensor",
    "seed_axpy_": f"(Tensor(a!)[] tensors, Tensor(b!)[] residuals, {_TERMS}) -> ()",
    "seed_axpy_out": "(Tensor[] tensors, Tensor[] residuals, Tensor(a!)[] out, Tensor? rows, "
    f"{_TERMS}) -> ()",
    "seed_axpy_pair_out": "(Tensor[] tensors, Tensor[] residuals, Tensor(a!)[] out_plus, "
    f"Tensor(b!)[] out_minus, Tensor? rows, {_TERMS}) -> ()",
}


def _execute(
    tensors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    outs_minus: Sequence[Tensor] | None,
    rows: Tensor | None,
    *rest: Any,
) -> None:
    """Check everything, then hand the list to the backend of its device. outs None: in place."""
    arguments = TermArguments(*rest)
    operands = tensor_checks.check_operands(
        tensors, outs, outs_minus, rows, arguments.streams, arguments.offsets, arguments.views, residuals
    )
    if outs is None:
        tensor_checks.check_split_rounding(arguments.rounding, residuals)
    terms = term_checks.check_terms(arguments, operands.all_fp64, operands.device)
    dispatch.execute(operands, terms)


def _check_without_values(
    tensors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    outs_minus: Sequence[Tensor] | None,
    rows: Tensor | None,
    *rest: Any,
) -> None:
    """The fake of every op that mutates: what can be checked on tensors that have no memory."""
    arguments = TermArguments(*rest)
    tensor_checks.check_metadata(tensors, "tensors")
    if rows is not None:
        tensor_checks.check_rows(rows, tensors)
    num_rows = None if rows is None else rows.shape[0]
    for name, written in (("out", outs), ("out_minus", outs_minus)):
        if written is not None:
            tensor_checks.check_outs(written, name, tensors, num_rows)
    if outs is not None and outs_minus is not None:
        tensor_checks.check_sides(outs, outs_minus)
    tensor_checks.check_residuals(residuals, tensors)
    if outs is None:
        tensor_checks.check_split_rounding(arguments.rounding, residuals)
    device = tensors[0].device if tensors else torch.device("cpu")
    term_checks.check_term_metadata(arguments, device)


def _execute_in_place(tensors: Sequence[Tensor], residuals: Sequence[Tensor], *rest: Any) -> None:
    _execute(tensors, residuals, None, None, None, *rest)


def _execute_out(
    tensors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    out: Sequence[Tensor],
    rows: Tensor | None,
    *rest: Any,
) -> None:
    _execute(tensors, residuals, out, None, rows, *rest)


def _fake_in_place(tensors: Sequence[Tensor], residuals: Sequence[Tensor], *rest: Any) -> None:
    _check_without_values(tensors, residuals, None, None, None, *rest)


def _fake_out(
    tensors: Sequence[Tensor],
    residuals: Sequence[Tensor],
    out: Sequence[Tensor],
    rows: Tensor | None,
    *rest: Any,
) -> None:
    _check_without_values(tensors, residuals, out, None, rows, *rest)


def _fake_normal(
    shape: Sequence[int],
    seed: Tensor,
    stream: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device,
    family: str,
) -> Tensor:
    tensor_checks.check_dtype(dtype, "the noise")
    term_checks.check_choices(family, "nearest")
    term_checks.check_term_place(seed, "seed", device)
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise ValueError(f"expected seed int64 of shape (), got {seed.dtype} of shape {tuple(seed.shape)}")
    return torch.empty(shape, dtype=dtype, device=device)


def _execute_normal(
    shape: Sequence[int],
    seed: Tensor,
    stream: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device,
    family: str,
) -> Tensor:
    tensor_checks.check_noise_indices([math.prod(shape)], [stream], [offset], [None])
    if device.type == "meta":
        return _fake_normal(shape, seed, stream, offset, dtype, device, family)
    dispatch.select(device)  # before torch looks for the device
    out = _fake_normal(shape, seed, stream, offset, dtype, device, family)
    one = torch.ones((), dtype=torch.float64, device="cpu")
    arguments = TermArguments(
        seed.reshape(1), one.reshape(1), one, [stream], [offset], [], family, "nearest", rounding_seed=None
    )
    terms = term_checks.check_terms(arguments, all_fp64=False, device=device)
    dispatch.execute(Operands(None, TensorList([out]), None, None, [stream], [offset], [None]), terms)
    return out


_library = torch.library.Library("fedkseed", "DEF")  # type: ignore[no-untyped-call]
for _name, _implementation, _fake in (
    ("normal", _execute_normal, _fake_normal),
    ("seed_axpy_", _execute_in_place, _fake_in_place),
    ("seed_axpy_out", _execute_out, _fake_out),
    ("seed_axpy_pair_out", _execute, _check_without_values),
):
    _schema = _name + SCHEMAS[_name]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    # One implementation for every device: `dispatch.TABLE` chooses the backend.
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fedkseed::{_name}", _fake, lib=_library)


def normal(
    shape: int | Sequence[int],
    seed: IntLike | Tensor,
    *,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    family: str = "gaussian",
) -> Tensor:
    """The noise itself: element i (row-major) is z(seed, stream, offset + i), rounded to nearest in dtype.

    Contract sections 4 and 5. The tails of the Gaussian end at |z| = 4.9954.

    Returns: a new contiguous tensor of the shape, dtype and device asked for.
    Raises: see the module.
    """
    sizes = [shape] if isinstance(shape, int) else list(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"expected a shape of non-negative sizes, got {tuple(sizes)}")
    streams, offsets = encode_indices([stream], "stream", 1), encode_indices([offset], "offset", 1)
    seed_tensor = term_checks.seed_scalar(seed)
    noise: Tensor = torch.ops.fedkseed.normal.default(
        sizes, seed_tensor, streams[0], offsets[0], dtype, torch.device(device), family
    )
    return noise


def seed_axpy_(
    tensors: Tensors,
    seeds: Seeds,
    coeffs: Coeffs,
    *,
    alpha: float | Tensor = 1.0,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int | None] | None = None,
    views: Sequence[View | None] | None = None,
    family: str = "gaussian",
    rounding: str = "nearest",
    rounding_seed: IntLike | Tensor | None = None,
    num_skipped: Tensor | None = None,
    residuals: Residuals | None = None,
) -> None:
    """In place, w <- round(alpha w + sum_k coeffs[k] z(seeds[k])): one pass over the weights, whatever K is.

    Contract section 6.1: acc = -0; acc = fma(c_k, z_k, acc) in index order, zero coefficients skipped;
    y = fma(alpha, w, acc); then one rounding to the tensor's dtype (sections 7 and 8).

    Mutates: tensors and residuals; their autograd version counters are raised.
    Raises: see the module; then no tensor has changed.
    """
    items = tensor_list(tensors, "tensors")
    torch.ops.fedkseed.seed_axpy_.default(
        items,
        encode_residuals(residuals, items),
        *_encode(
            len(items),
            seeds,
            coeffs,
            alpha,
            streams,
            offsets,
            views,
            family,
            rounding,
            rounding_seed,
            num_skipped,
        ),
    )


def seed_axpy(
    tensors: Tensors,
    seeds: Seeds,
    coeffs: Coeffs,
    *,
    alpha: float | Tensor = 1.0,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int | None] | None = None,
    views: Sequence[View | None] | None = None,
    family: str = "gaussian",
    rounding: str = "nearest",
    rounding_seed: IntLike | Tensor | None = None,
    num_skipped: Tensor | None = None,
    residuals: Residuals | None = None,
    out: Tensors | None = None,
    rows: Tensor | None = None,
) -> list[Tensor]:
    """The result of `seed_axpy_` in other tensors; with rows only for those rows (contract section 6.4).

    Args:
        out: tensors of the inputs' shapes (with rows: num_rows in place of the first size), dtypes and
            device; strides are free. out[i] may be tensors[i] itself, except with rows; nothing else may
            overlap. Without rows, out[i] of a bf16 or fp16 tensor may be in float32: it takes the result as
            it is, not rounded; with alpha 1 and no coefficient but zeros that is the weight itself.
        rows: see the module. Offsets and views still speak of the whole tensor.
    Returns: out, or new tensors. Mutates: out.
    Raises: see the module; then no tensor has changed.
    """
    items = tensor_list(tensors, "tensors")
    outs = _allocate(items, rows) if out is None else tensor_list(out, "out")
    encoded_residuals = encode_residuals(residuals, items)
    arguments = _encode(
        len(items),
        seeds,
        coeffs,
        alpha,
        streams,
        offsets,
        views,
        family,
        rounding,
        rounding_seed,
        num_skipped,
    )
    torch.ops.fedkseed.seed_axpy_out.default(items, encoded_residuals, outs, rows, *arguments)
    return outs


def seed_axpy_pair(
    tensors: Tensors,
    seeds: Seeds,
    coeffs: Coeffs,
    *,
    alpha: float | Tensor = 1.0,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int | None] | None = None,
    views: Sequence[View | None] | None = None,
    family: str = "gaussian",
    rounding: str = "nearest",
    rounding_seed: IntLike | Tensor | None = None,
    num_skipped: Tensor | None = None,
    residuals: Residuals | None = None,
    out_plus: Tensors | None = None,
    out_minus: Tensors | None = None,
    rows: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides from one generation of the noise: `seed_axpy` with coeffs and with -coeffs (section 6.2).

    Args:
        out_plus, out_minus: as `out` of `seed_axpy`, out_minus[i] of the dtype of out_plus[i]. One of
        out_plus[i], out_minus[i] may be tensors[i] itself.
    Returns: (out_plus, out_minus), given or new. Mutates: both.
    Raises: see the module; then no tensor has changed.
    """
    items = tensor_list(tensors, "tensors")
    plus = _allocate(items, rows) if out_plus is None else tensor_list(out_plus, "out_plus")
    minus = _allocate(items, rows) if out_minus is None else tensor_list(out_minus, "out_minus")
    encoded_residuals = encode_residuals(residuals, items)
    arguments = _encode(
        len(items),
        seeds,
        coeffs,
        alpha,
        streams,
        offsets,
        views,
        family,
        rounding,
        rounding_seed,
        num_skipped,
    )
    torch.ops.fedkseed.seed_axpy_pair_out.default(items, encoded_residuals, plus, minus, rows, *arguments)
    return plus, minus


def perturb_(
    tensors: Tensors,
    seed: IntLike | Tensor,
    scale: float | Tensor,
    *,
    alpha: float | Tensor = 1.0,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int | None] | None = None,
    views: Sequence[View | None] | None = None,
    family: str = "gaussian",
    rounding: str = "nearest",
    rounding_seed: IntLike | Tensor | None = None,
    num_skipped: Tensor | None = None,
    residuals: Residuals | None = None,
) -> None:
    """In place, w <- round(alpha w + scale z(seed)): `seed_axpy_` with one term.

    Mutates: tensors and residuals; their autograd version counters are raised.
    Raises: see the module; then no tensor has changed.
    """
    items = tensor_list(tensors, "tensors")
    seeds, coeffs = (
        term_checks.seed_scalar(seed).reshape(1),
        term_checks.number_tensor(scale, "scale").reshape(1),
    )
    torch.ops.fedkseed.seed_axpy_.default(
        items,
        encode_residuals(residuals, items),
        *_encode(
            len(items),
            seeds,
            coeffs,
            alpha,
            streams,
            offsets,
            views,
            family,
            rounding,
            rounding_seed,
            num_skipped,
        ),
    )


def _encode(
    num_tensors: int,
    seeds: Seeds,
    coeffs: Coeffs,
    alpha: float | Tensor,
    streams: Sequence[int] | None,
    offsets: Sequence[int | None] | None,
    views: Sequence[View | None] | None,
    family: str,
    rounding: str,
    rounding_seed: IntLike | Tensor | None,
    num_skipped: Tensor | None,
) -> TermArguments:
    """The arguments that every mutating op ends with, from what callers write."""
    return term_checks.encode_terms(
        seeds,
        coeffs,
        alpha,
        family,
        rounding,
        rounding_seed,
        num_skipped,
        streams=encode_indices(streams, "streams", num_tensors),
        offsets=encode_indices(offsets, "offsets", num_tensors, views),
        views=encode_views(views, num_tensors),
    )


def _allocate(tensors: Sequence[Tensor], rows: Tensor | None) -> list[Tensor]:
    if rows is None:
        return [torch.empty_like(t) for t in tensors]
    if not isinstance(rows, Tensor):
        raise TypeError(f"expected rows as an int64 tensor, got {type(rows).__name__}")
    tensor_checks.check_rows(rows, tensors)
    return [t.new_empty((rows.shape[0], *t.shape[1:])) for t in tensors]
