"""Every check of tensor arguments, made before anything is written. Messages: expected, got, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkseed_kernels.arguments.encoding import decode_views
from fedkseed_kernels.arguments.overlap import find_shared, overlaps_itself
from fedkseed_kernels.layout import collapsed_layout, strided_positions
from fedkseed_kernels.operands import COMPENSATED_DTYPES, DTYPE_CODES, MAX_DIMS, Operands, TensorList, View

NUM_STREAMS = 1 << 32
NUM_ELEMENTS = 1 << 63


def check_dtype(dtype: torch.dtype, place: str) -> None:
    """Refuse a dtype that the contract does not cover."""
    if dtype not in DTYPE_CODES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_CODES)
        got = str(dtype).removeprefix("torch.")
        raise TypeError(f"expected {place} in one of {known}, got {got}; leave it out or convert it")


def check_grad(tensors: Sequence[Tensor], name: str) -> None:
    """Refuse tensors that require grad while gradients are recorded."""
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        position = [t.requires_grad for t in tensors].index(True)
        raise RuntimeError(
            f"expected tensors that need no gradient, got {name}[{position}] that requires grad; "
            "wrap the call in torch.no_grad(), the noise kernels are not differentiable"
        )


def check_metadata(tensors: Sequence[Tensor], name: str) -> None:
    """Device, dtype, memory format and grad mode of one list; looks at no values and no addresses."""
    if len({t.device for t in tensors}) > 1:
        devices = [t.device for t in tensors]
        position = next(i for i, device in enumerate(devices) if device != devices[0])
        raise ValueError(
            f"expected all tensors of a list on one device, got {name}[0] on {devices[0]} and "
            f"{name}[{position}] on {devices[position]}; make one call for each device"
        )
    if not DTYPE_CODES.keys() >= {t.dtype for t in tensors}:
        for position, tensor in enumerate(tensors):
            check_dtype(tensor.dtype, f"{name}[{position}]")
    if not {torch.strided} >= {t.layout for t in tensors}:
        position = next(i for i, t in enumerate(tensors) if t.layout is not torch.strided)
        raise TypeError(
            f"expected strided tensors, got {name}[{position}] of layout {tensors[position].layout}; "
            "pass its values() or a dense copy"
        )
    check_grad(tensors, name)


def check_outs(outs: Sequence[Tensor], name: str, tensors: Sequence[Tensor], num_rows: int | None) -> None:
    """An output list beside its inputs: length, shape, dtype, device. num_rows replaces dimension 0."""
    wide_dtypes = () if num_rows is not None else COMPENSATED_DTYPES
    if len(outs) != len(tensors):
        raise ValueError(
            f"expected {name} to hold {len(tensors)} tensors, one for each input, got {len(outs)}"
        )
    check_metadata(outs, name)
    if outs and outs[0].device != tensors[0].device:
        raise ValueError(f"expected {name} on {tensors[0].device} like the inputs, got {outs[0].device}")
    for position, (out, tensor) in enumerate(zip(outs, tensors, strict=True)):
        if out.dtype != tensor.dtype and not (out.dtype == torch.float32 and tensor.dtype in wide_dtypes):
            other = " or torch.float32" if tensor.dtype in wide_dtypes else ""
            raise TypeError(
                f"expected {name}[{position}] in {tensor.dtype} like its input{other}, got {out.dtype}"
            )
        shape = tensor.shape if num_rows is None else (num_rows, *tensor.shape[1:])
        if out.shape != shape:
            raise ValueError(f"expected {name}[{position}] of shape {tuple(shape)}, got {tuple(out.shape)}")


def check_sides(outs: Sequence[Tensor], outs_minus: Sequence[Tensor]) -> None:
    """The two output lists of a pair, each checked beside the inputs: of the same dtypes."""
    for position, (plus, minus) in enumerate(zip(outs, outs_minus, strict=True)):
        if plus.dtype != minus.dtype:
            raise TypeError(
                f"expected out_minus[{position}] in {plus.dtype} like out_plus[{position}], got {minus.dtype}"
            )


def has_residuals(residuals: Sequence[Tensor]) -> bool:
    """Whether there is any among the residuals of a schema."""
    return any([r.numel() != 0 for r in residuals])


def check_residuals(residuals: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Residuals in the schema's form beside their tensors: number, dtypes, devices, shapes, strides."""
    if not residuals:
        return
    if len(residuals) != len(tensors):
        raise ValueError(f"expected {len(tensors)} residuals, one for each tensor, got {len(residuals)}")
    for position, (residual, tensor) in enumerate(zip(residuals, tensors, strict=True)):
        place = f"residuals[{position}]"
        if residual.dtype != torch.int16:
            raise TypeError(f"expected {place} in torch.int16, got {residual.dtype}")
        if residual.numel() == 0:
            continue
        if tensor.dtype not in COMPENSATED_DTYPES:
            raise TypeError(
                f"expected residuals of tensors in bfloat16 or float16 alone, got one of tensors[{position}] "
                f"in {tensor.dtype}; pass None for it"
            )
        if residual.device != tensor.device:
            raise ValueError(f"expected {place} on {tensor.device} like its tensor, got {residual.device}")
        if residual.layout is not torch.strided or residual.shape != tensor.shape:
            got = f"{tuple(residual.shape)}, {residual.layout}"
            raise ValueError(f"expected {place} strided, of shape {tuple(tensor.shape)}, got {got}")
        strides = zip(tensor.shape, tensor.stride(), residual.stride(), strict=True)
        if any([size > 1 and a != b for size, a, b in strides]):
            raise ValueError(
                f"expected {place} with the strides of its tensor, {tensor.stride()}, got "
                f"{residual.stride()}; make it by torch.empty_strided(t.shape, t.stride(), dtype=torch.int16)"
            )


def check_split_rounding(rounding: str, residuals: Sequence[Tensor]) -> None:
    """In place, what rounding leaves goes to the residual: nothing is left to chance."""
    if rounding == "stochastic" and has_residuals(residuals):
        raise ValueError(
            "expected rounding='nearest' for tensors with residuals that are changed in place, "
            "got 'stochastic'; leave one of the two out"
        )


def check_rows(rows: Tensor, tensors: Sequence[Tensor]) -> None:
    """The index tensor of a gather, except for its values."""
    if rows.dtype != torch.int64:
        raise TypeError(f"expected rows in int64, got {rows.dtype}")
    if rows.dim() != 1:
        raise ValueError(f"expected rows of shape [num_rows], got {tuple(rows.shape)}")
    for position, tensor in enumerate(tensors):
        if rows.device != tensor.device:
            raise ValueError(f"expected rows on {tensor.device} like the tensors, got {rows.device}")
        if tensor.dim() == 0:
            raise ValueError(
                f"expected tensors with rows to gather, got tensors[{position}] without dimensions"
            )
        if tensor.shape[0] != tensors[0].shape[0]:
            raise ValueError(
                "expected equally many rows in every tensor, for rows index them all, got "
                f"{tensors[0].shape[0]} in tensors[0] and {tensor.shape[0]} in tensors[{position}]; "
                "make one call for each number of rows"
            )


def _check_row_values(rows: Tensor, tensors: Sequence[Tensor]) -> None:
    # On a GPU the values are not asked for: the host would wait. There a row out of range gives NaN.
    if not tensors or rows.numel() == 0 or rows.device.type == "cuda":
        return
    low, high = (int(x) for x in torch.aminmax(rows))
    if low < 0 or high >= tensors[0].shape[0]:
        raise IndexError(f"expected rows in [0, {tensors[0].shape[0]}), got rows from {low} to {high}")


def _check_memory(items: TensorList, name: str, is_written: bool = True) -> None:
    """Every element has memory, and where it is written memory of its own."""
    if 0 in items.addresses:
        for position, (address, numel) in enumerate(zip(items.addresses, items.numels, strict=True)):
            if numel and not address:
                raise ValueError(
                    f"expected tensors with memory, got {name}[{position}] without; is it sharded away?"
                )
    if all(items.contiguous) or not is_written:
        return
    for position, (tensor, numel) in enumerate(zip(items.tensors, items.numels, strict=True)):
        overlaps = numel > 0 and overlaps_itself(tensor.shape, tensor.stride())
        if overlaps is not False:
            what = (
                "elements that share memory"
                if overlaps
                else "strides too irregular to rule out shared memory"
            )
            raise ValueError(
                f"expected each element to have memory of its own, got {name}[{position}] with {what} (shape "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}); pass a contiguous copy"
            )


def _equal_memory(a: TensorList, b: TensorList, i: int) -> bool:
    return (
        a.addresses[i] == b.addresses[i]
        and a.dtypes[i] == b.dtypes[i]
        and a.tensors[i].stride() == b.tensors[i].stride()
    )


def _check_residuals_stay_true(operands: Operands, residuals: TensorList) -> None:
    """Out of place residuals are not written: a weight that is overwritten would no longer fit its own."""
    if operands.writes_residuals or operands.inputs is None or operands.rows is not None:
        return
    for outs in (operands.outs, operands.outs_minus):
        for i, numel in enumerate(residuals.numels):
            if outs is not None and numel and _equal_memory(outs, operands.inputs, i):
                raise ValueError(
                    f"expected another output than tensors[{i}] itself, which has residuals; "
                    "use seed_axpy_ to change it in place"
                )


def _check_overlaps(operands: Operands, residuals: TensorList) -> None:
    """No byte belongs to two tensors; but without rows and residual, out[i] may be tensors[i] itself.

    residuals: in the form of the schema; empty ones take part in nothing.
    """
    plus, minus = operands.outs, operands.outs_minus
    if len(plus.tensors) == 1 and minus is None and operands.inputs is plus and not residuals.tensors:
        return
    lists: list[TensorList] = []
    places: list[tuple[str, int]] = []

    def add(items: TensorList, name: str, positions: Sequence[int]) -> None:
        some = len(positions) < len(items.tensors)
        lists.append(TensorList([items.tensors[i] for i in positions]) if some else items)
        places.extend((name, i) for i in positions)

    everything = range(len(plus.tensors))
    if operands.inputs is not None:
        add(operands.inputs, "tensors", everything)
    plus_name = "out" if minus is None else "out_plus"
    for name, outs in ((plus_name, plus), ("out_minus", minus)):
        if outs is None or outs is operands.inputs:
            continue
        if operands.inputs is not None and operands.rows is None:
            add(outs, name, [i for i in everything if not _equal_memory(outs, operands.inputs, i)])
        else:
            add(outs, name, everything)
    if residuals.tensors:
        add(residuals, "residuals", everything)
        _check_residuals_stay_true(operands, residuals)
    if minus is not None:
        for i in everything:
            if plus.numels[i] and _equal_memory(plus, minus, i):
                raise ValueError(
                    f"expected two outputs, got out_plus[{i}] and out_minus[{i}] in the same memory"
                )
    shared = find_shared(lists)
    if shared is not None:
        (name, i), (other, j) = places[shared[0]], places[shared[1]]
        verb = "share memory" if shared[2] else "have strides too irregular to rule out shared memory"
        raise ValueError(
            f"expected tensors that do not overlap, but {name}[{i}] and {other}[{j}] {verb}; "
            "list a tied parameter once, or pass a copy"
        )


def _check_view(view: View, shape: Sequence[int], position: int) -> None:
    full_shape, start = view
    fits = len(full_shape) == len(start) == len(shape) and all(
        s >= 0 and s + n <= full for s, n, full in zip(start, shape, full_shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"expected a view that holds tensors[{position}] of shape {tuple(shape)}, got full shape "
            f"{tuple(full_shape)} and start {tuple(start)}; give each one number for each dimension, with "
            "start + size within the full shape"
        )
    numel = 1
    for full in full_shape:
        numel *= full
    if numel > NUM_ELEMENTS:
        raise ValueError(f"expected at most 2^63 elements in a full shape, got {tuple(full_shape)}")


def check_noise_indices(
    numels: Sequence[int],
    streams: Sequence[int],
    offsets: Sequence[int],
    views: Sequence[View | None],
) -> None:
    """Streams and offsets of a list of tensors; one of each, and a view, for each tensor."""
    for what, values in (("streams", streams), ("offsets", offsets), ("views", views)):
        if len(values) != len(numels):
            raise ValueError(f"expected {len(numels)} {what}, one for each tensor, got {len(values)}")
    if not numels:
        return
    if min(streams) < 0 or max(streams) >= NUM_STREAMS:
        position = next(i for i, s in enumerate(streams) if not 0 <= s < NUM_STREAMS)
        raise ValueError(f"expected streams in [0, 2^32), got {streams[position]} for tensors[{position}]")
    if min(offsets) < 0 or max(offsets) + max(numels) > NUM_ELEMENTS:
        for position, (offset, numel) in enumerate(zip(offsets, numels, strict=True)):
            if offset < 0 or offset + numel > NUM_ELEMENTS:
                raise ValueError(
                    f"expected element indices in [0, 2^63), got offset {offset} for the {numel} elements of "
                    f"tensors[{position}]"
                )
    for position, view in enumerate(views):
        if view is not None and offsets[position]:
            raise ValueError(f"expected a view or an offset, got both for tensors[{position}]; leave one out")


def check_operands(
    tensors: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    outs_minus: Sequence[Tensor] | None,
    rows: Tensor | None,
    streams: Sequence[int],
    offsets: Sequence[int],
    views: Sequence[int],
    residuals: Sequence[Tensor] = (),
) -> Operands:
    """Check the tensors of a call. Arguments are those of the schemas in `ops`; outs None means in place.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `ops` documents.
    """
    num_tensors = len(tensors)
    plus_name = "out" if outs_minus is None else "out_plus"
    check_metadata(tensors, "tensors")
    if rows is not None:
        check_rows(rows, tensors)
        _check_row_values(rows, tensors)
    num_rows = None if rows is None else rows.shape[0]
    for name, written in ((plus_name, outs), ("out_minus", outs_minus)):
        if written is not None:
            check_outs(written, name, tensors, num_rows)
    if outs is not None and outs_minus is not None:
        check_sides(outs, outs_minus)
    check_residuals(residuals, tensors)
    residual_list = TensorList(residuals if has_residuals(residuals) else ())
    inputs = TensorList(tensors)
    operands = Operands(
        inputs=inputs,
        outs=inputs if outs is None else TensorList(outs),
        outs_minus=None if outs_minus is None else TensorList(outs_minus),
        rows=None if rows is None else rows.contiguous(),
        streams=streams or range(num_tensors),
        offsets=offsets or [0] * num_tensors,
        views=decode_views(views, num_tensors),
        residuals=[
            r if numel else None for r, numel in zip(residual_list.tensors, residual_list.numels, strict=True)
        ]
        or None,
        writes_residuals=outs is None and bool(residual_list.tensors),
    )
    check_noise_indices(inputs.numels, operands.streams, operands.offsets, operands.views)
    for position, view in enumerate(operands.views):
        if view is not None:
            _check_view(view, tensors[position].shape, position)
    _check_memory(inputs, "tensors", is_written=outs is None)
    if outs is not None:
        _check_memory(operands.outs, plus_name)
    if operands.outs_minus is not None:
        _check_memory(operands.outs_minus, "out_minus")
    _check_memory(residual_list, "residuals")
    _check_overlaps(operands, residual_list)
    for position in strided_positions(operands):
        if tensors[position].dim() > MAX_DIMS:
            collapsed_layout(operands, position)
    return operands
