"""`prepare`: a list of tensors checked once, for callers that change it in place again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkseed_kernels import _checks, _terms, dispatch
from fedkseed_kernels._arguments import (
    Residuals,
    Tensors,
    encode_indices,
    encode_residuals,
    encode_views,
    tensor_list,
)
from fedkseed_kernels._operands import View
from fedkseed_kernels._terms import Coeffs, IntLike, Seeds


class Prepared:
    """A list of tensors checked once; made by `prepare`, whose docstring has the details.

    It holds the tensors themselves, so their memory stays. Each call compares every tensor's address, shape,
    strides and dtype with what was checked, so a stale pointer is never used.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        streams: list[int],
        offsets: list[int],
        views: list[int],
        family: str,
        residuals: list[Tensor],
    ):
        _terms.check_choices(family, "nearest")
        for position, tensor in enumerate(tensors):
            if tensor.is_neg():  # the dispatcher refuses these for the ops
                raise ValueError(f"expected plain memory, got tensors[{position}] with the negative bit set")
        with torch.no_grad():
            self._operands = _checks.check_operands(
                tensors, None, None, None, streams, offsets, views, residuals
            )
        self._tensors = tensors
        self._residuals = residuals
        self._watched = [*tensors, *residuals]
        self._family = family
        self._all_fp64 = all(t.dtype == torch.float64 for t in tensors)
        self._identity = self._current_identity()

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
            names = ("address", "shape", "strides", "dtype")
            for name, old, new in zip(names, self._identity, current, strict=True):
                for position, (was, now) in enumerate(zip(old, new, strict=True)):
                    if was != now:
                        num_tensors = len(self._tensors)
                        what = "tensors" if position < num_tensors else "residuals"
                        raise RuntimeError(
                            f"expected {what}[{position % num_tensors}] as it was prepared, but its {name} "
                            f"changed from {was} to {now}; call prepare again"
                        )
        _checks.check_grad(self._tensors, "tensors")

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
        terms = _terms.check_terms(
            _terms.seed_tensor(seeds),
            _terms.coefficient_tensor(coeffs),
            _terms.number_tensor(alpha, "alpha"),
            self._family,
            rounding,
            None if rounding_seed is None else _terms.seed_scalar(rounding_seed),
            num_skipped,
            self._all_fp64,
            self._tensors[0].device if self._tensors else torch.device("cpu"),
        )
        _checks.check_split_rounding(rounding, self._residuals)
        self._check_unchanged()
        dispatch.execute(self._operands, terms)

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
        seeds = _terms.seed_scalar(seed).reshape(1)
        coeffs = _terms.number_tensor(scale, "scale").reshape(1)
        self.seed_axpy_(
            seeds,
            coeffs,
            alpha=alpha,
            rounding=rounding,
            rounding_seed=rounding_seed,
            num_skipped=num_skipped,
        )


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
    items = tensor_list(tensors, "tensors")
    flat_views = encode_views(views, len(items))
    return Prepared(
        items,
        encode_indices(streams, "streams", len(items)),
        encode_indices(offsets, "offsets", len(items), views),
        flat_views,
        family,
        encode_residuals(residuals, items),
    )
