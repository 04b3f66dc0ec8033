"""`prepare` and its kin: lists of tensors checked once, for callers that come with them again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fedkseed_kernels.arguments.terms import Coeffs, IntLike, Seeds
from fedkseed_kernels.operands import View


class _Checked:
    """Lists of tensors checked once. outs None: in place; outs_minus None: one side.

    It holds the tensors themselves, so their memory stays. Each call compares every tensor's address, shape,
    strides and dtype with what was checked, so a stale pointer is never used.
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
        left = encode_residuals(residuals, tensors)
        plus_name = "out" if outs_minus is None else "out_plus"
        self._lists: dict[str, list[Tensor]] = {"tensors": tensors}
        self._lists |= {} if outs is None else {plus_name: outs}
        self._lists |= {} if outs_minus is None else {"out_minus": outs_minus}
        self._lists |= {"residuals": left}
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
                left,
            )
        self._watched = [tensor for _, _, tensor in self._places()]
        self._family = family
        self._identity = self._current_identity()

    def _places(self) -> Iterator[tuple[str, int, Tensor]]:
        for name, items in self._lists.items():
            for position, tensor in enumerate(items):
                yield name, position, tensor

    def _current_identity(self) -> tuple[list[Any], ...]:
        tensors = self._watched
        return (
            [t.data_ptr() for t in tensors],
            [t.shape for t in tensors],
            [t.stride() for t in tensors],
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

    def _run(
        self,
        seeds: Seeds,
        coeffs: Coeffs,
        alpha: float | Tensor,
        rounding: str,
        rounding_seed: IntLike | Tensor | None,
        num_skipped: Tensor | None,
    ) -> None:
        terms = term_checks.check_terms(
            term_checks.seed_tensor(seeds),
            term_checks.coefficient_tensor(coeffs),
            term_checks.number_tensor(alpha, "alpha"),
            self._family,
            rounding,
            None if rounding_seed is None else term_checks.seed_scalar(rounding_seed),
            num_skipped,
            self._operands.all_fp64,
            self._operands.device,
        )
        if self._operands.writes_residuals:
            tensor_checks.check_split_rounding(rounding, self._lists["residuals"])
        self._check_unchanged()
        dispatch.execute(self._operands, terms)


class Prepared(_Checked):
    """A list of tensors that change in place, checked once; made by `prepare`."""

    def seed_axpy_(
        self,
        seeds: Seeds,
        coeffs: Coeffs,
        *,
        alpha: float | Tensor = 1.0,
        rounding: str = "nearest",
        rounding_seed: IntLike | Tensor | None = None,
        num_skipped: Tensor | None = None,
    ) -> None:
        """`fedkseed_kernels.seed_axpy_` on the prepared tensors: the same bits, the same errors.

        Raises:
            RuntimeError: a tensor is not where, or what, it was when it was prepared.
        """
        self._run(seeds, coeffs, alpha, rounding, rounding_seed, num_skipped)

    def perturb_(
        self,
        seed: IntLike | Tensor,
        scale: float | Tensor,
        *,
        alpha: float | Tensor = 1.0,
        rounding: str = "nearest",
        rounding_seed: IntLike | Tensor | None = None,
        num_skipped: Tensor | None = None,
    ) -> None:
        """`fedkseed_kernels.perturb_` on the prepared tensors: `seed_axpy_` with one term."""
        seeds = term_checks.seed_scalar(seed).reshape(1)
        coeffs = term_checks.number_tensor(scale, "scale").reshape(1)
        self.seed_axpy_(
            seeds,
            coeffs,
            alpha=alpha,
            rounding=rounding,
            rounding_seed=rounding_seed,
            num_skipped=num_skipped,
        )


class PreparedOut(_Checked):
    """A list of tensors and of outputs, checked once; made by `prepare_out`."""

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
        """`fedkseed_kernels.seed_axpy` from the prepared tensors into the prepared outputs.

        Mutates: the outputs.
        Raises:
            RuntimeError: a tensor or an output is not where, or what, it was when it was prepared.
        """
        self._run(seeds, coeffs, alpha, rounding, rounding_seed, num_skipped)


class PreparedPair(_Checked):
    """A list of tensors and of outputs for either side, checked once; made by `prepare_pair`."""

    def seed_axpy_pair(
        self,
        seeds: Seeds,
        coeffs: Coeffs,
        *,
        alpha: float | Tensor = 1.0,
        rounding: str = "nearest",
        rounding_seed: IntLike | Tensor | None = None,
        num_skipped: Tensor | None = None,
    ) -> None:
        """`fedkseed_kernels.seed_axpy_pair` from the prepared tensors into the prepared outputs.

        Mutates: the outputs of both sides.
        Raises:
            RuntimeError: a tensor or an output is not where, or what, it was when it was prepared.
        """
        self._run(seeds, coeffs, alpha, rounding, rounding_seed, num_skipped)


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
    Returns: a handle with `seed_axpy_` and `perturb_`, for eager code (under torch.compile use the
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
) -> PreparedOut:
    """Check a list of tensors and of outputs once, for many calls that read the one and write the other.

    Args: those of `ops.seed_axpy`, without rows.
    Returns: a handle with `seed_axpy`, as `prepare`.
    Raises: see `ops`.
    """
    items, outs = tensor_list(tensors, "tensors"), tensor_list(out, "out")
    return PreparedOut(items, outs, None, streams, offsets, views, family, residuals)


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
) -> PreparedPair:
    """Check a list of tensors and of outputs for both sides once, for many calls.

    Args: those of `ops.seed_axpy_pair`, without rows.
    Returns: a handle with `seed_axpy_pair`, as `prepare`.
    Raises: see `ops`.
    """
    items = tensor_list(tensors, "tensors")
    plus, minus = tensor_list(out_plus, "out_plus"), tensor_list(out_minus, "out_minus")
    return PreparedPair(items, plus, minus, streams, offsets, views, family, residuals)
