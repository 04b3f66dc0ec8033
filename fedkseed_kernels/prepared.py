"""`prepare` and its kin: lists of tensors checked once, for callers that come with them again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, Unpack

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
from fedkseed_kernels.arguments.terms import Coeffs, IntLike, Seeds
from fedkseed_kernels.operands import View

_WRITTEN = {
    "prepare": "the tensors in place",
    "prepare_out": "the outputs",
    "prepare_pair": "the outputs of both sides",
}


class _Options(TypedDict, total=False):
    """What `Prepared.seed_axpy` takes by keyword alone."""

    alpha: float | Tensor
    rounding: str
    rounding_seed: IntLike | Tensor | None
    num_skipped: Tensor | None


class Prepared:
    """Lists of tensors checked once; made by `prepare` (in place), `prepare_out` and `prepare_pair`.

    It holds the tensors themselves, so their memory stays. Each call compares every tensor's address, shape,
    strides and dtype with what was checked, so a stale pointer is never used. `seed_axpy` writes whatever was
    prepared to be written: the tensors themselves in place, or the outputs. The other methods do what the
    functions of their names do, and refuse a handle of another kind.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        outs: list[Tensor] | None,
        outs_minus: list[Tensor] | None,
        streams: Sequence[int] | None,
        offsets: Sequence[int | None] | None,
        views: Sequence[View | None] | None,
        family: str,
        residuals: Residuals | None,
    ):
        term_checks.check_choices(family, "nearest")
        encoded_residuals = encode_residuals(residuals, tensors)
        plus_name = "out" if outs_minus is None else "out_plus"
        self._lists: dict[str, list[Tensor]] = {"tensors": tensors}
        self._lists |= {} if outs is None else {plus_name: outs}
        self._lists |= {} if outs_minus is None else {"out_minus": outs_minus}
        self._lists |= {"residuals": encoded_residuals}
        for name, position, tensor in self._places():
            if tensor.is_neg():  # the dispatcher refuses these for the ops
                raise ValueError(f"expected plain memory, got {name}[{position}] with the negative bit set")
        with torch.no_grad():
            self._operands = tensor_checks.check_operands(
                tensors,
                outs,
                outs_minus,
                None,
                encode_indices(streams, "streams", len(tensors)),
                encode_indices(offsets, "offsets", len(tensors), views),
                encode_views(views, len(tensors)),
                encoded_residuals,
            )
        self._watched = [tensor for _, _, tensor in self._places()]
        self._family = family
        self._maker = "prepare" if outs is None else "prepare_out" if outs_minus is None else "prepare_pair"
        self._identity = self._current_identity()

    def _places(self) -> Iterator[tuple[str, int, Tensor]]:
        for name, items in self._lists.items():
            for position, tensor in enumerate(items):
                yield name, position, tensor

    def _current_identity(self) -> tuple[list[Any], ...]:
        tensors = self._watched
        return (
            list(map(Tensor.data_ptr, tensors)),  # without a line of Python for each: asked for at every call
            [t.shape for t in tensors],
            list(map(Tensor.stride, tensors)),
            [t.dtype for t in tensors],
        )

    def _check_unchanged(self) -> None:
        current = self._current_identity()
        if current != self._identity:
            whats = ("address", "shape", "strides", "dtype")
            for what, old, new in zip(whats, self._identity, current, strict=True):
                for (name, position, _), was, now in zip(self._places(), old, new, strict=True):
                    if was != now:
                        raise RuntimeError(
                            f"expected {name}[{position}] as it was prepared, but its {what} changed from "
                            f"{was} to {now}; call prepare again"
                        )
        for name, items in self._lists.items():
            tensor_checks.check_grad(items, name)

    def seed_axpy(
        self,
        seeds: Seeds,
        coeffs: Coeffs,
        *,
        alpha: float | Tensor = 1.0,
        rounding: str = "nearest",
        rounding_seed: IntLike | Tensor | None = None,
        num_skipped: Tensor | None = None,
    ) -> None:
        """The primitive on what was prepared: the bits and the errors of the function of that kind.

        Mutates: the tensors and residuals of `prepare`, or the outputs of `prepare_out` and `prepare_pair`.
        Raises:
            RuntimeError: a tensor is not where, or what, it was when it was prepared.
        """
        arguments = term_checks.encode_terms(
            seeds, coeffs, alpha, self._family, rounding, rounding_seed, num_skipped
        )
        operands = self._operands
        terms = term_checks.check_terms(arguments, operands.all_fp64, operands.device)
        if operands.writes_residuals:
            tensor_checks.check_split_rounding(rounding, self._lists["residuals"])
        self._check_unchanged()
        dispatch.execute(operands, terms)

    def check(self) -> None:
        """Raises what a call would raise for the tensors themselves, whatever its terms; moves nothing.

        Raises:
            RuntimeError: a tensor is not where, or what, it was when it was prepared, or requires grad while
                gradients are recorded; no backend serves the device.
        """
        self._check_unchanged()
        dispatch.select(self._operands.device)

    def _expect(self, maker: str) -> None:
        if self._maker != maker:
            raise TypeError(
                f"expected a handle of {maker}, got one of {self._maker}, whose seed_axpy writes "
                f"{_WRITTEN[self._maker]}; call that, or {maker}"
            )

    def seed_axpy_(self, seeds: Seeds, coeffs: Coeffs, **options: Unpack[_Options]) -> None:
        """`fedkseed_kernels.seed_axpy_` on the tensors of `prepare`; arguments as in `seed_axpy`.

        Raises:
            TypeError: outputs were prepared too.
        """
        self._expect("prepare")
        self.seed_axpy(seeds, coeffs, **options)

    def perturb_(self, seed: IntLike | Tensor, scale: float | Tensor, **options: Unpack[_Options]) -> None:
        """`fedkseed_kernels.perturb_` on the tensors of `prepare`: `seed_axpy_` with one term.

        Raises:
            TypeError: outputs were prepared too.
        """
        seeds = term_checks.seed_scalar(seed).reshape(1)
        coeffs = term_checks.number_tensor(scale, "scale").reshape(1)
        self.seed_axpy_(seeds, coeffs, **options)

    def seed_axpy_pair(self, seeds: Seeds, coeffs: Coeffs, **options: Unpack[_Options]) -> None:
        """`fedkseed_kernels.seed_axpy_pair` into the outputs of `prepare_pair`; arguments as in `seed_axpy`.

        Raises:
            TypeError: not both sides were prepared.
        """
        self._expect("prepare_pair")
        self.seed_axpy(seeds, coeffs, **options)


# The handles of `prepare_out` and `prepare_pair` had classes of their own in 0.1.
PreparedOut = Prepared
PreparedPair = Prepared


def prepare(
    tensors: Tensors,
    *,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int | None] | None = None,
    views: Sequence[View | None] | None = None,
    family: str = "gaussian",
    residuals: Residuals | None = None,
) -> Prepared:
    """Check a list of tensors once, for many in-place calls on it.

    Args: those of `ops.seed_axpy_`; residuals, too, are checked once and used by each call. Tensors that
        require grad may be prepared; calls are refused outside no_grad.
    Returns: a handle whose `seed_axpy_` and `perturb_` are called, by eager code (under torch.compile use the
    functions).
    Raises: see `ops`.
    """
    return Prepared(tensor_list(tensors, "tensors"), None, None, streams, offsets, views, family, residuals)


def prepare_out(
    tensors: Tensors,
    out: Tensors,
    *,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int | None] | None = None,
    views: Sequence[View | None] | None = None,
    family: str = "gaussian",
    residuals: Residuals | None = None,
) -> Prepared:
    """Check a list of tensors and of outputs once, for many calls that read the one and write the other.

    Args: those of `ops.seed_axpy`, without rows.
    Returns: a handle, as `prepare`, whose `seed_axpy` is called.
    Raises: see `ops`.
    """
    items, outs = tensor_list(tensors, "tensors"), tensor_list(out, "out")
    return Prepared(items, outs, None, streams, offsets, views, family, residuals)


def prepare_pair(
    tensors: Tensors,
    out_plus: Tensors,
    out_minus: Tensors,
    *,
    streams: Sequence[int] | None = None,
    offsets: Sequence[int | None] | None = None,
    views: Sequence[View | None] | None = None,
    family: str = "gaussian",
    residuals: Residuals | None = None,
) -> Prepared:
    """Check a list of tensors and of outputs for both sides once, for many calls.

    Args: those of `ops.seed_axpy_pair`, without rows.
    Returns: a handle, as `prepare`, whose `seed_axpy` or `seed_axpy_pair` is called.
    Raises: see `ops`.
    """
    items = tensor_list(tensors, "tensors")
    plus, minus = tensor_list(out_plus, "out_plus"), tensor_list(out_minus, "out_minus")
    return Prepared(items, plus, minus, streams, offsets, views, family, residuals)
